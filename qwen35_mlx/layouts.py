"""How arrays lie in memory on MLX's Metal back end, followed from operation to operation.

A view costs nothing, and a kernel that needs its input in rows copies one that is not: which it is
hangs on strides, which no graph holds. They follow MLX's own rules. Source: MLX 0.32,
`backend/common` and `backend/gpu`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

SHARED_SPARE = 16384  # bytes that a shared buffer may be too large
# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh",
    "AsType", "BitwiseBinary", "BitwiseInvert", "Ceil", "Conjugate", "Cos", "Cosh", "Divide",
    "DivMod", "Equal", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "FloorDivide", "Greater",
    "GreaterEqual", "Imag", "Less", "LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd",
    "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power",
    "Real", "Remainder", "Round", "Select", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square",
    "Subtract", "Tan", "Tanh",
))
# fmt: on
# A result of these lies as the inputs do.
ALIKE = ELEMENTWISE | {"Compiled", "LayerNorm", "RMSNorm", "Softmax"}


@dataclass(frozen=True)
class Layout:
    """Where an array lies. strides: in elements. buffer: names the memory, of `nbytes`."""

    shape: Shape
    strides: Shape
    itemsize: int
    buffer: str
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def in_rows(self) -> bool:
        """Row by row without gaps; an axis of one element may have any stride."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    @property
    def distinct(self) -> int:
        """Elements without repetitions."""
        return math.prod(n for n, stride in zip(self.shape, self.strides, strict=True) if stride)

    @property
    def is_dense(self) -> bool:
        """Without gaps, in whatever order, repetitions apart."""
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return min(self.strides, default=0) >= 0 and reach + 1 == self.distinct


@dataclass(frozen=True)
class Operation:
    """One node of a traced graph. given_up: numbers of the inputs whose memory may be reused."""

    name: str
    arguments: Sequence[Any]
    inputs: tuple[Layout, ...]
    output: Shape
    given_up: frozenset[int] = frozenset()


def rows(shape: Shape) -> Shape:
    """Strides of a new array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# -- views: the same memory with another shape; the result's strides --------------------------


def _broadcast(op: Operation) -> Shape:
    x = op.inputs[0]
    kept = tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))
    return (0,) * (len(op.output) - len(kept)) + kept


def _expanded(op: Operation) -> Shape:
    strides = list(op.inputs[0].strides)
    for axis in op.arguments[0]:
        strides.insert(axis, 1)
    return tuple(strides)


def _squeezed(op: Operation) -> Shape:
    axes = {axis % len(op.inputs[0].shape) for axis in op.arguments[0]}
    return tuple(s for i, s in enumerate(op.inputs[0].strides) if i not in axes)


def _transposed(op: Operation) -> Shape:
    return tuple(op.inputs[0].strides[axis] for axis in op.arguments[0])


def _sliced(op: Operation) -> Shape:
    steps = op.arguments[2]
    return tuple(s * step for s, step in zip(op.inputs[0].strides, steps, strict=True))


def _same(op: Operation) -> Shape:
    return op.inputs[0].strides


def _reshaped(op: Operation) -> Shape | None:
    """None where the elements have to be copied. common/common.cpp, `prepare_reshape`."""
    x = op.inputs[0]
    if x.in_rows or not x.shape:
        return rows(op.output) if x.shape else (0,) * len(op.output)
    shape, strides = _merged(x)
    found: list[int] = []
    axis = 0
    for n in op.output:
        if axis < len(shape) and shape[axis] % n == 0:
            shape[axis] //= n
            found.append(shape[axis] * strides[axis])
            axis += shape[axis] == 1
        elif n == 1:
            found.append(found[-1])
        else:
            return None
    return tuple(found)


def _merged(x: Layout) -> tuple[list[int], list[int]]:
    """Shape and strides with axes that follow one another in memory as one."""
    shape, strides = [x.shape[0]], [x.strides[0]]
    for n, stride in zip(x.shape[1:], x.strides[1:], strict=True):
        if n == 1:
            continue
        if strides[-1] == stride * n:
            shape[-1], strides[-1] = shape[-1] * n, stride
        else:
            shape.append(n)
            strides.append(stride)
    return shape, strides


def _contiguous(op: Operation) -> Shape | None:
    """None where it copies. gpu/primitives.cpp: the buffer must not be much larger, either."""
    x = op.inputs[0]
    fits = x.nbytes <= x.size * x.itemsize + SHARED_SPARE
    return x.strides if x.in_rows and fits else None


VIEWS: dict[str, Callable[[Operation], Shape | None]] = {
    "Broadcast": _broadcast,
    "BroadcastAxes": _broadcast,
    "Contiguous": _contiguous,
    "Copy": _same,
    "Depends": _same,
    "ExpandDims": _expanded,
    "Flatten": _reshaped,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _same,
    "Squeeze": _squeezed,
    "StopGradient": _same,
    "Transpose": _transposed,
    "Unflatten": _reshaped,
    "View": _same,  # of a type of the same size
}


def view(op: Operation) -> Shape | None:
    """Strides of the result where it shares the memory of its first input, else None."""
    return VIEWS[op.name](op) if op.name in VIEWS else None


def strides(op: Operation) -> Shape:
    """Strides of a result that has memory of its own: most are in rows, elementwise ones as their
    inputs where those agree. common/unary.h, binary.h, compiled.cpp.
    """
    if op.name in ALIKE:
        whole = [x for x in op.inputs if x.distinct != 1]
        alike = {x.strides for x in whole if x.shape == op.output and x.is_dense}
        if len(alike) == 1 and all(x.shape == op.output and x.is_dense for x in whole):
            return alike.pop()
    return rows(op.output)
