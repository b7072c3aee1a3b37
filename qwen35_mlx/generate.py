"""`python -m qwen35_mlx.generate`: options in, streamed text out. README.md lists exit codes."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Ctrl-C during the imports below is no traceback; `terminal.guarded` then takes over.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import re
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import terminal
from .commands import Command
from .errors import InputError, OutOfMemory, shown
from .terminal import gigabytes, note

if TYPE_CHECKING:
    from .api import Finish, Prompt, Qwen35
    from .hub import Choice

DEFAULT_MODEL, SMALL_MODEL = "4b", "0.8b"
SMALL_MEMORY = 5_000_000_000  # usable bytes below which SMALL_MODEL is the default
MEDIA = ("--image", "--video")
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
)


@dataclass(frozen=True)
class Request:
    """The options as typed; `media` holds ("image" or "video", source) in the order typed."""

    model: str | None
    prompt: str | None
    system: str | None
    media: tuple[tuple[str, str], ...]
    fps: float | None
    thinking: bool | None
    tools: str | None
    max_tokens: int | None
    stop: tuple[str, ...]
    json: bool
    quiet: bool
    dtype: str | None
    sampling: dict[str, Any]  # only what was given


class Generate(Command):
    """A command that remembers the order of --image and --video, and groups its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # click keeps one list per option; which came first is only in the arguments.
        ctx.meta["media"] = [name for arg in args if (name := arg.split("=", 1)[0]) in MEDIA]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], "Sampling": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                record = record[0], record[1].replace("x>=1", "at least 1")
                groups["Sampling" if parameter.name in SAMPLING else "Options"].append(record)
        groups["Sampling (default: as recommended for the size and mode)"] = groups.pop("Sampling")
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=36)


def _known_dtype(ctx: click.Context, option: click.Parameter, name: str | None) -> str | None:
    """One of the loader's types, which is imported only for a name: it takes a while."""
    if name is None:
        return None
    from .shapes import DTYPES

    return click.Choice(list(DTYPES)).convert(name, option, ctx)


