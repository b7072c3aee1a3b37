"""The first half of the experts, for few tokens: gate and up products and `silu(gate) up`."""

import mlx.core as mx

from . import library
from .fused import swiglu
from .moe import grouped_matmul
from .packed import MAX_TOKENS, Packed, buffers, is_streamable, layout, matmul

# Of a threadgroup. They share nothing: few, so that a group whose expert is another's ends early.
_SIMDGROUPS = 4
_ARRAYS = ("weight", "scales", "biases")
_INPUTS = ("x", "experts", *_ARRAYS, *(f"shared_{name}" for name in _ARRAYS))


def moe_gate_up(
    x: mx.array, experts: mx.array, gate_up: Packed, shared_gate_up: Packed
) -> mx.array:
    """`silu(G x) * (U x)` for each chosen expert and the shared one, in f32.

    x: `[N, hidden]`; experts: `[N, K]` uint32, those of one token distinct; gate_up: of the
    experts `[E, 2 I, hidden]`, G before U; shared_gate_up: of the shared one `[2 Is, hidden]`.

    Returns: `[N, K I + Is]`, type of x: K times I, then the shared expert's.
    Source: transformers `Qwen3_5MoeExperts`, which rounds both products to the type of x.
    """
    if library.uses("moe_gate_up") and fits(x, experts, gate_up, shared_gate_up):
        return launch(x, experts, gate_up, shared_gate_up)
    return reference(x, experts, gate_up, shared_gate_up)


def fits(x: mx.array, experts: mx.array, gate_up: Packed, shared_gate_up: Packed) -> bool:
    """Whether the kernel serves so many tokens and these formats."""
    return (
        x.shape[0] <= MAX_TOKENS
        and experts.shape[1] <= 32
        # Two rows of gate and two of up at once.
        and is_streamable(gate_up, 4)
        and is_streamable(shared_gate_up, 4)
    )


def reference(x: mx.array, experts: mx.array, gate_up: Packed, shared_gate_up: Packed) -> mx.array:
    """The same in MLX operations, with gate and up rounded to the type of x."""
    routed = grouped_matmul(x[:, None, None], experts, False, *gate_up)[:, :, 0]
    h = swiglu(*mx.split(routed, 2, axis=-1)).reshape(x.shape[0], -1)
    shared = swiglu(*mx.split(matmul(x, shared_gate_up), 2, axis=-1))
    return mx.concatenate([h, shared], axis=-1)


def launch(x: mx.array, experts: mx.array, gate_up: Packed, shared_gate_up: Packed) -> mx.array:
    """The same by `metal/moe_gate_up.metal`."""
    (N, hidden), K = x.shape, experts.shape[1]
    inner, shared = gate_up.weight.shape[1] // 2, shared_gate_up.weight.shape[0] // 2
    blocks = -(-max(inner, shared) // (2 * _SIMDGROUPS))
    (h,) = library.kernel("moe_gate_up", _INPUTS, ("h",))(
        inputs=[x, experts, *buffers(gate_up), *buffers(shared_gate_up)],
        template=[
            ("T", x.dtype),
            ("N", N),
            ("K", K),
            ("Hidden", hidden),
            ("Inner", inner),
            ("Shared", shared),
            ("Simdgroups", _SIMDGROUPS),
            *layout(gate_up),
            *layout(shared_gate_up, "Shared"),
        ],
        grid=(32, _SIMDGROUPS * blocks, 1 + N * K),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(N, K * inner + shared)],
        output_dtypes=[x.dtype],
    )
    return h
