"""The command: options in, streamed text out. A scripted model stands in for a real one."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen35_mlx import __version__, api, family, generate, hub, memory, terminal
from qwen35_mlx.api import Finish, Progress, Usage
from qwen35_mlx.errors import InputError, ModelError
from qwen35_mlx.parse import Reasoning, Text, ToolCall
from qwen35_mlx.sampling import Sampling

ROOT = Path(__file__).parents[1]
USAGE = Usage(1234, 101, 2.0, 4.0, 2.25, 3_500_000_000)
FIGURES = (
    "prompt 1,234 tokens, 617 tokens/s; answer 101 tokens, 25.0 tokens/s; "
    "first token 2.25 s; peak 3.5 GB"
)
Steps = list[list[Any]]


class Scripted:
    """A model that says what the script says; `asked` is what it was called with."""

    size = SimpleNamespace(name="4B")

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.asked: dict[str, Any] = {}

    def prompt(
        self, messages: Any, tools: Any, thinking: bool | None, allow_url: bool
    ) -> SimpleNamespace:
        self.asked |= {
            "messages": messages,
            "tools": tools,
            "thinking": thinking,
            "allow_url": allow_url,
        }
        return SimpleNamespace(thinking=bool(thinking), media=())

    def recommended_sampling(self, prompt: SimpleNamespace) -> Sampling:
        size = family.find("4b")
        assert size is not None
        return family.recommended(size, prompt.thinking, bool(prompt.media))

    def stream(
        self,
        prompt: SimpleNamespace,
        *,
        sampling: Sampling,
        max_tokens: int | None,
        stop: tuple[str, ...],
        cancel: threading.Event,
        progress: Callable[[Progress], None],
    ) -> Iterator[Any]:
        self.asked |= {"sampling": sampling, "max_tokens": max_tokens, "stop": stop}
        reason = "stop"
        for kind, *values in self.steps:
            if kind == "text":
                yield Text(values[0])
            elif kind == "reasoning":
                yield Reasoning(values[0])
            elif kind == "call":
                yield ToolCall(values[0], values[1], "call-1")
            elif kind == "progress":
                progress(Progress("prompt", values[0], values[1]))
            elif kind == "reason":
                reason = values[0]
            elif kind == "sleep":
                ready()
                for _ in range(int(values[0] / 0.01)):
                    if cancel.is_set():
                        begun = ["text"] in [step[:1] for step in self.steps]
                        yield Finish(
                            "cancelled", USAGE if begun else replace(USAGE, generated_tokens=0)
                        )
                        return
                    time.sleep(0.01)
            elif kind == "hang":  # deaf to `cancel`
                time.sleep(values[0])
            elif kind == "raise":
                raise {"fault": RuntimeError, "input": InputError}[values[0]](values[1])
        yield Finish(reason, USAGE)  # type: ignore[arg-type]


def ready() -> None:
    """Tell the test that waits for it that the child is where it should be."""
    if path := os.environ.get("READY"):
        Path(path).touch()


def stand_in(model: Scripted, load_seconds: float = 0.0) -> None:
    """Make the command find `model` whatever is asked for."""

    def load(folder: Path, *, dtype: Any, progress: Callable[[Progress], None]) -> Scripted:
        model.asked |= {"folder": str(folder), "dtype": dtype}
        progress(Progress("load", 1, 2))
        if load_seconds:
            ready()
            time.sleep(load_seconds)
        progress(Progress("load", 2, 2))
        return model

    api.load = load  # type: ignore[assignment]
    hub.resolve = lambda name: hub.Choice(name, "local folder", folder=Path(name))


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", api.load)
    monkeypatch.setattr(hub, "resolve", hub.resolve)
    monkeypatch.delenv("QWEN35_TRACEBACK", raising=False)


class Ask:
    """Runs the command in this process; keeps the scripted model of the last run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(
        self, *argv: str, steps: Steps | None = None, stdin: bytes = b""
    ) -> tuple[int, str, str]:
        self.model = Scripted([["text", "Hi."]] if steps is None else steps)
        stand_in(self.model)
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            generate.main(list(argv))
        out, err = self.capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    @property
    def asked(self) -> dict[str, Any]:
        return self.model.asked


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return Ask(monkeypatch, capsys)


# -- what is asked -----------------------------------------------------------------------------