def _say_versions(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        from . import __version__ as ours

        click.echo(f"qwen35-mlx {ours}, mlx {version('mlx')}")
        ctx.exit()


@click.command(cls=Generate, examples=['--model 4b --image photo.jpg --prompt "What is this?"'])
@click.option(
    "-m", "--model", metavar="NAME", help="Folder, Hub id, or size: 0.8b 2b 4b (default) 9b ..."
)
@click.option("-p", "--prompt", metavar="TEXT", help="The question; - or none reads it from stdin.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--image", multiple=True, metavar="FILE", help="Picture: file or URL. Repeatable.")
@click.option("--video", multiple=True, metavar="PATH", help="Video: file, GIF, folder of frames.")
@click.option(
    "--fps", type=float, metavar="N", help="Frames per second; of a folder 24 unless said."
)
@click.option("--thinking/--no-thinking", default=None, help="Reason first? Default: the model's.")
@click.option("--tools", metavar="FILE", help="JSON list of tools in OpenAI's form.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Stop after N tokens.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON event per line.")
@click.option("-q", "--quiet", is_flag=True, help="The answer only: no reasoning, bar or figures.")
@click.option(
    "--dtype",
    callback=_known_dtype,
    metavar="TYPE",
    help="Type of activations, such as float32.",
)
@click.option("--temperature", type=float, metavar="X", help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, metavar="X", help="Keep the likeliest tokens up to this sum.")
@click.option("--top-k", type=int, metavar="N", help="Keep the N likeliest tokens.")
@click.option("--min-p", type=float, metavar="X", help="Drop tokens below X times the likeliest.")
@click.option("--presence-penalty", type=float, metavar="X", help="Against words already said.")
@click.option("--repetition-penalty", type=float, metavar="X", help="The same, by a factor.")
@click.option("--seed", type=int, metavar="N", help="Repeat the same random choices.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_versions,
    help="Say the versions of this and of MLX.",
)
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> int:
    """Ask Qwen3.5 one question, with pictures and videos if you like.

    The answer goes to stdout as it is made. Reasoning is dimmed on a terminal, and goes to stderr
    when stdout is a file or pipe. Speed and memory are said on stderr at the end.
    """
    images, videos = list(given.pop("image")), list(given.pop("video"))
    order: list[str] = ctx.meta["media"]
    if order.count("--image") != len(images) or order.count("--video") != len(videos):
        # Some option's value looks like one of ours ("--prompt --image"): take pictures first.
        order = ["--image"] * len(images) + ["--video"] * len(videos)
    media = tuple(
        (name.lstrip("-"), (images if name == "--image" else videos).pop(0)) for name in order
    )
    given["stop"] = tuple(_valid(text, "--stop") for text in given["stop"])
    sampling = {key: value for key in SAMPLING if (value := given.pop(key)) is not None}
    return run(Request(media=media, sampling=sampling, json=given.pop("as_json"), **given))


def main(argv: list[str] | None = None, prog: str = "python -m qwen35_mlx.generate") -> None:
    """Run the command and exit the process; `argv` without the program's name."""
    sys.exit(terminal.guarded(command, sys.argv[1:] if argv is None else argv, prog))


def run(request: Request) -> int:
    """Answer one request. Returns the exit code.

    Raises: Qwen35Error for what the user can mend; KeyboardInterrupt before anything was said.
    """
    # What is cheap to check is checked before the weights are read or fetched.
    from .sampling import Sampling

    Sampling(**request.sampling)
    if request.model == "":
        raise InputError("--model: the name is empty; expected a folder, Hub id or size. Name one.")
    messages = _messages(request)
    tools = _tools(request.tools)
    bar = terminal.Bar(not request.quiet and sys.stderr.isatty())
    stage = terminal.Stage(bar)
    try:
        model, folder = _load(request, stage)
        typed_urls = any(_is_url(source) for _, source in request.media)
        stage.enter("prompt")
        try:
            prompt = model.prompt(messages, tools, request.thinking, allow_url=typed_urls)
        except InputError as error:
            raise InputError(_as_typed(str(error), request.media)) from None
        return _stream(request, model, folder, prompt, stage)
    except KeyboardInterrupt:
        bar.close()
        if not request.quiet:
            note(stage.interrupted())
        return terminal.INTERRUPTED
    finally:
        bar.close()


def _as_typed(message: str, media: tuple[tuple[str, str], ...]) -> str:
    """An error about a part of the conversation, as one about the option that put it there."""
    found = re.match(r"messages\[\d+\] \(user\) part (\d+): ", message)
    if found is None or int(found[1]) >= len(media):
        return message
    kind, source = media[int(found[1])]
    told = message[found.end() :].removeprefix(f"{shown(source)}: ")
    return f"--{kind} {shown(source)}: {told}"


def _load(request: Request, stage: terminal.Stage) -> "tuple[Qwen35, str]":
    """The model, and the folder or repository it came from; says so when it was not typed."""
    from . import api, hub
    from .shapes import DTYPES

    choice = hub.resolve(_default_model() if request.model is None else request.model)
    if not request.quiet:
        _say_choice(request, choice)
    if choice.folder is None:
        _refuse_oversize(choice)
        stage.enter("download")
        with terminal.leaving_at_once(request.quiet):
            folder = hub.download(choice, lambda d, t: stage.report("download", d, t))
    else:
        folder = choice.folder
    stage.enter("load")
    dtype = DTYPES[request.dtype] if request.dtype else None
    model = api.load(folder, dtype=dtype, progress=lambda p: stage.report(p.stage, p.done, p.total))
    return model, str(folder)


def _default_model() -> str:
    from . import memory

    return DEFAULT_MODEL if memory.capacity() >= SMALL_MEMORY else SMALL_MODEL


def _say_choice(request: Request, choice: "Choice") -> None:
    chosen = "" if request.model is not None else f"no --model given, so {choice.name}: "
    if choice.folder is None:
        note(
            f"{chosen}{choice.repo} ({choice.why}), {gigabytes(choice.bytes)} to download, "
            f"{gigabytes(choice.free)} free in {choice.cache}"
        )
    elif choice.why != "local folder":
        note(f"{chosen}{choice.folder} ({choice.why})")


def _refuse_oversize(choice: "Choice") -> None:
    from . import family, memory

    usable = memory.capacity()
    if choice.total_bytes > usable:
        raise OutOfMemory(
            f"{choice.repo}: its files are {gigabytes(choice.total_bytes)}; a model can use "
            f"{gigabytes(usable)} of memory here. {family.fits_advice(usable)}"
        )


def _messages(request: Request) -> list[dict[str, Any]]:
    """The conversation to be continued, in OpenAI's form."""
    text = _prompt_text(request.prompt)
    parts: list[dict[str, Any]] = []
    for kind, source in request.media:
        is_file = not _is_url(source) and not source.startswith("data:")
        if is_file and not os.path.exists(source):  # Path.exists raises for a very long name
            raise InputError(f"--{kind} {source}: no such file. Check the path.")
        part: dict[str, Any] = {"type": kind, kind: source}
        if kind == "video" and request.fps is not None:
            part["fps"] = request.fps
        parts.append(part)
    content = [*parts, {"type": "text", "text": text}] if parts else text
    system = [{"role": "system", "content": _valid(request.system, "--system")}]
    return (system if request.system else []) + [{"role": "user", "content": content}]


def _prompt_text(given: str | None) -> str:
    from_stdin = given is None or given == "-"
    if from_stdin and (sys.stdin is None or (given is None and sys.stdin.isatty())):
        raise InputError('no prompt; expected --prompt TEXT, or text on stdin. Add --prompt "...".')
    if not from_stdin:
        text, where = _valid(given, "--prompt"), "--prompt"
    else:
        if sys.stdin.isatty():
            note("type the prompt, then Ctrl-D on a line of its own")
        text, where = _decoded(sys.stdin.buffer.read()), "stdin"
    if not text.strip():
        advice = 'Add --prompt "...".' if from_stdin else "Write one."
        raise InputError(f"{where}: the prompt is empty; expected a question. {advice}")
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"stdin: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "expected UTF-8 text. Convert it first, for example with iconv."
        ) from None


