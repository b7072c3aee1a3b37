"""`qwen35-mlx convert`: a model in, a complete folder for MLX out. Exit codes as of `generate`."""

import sys
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qwen35_mlx import hub, terminal
from qwen35_mlx.commands import Command
from qwen35_mlx.errors import ConversionError, Qwen35Error, shown
from qwen35_mlx.family import SIZES
from qwen35_mlx.terminal import gigabytes, harmless_line, note

from . import folder, origin, overview, place, published
from .job import Progress, convert
from .options import options
from .origin import Found, Model
from .overview import Overview
from .plan import Plan, plan
from .request import Request, read_text, require_sense
from .told import Told


@click.command(
    cls=Command,
    examples=("9b --plan", "Qwen/Qwen3.5-9B --bits 4 --out qwen-9b-4bit"),
)
@click.argument("model", required=False)
@click.option("-b", "--bits", type=int, metavar="N", help="3, 4 (default), 5, 6, 8, or 16: BF16.")
@click.option(
    "--mode", default="affine", metavar="MODE", help="affine (default), mxfp4, mxfp8 or nvfp4."
)
@click.option("--group-size", type=int, metavar="N", help="Weights per scale: 32, 64 or 128.")
@click.option(
    "--recipe", metavar="NAME", help="careful: sensitive matrices get more bits; or uniform."
)
@click.option("--vision-bits", type=int, default=16, metavar="N", help="Vision tower: 8, or 16.")
@click.option("--shard-size", default="5GB", metavar="SIZE", help="Largest file, such as 5GB.")
@click.option("-o", "--out", metavar="DIR", help="The new folder; with --all the one they lie in.")
@click.option("--all", "every", is_flag=True, help="All eight sizes, the smallest first.")
@click.option(
    "--plan", is_flag=True, help="Say what would be made and needed; download no weights."
)
@click.option("--stream", is_flag=True, help="Keep few source files on the disk at a time.")
@click.option("--revision", metavar="SHA", help="Commit of the Hub's repository.")
@click.option("--verify", metavar="DIR", help="Check every byte of a folder made before; no MODEL.")
@click.option("--report", is_flag=True, help="Then tell the error of each class of matrices.")
@click.option("--text", metavar="FILE", help="And the KL divergence on this text, with --report.")
@click.pass_context
def command(ctx: click.Context, /, **values: Any) -> int:
    """Make a folder for MLX of a Qwen3.5 MODEL: language model, vision tower and MTP head.

    MODEL is a Hub id, a size such as 4b (its original weights are fetched), or a local folder in
    BF16, FP8 or MLX's form. An interrupted conversion goes on with the same command.
    """
    given = tuple(
        "MODEL" if isinstance(parameter, click.Argument) else parameter.opts[-1]
        for parameter in ctx.command.params
        if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    )
    form = ("bits", "mode", "group_size", "recipe", "vision_bits", "shard_size")
    asked = options(**{key: values.pop(key) for key in form})
    return run(Request(given=given, options=asked, **values))


def main(argv: list[str] | None = None, prog: str = "python -m qwen35_mlx.convert") -> None:
    """Run the command and exit the process; `argv` without the program's name."""
    sys.exit(terminal.guarded(command, sys.argv[1:] if argv is None else argv, prog))


def run(request: Request) -> int:
    """Do what was asked for. Returns the exit code.

    Raises: Qwen35Error for what the user can mend.
    """
    require_sense(request)
    told = Told()
    try:
        if request.verify is not None:
            return _verify(place.named(request.verify), told)
        if request.plan:
            _say_plan(request)
            return 0
        if request.every:
            return _make_all(request, told)
        model = _model(request)
        return _make(request, model, _out(request, model), told)
    except KeyboardInterrupt:
        told.bar.close()
        note(told.interrupted())
        return terminal.INTERRUPTED
    finally:
        told.bar.close()


# -- what was asked ----------------------------------------------------------------------------


def _model(request: Request) -> Model:
    assert request.model is not None
    model = origin.model_of(request.model)
    if model.folder is not None and request.revision is not None:
        raise ConversionError(
            f"--revision: given with {shown(model.folder)}, a local folder; expected a Hub id. "
            "Leave it out."
        )
    return model


def _out(request: Request, model: Model) -> Path:
    """The folder to be made."""
    if request.out is not None and not request.every:
        return place.named(request.out)
    parent = place.named(request.out) if request.out else hub.models()
    return parent / f"{model.name.rpartition('/')[2]}-{request.options.label}"


# -- plan --------------------------------------------------------------------------------------


def _say_plan(request: Request) -> None:
    if request.every:
        models = [Model(size.hf_id, size=size) for size in SIZES]
        text = overview.several([_overview(request, m, _out(request, m)) for m in models])
    else:
        model = _model(request)
        text = overview.single(_overview(request, model, _out(request, model)))
    click.echo(terminal.neutral(text))


def _overview(request: Request, model: Model, out: Path) -> Overview:
    """What a conversion would need, without fetching weights."""
    with place.explained(out):
        found = origin.headers(model, out, request.stream, request.revision)
        return place.assessed(model, out, found, plan(found.source, request.options))


# -- make --------------------------------------------------------------------------------------


def _make_all(request: Request, told: Told) -> int:
    """Every size; one that fails is told again at the end."""
    failed: list[str] = []
    code = 0
    for size in SIZES:
        model = Model(size.hf_id, size=size)
        try:
            if _make(request, model, _out(request, model), told):
                code = terminal.FAULT
                failed.append(f"{size.name}: verification found problems; see above")
        except Qwen35Error as error:
            code = code or terminal.MISTAKE
            told.end(f"error: {error}")
            failed.append(f"{size.name}: {error}")
    for line in failed:
        note(f"failed: {line}")
    return code


