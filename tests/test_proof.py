"""One trial: what counts as right, what is timed, and a process that does not come back."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from broken_kernels import Clock
from qwen35_mlx import proof
from qwen35_mlx.proof import TOLERANCES, Op, Plan, Trial, Verdict, chosen, examine, why_not

X = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)


def constant(*values: Any, dtype: mx.Dtype = mx.float32) -> Op:
    return lambda _: [mx.array(value).astype(dtype) for value in values]


def examined(launch: Op, reference: Op, exact: Op | None = None, **given: Any) -> Verdict:
    trial = Trial(launch, reference, exact or reference, 600, **given)
    verdict = examine(Plan("twice", "3 x 50", lambda: trial))
    assert verdict is not None
    return verdict


def off_by(share: float) -> np.ndarray:
    """X with one value changed by that share of the largest."""
    changed = X.copy()
    changed[1, 7] += share * np.abs(X).max()
    return changed


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_largest_error_decides(dtype: mx.Dtype) -> None:
    tolerance = TOLERANCES[dtype]
    for share, right in ((0.3 * tolerance, True), (1.6 * tolerance, False)):
        verdict = examined(constant(off_by(share), dtype=dtype), constant(X, dtype=dtype))
        assert verdict.is_right is right, verdict
        assert verdict.tolerance == tolerance
        assert verdict.error == pytest.approx(share, abs=0.7 * tolerance)
        assert math.isfinite(verdict.seconds) is right


def test_the_reference_in_f32_counts_and_not_its_rounding() -> None:
    rounded = np.round(X)
    assert examined(constant(X), constant(rounded), constant(X)).is_right
    assert not examined(constant(rounded), constant(rounded), constant(X)).is_right


@pytest.mark.parametrize("output", [0, 1])
def test_every_output_is_compared(output: int) -> None:
    values = [X, 1000 * X]
    wrong = list(values)
    wrong[output] = wrong[output].copy()
    wrong[output][2, 3] *= 1.5
    assert examined(constant(*values), constant(*values)).is_right
    assert not examined(constant(*wrong), constant(*values)).is_right


def test_whole_numbers_are_equal_or_wrong() -> None:
    found, wanted = np.arange(40), np.arange(40)
    kind = mx.uint32
    assert examined(constant(found, dtype=kind), constant(wanted, dtype=kind)).is_right
    found[-1] += 1
    assert not examined(constant(found, dtype=kind), constant(wanted, dtype=kind)).is_right


@pytest.mark.parametrize(
    "launch",
    [
        constant(np.full_like(X, np.nan)),
        constant(np.where(X == X[2, 9], np.nan, X)),
        constant(np.where(X == X[2, 9], np.inf, X)),
        constant(X.T),
        constant(X, dtype=mx.float16),
    ],
    ids=["all NaN", "one NaN", "one infinity", "another shape", "another type"],
)
def test_what_cannot_be_compared_is_wrong(launch: Op) -> None:
    verdict = examined(launch, constant(X))
    assert not verdict.is_right and verdict.problem is None
    assert why_not("twice", [verdict]) == "differs"
    assert not chosen([verdict])


def test_a_launch_that_is_wrong_now_and_then_is_wrong() -> None:
    calls = []

    def launch(n: int) -> list[mx.array]:
        calls.append(n)
        return [mx.array(off_by(1.0) if len(calls) == proof.REPEATS else X)]

    assert not examined(launch, constant(X)).is_right


def test_memory_that_the_reference_left_is_no_result() -> None:
    """The launch runs first: an output that it does not write would else hold the right values."""
    order: list[str] = []

    def noted(name: str) -> Op:
        def op(_: int) -> list[mx.array]:
            order.append(name)
            return [mx.array(X)]

        return op

    examined(noted("launch"), noted("reference"), noted("exact"))
    assert order[: proof.REPEATS] == ["launch"] * proof.REPEATS


def test_an_error_of_the_compiler_is_one_line() -> None:
    def launch(_: int) -> list[mx.array]:
        raise RuntimeError("[metal::Device] Unable to build\nerror: no double\n" + 900 * "x")

    verdict = examined(launch, constant(X))
    # What is wrong is said below the first line.
    assert verdict.problem == "does not run: error: no double"
    assert why_not("twice", [verdict]) == verdict.problem


def test_of_the_references_own_failure_the_kernel_is_not_blamed() -> None:
    def fail(_: int) -> list[mx.array]:
        raise MemoryError("too large")

    for ops in ((constant(X), fail, constant(X)), (constant(X), constant(X), fail)):
        assert examined(*ops).problem == "MLX's own operations do not run: too large"

    def no_inputs() -> Trial:
        raise MemoryError("no room")

    verdict = examine(Plan("a", "b", no_inputs))
    assert verdict is not None and verdict.problem == "its inputs cannot be made: no room"


def test_a_kernel_that_does_not_fit_has_no_verdict() -> None:
    assert examine(Plan("a", "b", lambda: None)) is None


def test_what_is_not_timed_is_compared_only() -> None:
    verdict = examined(constant(X), constant(X), is_timed=False)
    assert verdict.is_right and math.isnan(verdict.seconds)
    assert chosen([verdict]) == {"twice"}
    assert not examined(constant(off_by(1.0)), constant(X), is_timed=False).is_right


@pytest.mark.parametrize(
    ("nbytes", "many"), [(1, 32), (proof.AT_ONCE_BYTES // 10, 10), (proof.AT_ONCE_BYTES, 8)]
)
def test_times_are_of_one_call_and_taken_in_turns(nbytes: int, many: int) -> None:
    """Of the round in the middle; each goes on through the sets of inputs."""
    clock = Clock()
    turns: list[tuple[str, int]] = []

    def taking(name: str, seconds: list[float]) -> Op:
        def op(n: int) -> list[mx.array]:
            clock.now += seconds[len(turns) // (2 * many)]
            turns.append((name, n))
            return [mx.array(X)]

        return op

    launch, reference = taking("ours", [1.0, 9.0, 1.5, 9.0, 1.0]), taking("theirs", [2.0] * 5)
    ours, theirs = proof._times((launch, reference), nbytes, clock)
    assert turns == [
        (name, number * many + n)
        for number in range(proof.ROUNDS)
        for name in ("ours", "theirs")
        for n in range(many)
    ]
    assert (ours, theirs) == (1.5, 2.0)


def verdict(kernel: str, ours: float, theirs: float, **given: Any) -> Verdict:
    known: dict[str, Any] = {"error": 1e-6, "tolerance": 1e-4}
    return Verdict(kernel, "case", seconds=ours, reference_seconds=theirs, **known | given)


def test_a_kernel_has_to_be_right_in_every_case_and_as_fast_in_all_together() -> None:
    verdicts = [
        verdict("even", 1.0, 1.0),
        # Ten times as fast for one token outweighs a third more for a prompt.
        *(verdict("mixed", 1e-6, 1e-5), verdict("mixed", 1.33, 1.0)),
        *(verdict("slow", 1e-6, 1e-6), verdict("slow", 1.1, 1.0)),
        *(verdict("wrong", 0.1, 1.0), verdict("wrong", 0.1, 1.0, error=1e-3)),
        *(verdict("broken", 0.1, 1.0), Verdict("broken", "other", problem="does not run: no")),
    ]
    assert chosen(verdicts) == {"even", "mixed"}
    reasons = {kernel: why_not(kernel, verdicts) for kernel in ("slow", "wrong", "broken")}
    assert reasons == {"slow": "slower", "wrong": "differs", "broken": "does not run: no"}
