"""From the projections of a gated attention layer to what attention and the cache take."""

import mlx.core as mx

from . import library

_SIMDGROUPS = 4  # per threadgroup; they do not need each other, so few, for many cores


def attention_prepare(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Normalise and rotate queries and keys, split off the gate, and lay out keys and values.

    qkv: `[B, T, 2 H D + 2 Hk D]`: per query head D query then D gate rows, then the keys, then
    the values; q_weight, k_weight: `[D]` f32, the whole norm factors; cos, sin:
    `[B, 1, T, pairs]` f32 of `layers/rope.py`; dims (i, i + pairs) turn together, dims from
    2 pairs on pass.

    Returns: q `[B, H, T, D]`, gate `[B, T, H D]`, and keys and values as one array
    `[2, B, Hk, T, D]`, all of qkv's type.
    Source: transformers `Qwen3_5Attention` up to the cache. There q and k are rounded after the
    norm and after each product of the rotation; here after the norm and at the output.
    """
    D = q_weight.shape[0]
    used = library.uses("attention_prepare") and fits(D, cos.shape[-1])
    run = launch if used else reference
    return run(qkv, q_weight, k_weight, cos, sin, heads=heads, kv_heads=kv_heads, eps=eps)


def fits(D: int, pairs: int) -> bool:
    """Whether the two dims of a pair lie in the same register of two lanes."""
    each = -(-D // 32)
    return D % each == 0 and pairs % each == 0


def reference(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """The same in MLX operations."""
    B, T, _ = qkv.shape
    D, H, Hk = q_weight.shape[0], heads, kv_heads
    queries, k, v = mx.split(qkv, [2 * H * D, (2 * H + Hk) * D], axis=-1)
    q, gate = mx.split(queries.reshape(B, T, H, 2 * D), 2, axis=-1)
    q = _rotated(mx.fast.rms_norm(q, q_weight, eps).astype(q.dtype), cos, sin)
    k = mx.fast.rms_norm(k.reshape(B, T, Hk, D), k_weight, eps)
    k = _rotated(k.astype(qkv.dtype), cos, sin)
    kv = mx.stack([k, v.reshape(B, T, Hk, D).swapaxes(1, 2)])
    return q, gate.reshape(B, T, H * D), kv


def _rotated(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """`[B, T, H, D]` -> `[B, H, T, D]`, pairs turned in f32."""
    x = x.swapaxes(1, 2)
    pairs = cos.shape[-1]
    a, b, rest = mx.split(x, [pairs, 2 * pairs], axis=-1)
    turned = (a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)
    return mx.concatenate([*turned, rest], axis=-1)


def launch(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """The same by `metal/attention_prepare.metal`."""
    B, T, _ = qkv.shape
    D, kind = q_weight.shape[0], qkv.dtype
    run = library.kernel(
        "attention_prepare",
        ("qkv", "q_weight", "k_weight", "cos", "sin", "eps"),
        ("q", "gate", "kv"),
    )
    q, gate, kv = run(
        inputs=[qkv, q_weight, k_weight, cos, sin, eps],
        template=[("T", kind), ("H", heads), ("Hk", kv_heads), ("D", D), ("Pairs", cos.shape[-1])],
        grid=(32 * (2 * heads + 2 * kv_heads), T, B),
        threadgroup=(32 * _SIMDGROUPS, 1, 1),
        output_shapes=[(B, heads, T, D), (B, T, heads * D), (2, B, kv_heads, T, D)],
        output_dtypes=[kind, kind, kind],
    )
    return q, gate, kv
