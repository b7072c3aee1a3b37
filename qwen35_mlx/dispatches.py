"""How many kernels MLX's Metal back end launches for one operation.

MLX decides while it evaluates, from shapes and layouts. Source: MLX 0.32, `backend/metal` and
`backend/gpu`; the file is named beside each rule. What hangs on the chip is answered for up to five
rows at a time, where chips agree but for what `TWO_PASS_KEYS` says.
"""

import math
from collections.abc import Callable

from .layouts import ELEMENTWISE, Layout, Operation, view

BLOCK_OF_SORT = 2048  # elements that one threadgroup sorts; sort.cpp
ONE_PASS_SUM = 4096  # elements that one threadgroup sums; reduce.cpp
TWO_PASS_KEYS = 4096  # keys from which grouped queries take two passes (1,024 on Max and Ultra)


def _unfit(op: Operation, fits: Callable[[Layout], bool], last: int | None = None) -> int:
    """Copies of inputs that do not lie as the kernel needs them."""
    return sum(not fits(x) for x in op.inputs[:last])


def _is_matrix(x: Layout) -> bool:
    """quantized.cpp: the last two axes in rows, and there an axis of one element counts too."""
    return x.strides[-1] == 1 and (len(x.shape) < 2 or x.strides[-2] == x.shape[-1])


def _is_product_input(x: Layout, is_vector: bool) -> bool:
    """matmul.cpp, `check_transpose`."""
    across, along = x.strides[-2:]
    if along == 1 and (not is_vector or across == x.shape[-1]):
        return True
    return across == 1 and (not is_vector or along == x.shape[-2])


def _matmul(op: Operation) -> int:
    a, b = op.inputs[:2]
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    copies = (not _is_product_input(a, M == 1)) + (not _is_product_input(b, N == 1))
    batch = math.prod(op.output[:-2])
    if M == 1 and N == 1 and batch == 1 and a.in_rows and b.in_rows:
        return copies + 3  # partial products, their sum, and its copy in the result's type
    if min(M, N) > 1 and batch == 1 and K >= 128 and max(M, N) <= K:
        return copies + 2  # cut along K, then added
    return copies + 1


def _gathered_product(op: Operation) -> int:
    a, b = op.inputs[:2]
    fits = _is_product_input(a, a.shape[-2] == 1), _is_product_input(b, b.shape[-1] == 1)
    return 1 + fits.count(False)


def _norm(op: Operation) -> int:
    """normalization.cpp."""
    x = op.inputs[0]
    fits = x.is_dense and x.strides[-1] == 1
    if len(x.shape) > 1 and x.shape[-2] != 1:
        fits = fits and x.strides[-2] in (0, x.shape[-1])
    return 1 + (not fits)


def _softmax(op: Operation) -> int:
    return 1 + _unfit(op, lambda x: x.is_dense and x.strides[-1] == 1)


def _partial_rope(op: Operation) -> int:
    """rope.cpp: the dims that are not turned come by a copy, or stay where they are."""
    return 1 + (not (op.inputs[0].in_rows and 0 in op.given_up))


def _rope(op: Operation) -> int:
    x = op.inputs[0]
    by_heads = len(x.shape) == 4 and x.strides[1:3] == (x.shape[3], x.shape[1] * x.shape[3])
    three_axes = math.prod(x.shape[:-3]) == 1
    return 1 + (not (x.in_rows or three_axes or by_heads))


def _attention(op: Operation) -> int:
    """scaled_dot_product_attention.cpp, up to 8 queries."""
    q, k, v = op.inputs[:3]
    copies = sum(x.strides[-1] != 1 for x in (k, v))
    if not q.in_rows:
        axis = 1 if q.shape[0] == 1 else 0
        turned = q.strides[3] == 1 and q.strides[axis] == q.shape[3]
        turned = turned and q.strides[2] == q.shape[3] * q.shape[axis]
        copies += not (turned and 1 in q.shape[:2])
    return copies + 1 + (k.shape[1] < q.shape[1] and k.shape[2] >= TWO_PASS_KEYS)


