"""Softmax attention whose score matrix stays bounded, however long the prompt."""

import mlx.core as mx

# Scores of one call are kept under this: beyond it queries are cut into blocks. MLX prefers its
# unfused path for head dim 256, which is faster while it fits.
SCORE_BYTES = 64 << 20
# The fused kernel holds no scores: its blocks only bound the work of one command, since a GPU's
# watchdog ends commands of seconds. About 0.2 TFLOP at head dim 72.
FUSED_SCORES = 1 << 30
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
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    # Few queries take a kernel without scores on the GPU.
    if T == 1 or (on_gpu and T <= 8) or 4 * B * H * T * S <= SCORE_BYTES:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    fused = on_gpu and D in FUSED_DIMS
    rows = max(1, (FUSED_SCORES if fused else SCORE_BYTES // 4) // (B * H * S))
    blocks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        # "causal" aligns the last query with the last key, so later keys are cut off, not masked.
        seen = S - T + stop if causal else S
        blocks.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, :seen],
                v[:, :, :seen],
                scale=scale,
                mask=mask,
                force_fused=fused and stop - start > 8,
            )
        )
    return mx.concatenate(blocks, axis=2)
