"""Whether a kernel is right on this machine's GPU, and faster than MLX's own operations.

A kernel is compared with its reference on the shapes of the model at hand and timed beside it.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

REPEATS = 3  # launches that are compared: a race need not show in the first
ROUNDS = 5
# Launches timed together, so that waiting does not count: so many, of large ones fewer.
AT_ONCE, AT_LEAST, AT_ONCE_BYTES = 32, 8, 128 << 20
# Largest error of an output, as a share of its largest value, beside the reference in f32: that has
# a GPU's exp and another order too, and an output of 16 bits is rounded up to three times.
TOLERANCES = {mx.float32: 1e-4, mx.float16: 3 * 2.0**-11, mx.bfloat16: 3 * 2.0**-8}

Op = Callable[[int], Sequence[mx.array]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Trial:
    """One kernel on one set of shapes.

    launch, reference: the op on the n-th set of inputs, of which there may be several, so that not
    every launch finds its weights in a cache. exact: the reference in f32. nbytes: of memory that
    one launch must touch. is_timed: whether speed is asked for, too.
    """

    launch: Op
    reference: Op
    exact: Op
    nbytes: int
    is_timed: bool = True


@dataclass(frozen=True)
class Plan:
    """A trial before its inputs are drawn. make: gives None where the kernel does not fit."""

    kernel: str
    case: str
    make: Callable[[], Trial | None]


@dataclass(frozen=True)
class Verdict:
    """What a trial showed.

    error: of the output that is worst beside its tolerance, as a share of its largest value.
    seconds: of one launch. problem: why there is no error or no time; None if all is well.
    """

    kernel: str
    case: str
    nbytes: int = 0
    error: float = math.nan
    tolerance: float = math.nan
    seconds: float = math.nan
    reference_seconds: float = math.nan
    problem: str | None = None

    @property
    def is_right(self) -> bool:
        return self.problem is None and self.error <= self.tolerance


def chosen(verdicts: Sequence[Verdict]) -> frozenset[str]:
    """Kernels that are right in every case and, over all of them, at least as fast."""
    kernels = {verdict.kernel for verdict in verdicts}
    return frozenset(kernel for kernel in kernels if not why_not(kernel, verdicts))


def why_not(kernel: str, verdicts: Sequence[Verdict]) -> str:
    """The reason not to use `kernel`; empty if there is none."""
    cases = [verdict for verdict in verdicts if verdict.kernel == kernel]
    for verdict in cases:
        if verdict.problem is not None:
            return verdict.problem
        if not verdict.is_right:
            return "differs"
    # Every case counts alike: the sum of times would be that of the longest prompt.
    timed = [verdict for verdict in cases if not math.isnan(verdict.seconds)]
    ratio = math.prod(verdict.seconds / verdict.reference_seconds for verdict in timed)
    return "" if ratio <= 1 else "slower"


def examine(plan: Plan, clock: Clock = time.perf_counter) -> Verdict | None:
    """Draw, run, compare and time one trial in this process. None: the kernel does not fit."""
    blamed = "its inputs cannot be made"
    try:
        trial = plan.make()
        if trial is None:
            return None
        blamed = "does not run"
        # Before the reference: memory that this leaves behind would hold the right values.
        found = [trial.launch(0) for _ in range(REPEATS)]
        mx.eval(found)
        blamed = "MLX's own operations do not run"
        return _compared(plan, trial, found, clock)
    except Exception as raised:  # whatever a compiler or driver may raise
        return Verdict(plan.kernel, plan.case, problem=f"{blamed}: {_said(raised)}")


def _said(raised: Exception) -> str:
    """One line: what a compiler found, where it says that, is below the first."""
    lines = [line.strip() for line in str(raised).splitlines() if line.strip()]
    found = next((line for line in lines if "error:" in line), None)
    return (found or (lines or [type(raised).__name__])[0])[:200]


def _compared(
    plan: Plan, trial: Trial, found: Sequence[Sequence[mx.array]], clock: Clock
) -> Verdict:
    kinds = [array.dtype for array in trial.reference(0)]
    wanted = trial.exact(0)
    mx.eval(wanted)
    errors = [_error(arrays, wanted, kinds) for arrays in found]
    error, tolerance = max(errors, key=lambda found: _excess(*found))
    times = (math.nan, math.nan)
    if trial.is_timed and error <= tolerance:
        times = _times((trial.launch, trial.reference), trial.nbytes, clock)
    return Verdict(plan.kernel, plan.case, trial.nbytes, error, tolerance, *times)


def _error(
    found: Sequence[mx.array], wanted: Sequence[mx.array], kinds: Sequence[mx.Dtype]
) -> tuple[float, float]:
    """Error and tolerance of the worst output; infinite where shape or type is another's."""
    worst = (0.0, TOLERANCES[mx.float32])
    for ours, exact, kind in zip(found, wanted, kinds, strict=True):
        tolerance = TOLERANCES.get(kind, 0.0)  # whole numbers are equal or wrong
        if (ours.shape, ours.dtype) != (exact.shape, kind):
            return math.inf, tolerance
        if not mx.issubdtype(kind, mx.floating):
            error = 0.0 if mx.array_equal(ours, exact.astype(kind)) else 1.0
        else:
            ours, exact = ours.astype(mx.float32), exact.astype(mx.float32)
            largest = mx.maximum(mx.abs(exact).max(), 1e-30)
            error = float(np.array(mx.abs(ours - exact).max() / largest))
        worst = max(worst, (error, tolerance), key=lambda found: _excess(*found))
    return worst


def _excess(error: float, tolerance: float) -> float:
    """The error beside what is allowed; infinite where it is NaN."""
    return math.inf if math.isnan(error) else error / max(tolerance, 1e-30)


def _times(ops: tuple[Op, Op], nbytes: int, clock: Clock) -> tuple[float, float]:
    """Seconds of one call of each op: the median of rounds in which they take turns."""
    many = min(AT_ONCE, max(AT_LEAST, AT_ONCE_BYTES // max(1, nbytes)))
    rounds: tuple[list[float], list[float]] = ([], [])
    for done in range(0, ROUNDS * many, many):  # on through the sets of inputs
        for op, times in zip(ops, rounds, strict=True):
            begin = clock()
            mx.eval([op(done + n) for n in range(many)])
            times.append((clock() - begin) / many)
    ours, theirs = (sorted(times)[ROUNDS // 2] for times in rounds)
    return ours, theirs