def _make(request: Request, model: Model, out: Path, told: Told) -> int:
    """Make and verify one folder, or verify the one that is there. Returns the exit code."""
    begin = time.monotonic()
    told.partial = folder.partial_of(out)
    planned = None
    with place.explained(out):
        if model.folder is not None:
            folder.require_apart(model.folder, out)
        if folder.is_made(out, model.name, request.options):
            _require_same_source(request, model, out)
        else:
            planned = _convert(request, model, out, told)
        folder.tidy(out)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if code := _say_problems(out, told):
        return code
    bits = f", {planned.bits_per_weight:.2f} bits per weight" if planned else ""
    done = "done" if planned else "complete already, and verified"
    told.end(f"{done}: {shown(out)}, {gigabytes(size)}{bits}, {time.monotonic() - begin:.1f} s")
    if request.report:
        _say_report(request, model, out, told)
    return 0


def _require_same_source(request: Request, model: Model, out: Path) -> None:
    """Compare the complete `out` with what is known of the model without fetching it."""
    found = origin.here(model, request.revision)
    if found is not None:
        now = folder.state_of(found.source, model.name, found.revision, request.options)
        folder.require_same_source(out, now)
    elif request.revision is not None:
        commit = origin.commit(model, request.revision)
        folder.require_same_source(out, {"source": {"name": model.name, "revision": commit}})


def _convert(request: Request, model: Model, out: Path, told: Told) -> Plan:
    """Bring the source and convert it. Returns the plan that was carried out."""
    place.require_writable(out)
    found = _found(request, model, out, told)
    planned = plan(found.source, request.options)
    place.require_room(place.assessed(model, out, found, planned))
    if found.lacks:
        note(f"note: {model.name}: {found.lacks}; the new folder will have none either.")
    read, written = gigabytes(planned.source_bytes), gigabytes(planned.output_bytes)

    def report(now: Progress) -> None:
        if not told.is_converting:
            told.enter("plan", f"{model.name}, {read} to read, {written} to write")
        tensors = f"{now.tensors:,} of {now.total_tensors:,} tensors"
        of_all = f"{gigabytes(now.done_bytes)} of {gigabytes(now.total_bytes)}"
        told.enter("convert", f"{tensors} done, {of_all}")
        told.stage.report("convert", now.done_bytes, now.total_bytes, tensors)
        if (now.tensors, now.done_bytes) == (now.total_tensors, now.total_bytes):
            told.enter("finish", f"{len(planned.files)} files, {written}")

    convert(
        found.source,
        out,
        request.options,
        name=model.name,
        revision=found.revision,
        supply=found.supply,
        progress=report,
    )
    return planned


def _found(request: Request, model: Model, out: Path, told: Told) -> Found:
    """The source, ready to be read: here, streamed, or after its download."""
    found = origin.here(model, request.revision)
    if found is None and request.stream:
        found = origin.streamed(model, out, request.revision)
    return found or origin.of_snapshot(_downloaded(request, model, out, told))


def _downloaded(request: Request, model: Model, out: Path, told: Told) -> Path:
    """The folder in the Hugging Face cache, after what is missing of it was fetched."""
    if request.revision is not None:
        raise ConversionError(
            f"--revision: {request.revision} of {model.name} is not in the Hugging Face cache; "
            "only --stream fetches another commit than the newest. Add --stream."
        )
    choice = hub.resolve(model.name)
    if choice.folder is not None:
        return choice.folder
    if model.size is not None:
        source = published.source(model.size)
        found = Found(source, "published shapes", download=choice.bytes)
        place.require_room(place.assessed(model, out, found, plan(source, request.options)))
    figures = f"{gigabytes(choice.bytes)} to download, {gigabytes(choice.free)} free"
    told.enter("download", f"{choice.repo}, {figures} in {choice.cache}", always=True)
    with terminal.leaving_at_once(quiet=False):
        return hub.download(choice, lambda d, t: told.stage.report("download", d, t))


# -- check and report --------------------------------------------------------------------------


def _verify(made: Path, told: Told) -> int:
    """Check a folder that was made before. Returns the exit code."""
    begin = time.monotonic()
    code = _say_problems(made, told)
    if not code:
        size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        told.end(f"verified: {shown(made)}, {gigabytes(size)}, {time.monotonic() - begin:.1f} s")
    return code


def _say_problems(made: Path, told: Told) -> int:
    """Verify a folder; problems go to stdout, one per line. Returns the exit code."""
    from . import verify

    def progress(done: int, total: int) -> None:
        told.enter("verify", gigabytes(total))
        told.stage.report("verify", done, total)

    problems = verify.verify(made, progress)
    told.bar.close()
    for line in problems:
        click.echo(harmless_line(line))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        told.end(f"{shown(made)}: {count} found. Remove the folder and convert again.")
        return terminal.FAULT
    return 0


def _say_report(request: Request, model: Model, out: Path, told: Told) -> None:
    """Compare the folder with its source and print the table."""
    from . import report

    found = _found(request, model, out, told)
    text = None if request.text is None else read_text(request.text)

    def progress(done: int, total: int) -> None:
        told.enter("compare", f"{shown(out)} with {model.name}")
        told.stage.report("compare", 2 * done, 2 * total)  # of weights, two bytes each

    made = report.report(found.source.folder, out, text, progress)
    told.bar.close()
    click.echo(terminal.neutral(made.table()))