def _valid(text: str | None, where: str) -> str:
    """Bytes that the locale cannot read arrive as lone surrogates; they may be UTF-8 still."""
    text = text or ""
    if not any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise InputError(f"{where}: is not UTF-8; expected UTF-8 text. Convert it first.") from None


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def _tools(path: str | None) -> list[dict[str, Any]] | None:
    if path is None:
        return None
    if not os.path.exists(path):
        raise InputError(f"--tools {path}: no such file. Check the path.")
    try:
        tools = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--tools {path}: {error}; expected a JSON file. Check it.") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"--tools {path}: expected a JSON list of tool objects. See README.md.")
    return tools


def _stream(
    request: Request, model: "Qwen35", folder: str, prompt: "Prompt", stage: terminal.Stage
) -> int:
    """Say the answer as it comes; the first Ctrl-C asks the engine to stop, the second insists."""
    from .api import Finish

    sampling = replace(model.recommended_sampling(prompt), **request.sampling)
    output = terminal.JsonWriter() if request.json else terminal.Writer(request.quiet)
    output.start(
        folder=folder,
        size=model.size.name if model.size else None,
        thinking=prompt.thinking,
        sampling=asdict(sampling),
    )
    cancel = threading.Event()
    try:
        with terminal.asking_first(cancel):
            for event in model.stream(
                prompt,
                sampling=sampling,
                max_tokens=request.max_tokens,
                stop=request.stop,
                cancel=cancel,
                progress=lambda p: stage.report(p.stage, p.done, p.total),
            ):
                if isinstance(event, Finish):
                    return _finish(request, event, output, stage)
                stage.enter("answering")
                output.event(event)
    finally:
        output.close()
    raise ValueError("the stream ended without a Finish")


def _finish(
    request: Request, finish: "Finish", output: terminal.Output, stage: terminal.Stage
) -> int:
    """Close the answer and say the figures. Returns the exit code."""
    output.finish(finish)
    stage.bar.close()
    interrupted = finish.reason == "cancelled"
    if request.quiet:
        pass
    elif interrupted and not finish.usage.generated_tokens:
        note(f"{stage.interrupted()} ({finish.usage.prompt_tokens:,} tokens read)")
    else:
        if finish.reason == "length":
            note("stopped at the limit of tokens; --max-tokens raises it")
        note(("interrupted; " if interrupted else "") + terminal.figures(finish.usage))
    return terminal.INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    main()
