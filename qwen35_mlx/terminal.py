"""What the commands write: streamed text on stdout; progress, notes and figures on stderr.

Text that a model, a file or a server supplied never reaches a terminal with control characters in
it: an escape sequence could recolour, retitle or rewrite what the person sees.
"""

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Protocol

import click

from .errors import Qwen35Error
from .parse import Event, Reasoning, Text, ToolCall

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from .api import Finish, Usage

FAULT, MISTAKE, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141  # exit codes
TITLES = {
    "download": "downloading",
    "load": "loading the weights",
    "kernels": "trying the kernels on this GPU",
    "prompt": "reading the prompt",
    "answering": "answering",
    "plan": "planning",
    "convert": "converting",
    "finish": "finishing",
    "verify": "verifying",
    "compare": "comparing with the source",
}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
SHOW_CURSOR = b"\x1b[?25h"
LONGEST = 500  # characters of a note; what was typed may be of any length
BAR_DELAY = 0.5  # seconds; what is over sooner needs no bar, and rich need not be imported

# C0 and DEL become their pictures (U+2400 ...), C1 the replacement character; line feed and tab
# stay. Bidirectional overrides can make text read as other text than it is.
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_CONTROLS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_JSON_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def neutral(text: str) -> str:
    """`text` with every control character made visible and harmless; lines and tabs stay."""
    return text.translate(_CONTROLS)


def harmless_line(text: str) -> str:
    """`text` on one harmless line, for errors that quote what they found."""
    return neutral(" ".join(text.split()))


def gigabytes(count: float) -> str:
    """Bytes for people, in decimal units as disks and file listings count them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def note(text: str) -> None:
    """One line on stderr; a long one keeps its end, which says what to do."""
    line = harmless_line(text)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 205]} ... {line[-200:]}"
    _remark(line + "\n")


def _remark(text: str) -> None:
    """Onto stderr, where that can be written: its failure must not cost the answer on stdout."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _abandon(2)


