"""Whether a kernel is right on this machine's GPU, and faster than MLX's own operations.

A kernel is compared with its reference on the shapes of the model at hand and timed beside it. All
of it happens in a process of its own: a compiler that hangs or a GPU that faults ends that process,
not the program.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

SECONDS = 30.0  # for one trial with its compilation; beyond it the process is ended
REPEATS = 3  # launches that are compared: a race need not show in the first
ROUNDS = 5
AT_ONCE_BYTES, AT_ONCE = 128 << 20, 32  # launches timed together, so that waiting does not count
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
    one launch must touch.
    """

    kernel: str
    case: str
    launch: Op
    reference: Op
    exact: Op
    nbytes: int


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
    ratio = math.prod(verdict.seconds / verdict.reference_seconds for verdict in cases)
    return "" if ratio <= 1 else "slower"


def examine(trial: Trial, clock: Clock = time.perf_counter) -> Verdict:
    """Run, compare and time one trial in this process."""
    tell = (trial.kernel, trial.case, trial.nbytes)
    try:
        # Before the reference: memory that this leaves behind would hold the right values.
        found = [trial.launch(0) for _ in range(REPEATS)]
        mx.eval(found)
    except Exception as raised:  # whatever a compiler or driver may raise
        lines = str(raised).strip().splitlines() or [type(raised).__name__]
        return Verdict(*tell, problem=f"does not run: {lines[0][:200]}")
    kinds = [array.dtype for array in trial.reference(0)]
    wanted = trial.exact(0)
    mx.eval(wanted)
    errors = [_error(arrays, wanted, kinds) for arrays in found]
    error, tolerance = max(errors, key=lambda found: _excess(*found))
    if not error <= tolerance:  # also NaN
        return Verdict(*tell, error, tolerance)
    ours, theirs = _times((trial.launch, trial.reference), trial.nbytes, clock)
    return Verdict(*tell, error, tolerance, ours, theirs)


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


def _times(ops: Sequence[Op], nbytes: int, clock: Clock) -> list[float]:
    """Seconds of one call of each op: the median of rounds in which they take turns."""
    many = max(1, min(AT_ONCE, AT_ONCE_BYTES // max(1, nbytes)))
    rounds: list[list[float]] = [[] for _ in ops]
    for _ in range(ROUNDS):
        for op, times in zip(ops, rounds, strict=True):
            begin = clock()
            mx.eval([op(n) for n in range(many)])
            times.append((clock() - begin) / many)
    return [sorted(times)[ROUNDS // 2] for times in rounds]


# -- in a process of its own -----------------------------------------------------------------------


def can_examine_apart() -> bool:
    """Whether this process can start another of its kind.

    A program that embeds Python would start itself again instead.
    """
    name = os.path.basename(sys.executable or "")
    return name.startswith("python") and not getattr(sys, "frozen", False)


def examine_apart(
    shapes: Any,
    worker: Sequence[str] | None = None,
    seconds: float = SECONDS,
    progress: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Examine every trial of `shapes` (a dataclass of plain values) in another process.

    worker: the command of that process, which reads a request from stdin and writes lines as
    `serve` does. A trial that takes longer than `seconds`, or ends the process, is a problem of its
    kernel; the others go on in a new process. progress: called with each verdict.
    Raises: OSError when the process cannot be started; RuntimeError when it ends before a trial.
    """
    command = worker or (sys.executable, "-P", "-m", "qwen35_mlx.trials")
    verdicts: list[Verdict] = []

    def told(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if progress:
            progress(verdict)

    while True:
        skip = sorted({verdict.kernel for verdict in verdicts})
        request = json.dumps({"shapes": asdict(shapes), "skip": skip})
        begun: dict[str, str] | None = None
        for line in _lines(command, request, seconds):
            said = json.loads(line)
            if said == "end":
                return verdicts
            begun = None if "problem" in said else said
            if begun is None:
                told(Verdict(**said))
        if begun is None:
            raise RuntimeError(f"{command[0]}: ended between two trials")
        problem = f"gave no answer within {seconds:g} s, or ended the process"
        told(Verdict(begun["kernel"], begun["case"], problem=problem))


def serve(
    trials: Iterable[Trial], skip: Sequence[str], clock: Clock = time.perf_counter
) -> Iterator[str]:
    """The other side: a line before each trial, one after it, and "end".

    trials: those of a kernel one after the other. skip: kernels that are done, or have failed.
    """
    for trial in trials:
        if trial.kernel in skip:
            continue
        yield json.dumps({"kernel": trial.kernel, "case": trial.case})
        yield json.dumps(asdict(examine(trial, clock)))
    yield json.dumps("end")


def _lines(command: Sequence[str], request: str, seconds: float) -> Iterator[str]:
    """What `command` prints; it is killed when a line takes longer than `seconds`."""
    # The same modules as here, and none from the folder that happens to be the current one.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.close()
            while True:
                timer = threading.Timer(seconds, process.kill)
                timer.start()
                try:
                    line = process.stdout.readline()
                finally:
                    timer.cancel()
                if not line.endswith("\n"):
                    return
                yield line
        finally:
            process.kill()
