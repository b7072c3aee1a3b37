"""Rows of an embedding, gathered and unpacked in one launch."""

import mlx.core as mx

from . import library
from .packed import FLOATS, Packed

_VALUES = 8  # that a thread unpacks: in every packing they are whole bytes of at most two words
# Few, so that one token's row keeps more than one core busy.
_THREADS = 64


def embed(tokens: mx.array, matrix: Packed, dtype: mx.Dtype) -> mx.array:
    """The rows of `matrix` that `tokens` name.

    tokens: `[B, T]` uint32 ids; one outside the matrix counts as the last.
    matrix: `[V, hidden]`, plain or packed in any format.

    Returns: `[B, T, hidden]` in `dtype`; of an affine format `scale q + bias` in f32, rounded once.
    Source: MLX's `nn.QuantizedEmbedding`, which calculates in the type of the scales and so rounds
    the product too, at 8 bits and bf16 by up to half a step of q.
    """
    if library.uses("embed") and fits(tokens, matrix, dtype):
        return launch(tokens, matrix, dtype)
    return reference(tokens, matrix, dtype)


def fits(tokens: mx.array, matrix: Packed, dtype: mx.Dtype) -> bool:
    """Whether the kernel serves these types and this format."""
    is_affine = matrix.packing is not None and matrix.packing.mode == "affine"
    return is_affine and tokens.dtype == mx.uint32 and dtype in FLOATS


def reference(tokens: mx.array, matrix: Packed, dtype: mx.Dtype) -> mx.array:
    """The same in MLX operations."""
    weight, scales, biases, packing = matrix
    # As unsigned, a negative id is a large one.
    ids = mx.minimum(tokens.astype(mx.uint32), weight.shape[0] - 1)
    if scales is None or packing is None:
        return weight[ids].astype(dtype)
    scales = scales[ids]
    if biases is not None:
        # Scales of the float formats are bytes without biases.
        scales, biases = scales.astype(mx.float32), biases[ids].astype(mx.float32)
    group, bits, mode = packing.group_size, packing.bits, packing.mode
    return mx.dequantize(weight[ids], scales, biases, group, bits, mode).astype(dtype)


def launch(tokens: mx.array, matrix: Packed, dtype: mx.Dtype) -> mx.array:
    """The same by `metal/embed.metal`."""
    packing, hidden = matrix.packing, matrix.columns
    if packing is None:
        raise ValueError("embed: the matrix is plain; expected a packed one.")
    run = library.kernel("embed", ("ids", "weight", "scales", "biases"), ("y",))
    (y,) = run(
        inputs=[tokens, *matrix[:3]],
        template=[
            ("T", dtype),
            ("Hidden", hidden),
            ("Bits", packing.bits),
            ("Group", packing.group_size),
        ],
        grid=(hidden // _VALUES, tokens.size, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(*tokens.shape, hidden)],
        output_dtypes=[dtype],
    )
    return y
