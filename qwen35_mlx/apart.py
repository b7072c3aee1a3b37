"""Trials in a process of their own: a compiler that hangs or a GPU that faults ends that, not this.

One line of JSON each way: the request, then one before each trial and one after it, and "end".
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO, Any

from .proof import Clock, Plan, Verdict, examine

SECONDS = 30.0  # for one trial with its compilation; beyond it the process is ended


def verdicts(
    shapes: Any,
    worker: Sequence[str] | None = None,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Examine every trial of `shapes` (a dataclass of plain values) in another process.

    worker: the command of that process, which reads a request from stdin and writes lines as
    `serve` does. A trial that takes longer than `seconds`, or ends the process, is made once more,
    for the machine may have slept or run out of memory; then it is a problem of its kernel, and the
    others go on in a new process. progress: called with trials done, and in all.
    Raises: OSError when no process can be started; RuntimeError when it does not answer as it
    should.
    """
    command = _own_worker() if worker is None else worker
    found: list[Verdict] = []
    failed: set[str] = set()
    while True:
        skip = sorted({verdict.kernel for verdict in found})
        request = json.dumps({"shapes": asdict(shapes), "skip": skip})
        with _started(command, request, seconds) as process:
            try:
                broken = _heard(process, found, progress)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise RuntimeError(f"{command[0]}: answers in another way: {error}") from None
        if broken is None:
            return found
        # The whole kernel again: what it has shown so far would stand there twice.
        found = [verdict for verdict in found if verdict.kernel != broken.kernel]
        if broken.kernel in failed:
            found.append(broken)
        failed.add(broken.kernel)


def _heard(
    process: "_Worker", found: list[Verdict], progress: Callable[[int, int], None] | None
) -> Verdict | None:
    """Add what the process says to `found`. Returns: of the trial that it did not survive.

    Raises: RuntimeError when it ends otherwise before its end.
    """
    begun: dict[str, str] | None = None
    done = total = 0
    for said in process.lines():
        if said == "end" and total:
            if progress:
                progress(total, total)
            return None
        if said is not None and "trials" in said:
            total = said["trials"]
        elif said is not None and "problem" not in said:
            begun = said
        else:
            begun, done = None, done + 1
            found += [] if said is None else [Verdict(**said)]
            if progress:
                progress(min(done, total), total)
    if begun is None:
        raise RuntimeError(f"{process.ending}, between two trials")
    return Verdict(begun["kernel"], begun["case"], problem=process.ending)


def serve(
    plans: Sequence[Plan], skip: Sequence[str], clock: Clock = time.perf_counter
) -> Iterator[str]:
    """The other side: how many trials, then a line before each, one after it, and "end".

    plans: those of a kernel one after the other. skip: kernels that are done, or have failed.
    """
    yield json.dumps({"trials": len(plans)})
    for plan in plans:
        if plan.kernel in skip:
            yield json.dumps(None)  # counts as done
            continue
        yield json.dumps({"kernel": plan.kernel, "case": plan.case})
        verdict = examine(plan, clock)
        yield json.dumps(None if verdict is None else asdict(verdict))
    yield json.dumps("end")


def _own_worker() -> tuple[str, ...]:
    """Raises: OSError where this process is no Python that could start another.

    A program that embeds Python would start itself again instead.
    """
    name = os.path.basename(sys.executable or "").lower()
    if not name.startswith("python") or getattr(sys, "frozen", False):
        raise OSError(f"{sys.executable or 'this program'} is no Python interpreter")
    # -P adds no folder of its own to the path; `_started` hands on the one of this process.
    return sys.executable, "-P", "-m", "qwen35_mlx.trials"


@contextmanager
def _started(command: Sequence[str], request: str, seconds: float) -> "Iterator[_Worker]":
    """The process, which is ended in any case."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=env,
            process_group=0,  # Ctrl-C is for this process, which then ends the other
        ) as process,
    ):
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already: there will be no line
                process.stdin.write(request)
                process.stdin.close()
            yield _Worker(process, errors, seconds)
        finally:
            process.kill()


class _Worker:
    """A process that answers a request; it is killed when an answer takes too long.

    ending: why there are no more lines, in words.
    """

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes], seconds: float) -> None:
        self._process, self._errors, self._seconds = process, errors, seconds
        self.ending = ""

    def lines(self) -> Iterator[Any]:
        """What it says, until it ends or is killed."""
        assert self._process.stdout is not None
        while True:
            late = threading.Event()
            timer = threading.Timer(self._seconds, self._stop, [late])
            timer.start()
            try:
                line = self._process.stdout.readline()
            finally:
                timer.cancel()
            if not line.endswith("\n"):
                self.ending = f"gave no answer within {self._seconds:g} s"
                if not late.is_set():
                    self.ending = f"ended the process ({self._last_words()})"
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise RuntimeError(f"it says {line[:80]!r}") from None

    def _stop(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:200]}" if lines else how