def _reduce(op: Operation) -> int:
    """reduce.cpp; axes that are not next to each other count as one."""
    x = op.inputs[0]
    axes = op.arguments[1]
    count = math.prod(x.shape[axis] for axis in axes)
    if len(axes) == len(x.shape) and x.is_dense:
        return 1 + (x.size > ONE_PASS_SUM)
    copy = 0 if x.in_rows or any(x.strides[axis] == 1 for axis in axes) else 1
    if axes[-1] == len(x.shape) - 1:
        return 1 + copy
    behind = math.prod(x.shape[axes[-1] + 1 :])
    long_and_narrow = behind < 32 and count >= 1024
    return 1 + copy + (long_and_narrow or (count > 256 and x.size // count < 32 * 1024))


def _sort(op: Operation) -> int:
    """sort.cpp: blocks are sorted, then merged two by two; a partition is a sort."""
    axis = op.arguments[-1]
    blocks = -(-op.inputs[0].shape[axis] // BLOCK_OF_SORT)
    return 1 if blocks == 1 else 2 + 2 * math.ceil(math.log2(blocks))


def _update(op: Operation) -> int:
    """indexing.cpp: written in place where nothing else needs the old array, else into a copy.

    What the GPU still does with it from the step before is taken as done.
    """
    return 1 + (0 not in op.given_up)


def _custom_kernel(op: Operation) -> int:
    """custom_kernel.cpp. `init_value` is not in the trace: a fill per output is not counted."""
    needs_rows = op.arguments[9]
    return 1 + (_unfit(op, lambda x: x.in_rows) if needs_rows else 0)


LAUNCHES: dict[str, int | Callable[[Operation], int]] = {
    **dict.fromkeys(ELEMENTWISE, 1),  # any layout; unary.cpp, binary.cpp, ternary.cpp, copy.cpp
    "AddMM": _matmul,
    "Arange": 1,  # primitives.cpp
    "ArgPartition": _sort,
    "ArgReduce": 1,  # primitives.cpp: one threadgroup per row, however long
    "ArgSort": _sort,
    "Concatenate": lambda op: sum(x.size > 0 for x in op.inputs),  # gpu/slicing.cpp: a copy each
    "Convolution": lambda op: 1 + _unfit(op, lambda x: x.in_rows),  # conv.cpp, depthwise or small
    "CustomKernel": _custom_kernel,
    "Dequantize": lambda op: 1 + _unfit(op, lambda x: x.in_rows),  # quantized.cpp
    "DynamicSlice": 2,  # gpu/primitives.cpp: the offset is computed by a kernel
    "DynamicSliceUpdate": lambda op: 1 + _update(op),
    "Full": 1,  # gpu/primitives.cpp
    "Gather": 1,  # indexing.cpp
    "GatherAxis": 1,
    "GatherMM": _gathered_product,  # matmul.cpp, one row per matrix
    "GatherQMM": lambda op: 1 + _unfit(op, _is_matrix, -2),  # quantized.cpp; indices may lie anyhow
    "LayerNorm": _norm,
    "LogSumExp": _softmax,
    "Matmul": _matmul,
    "Pad": 2,  # gpu/slicing.cpp: filled, then copied into
    "PartialRoPE": _partial_rope,
    "Partition": _sort,
    "Quantize": lambda op: 1 + _unfit(op, lambda x: x.in_rows),
    "QuantizedMatmul": lambda op: 1 + _unfit(op, _is_matrix),  # up to 5 rows; then it may be cut
    "RMSNorm": _norm,
    "RandomBits": 1,  # primitives.cpp
    "Reduce": _reduce,
    "RoPE": _rope,
    "Scan": lambda op: 1 + _unfit(op, lambda x: x.is_dense),  # scan.cpp
    "ScaledDotProductAttention": _attention,
    "Scatter": _update,
    "ScatterAxis": _update,
    "SearchSorted": 1,
    "SliceUpdate": _update,
    "Softmax": _softmax,
    "Sort": _sort,
    **dict.fromkeys(("Contiguous", "Flatten", "Reshape", "Unflatten"), 1),  # where they copy
}


def launches(op: Operation, known: int | None = None) -> int:
    """Kernels that MLX launches for `op` on a GPU; known: how many, where the node says so.

    Raises: ValueError for an operation without a rule.
    """
    if known is not None:
        return known
    if not math.prod(op.output) or view(op) is not None:
        return 0
    rule = LAUNCHES.get(op.name)
    if rule is None:
        raise ValueError(f"no rule says how often {op.name} launches; add one to LAUNCHES")
    return rule if isinstance(rule, int) else rule(op)
