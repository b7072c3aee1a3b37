"""Matrix products with a different matrix per row: the experts of a mixture."""

from typing import NamedTuple

import mlx.core as mx

from ..packing import Format

# More tokens are sorted by expert: their products are large enough for MLX's own kernels.
MAX_TOKENS = 8
# The types of plain matrices that kernels read.
PLAIN = (mx.float32, mx.float16, mx.bfloat16)


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


def is_streamable(matrix: Packed, rows: int) -> bool:
    """Whether this project's kernels read it, `rows` rows at a time: plain, or affine 4 or 8 bits.

    Of a plain row a lane loads 16 bytes at once, and rows may not end within them.
    """
    packing, arrays = matrix.packing, buffers(matrix)
    if packing is None:
        known = matrix.weight.dtype in PLAIN and matrix.columns % 8 == 0
    else:
        known = packing.mode == "affine" and packing.bits in (4, 8) and matrix.biases is not None
    # Metal gets arrays of fewer than 8 elements in another kind of memory.
    return known and matrix.weight.shape[-2] % rows == 0 and all(a.size >= 8 for a in arrays)


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


def route(logits: mx.array, K: int) -> tuple[mx.array, mx.array]:
    """The K most likely experts of each token and their weights, which sum to one.

    logits: `[N, E]` any float; softmax and renormalisation in f32.
    Returns: indices `[N, K]` uint32, the most likely first and of equal ones the lowest, and
    weights `[N, K]` f32.
    Source: transformers `Qwen3_5MoeTopKRouter`.
    """
    logits = logits.astype(mx.float32)
    # One integer that orders as (-logit, index): a partition has no order among equals, and in
    # bf16 equal logits are common.
    bits = (logits + 0.0).view(mx.int32)
    descending = ~mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = descending.astype(mx.int64) * (1 << 32) + mx.arange(logits.shape[-1], dtype=mx.int64)
    first = mx.sort(mx.partition(keys, K - 1, axis=-1)[:, :K], axis=-1)
    chosen = (first & 0xFFFFFFFF).astype(mx.uint32)
    weights = mx.take_along_axis(mx.softmax(logits, axis=-1), chosen, axis=-1)
    return chosen, weights / weights.sum(-1, keepdims=True)


def grouped_matmul(
    x: mx.array,
    chosen: mx.array,
    is_sorted: bool,
    weight: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    packing: Format | None = None,
) -> mx.array:
    """`x [..., 1, in]` times the matrix that `chosen [...]` names -> `[..., 1, out]`, type of x.

    weight: `[E, out, in]`, or packed with scales and biases as `mx.quantize` gives them.
    """
    kind = x.dtype
    if mx.default_device().type == mx.DeviceType.cpu:
        # MLX's CPU gather_mm knows f32 only, and its gather_qmm sums in the type of x.
        x = x.astype(mx.float32)
    if scales is None or packing is None:
        if weight.dtype != x.dtype and chosen.size < weight.shape[0]:
            # Fewer matrices than there are: only these are converted.
            y = x @ weight[chosen].astype(x.dtype).swapaxes(-1, -2)
        else:
            stack = weight.astype(x.dtype).swapaxes(-1, -2)
            y = mx.gather_mm(x, stack, rhs_indices=chosen, sorted_indices=is_sorted)
        return y.astype(kind)
    y = mx.gather_qmm(
        x,
        weight,
        # Scales of the float formats are bytes without biases; only affine ones follow x.
        scales if biases is None else scales.astype(x.dtype),
        None if biases is None else biases.astype(x.dtype),
        rhs_indices=chosen,
        transpose=True,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        sorted_indices=is_sorted,
    )
    return y.astype(kind)


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


def by_expert(chosen: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Sort (token, expert) pairs by expert.

    chosen: `[N, K]`. Returns: the token of each sorted pair `[N K]`, its expert `[N K]`, and where
    each original pair went `[N K]`.
    """
    flat = chosen.flatten()
    order = mx.argsort(flat)
    return order // chosen.shape[1], flat[order], mx.argsort(order)
