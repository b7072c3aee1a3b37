"""What many tokens' experts gave, back in the tokens' order, weighted and summed."""

import mlx.core as mx

from . import library

_THREADS = 256


def moe_combine(
    y_sorted: mx.array, back: mx.array, weights: mx.array, shared: mx.array, shared_out: mx.array
) -> mx.array:
    """`sum_k weights[n, k] y_sorted[back[n, k]] + shared[n] shared_out[n]`, summed in f32.

    y_sorted: `[N K, hidden]`, rows in the order of `moe.by_expert`, which also gives `back`:
    `[N K]` uint32; weights: `[N, K]` f32; shared: `[N]` f32; shared_out: `[N, hidden]`, type of
    y_sorted.

    Returns: `[N, hidden]`, type of y_sorted.
    """
    if library.uses("moe_combine") and fits(y_sorted, shared_out):
        return launch(y_sorted, back, weights, shared, shared_out)
    return reference(y_sorted, back, weights, shared, shared_out)


def fits(y_sorted: mx.array, shared_out: mx.array) -> bool:
    """Whether the kernel serves this width and number of tokens."""
    N, hidden = shared_out.shape
    # Metal gets arrays of fewer than 8 elements in another kind of memory.
    return N >= 8 and hidden % 4 == 0 and hidden >= 8 and y_sorted.dtype == shared_out.dtype


def reference(
    y_sorted: mx.array, back: mx.array, weights: mx.array, shared: mx.array, shared_out: mx.array
) -> mx.array:
    """The same in MLX operations."""
    y = y_sorted[back].reshape(*weights.shape, -1).astype(mx.float32)
    total = (weights[:, None] @ y)[:, 0] + shared[:, None] * shared_out.astype(mx.float32)
    return total.astype(y_sorted.dtype)


def launch(
    y_sorted: mx.array, back: mx.array, weights: mx.array, shared: mx.array, shared_out: mx.array
) -> mx.array:
    """The same by `metal/moe_combine.metal`."""
    (N, K), hidden = weights.shape, y_sorted.shape[-1]
    inputs = ("y_sorted", "back", "weights", "shared", "shared_out")
    (y,) = library.kernel("moe_combine", inputs, ("y",))(
        inputs=[y_sorted, back, weights, shared, shared_out],
        template=[("T", y_sorted.dtype), ("K", K), ("Hidden", hidden)],
        grid=(hidden // 4, N, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(N, hidden)],
        output_dtypes=[y_sorted.dtype],
    )
    return y
