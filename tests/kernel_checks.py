"""What the tests of all kernels share: types, roundings, ways to run a launch, and its bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import Launch, emulated, require_clean
from qwen35_mlx.kernels import library

TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Half a unit in the last place, relative, and half of the subnormals' step. What f32 may be off
# depends on the operation: each test says.
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
SMALLEST = {mx.float32: 0.0, mx.float16: 2.0**-25, mx.bfloat16: 0.0}

# How a launch is run: order of threads (7 seeds a random one), order in which simd_sum adds, which
# is not known, and whether products and sums are contracted.
RUNS: list[dict[str, Any]] = [
    {"schedule": schedule, "reduce": reduce, "contract": contract}
    for schedule, reduce in (("forward", "butterfly"), ("reverse", "ascending"), (7, "random"))
    for contract in (True, False)
]
EVERY_RUN = pytest.mark.parametrize(
    "run", RUNS, ids=lambda run: f"{run['schedule']}-{run['contract']}"
)
# Every order once, where all would take too long.
FEW_RUNS = RUNS[0], RUNS[3], RUNS[4]


def mlx_array(values: Any, kind: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.asarray(values, np.float32)).astype(kind)


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rounding(wanted: np.ndarray, kind: mx.Dtype) -> np.ndarray:
    """What `wanted` may be off once it is rounded to a type."""
    return ROUNDING[kind] * np.abs(wanted) + SMALLEST[kind]


def relative_error(found: mx.array, wanted: np.ndarray) -> float:
    """In L2."""
    assert found.shape == wanted.shape
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(as_float64(found) - wanted)) / max(size, 1e-30)


def equal(found: Sequence[mx.array], wanted: Sequence[mx.array]) -> bool:
    """Bit for bit."""
    return all(bool(mx.array_equal(a, b)) for a, b in zip(found, wanted, strict=True))


def clean(launches: list[Launch] | None) -> None:
    """Of the launches on a CPU, that nothing was reported; a GPU reports nothing."""
    if launches is not None:
        require_clean(launches)


@contextmanager
def executed(**run: Any) -> Iterator[list[Launch]]:
    """Kernels that are launched run from their Metal text, and nothing is reported."""
    with emulated(**run) as launches:
        yield launches
    require_clean(launches)


@contextmanager
def using(*names: str) -> Iterator[None]:
    """The ops launch these kernels, and no other."""
    library.use(names)
    try:
        yield
    finally:
        library.use(())


def takes_the_reference(op: Callable[[], Sequence[mx.array]]) -> None:
    """That the op launches no kernel for these arguments, whichever may be used."""
    before = op()
    with emulated() as launches, using(*library.names()):
        after = op()
    assert not launches
    assert equal(before, after)


class Needed(NamedTuple):
    """A row of the traffic table: a call, and the bytes that it must read and write."""

    label: str
    op: Callable[[], object]
    read: int
    written: int


def touched(case: Needed) -> Launch:
    """Its launch, which touches these bytes and no other, and writes each line once."""
    with executed() as launches:
        case.op()
    (launch,) = launches
    assert (launch.read.unique, launch.written.unique) == (case.read, case.written)
    assert launch.written.lines == case.written
    return launch
