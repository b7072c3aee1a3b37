"""Trials in another process: what it says, and what happens when it does not come back."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from qwen35_mlx import apart, config, shapes
from qwen35_mlx.proof import chosen, why_not
from tiny_shapes import CONFIGS


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
    heard: list[tuple[int, int]] = []
    code = (
        "say({'trials': 4}, begun('a'), done('a'), begun('x'), None, begun('b'), done('b'))\n"
        "say('end')"
    )
    found = apart.verdicts(Shapes(), worker(code), progress=lambda *n: heard.append(n))
    assert [v.kernel for v in found] == ["a", "b"]  # x does not fit
    assert {v.nbytes for v in found} == {5}
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


ENDINGS = {
    "time.sleep(600)": "gave no answer within 3 s",
    "os._exit(9)": r"ended the process (exit code 9)",
    "os.abort()": f"ended the process (signal {signal.SIGABRT.value})",
    "raise MemoryError('too large')": "ended the process (exit code 1: MemoryError: too large)",
}


@pytest.mark.parametrize("end", ENDINGS)
def test_a_trial_without_an_answer_is_its_kernels_problem_and_the_rest_goes_on(end: str) -> None:
    code = (
        "say({'trials': 4})\n"
        "if 'a' not in request['skip']: say(begun('a'), done('a'))\n"
        "if 'b' not in request['skip']:\n"
        f"    say(begun('b'), done('b'), begun('b')); {end}\n"
        "assert request['skip'] == ['a', 'b']\n"
        "say(begun('c'), done('c'), 'end')"
    )
    found = apart.verdicts(Shapes(), worker(code), seconds=3.0)
    assert [v.kernel for v in found] == ["a", "b", "c"]
    assert chosen(found) == {"a", "c"}
    assert why_not("b", found) == ENDINGS[end]


def test_a_trial_that_failed_by_accident_is_made_once_more(tmp_path: Path) -> None:
    """The machine may have slept or run out of memory; what is remembered would stay."""
    once = str(tmp_path / "once")
    code = (
        "say({'trials': 4})\n"
        "if not request['skip']: say(begun('a'), done('a'))\n"
        "say(begun('b'), done('b'), begun('b'))\n"
        f"if not os.path.exists({once!r}):\n"
        f"    open({once!r}, 'w'); os.kill(os.getpid(), 9)\n"
        "say(done('b'), 'end')"
    )
    found = apart.verdicts(Shapes(), worker(code))
    assert [v.kernel for v in found] == ["a", "b", "b"]
    assert chosen(found) == {"a", "b"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("pass", r"exit code 0\), between two trials"),
        ("import nothing_like_it", "exit code 1: ModuleNotFoundError: .*between two trials"),
        ("print('hello'); say('end')", "it says 'hello"),
        ("print('[1, 2'); say('end')", "it says"),
        ("say('end')", "another way|between two trials"),
        ("say(5)", "another way"),
        ("say([1])", "another way"),
        ("say({'trials': 2}, {'problem': None})", "another way"),
        ("say({'trials': 2}, {'a': 1}); os._exit(1)", "another way"),
        ("sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush()", "it says"),
    ],
)
def test_a_process_that_does_not_keep_to_the_rules_is_an_error_and_no_endless_loop(
    code: str, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        apart.verdicts(Shapes(), worker(code))


def test_a_process_that_cannot_be_started_is_an_error() -> None:
    with pytest.raises(OSError, match="no/such"):
        apart.verdicts(Shapes(), ["/no/such/python"])


def test_a_process_that_ends_before_it_reads_is_no_broken_pipe() -> None:
    code = "import os; os._exit(7)"
    with pytest.raises(RuntimeError, match="exit code 7"):
        apart.verdicts(Shapes(), [sys.executable, "-c", code])


def test_ctrl_c_on_the_terminal_is_not_for_the_worker() -> None:
    """It would be taken for a kernel that ends the process, and remembered."""
    code = (
        "own = str(os.getpgrp() == os.getpid())\nsay({'trials': 1}, begun(own), done(own), 'end')"
    )
    assert [v.kernel for v in apart.verdicts(Shapes(), worker(code))] == ["True"]


def test_the_process_is_ended_when_this_one_stops_waiting(tmp_path: Path) -> None:
    told = tmp_path / "pid"

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    code = (
        f"open({str(told)!r}, 'w').write(str(os.getpid()))\n"
        "say({'trials': 9}, begun('a'), done('a')); time.sleep(600)"
    )
    with pytest.raises(KeyboardInterrupt):
        apart.verdicts(Shapes(), worker(code), progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_our_own_worker_runs_and_nothing_of_the_current_folder_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "mlx.py", "qwen35_mlx.py"):
        (tmp_path / name).write_text("raise SystemExit('from the current folder')")
    monkeypatch.chdir(tmp_path)
    tiny = shapes.shapes_of(config.parse(CONFIGS["dense"], "tiny"), {}, mx.bfloat16)
    found = apart.verdicts(tiny)
    assert {v.kernel for v in found} >= {"add_norm", "delta_step", "top_k"}
    if not mx.metal.is_available():
        assert not chosen(found)
        assert all("does not run: " in why_not(v.kernel, found) for v in found)


@pytest.mark.parametrize(
    ("executable", "frozen", "can"),
    [
        ("/usr/bin/python3.12", False, True),
        ("/x/.venv/bin/python", False, True),
        ("/x/Python.framework/Versions/3.12/Resources/Python.app/Contents/MacOS/Python", False, 1),
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
    if can:
        assert apart._own_worker()[0] == executable
    else:
        with pytest.raises(OSError, match="no Python interpreter"):
            apart._own_worker()


def test_what_is_printed_beside_the_answers_is_no_answer(tmp_path: Path) -> None:
    """As by a hook of the user's that runs in every Python."""
    request = '{"shapes": {}, "skip": []}'
    code = (
        "import io, sys\n"
        "from qwen35_mlx import trials\n"
        "from qwen35_mlx.proof import Plan\n"
        f"sys.stdin = io.StringIO({request!r})\n"
        "trials.from_plain = lambda _: None\n"
        "def plans(_):\n"
        "    print('a hook says hello')\n"
        "    return [Plan('a', 'b', lambda: None)]\n"
        "trials.plans = plans\n"
        "trials.main()\n"
    )
    command = [sys.executable, "-c", code]
    assert apart.verdicts(Shapes(), command) == []
