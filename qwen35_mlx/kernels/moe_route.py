"""The router: softmax, the K most likely experts, their weights, and the shared expert's gate."""

import mlx.core as mx

from . import library
from .moe import route


def moe_route(
    logits: mx.array, K: int, x: mx.array, shared_gate: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Which experts each token visits and how much each counts.

    logits: `[N, E]` any float; x: `[N, hidden]`; shared_gate: `[hidden]` f32.

    Returns: experts `[N, K]` uint32, the most likely first and of equal ones the lowest; their
    weights `[N, K]` f32, which sum to one; `sigmoid(x . shared_gate)` `[N]` f32. All in f32.
    Source: transformers `Qwen3_5MoeTopKRouter` and `Qwen3_5MoeSparseMoeBlock`, which takes the
    gate in the type of x.
    """
    if library.uses("moe_route") and fits(logits, K, x, shared_gate):
        return launch(logits, K, x, shared_gate)
    return reference(logits, K, x, shared_gate)


def fits(logits: mx.array, K: int, x: mx.array, shared_gate: mx.array) -> bool:
    """Whether the kernel serves these widths."""
    E, hidden = logits.shape[-1], x.shape[-1]
    # A lane keeps a 32nd of the logits in registers, and one of the chosen.
    return (
        E <= 1024
        and K <= min(E, 32)
        and hidden % 4 == 0
        and hidden >= 8
        and shared_gate.dtype == mx.float32
    )


def reference(
    logits: mx.array, K: int, x: mx.array, shared_gate: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The same in MLX operations."""
    experts, weights = route(logits, K)
    # A product and a sum: the CPU's products of matrices follow the type of x.
    return experts, weights, mx.sigmoid(mx.sum(x.astype(mx.float32) * shared_gate, axis=-1))


def launch(
    logits: mx.array, K: int, x: mx.array, shared_gate: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The same by `metal/moe_route.metal`."""
    N, E = logits.shape
    run = library.kernel("moe_route", ("logits", "x", "gate"), ("experts", "weights", "shared"))
    experts, weights, shared = run(
        inputs=[logits, x, shared_gate],
        template=[("T", x.dtype), ("E", E), ("K", K), ("Hidden", x.shape[-1])],
        grid=(32, 2, N),
        threadgroup=(32, 2, 1),
        output_shapes=[(N, K), (N, K), (N,)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return experts, weights, shared
