"""Matrices as kernels read them: plain, or packed as `mx.quantize` does it."""

from typing import NamedTuple

import mlx.core as mx

from ..packing import Format

# Rows of x that this project's kernels take at once; for more MLX's own are made.
MAX_TOKENS = 8
# The types of activations and of plain matrices that kernels know.
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class Packed(NamedTuple):
    """Matrices `[..., out, in]`: plain, or in the packed format that `mx.quantize` gives."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    packing: Format | None = None

    @property
    def columns(self) -> int:
        """The width before packing."""
        width = self.weight.shape[-1]
        return width if self.packing is None else width * 32 // self.packing.bits


def is_known(packing: Format | None) -> bool:
    """Whether this project's kernels read matrices that are packed like this."""
    return packing is None or (packing.mode == "affine" and packing.bits in (4, 8))


def is_streamable(matrix: Packed, rows: int) -> bool:
    """Whether this project's kernels read it, `rows` rows at a time.

    Of a plain row a lane loads 16 bytes at once, and rows may not end within them.
    """
    if matrix.packing is None:
        whole = matrix.weight.dtype in FLOATS and matrix.columns % 8 == 0
    else:
        whole = matrix.biases is not None
    # Metal gets arrays of fewer than 8 elements in another kind of memory.
    large = all(array.size >= 8 for array in buffers(matrix))
    return is_known(matrix.packing) and whole and large and matrix.weight.shape[-2] % rows == 0


def buffers(matrix: Packed) -> list[mx.array]:
    """What a kernel is given of it; a plain one stands in for the scales and biases it lacks."""
    return [matrix.weight if array is None else array for array in matrix[:3]]


def layout(matrix: Packed, prefix: str = "") -> list[tuple[str, int]]:
    """The template arguments that tell a kernel how the rows lie: bits, group, words at once."""
    if matrix.packing is None:
        bits, group = 8 * matrix.weight.itemsize, matrix.columns
    else:
        bits, group = matrix.packing.bits, matrix.packing.group_size
    return [
        (f"{prefix}Bits", bits),
        (f"{prefix}Group", group),
        (f"{prefix}Words", words_at_once(matrix)),
    ]


def words_at_once(matrix: Packed) -> int:
    """How many words of 32 bits a lane loads at once; of packed ones 4 if that fills 32 lanes."""
    words = matrix.weight.shape[-1]
    if matrix.packing is None:
        return 4
    return 4 if words % 128 == 0 else 2 if words % 64 == 0 else 1


def matmul(x: mx.array, matrix: Packed) -> mx.array:
    """`x [..., in]` times one matrix `[out, in]` -> `[..., out]`, type of x."""
    if matrix.scales is None or matrix.packing is None:
        return x @ matrix.weight.astype(x.dtype).T
    affine = matrix.biases is not None
    return mx.quantized_matmul(
        x,
        matrix.weight,
        matrix.scales.astype(x.dtype) if affine else matrix.scales,
        matrix.biases.astype(x.dtype) if matrix.biases is not None else None,
        transpose=True,
        group_size=matrix.packing.group_size,
        bits=matrix.packing.bits,
        mode=matrix.packing.mode,
    )
