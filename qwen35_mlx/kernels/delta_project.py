"""The projections of Gated DeltaNet for few tokens: two matrices, one launch."""

import mlx.core as mx

from . import library
from .packed import MAX_TOKENS, Packed, buffers, is_streamable, layout, matmul

_SIMDGROUPS = 4  # of a threadgroup; they share nothing
_ROWS = 4  # of a simdgroup at once
_ARRAYS = ("weight", "scales", "biases")
_INPUTS = ("x", *_ARRAYS, *(f"ba_{name}" for name in _ARRAYS))


def delta_project(x: mx.array, qkvz: Packed, ba: Packed) -> tuple[mx.array, mx.array]:
    """`A x` and `B x`, in f32.

    x: `[..., hidden]`; qkvz: the rows of q, k, v and z, `[2 Hk Dk + 2 Hv Dv, hidden]`; ba: those
    of the logits of beta and decay, `[2 Hv, hidden]`, which mostly are stored in more bits.

    Returns: `[..., rows]` of each, type of x.
    Source: transformers `Qwen3_5GatedDeltaNet`, `in_proj_*`.
    """
    if library.uses("delta_project") and fits(x, qkvz, ba):
        return launch(x, qkvz, ba)
    return reference(x, qkvz, ba)


def fits(x: mx.array, qkvz: Packed, ba: Packed) -> bool:
    """Whether the kernel serves so many tokens and these formats."""
    is_few = x.size <= MAX_TOKENS * x.shape[-1]
    return is_few and is_streamable(qkvz, _ROWS) and is_streamable(ba, _ROWS)


def reference(x: mx.array, qkvz: Packed, ba: Packed) -> tuple[mx.array, mx.array]:
    """The same in MLX operations."""
    return matmul(x, qkvz), matmul(x, ba)


def launch(x: mx.array, qkvz: Packed, ba: Packed) -> tuple[mx.array, mx.array]:
    """The same by `metal/delta_project.metal`."""
    *lead, hidden = x.shape
    width, ba_width = qkvz.weight.shape[0], ba.weight.shape[0]
    blocks = -(-(width + ba_width) // (_ROWS * _SIMDGROUPS))
    projected, logits = library.kernel("delta_project", _INPUTS, ("qkvz", "ba"))(
        inputs=[x, *buffers(qkvz), *buffers(ba)],
        template=[
            ("T", x.dtype),
            ("N", x.size // hidden),
            ("Hidden", hidden),
            ("Width", width),
            ("BaWidth", ba_width),
            ("Simdgroups", _SIMDGROUPS),
            *layout(qkvz),
            *layout(ba, "Ba"),
        ],
        grid=(32, _SIMDGROUPS * blocks, 1),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(*lead, width), (*lead, ba_width)],
        output_dtypes=[x.dtype, x.dtype],
    )
    return projected, logits
