"""Random matrices, plain and packed, their values in float64, and what a kernel read of them."""

import mlx.core as mx
import numpy as np

from kernel_checks import ROUNDING, as_float64, mlx_array
from metal_cpu import BufferTraffic, Launch
from qwen35_mlx.kernels.packed import Packed
from qwen35_mlx.packing import Format

FOUR_BITS = Format("affine", 4, 64)
# The buffers that hold matrices.
STREAMED = tuple(
    which + name for which in ("", "shared_", "ba_") for name in ("weight", "scales", "biases")
)
# Of sums of a few hundred to a few thousand f32 terms, beside the root mean square of the output.
F32_ERROR = 1e-5


def streamed(launch: Launch) -> tuple[int, int]:
    """Of the matrices: bytes read, and bytes of the 64-byte lines fetched."""
    read = [launch.buffers[name].read for name in STREAMED if name in launch.buffers]
    return sum(r.unique for r in read), sum(r.lines for r in read)


def nbytes(matrix: Packed) -> int:
    """Of a matrix, its scales and biases."""
    return sum(array.nbytes for array in matrix[:3] if array is not None)


def is_whole(buffer: BufferTraffic) -> bool:
    """Whether every byte was touched."""
    return bool(buffer.touched.all())


def excess(found: mx.array, wanted: np.ndarray) -> float:
    """The largest error beyond one rounding, beside the root mean square of `wanted`."""
    error = np.abs(as_float64(found) - wanted) - ROUNDING[found.dtype] * np.abs(wanted)
    return float(np.max(error) / np.sqrt(np.mean(wanted**2)))


def unpacked(matrix: Packed, at: int | None = None) -> np.ndarray:
    """One matrix `[out, in]` in float64, the `at`-th where there are several."""
    packing = matrix.packing
    if packing is None:
        return as_float64(matrix.weight if at is None else matrix.weight[at])
    assert matrix.scales is not None and matrix.biases is not None
    parts = [as_float64(a if at is None else a[at]) for a in (matrix.scales, matrix.biases)]
    words = np.array(matrix.weight if at is None else matrix.weight[at])
    places = np.arange(0, 32, packing.bits, dtype=np.uint32)
    q = (words[..., None] >> places) & np.uint32(2**packing.bits - 1)
    scale, bias = (np.repeat(p, packing.group_size, axis=-1) for p in parts)
    return q.reshape(words.shape[0], -1) * scale + bias


def draw_packed(
    draw: np.random.Generator, shape: tuple[int, ...], packing: Format | None, kind: mx.Dtype
) -> Packed:
    """Random matrices of `shape` `[..., in]`; scales and biases, or plain ones, of type `kind`."""
    if packing is None:
        return Packed(mlx_array(draw.standard_normal(shape, np.float32), kind))
    if packing.mode != "affine":
        values = mlx_array(draw.normal(size=shape))
        parts = mx.quantize(values, packing.group_size, packing.bits, packing.mode)
        return Packed(parts[0], parts[1], None, packing)
    words = (*shape[:-1], shape[-1] * packing.bits // 32)
    groups = (*shape[:-1], shape[-1] // packing.group_size)
    span = 2.0**packing.bits
    scales = draw.uniform(0.2, 1.0, groups).astype(np.float32) / np.float32(span)
    scales *= draw.choice(np.array([-1, 1], np.float32), groups)
    biases = -scales * np.float32(span / 2) * draw.uniform(0.8, 1.2, groups).astype(np.float32)
    return Packed(
        mx.array(draw.integers(0, 2**32, words, dtype=np.uint32)),
        mlx_array(scales, kind),
        mlx_array(biases, kind),
        packing,
    )


def label(packing: Format | None) -> str:
    return f"{packing.bits}b/{packing.group_size}" if packing else "plain"


def part_of_name(value: object) -> str:
    """An argument in the name of a test."""
    return label(value) if value is None or isinstance(value, Format) else str(value)
