"""Softmax attention whose score matrix stays bounded, however long the prompt."""

import mlx.core as mx

# Scores of one call are kept under this: beyond it the fused kernel runs on the GPU, and blocks of
# queries elsewhere. MLX prefers its unfused path for head dim 256, which is faster while it fits.
SCORE_BYTES = 64 << 20
FUSED_DIMS = (64, 72, 80, 96, 128, 192, 256)  # of MLX 0.32's kernel for more than 8 queries


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
    """`softmax(scale q k^T) v`, softmax in f32.

    q: `[B, H, T, D]`; k, v: `[B, Hk, S, D]` with H a multiple of Hk (query head j reads key head
    j / (H / Hk)); causal: query t sees keys up to S - T + t.
    Returns: `[B, H, T, D]` of q's type.
    """
    B, H, T, D = q.shape
    S = k.shape[2]
    mask = "causal" if causal and T > 1 else None
    is_small = T == 1 or 4 * B * H * T * S <= SCORE_BYTES
    has_fused = mx.default_device().type == mx.DeviceType.gpu and T > 8 and D in FUSED_DIMS
    if is_small or has_fused:
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=mask, force_fused=not is_small
        )
    return _by_query_blocks(q, k, v, scale, mask)


def _by_query_blocks(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | None
) -> mx.array:
    B, H, T, _ = q.shape
    S = k.shape[2]
    rows = max(1, SCORE_BYTES // (4 * B * H * S))
    blocks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        # "causal" aligns the last query with the last key, so later keys are cut off, not masked.
        seen = S - T + stop if mask else S
        blocks.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], scale=scale, mask=mask
            )
        )
    return mx.concatenate(blocks, axis=2)
