"""One trial: what counts as right, what is timed, and a process that does not come back."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from broken_kernels import Clock
from qwen35_mlx import proof
from qwen35_mlx.proof import TOLERANCES, Op, Trial, Verdict, chosen, examine, why_not

X = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)


def constant(*values: Any, dtype: mx.Dtype = mx.float32) -> Op:
    return lambda _: [mx.array(value).astype(dtype) for value in values]


def trial(launch: Op, reference: Op, exact: Op | None = None) -> Trial:
    return Trial("twice", "3 x 50", launch, reference, exact or reference, 600)


def off_by(share: float) -> np.ndarray:
    """X with one value changed by that share of the largest."""
    changed = X.copy()
    changed[1, 7] += share * np.abs(X).max()
    return changed


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_largest_error_decides(dtype: mx.Dtype) -> None:
    tolerance = TOLERANCES[dtype]
    for share, right in ((0.3 * tolerance, True), (1.6 * tolerance, False)):
        verdict = examine(trial(constant(off_by(share), dtype=dtype), constant(X, dtype=dtype)))
        assert verdict.is_right is right, verdict
        assert verdict.tolerance == tolerance
        assert verdict.error == pytest.approx(share, abs=0.7 * tolerance)
        assert math.isfinite(verdict.seconds) is right


def test_the_reference_in_f32_counts_and_not_its_rounding() -> None:
    rounded = np.round(X)
    assert examine(trial(constant(X), constant(rounded), constant(X))).is_right
    assert not examine(trial(constant(rounded), constant(rounded), constant(X))).is_right


@pytest.mark.parametrize("output", [0, 1])
def test_every_output_is_compared(output: int) -> None:
    values = [X, 1000 * X]
    wrong = list(values)
    wrong[output] = wrong[output].copy()
    wrong[output][2, 3] *= 1.5
    assert examine(trial(constant(*values), constant(*values))).is_right
    assert not examine(trial(constant(*wrong), constant(*values))).is_right


def test_whole_numbers_are_equal_or_wrong() -> None:
    found, wanted = np.arange(40), np.arange(40)
    kind = mx.uint32
    assert examine(trial(constant(found, dtype=kind), constant(wanted, dtype=kind))).is_right
    found[-1] += 1
    assert not examine(trial(constant(found, dtype=kind), constant(wanted, dtype=kind))).is_right


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
    verdict = examine(trial(launch, constant(X)))
    assert not verdict.is_right and verdict.problem is None
    assert why_not("twice", [verdict]) == "differs"
    assert not chosen([verdict])


def test_a_launch_that_is_wrong_now_and_then_is_wrong() -> None:
    calls = []

    def launch(n: int) -> list[mx.array]:
        calls.append(n)
        return [mx.array(off_by(1.0) if len(calls) == proof.REPEATS else X)]

    assert not examine(trial(launch, constant(X))).is_right


def test_memory_that_the_reference_left_is_no_result() -> None:
    """The launch runs first: an output that it does not write would else hold the right values."""
    order: list[str] = []

    def noted(name: str) -> Op:
        def op(_: int) -> list[mx.array]:
            order.append(name)
            return [mx.array(X)]

        return op

    examine(Trial("a", "b", noted("launch"), noted("reference"), noted("exact"), 1))
    assert order[: proof.REPEATS] == ["launch"] * proof.REPEATS


def test_an_error_of_the_compiler_is_one_line() -> None:
    def launch(_: int) -> list[mx.array]:
        raise RuntimeError("[metal::Device] Unable to build\nerror: no double\n" + 900 * "x")

    verdict = examine(trial(launch, constant(X)))
    assert verdict.problem == "does not run: [metal::Device] Unable to build"
    assert why_not("twice", [verdict]) == verdict.problem


def test_times_are_of_one_call_and_taken_in_turns() -> None:
    clock, turns = Clock(), []

    def taking(name: str, seconds: list[float]) -> Op:
        def op(n: int) -> list[mx.array]:
            turns.append((name, n))
            clock.now += seconds[len(turns) // 40 % len(seconds)]
            return [mx.array(X)]

        return op

    launch, reference = taking("ours", [1.0, 9.0, 1.0]), taking("theirs", [2.0])
    ours, theirs = proof._times((launch, reference), proof.AT_ONCE_BYTES // 4, clock)
    once = [(name, n) for name in ("ours", "theirs") for n in range(4)]
    assert turns == once * proof.ROUNDS
    assert (ours, theirs) == (1.0, 2.0)


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


# -- another process -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """What a worker here is told."""

    width: int = 5


def worker(code: str) -> list[str]:
    """A process that knows the request as `request` and speaks with `say`."""
    head = (
        "import json, os, sys, time\n"
        "request = json.load(sys.stdin)\n"
        "def say(*lines):\n"
        "    for line in lines: print(json.dumps(line), flush=True)\n"
        "def done(kernel): return {'kernel': kernel, 'case': 'c', 'error': 0.0, 'tolerance': 1.0,\n"
        "    'nbytes': request['shapes']['width'], 'seconds': 1.0, 'reference_seconds': 2.0,\n"
        "    'problem': None}\n"
        "def begun(kernel): return {'kernel': kernel, 'case': 'c'}\n"
    )
    return [sys.executable, "-c", head + code]


def test_verdicts_come_as_they_are_made() -> None:
    heard: list[Verdict] = []
    code = "say(begun('a'), done('a'), begun('b'), done('b'), 'end')"
    found = proof.examine_apart(Shapes(), worker(code), progress=heard.append)
    assert [v.kernel for v in found] == ["a", "b"] and heard == found
    assert {v.nbytes for v in found} == {5}


@pytest.mark.parametrize("end", ["time.sleep(600)", "os._exit(9)", "os.abort()"])
def test_a_trial_without_an_answer_is_its_kernels_problem_and_the_rest_goes_on(end: str) -> None:
    code = (
        "if not request['skip']:\n"
        f"    say(begun('a'), done('a'), begun('b')); {end}\n"
        "assert request['skip'] == ['a', 'b']\n"
        "say(begun('c'), done('c'), 'end')"
    )
    found = proof.examine_apart(Shapes(), worker(code), seconds=4.0)
    assert [v.kernel for v in found] == ["a", "b", "c"]
    assert chosen(found) == {"a", "c"}
    assert "no answer within 4 s" in why_not("b", found)


def test_a_process_that_says_nothing_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="ended between two trials"):
        proof.examine_apart(Shapes(), worker("pass"))
    with pytest.raises(OSError):
        proof.examine_apart(Shapes(), ["/no/such/python"])


def test_the_worker_imports_what_this_process_does_and_nothing_from_the_current_folder(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('from the current folder')")
    monkeypatch.chdir(tmp_path)
    code = "import metal_cpu\nsay(begun('a'), done('a'), 'end')"  # lies in the tests' folder
    command = worker(code)
    found = proof.examine_apart(Shapes(), [command[0], "-P", *command[1:]])
    assert [v.kernel for v in found] == ["a"]


@pytest.mark.parametrize(
    ("executable", "frozen", "can"),
    [
        ("/usr/bin/python3.12", False, True),
        ("/x/.venv/bin/python", False, True),
        ("/Applications/Talk.app/Contents/MacOS/Talk", False, False),
        ("/usr/bin/python3", True, False),
        ("", False, False),
    ],
)
def test_a_program_that_embeds_python_is_not_started_again(
    executable: str, frozen: bool, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    assert proof.can_examine_apart() is can
