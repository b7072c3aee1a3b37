"""The first half of the dense feed-forward block, for few tokens: `silu(gate) up` in one launch."""

import mlx.core as mx

from . import library
from .fused import swiglu_of
from .packed import MAX_TOKENS, Packed, buffers, is_streamable, layout, matmul

_SIMDGROUPS = 4  # of a threadgroup; they share nothing
_INPUTS = ("x", "weight", "scales", "biases")


def gate_up(x: mx.array, matrix: Packed) -> mx.array:
    """`silu(G x) * (U x)`, in f32.

    x: `[..., hidden]`; matrix: `[2 inner, hidden]`, the rows of G before those of U.

    Returns: `[..., inner]`, type of x.
    Source: transformers `Qwen3_5MLP`, which rounds both products to the type of x.
    """
    if library.uses("gate_up") and fits(x, matrix):
        return launch(x, matrix)
    return reference(x, matrix)


def fits(x: mx.array, matrix: Packed) -> bool:
    """Whether the kernel serves so many tokens and this format."""
    # Two rows of gate and two of up at once.
    return x.size <= MAX_TOKENS * x.shape[-1] and is_streamable(matrix, 4)


def reference(x: mx.array, matrix: Packed) -> mx.array:
    """The same in MLX operations, with gate and up rounded to the type of x."""
    return swiglu_of(matmul(x, matrix))


def launch(x: mx.array, matrix: Packed) -> mx.array:
    """The same by `metal/gate_up.metal`."""
    *lead, hidden = x.shape
    inner = matrix.weight.shape[0] // 2
    blocks = -(-inner // (2 * _SIMDGROUPS))
    (h,) = library.kernel("gate_up", _INPUTS, ("h",))(
        inputs=[x, *buffers(matrix)],
        template=[
            ("T", x.dtype),
            ("N", x.size // hidden),
            ("Hidden", hidden),
            ("Inner", inner),
            ("Simdgroups", _SIMDGROUPS),
            *layout(matrix),
        ],
        grid=(32, _SIMDGROUPS * blocks, 1),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(*lead, inner)],
        output_dtypes=[x.dtype],
    )
    return h
