"""The second half of the experts, for few tokens: down products, weighted and summed."""

import mlx.core as mx

from . import library
from .moe import grouped_matmul
from .packed import MAX_TOKENS, Packed, buffers, is_streamable, layout, matmul, words_at_once

# At most so many of a threadgroup; K + 1 where that is less, one for each matrix of one token.
_SIMDGROUPS = 12
_ARRAYS = ("weight", "scales", "biases")
_INPUTS = (
    "h",
    "experts",
    "weights",
    "shared",
    *_ARRAYS,
    *(f"shared_{name}" for name in _ARRAYS),
)


def moe_down(
    h: mx.array,
    experts: mx.array,
    weights: mx.array,
    shared: mx.array,
    down: Packed,
    shared_down: Packed,
) -> mx.array:
    """`sum_k weights_k D_k h_k + shared D' h'`, in f32.

    h: `[N, K I + Is]` as `moe_gate_up` gives it; experts: `[N, K]` uint32, those of one token
    distinct; weights: `[N, K]` f32; shared: `[N]` f32; down: of the experts `[E, hidden, I]`;
    shared_down: of the shared one `[hidden, Is]`.

    Returns: `[N, hidden]`, type of h.
    Source: transformers `Qwen3_5MoeSparseMoeBlock`, whose sum is in the type of h.
    """
    if library.uses("moe_down") and fits(h, experts, weights, shared, down, shared_down):
        return launch(h, experts, weights, shared, down, shared_down)
    return reference(h, experts, weights, shared, down, shared_down)


def fits(
    h: mx.array,
    experts: mx.array,
    weights: mx.array,
    shared: mx.array,
    down: Packed,
    shared_down: Packed,
) -> bool:
    """Whether the kernel serves so many tokens and these formats."""
    return (
        h.shape[0] <= MAX_TOKENS
        and experts.shape[1] <= 32
        and weights.dtype == shared.dtype == mx.float32
        and is_streamable(down, 4)
        and is_streamable(shared_down, 4)
    )


def reference(
    h: mx.array,
    experts: mx.array,
    weights: mx.array,
    shared: mx.array,
    down: Packed,
    shared_down: Packed,
) -> mx.array:
    """The same in MLX operations, with each expert's product rounded to the type of h."""
    N, K = experts.shape
    inner = h.shape[1] - shared_down.columns
    routed = h[:, :inner].reshape(N, K, 1, inner // K)
    y = grouped_matmul(routed, experts, False, *down)[:, :, 0].astype(mx.float32)
    shared_y = matmul(h[:, inner:], shared_down).astype(mx.float32)
    return ((weights[:, None] @ y)[:, 0] + shared[:, None] * shared_y).astype(h.dtype)


def launch(
    h: mx.array,
    experts: mx.array,
    weights: mx.array,
    shared: mx.array,
    down: Packed,
    shared_down: Packed,
) -> mx.array:
    """The same by `metal/moe_down.metal`."""
    (N, K), hidden = experts.shape, down.weight.shape[1]
    simdgroups = min(K + 1, _SIMDGROUPS)
    # 64 bytes of a lane on their way at once, where the sums leave registers for that.
    rows = 8 if words_at_once(down) < 4 and N <= 2 and hidden % 8 == 0 else 4
    (y,) = library.kernel("moe_down", _INPUTS, ("y",))(
        inputs=[h, experts, weights, shared, *buffers(down), *buffers(shared_down)],
        template=[
            ("T", h.dtype),
            ("N", N),
            ("K", K),
            ("Hidden", hidden),
            ("Inner", down.columns),
            ("Shared", shared_down.columns),
            ("Rows", rows),
            ("Simdgroups", simdgroups),
            *layout(down),
            *layout(shared_down, "Shared"),
        ],
        grid=(32, simdgroups, hidden // rows),
        threadgroup=(32, simdgroups, 1),
        output_shapes=[(N, hidden)],
        output_dtypes=[h.dtype],
    )
    return y