class Bar:
    """One line of progress on a terminal; comes only when there is something to wait for.

    in_bytes: the units are bytes, so that their number and speed are worth saying.
    """

    def __init__(self, shown: bool, in_bytes: bool = False) -> None:
        self.shown, self.in_bytes = shown, in_bytes
        self.title = ""
        self.begin = 0.0
        self.rich: RichProgress | None = None
        self.task: TaskID | None = None

    def update(self, title: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` units of what `title` names; another title begins another bar.

        detail: stands behind the title and may change.
        """
        if not self.shown:
            return
        if title != self.title:
            self.close()
            self.title, self.begin = title, time.monotonic()
        if self.rich is None and time.monotonic() - self.begin < BAR_DELAY:
            return
        if self.rich is None:
            self.rich = _rich_bar(self.in_bytes)
            self.rich.start()
            # What was done before is no part of the speed.
            self.task = self.rich.add_task(title, total=total, completed=done)
        if self.task is not None:
            said = f"{title} {detail}".rstrip()
            self.rich.update(self.task, completed=done, total=total, description=said)

    def close(self) -> None:
        """Take the line away; the next `update` begins anew."""
        if self.rich is not None:
            self.rich.stop()
        self.rich, self.task, self.title = None, None, ""


def _rich_bar(in_bytes: bool) -> "RichProgress":
    from rich import progress
    from rich.console import Console

    columns = [progress.BarColumn(), progress.TaskProgressColumn(), progress.TimeRemainingColumn()]
    if in_bytes:
        columns[1:1] = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    return progress.Progress(
        "{task.description}",
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


class Stage:
    """What a command is busy with, for its bar and for the line that Ctrl-C leaves."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.title, self.begin = bar, "starting", time.monotonic()

    def enter(self, name: str) -> None:
        """From now on it is `name`, a key of TITLES."""
        if TITLES[name] != self.title:
            self.bar.close()
            self.title, self.begin = TITLES[name], time.monotonic()

    def report(self, name: str, done: int, total: int, detail: str = "") -> None:
        """`name` has come to `done` of `total`."""
        self.bar.update(TITLES[name], done, total, detail)

    def interrupted(self) -> str:
        """The line that Ctrl-C leaves where there are no figures yet."""
        return f"interrupted while {self.title}, after {time.monotonic() - self.begin:.1f} s"


class Output(Protocol):
    """Where the events of one answer go."""

    def start(self, **about: Any) -> None: ...
    def event(self, event: Event) -> None: ...
    def finish(self, finish: "Finish") -> None: ...
    def close(self) -> None: ...


class JsonWriter:
    """One JSON object per line on stdout; control characters are escaped, C1 and DEL too."""

    def start(self, **about: Any) -> None:
        """What answers, and how."""
        self._line({"type": "start", **about})

    def event(self, event: Event) -> None:
        """A piece of reasoning or answer, or a tool call."""
        kind = {Text: "text", Reasoning: "reasoning", ToolCall: "tool_call"}[type(event)]
        self._line({"type": kind, **asdict(event)})

    def finish(self, finish: "Finish") -> None:
        """Why it ended, and the figures."""
        self._line({"type": "finish", **asdict(finish)})

    def close(self) -> None:
        """Every line is whole already."""

    def _line(self, values: dict[str, Any]) -> None:
        print(json.dumps(values, ensure_ascii=False).translate(_JSON_CONTROLS), flush=True)


class Writer:
    """Streams reasoning and answer so that a person tells them apart, and a pipe gets the answer.

    On a terminal reasoning is dimmed, or lies between <think> marks where NO_COLOR or TERM=dumb
    forbid that. With stdout elsewhere only the answer goes there, and reasoning goes to stderr.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.answer: IO[str] = sys.stdout
        self.aside: IO[str] = sys.stdout if sys.stdout.isatty() else sys.stderr
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.dim = self.aside.isatty() and not plain
        self.thinking = False
        self.last = "\n"  # last character of the answer

    def start(self, **_about: Any) -> None:
        """Nothing is said before the answer."""

    def event(self, event: Event) -> None:
        """A piece of reasoning or answer, or a tool call on a line of its own."""
        if isinstance(event, Reasoning):
            self._think(event.text)
        elif isinstance(event, Text):
            self._say(event.text)
        else:
            self.close()
            arguments = json.dumps(event.arguments, ensure_ascii=False)
            self._say(f"tool call: {event.name} {arguments}\n")

    def finish(self, _finish: "Finish") -> None:
        """The figures are the command's to say."""
        self.close()

    def close(self) -> None:
        """End what was begun, so that what follows starts on a line of its own."""
        self._end_thinking()
        if self.last != "\n":
            self._say("\n")

    def _say(self, text: str) -> None:
        self._end_thinking()
        self.last = text[-1:] or self.last
        # The model's text: untouched into files and pipes, harmless on a terminal.
        self.answer.write(neutral(text) if self.answer.isatty() else text)
        self.answer.flush()

    def _think(self, text: str) -> None:
        if self.quiet:
            return
        if not self.thinking:
            self.thinking = True
            self._put_aside(DIM if self.dim else "<think>\n")
        self._put_aside(neutral(text) if self.aside.isatty() else text)

    def _end_thinking(self) -> None:
        if self.thinking:
            self.thinking = False
            self._put_aside(f"{PLAIN}\n\n" if self.dim else "\n</think>\n\n")

    def _put_aside(self, text: str) -> None:
        if self.aside is sys.stderr:
            _remark(text)
        else:
            self.aside.write(text)
            self.aside.flush()


def figures(usage: "Usage") -> str:
    """The closing line: tokens, speeds, time to the first token, peak memory."""
    prompt = _rate(usage.prompt_tokens, usage.prompt_seconds)
    # The first token comes out of reading the prompt.
    generated = _rate(usage.generated_tokens - 1, usage.generation_seconds)
    parts = [
        f"prompt {usage.prompt_tokens:,} tokens{prompt}",
        f"answer {usage.generated_tokens:,} tokens{generated}",
        f"peak {gigabytes(usage.peak_bytes)}",
    ]
    if usage.generated_tokens:
        parts.insert(2, f"first token {usage.first_token_seconds:.2f} s")
    return "; ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    if tokens <= 0 or seconds <= 0:
        return ""
    rate = tokens / seconds
    return f", {rate:,.0f} tokens/s" if rate >= 100 else f", {rate:.1f} tokens/s"


@contextmanager
def asking_first(cancel: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `cancel`, so that the answer so far is closed in order; a second one insists."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    with _handling(handle):
        yield


@contextmanager
def leaving_at_once(quiet: bool) -> Iterator[None]:
    """Ctrl-C ends the process now: the Hub's client would first finish the files in flight."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        with suppress(OSError):
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)  # the bar hid it
            if not quiet:
                os.write(2, b"\ninterrupted; the download goes on from here next time\n")
        os._exit(INTERRUPTED)

    with _handling(handle):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def guarded(command: click.Command, argv: list[str], prog: str) -> int:
    """Run a command; whatever goes wrong is one line on stderr. Returns the exit code.

    QWEN35_TRACEBACK=1 lets the traceback of an error that is our fault through.
    """
    _prepare_streams()
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with command.make_context(prog, argv) as context:
            return int(command.invoke(context) or 0)
    except click.exceptions.Exit as end:  # --help
        return end.exit_code
    except click.ClickException as error:
        note(f"error: {error.format_message()} `{prog} --help` lists the options.")
    except Qwen35Error as error:
        note(f"error: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _abandon(1)
        return CLOSED_PIPE
    except Exception as error:
        if os.environ.get("QWEN35_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _abandon(1)
            note(f"error: stdout: {error.strerror}; expected room for the answer. Free some.")
            return MISTAKE
        note(
            f"error: {type(error).__name__}: {error}. This is a fault of the program, please "
            "report it; QWEN35_TRACEBACK=1 shows where it happened."
        )
        return FAULT
    return MISTAKE


def _prepare_streams() -> None:
    """A stream that was closed (`>&-`) swallows; a Latin-1 terminal must not end the answer.

    Its number must not fall to the next file opened: MLX takes a file numbered 0 for a failure,
    and what is written to stderr would go into a file numbered 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _abandon(number: int) -> None:
    """Python flushes stdout and stderr once more at exit; that must not fail and complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