def test_answer_on_stdout_and_figures_on_stderr(ask: Ask) -> None:
    assert ask("-m", "x", "-p", "Hello", steps=[["text", "One"], ["text", " two"]]) == (
        0,
        "One two\n",
        FIGURES + "\n",
    )
    assert ask.asked["messages"] == [{"role": "user", "content": "Hello"}]
    assert (ask.asked["folder"], ask.asked["dtype"], ask.asked["allow_url"]) == ("x", None, False)


def test_pictures_and_videos_keep_the_order_typed(ask: Ask, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.gif"):
        (tmp_path / name).write_bytes(b"")
    a, b, c = (str(tmp_path / name) for name in ("a.png", "b.png", "c.gif"))
    ask("--image", a, f"--video={c}", "--image", b, "-p", "Q", "--fps", "3", "--system", "S")
    system, user = ask.asked["messages"]
    assert system == {"role": "system", "content": "S"}
    assert user["content"] == [
        {"type": "image", "image": a},
        {"type": "video", "video": c, "fps": 3.0},
        {"type": "image", "image": b},
        {"type": "text", "text": "Q"},
    ]
    # A value that looks like an option must not disturb the order's bookkeeping.
    ask("--video", c, "--prompt", "--image", "--image", b)
    parts = ask.asked["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image", "video", "text"]
    assert parts[-1]["text"] == "--image"


def test_only_typed_urls_may_be_fetched(ask: Ask) -> None:
    ask("--image", "HTTPS://example.org/a.png", "-p", "Q")
    assert ask.asked["allow_url"] is True
    ask("--image", "data:image/png;base64,AAAA", "-p", "http://example.org/a.png")
    assert ask.asked["allow_url"] is False


@pytest.mark.parametrize(
    ("flags", "thinking"), [([], None), (["--thinking"], True), (["--no-thinking"], False)]
)
def test_sampling_is_what_the_model_recommends_unless_given(
    ask: Ask, flags: list[str], thinking: bool | None
) -> None:
    ask("-p", "Q", "--temperature", "0.25", "--seed", "7", *flags)
    size = family.find("4b")
    assert size is not None
    base = family.recommended(size, bool(thinking), False)
    assert ask.asked["thinking"] is thinking
    sampling = ask.asked["sampling"]
    assert (sampling.temperature, sampling.seed) == (0.25, 7)
    assert (sampling.top_p, sampling.presence_penalty) == (base.top_p, base.presence_penalty)


def test_every_option_reaches_the_model(ask: Ask, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    typed = "--top-p 0.5 --top-k 9 --min-p 0.1 --presence-penalty 0.2 --repetition-penalty 1.5"
    limits = ["--max-tokens", "17", "--stop", "END", "--stop", "\n\n", "--dtype", "float32"]
    code, _, err = ask("-p", "Q", "--tools", str(tmp_path / "tools.json"), *typed.split(), *limits)
    assert code == 0, err
    sampling = ask.asked["sampling"]
    found = (sampling.top_p, sampling.top_k, sampling.min_p)
    assert found + (sampling.presence_penalty, sampling.repetition_penalty) == (
        0.5,
        9,
        0.1,
        0.2,
        1.5,
    )
    assert (ask.asked["max_tokens"], ask.asked["stop"]) == (17, ("END", "\n\n"))
    assert (ask.asked["tools"], str(ask.asked["dtype"])) == (tools, "mlx.core.float32")


@pytest.mark.parametrize("argv", [[], ["-p", "-"]])
def test_prompt_comes_from_stdin(ask: Ask, argv: list[str]) -> None:
    ask(*argv, stdin="\ufeffWas ist das? \u00e4\n".encode())
    assert ask.asked["messages"][0]["content"] == "Was ist das? \u00e4\n"


def test_given_prompt_leaves_stdin_alone(ask: Ask) -> None:
    ask("-p", "Q", stdin=b"\xff\xff")
    assert ask.asked["messages"][0]["content"] == "Q"


def test_default_model_is_said_and_fits_the_memory(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for usable in (4_000_000_000, 5_726_623_061):  # the second: two thirds of an 8 GB Mac
        monkeypatch.setattr(memory, "capacity", lambda usable=usable: usable)
        ask("-p", "Q")
        found[usable] = ask.asked["folder"]
    assert list(found.values()) == ["0.8b", "4b"]
    choice = hub.Choice("4b", "newest local conversion of 4B", folder=Path("/m/4b"))
    monkeypatch.setattr(hub, "resolve", lambda _: choice)
    request = SimpleNamespace(model=None)
    generate._say_choice(request, choice)  # type: ignore[arg-type]
    assert ask.capsys.readouterr().err == (
        "no --model given, so 4b: /m/4b (newest local conversion of 4B)\n"
    )


# -- what is said ------------------------------------------------------------------------------


def test_a_pipe_gets_the_answer_and_stderr_the_reasoning(ask: Ask) -> None:
    steps = [["reasoning", "Hm"], ["reasoning", ", so."], ["text", "Yes"]]
    code, out, err = ask("-p", "Q", steps=steps)
    assert (code, out, err) == (0, "Yes\n", f"<think>\nHm, so.\n</think>\n\n{FIGURES}\n")


def test_quiet_says_the_answer_only(ask: Ask) -> None:
    steps = [["reasoning", "Hm"], ["text", "Yes\n"], ["reason", "length"]]
    assert ask("-q", "-p", "Q", steps=steps) == (0, "Yes\n", "")


def test_tool_calls_have_lines_of_their_own(ask: Ask) -> None:
    steps: Steps = [
        ["text", "Let me see"],
        ["call", "f", {"a": [1, "\u00fc"]}],
        ["reason", "tool_calls"],
    ]
    _, out, _ = ask("-p", "Q", steps=steps)
    assert out == 'Let me see\ntool call: f {"a": [1, "\u00fc"]}\n'


def test_the_limit_is_named_when_it_ended_the_answer(ask: Ask) -> None:
    _, out, err = ask("-p", "Q", steps=[["text", "So"], ["reason", "length"]])
    assert (out, err.splitlines()[0]) == (
        "So\n",
        "stopped at the limit of tokens; --max-tokens raises it",
    )


def test_json_is_one_event_per_line_and_harmless_on_a_terminal(ask: Ask) -> None:
    steps: Steps = [
        ["reasoning", "a"],
        ["text", "\x1b[2J\x9b\x7f\u00fc\n"],
        ["call", "f", {"x": 1}],
    ]
    code, out, _ = ask("--json", "-q", "-p", "Q", "--no-thinking", steps=steps)
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)
    start = events.pop(0)
    assert (start["type"], start["size"], start["thinking"]) == ("start", "4B", False)
    assert start["sampling"]["top_k"] == 20
    assert events == [
        {"type": "reasoning", "text": "a"},
        {"type": "text", "text": "\x1b[2J\x9b\x7f\u00fc\n"},
        {"type": "tool_call", "name": "f", "arguments": {"x": 1}, "id": "call-1"},
        {
            "type": "finish",
            "reason": "stop",
            "usage": {
                "prompt_tokens": 1234,
                "generated_tokens": 101,
                "prompt_seconds": 2.0,
                "generation_seconds": 4.0,
                "first_token_seconds": 2.25,
                "peak_bytes": 3_500_000_000,
            },
        },
    ]


def test_figures_of_an_answer_that_never_began() -> None:
    usage = Usage(10, 0, 0.5, 0.0, 0.0, 999)
    assert terminal.figures(usage) == (
        "prompt 10 tokens, 20.0 tokens/s; answer 0 tokens; peak 999 bytes"
    )


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (["-p", "  \n"], b"", "--prompt: the prompt is empty; expected a question. Write one."),
        ([], b"", 'stdin: the prompt is empty; expected a question. Add --prompt "...".'),
        (["-p", "Q", "--model", ""], b"", "--model: the name is empty; expected a folder,"),
        (["-p", "Q", "--max-tokens", "9" * 5000], b"", "Invalid value for '--max-tokens'"),
        ([], b"ab\xff", "stdin: byte 0xff at offset 2 is not UTF-8; expected UTF-8 text."),
        (["-p", "a\udcffb"], b"", "--prompt: is not UTF-8; expected UTF-8 text."),
        (["-p", "Q", "--system", "\udcff"], b"", "--system: is not UTF-8; expected UTF-8 text."),
        (["-p", "Q", "--image", "no.png"], b"", "--image no.png: no such file. Check the path."),
        (["-p", "Q", "--video", "no.mp4"], b"", "--video no.mp4: no such file. Check the path."),
        (["-p", "Q", "--image", "x" * 5000], b"", "--image xxx"),
        (["-p", "Q", "--tools", "no.json"], b"", "--tools no.json: no such file. Check the path."),
        (["-p", "Q", "--temperature", "-1"], b"", "sampling: temperature is -1.0; expected"),
        (["-p", "Q", "--top-p", "nan"], b"", "sampling: top_p is nan; expected"),
        (["-p", "Q", "--max-tokens", "0"], b"", "Invalid value for '--max-tokens': 0 is not in"),
        (["-p", "Q", "--dtype", "int8"], b"", "Invalid value for '--dtype': 'int8' is not one of"),
        (["--prmpt", "Q"], b"", "No such option"),
        (["-p", "Q", "stray"], b"", "Got unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    ask: Ask, argv: list[str], stdin: bytes, message: str
) -> None:
    code, out, err = ask(*argv, stdin=stdin)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {message}"), err
    assert len(err) <= 501
    assert "folder" not in ask.asked  # found before the weights were read


@pytest.mark.parametrize("content", ["{}", "[1]", "{", "\ufeff", "[" * 100_000])
def test_tools_must_be_a_list_of_objects(ask: Ask, tmp_path: Path, content: str) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    code, _, err = ask("-p", "Q", "--tools", str(path))
    assert (code, err.count("\n"), err.startswith(f"error: --tools {path}")) == (2, 1, True), err


def test_errors_while_answering_keep_what_was_said(ask: Ask) -> None:
    code, out, err = ask("-p", "Q", steps=[["text", "So"], ["raise", "input", "x:\n\x1b[31mbad"]])
    assert (code, out, err) == (2, "So\n", "error: x: \u241b[31mbad\n")


def test_a_fault_of_ours_is_one_line_unless_a_traceback_is_asked_for(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [["text", "So"], ["raise", "fault", "boom"]]
    code, _, err = ask("-p", "Q", steps=steps)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: RuntimeError: boom.") and "QWEN35_TRACEBACK=1" in err
    monkeypatch.setenv("QWEN35_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="boom"):
        ask("-p", "Q", steps=steps)


def test_a_model_that_cannot_be_loaded_is_a_mistake(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("x: no config.json; expected a model folder. Check the path.")

    stand_in(Scripted([]))
    monkeypatch.setattr(api, "load", refuse)
    with pytest.raises(SystemExit) as end:
        generate.main(["-m", "x", "-p", "Q"])
    err = ask.capsys.readouterr().err
    assert (end.value.code, err) == (
        2,
        "error: x: no config.json; expected a model folder. Check the path.\n",
    )


def test_help_fits_one_screen(ask: Ask) -> None:
    code, out, _ = ask("--help")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) <= 45, len(lines)
    assert max(map(len, lines)) <= 100
    assert "Example:" in out and "Sampling (" in out
    assert out.index("--max-tokens") < out.index("Sampling (") < out.index("--temperature")


# -- terminals, pipes and signals: real processes ----------------------------------------------

CLOSED_STDIN = "import os, sys; os.close(0); os.execv(sys.argv[1], sys.argv[1:])"
# click is the first import that takes a while.
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, *_):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
runpy.run_module("qwen35_mlx.generate", run_name="__main__")
"""
SERVE = "import sys, json, test_generate as t; t.serve(json.loads(sys.argv[1]), sys.argv[2:])"


def serve(script: dict[str, Any], argv: list[str]) -> None:
    """In a child process: the command with a scripted model."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
    stand_in(Scripted(script["steps"]), script.get("load", 0.0))
    generate.main(argv)


def command(script: dict[str, Any], *argv: str) -> list[str]:
    return [sys.executable, "-c", SERVE, json.dumps(script), "-p", "Q", *argv]


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "QWEN35_TRACEBACK")}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")))
    return env | {"PYTHONPATH": paths, "TERM": "xterm-256color", "COLUMNS": "100"} | more


def spawn(script: dict[str, Any], *argv: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(script, *argv),
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_a_terminal(script: dict[str, Any], *argv: str, **env: str) -> tuple[int, str]:
    """Exit code, and everything the terminal got."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(script, *argv),
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    while True:
        ready, _, _ = select.select([master], [], [], 60)
        assert ready, "the command hangs"
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    return process.wait(60), seen.decode().replace("\r\n", "\n")


def test_reasoning_is_dimmed_on_a_terminal_and_escapes_are_harmless() -> None:
    steps = [["reasoning", "Hm\x1b[31m"], ["text", "\x1b]0;title\x07\x9b2J\u202e\ta\n"]]
    code, seen = on_a_terminal({"steps": steps})
    answer = "\u241b]0;title\u2407\ufffd2J\ufffd\ta\n"
    assert (code, seen) == (0, f"\x1b[2mHm\u241b[31m\x1b[0m\n\n{answer}{FIGURES}\n")


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_reasoning_is_marked_where_dimming_is_not_wanted(env: dict[str, str]) -> None:
    _, seen = on_a_terminal({"steps": [["reasoning", "Hm"], ["text", "Yes"]]}, "-q", **env)
    assert seen == "Yes\n"
    _, seen = on_a_terminal({"steps": [["reasoning", "Hm"], ["text", "Yes"]]}, **env)
    assert seen == f"<think>\nHm\n</think>\n\nYes\n{FIGURES}\n"


def test_a_bar_comes_for_what_takes_long_and_leaves_nothing() -> None:
    steps = [["progress", 1, 9], ["hang", 0.8], ["progress", 5, 9], ["text", "Yes"]]
    _, seen = on_a_terminal({"steps": steps})
    assert "reading the prompt" in seen and "56%" in seen
    assert seen.endswith(f"Yes\n{FIGURES}\n")
    assert "loading" not in seen  # that was over at once


def test_no_bar_without_a_terminal() -> None:
    steps = [["progress", 1, 9], ["hang", 0.8], ["progress", 5, 9], ["text", "Yes"]]
    out, err = spawn({"steps": steps}).communicate(timeout=60)
    assert (out, err) == ("Yes\n", FIGURES + "\n")


def test_ctrl_c_keeps_what_was_said_and_prints_the_figures() -> None:
    process = spawn({"steps": [["text", "So far"], ["sleep", 60], ["text", "never"]]})
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(6) == "So far"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "\n", f"interrupted; {FIGURES}\n")


def test_a_second_ctrl_c_insists() -> None:
    process = spawn({"steps": [["text", "So far"], ["hang", 60]]})
    assert process.stdout is not None
    assert process.stdout.read(6) == "So far"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "\n")
    assert re.fullmatch(r"interrupted while answering, after \d+\.\d s\n", err)


@pytest.mark.parametrize(
    ("script", "stage"),
    [
        ({"steps": [], "load": 60}, "loading the weights"),
        ({"steps": [["sleep", 60]]}, ""),
    ],
)
def test_ctrl_c_before_the_answer(tmp_path: Path, script: dict[str, Any], stage: str) -> None:
    process = spawn(script, READY=str(tmp_path / "ready"))
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    if stage:
        assert re.fullmatch(rf"interrupted while {stage}, after \d+\.\d s\n", err), err
    else:
        said = r"interrupted while reading the prompt, after \d+\.\d s \(1,234 tokens read\)\n"
        assert re.fullmatch(said, err), err


def test_a_closed_pipe_ends_quietly() -> None:
    process = spawn({"steps": [["text", "a\n"], ["sleep", 0.3], *([["text", "b\n"]] * 50)]})
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "a\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">/dev/full", 2, "error: stdout: No space left on device; expected room for the answer."),
        (">&-", 0, "prompt 1,234 tokens"),
        ("2>&- >/dev/null", 0, ""),
    ],
)
def test_a_full_disk_or_a_closed_stream_is_no_traceback(
    redirect: str, code: int, said: str
) -> None:
    if redirect == ">/dev/full" and not Path("/dev/full").exists():
        redirect, code, said = ">&-", 0, "prompt 1,234 tokens"  # macOS has no such device
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {redirect}', "sh", *command({"steps": [["text", "So"]]})],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said), done.stderr


def test_a_broken_stderr_does_not_cost_the_answer() -> None:
    script = {"steps": [["reasoning", "Hm"], ["text", "So"], ["reasoning", "?"], ["text", "."]]}
    full = ["/dev/full"] if Path("/dev/full").exists() else []  # macOS has no such device
    for argv, expected in (([], (0, "So.\n")), (["--prompt", ""], (2, ""))):
        read, pipe = os.pipe()
        os.close(read)
        for broken in (pipe, *(os.open(path, os.O_WRONLY) for path in full)):
            done = subprocess.run(
                command(script, *argv),
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=broken,
                text=True,
                timeout=60,
            )
            os.close(broken)
            assert (done.returncode, done.stdout) == expected


def test_a_closed_stdin_leaves_its_number_to_no_other_file() -> None:
    asked = ["-m", "qwen35_mlx.generate", *DEMO, "-p", "Hello", "-q", "--max-tokens", "1"]
    done = from_checkout("-c", CLOSED_STDIN, sys.executable, *asked)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_during_the_imports_is_no_traceback() -> None:
    done = from_checkout("-c", INTERRUPTED_IMPORT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_utf8_is_read_whatever_the_locale() -> None:
    done = subprocess.run(
        command({"steps": [["text", "a"]]}, "-p", "ä", "--stop", "ü"),
        env=environment(LC_ALL="C", PYTHONUTF8="0"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"a\n"), done.stderr


@pytest.mark.parametrize("asked", ["-h", "--version"])
def test_help_and_versions_need_no_prompt(ask: Ask, asked: str) -> None:
    code, out, err = ask(asked)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: " if asked == "-h" else f"qwen35-mlx {__version__}, mlx ")


def test_an_error_about_a_picture_names_the_option() -> None:
    media = (("image", "a.png"), ("video", "b.gif"))
    for told in ("b.gif: is empty", "is empty"):
        found = generate._as_typed(f"messages[1] (user) part 1: {told}", media)
        assert found == "--video b.gif: is empty"
    assert generate._as_typed("messages[0] (user) part 2: x", media).startswith("messages[0]")


def test_a_narrow_encoding_does_not_end_the_answer() -> None:
    done = subprocess.run(
        command({"steps": [["text", "\u4e2d a"]]}),
        env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"? a\n")


# -- the demonstration model: everything together ----------------------------------------------

PICTURES = ROOT / "examples" / "pictures"
DEMO = ("--model", "examples/demo-model", "--image", "examples/pictures/shapes.png")
# The rows of the table in examples/pictures/README.md: file, question, right answer.
RIGHT = re.findall(
    r"^\| `(\S+)` \([^|]*\| (.+?) \| (.+?) \|$", (PICTURES / "README.md").read_text("utf-8"), re.M
)


def from_checkout(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_make_demo_describes_the_picture() -> None:
    recipe = (ROOT / "Makefile").read_text("utf-8").split("\ndemo:")[1].split("\n\n")[0]
    asked = "Describe this picture."
    assert all(word in recipe for word in (*DEMO, asked))
    done = from_checkout("-m", "qwen35_mlx.generate", *DEMO, "--prompt", asked)
    assert done.returncode == 0, done.stderr
    (answer,) = (answer for file, _, answer in RIGHT if file == "shapes.png")
    assert done.stdout == f"{answer}\n"
    number = r"[\d,]+(\.\d+)?"
    figures = (
        rf"prompt {number} tokens, {number} tokens/s; answer {number} tokens, "
        rf"{number} tokens/s; first token {number} s; peak {number} MB\n"
    )
    assert re.fullmatch(figures, done.stderr), done.stderr


@pytest.mark.parametrize(("file", "question", "answer"), RIGHT, ids=[row[0] for row in RIGHT])
def test_each_sample_gets_the_answer_its_readme_gives(
    file: str, question: str, answer: str
) -> None:
    assert {row[0] for row in RIGHT} == {p.name for p in PICTURES.iterdir()} - {"README.md"}
    kind = "--video" if file.endswith(".gif") else "--image"
    typed = ("--model", "examples/demo-model", kind, f"examples/pictures/{file}", "-p", question)
    done = from_checkout("-m", "qwen35_mlx.generate", *typed, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{answer}\n", "")


def test_the_same_seed_gives_the_same_answer() -> None:
    typed = ("-m", "qwen35_mlx.generate", *DEMO, "-p", "Hello", "-q", "--temperature", "3")
    limits = ("--top-p", "1", "--max-tokens", "24")
    answers = [from_checkout(*typed, *limits, "--seed", s).stdout for s in ("5", "5", "6")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run_as_printed_in_their_first_line(path: Path) -> None:
    first = path.read_text("utf-8").splitlines()[0]
    done = from_checkout(*first.split(".venv/bin/python ")[1].split())
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "Traceback" not in done.stderr
