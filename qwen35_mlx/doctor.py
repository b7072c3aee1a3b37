"""`qwen35-mlx doctor`: which kernels this Mac's GPU runs rightly and faster.

Exit codes as of `generate`.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from . import terminal
from .commands import Command

if TYPE_CHECKING:
    from .proof import Verdict
    from .shapes import Shapes

HEADINGS = ("kernel", "tried with", "error", "limit", "us", "MLX us", "GB/s", "chip", "used")
NO_GPU = (
    "Metal is not available on this machine: MLX's own operations are used\n"
    "throughout, and there is nothing to check."
)


@click.command(cls=Command, examples=("4b", "my-folder --json"))
@click.argument("model", default="4b")
@click.option("-b", "--bits", type=int, metavar="N", help="Of a size: 3, 4 (default), 5, 6, 8, 16.")
@click.option(
    "--recipe",
    metavar="NAME",
    help="Of a size: careful or uniform, instead of what `generate` loads.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(model: str, bits: int | None, recipe: str | None, as_json: bool) -> int:
    """Check and time every Metal kernel on this very GPU, with the shapes of MODEL.

    MODEL is a size (4b unless said) as `generate` takes it, a Hub id or a local folder; no weights
    are read. A kernel is used if its results are those of MLX's own operations and it is at least
    as fast in all that it was tried with together; otherwise these run in its place. What is found
    is remembered for this chip, macOS, MLX and version, in the place of what was found before; the
    first load of a model does the same by itself. QWEN35_REFERENCE=1 uses no kernel.

    The makers have executed every kernel's Metal source on a CPU, and none on an Apple GPU yet:
    this check, on your Mac, is the first.
    """
    from . import choice, shapes, subject

    title, config, formats = subject.as_loaded(model, bits, recipe)
    if not choice.has_gpu():
        print(json.dumps({"metal": False}) if as_json else NO_GPU)
        return 0
    asked = shapes.shapes_of(config, formats, shapes.DTYPES[config.dtype])
    verdicts = examined(asked)
    about = choice.combination(asked)
    off = choice.wants_reference()
    if as_json:
        print(json.dumps(_as_json(title, about, verdicts, off)))
    else:
        print(terminal.neutral(report(title, about, verdicts, _bandwidth(), off)))
    if choice.remembered(asked) is None:
        terminal.note("note: this could not be remembered; the next load tries the kernels again.")
    return 0


def main(argv: list[str] | None = None, prog: str = "python -m qwen35_mlx.doctor") -> None:
    """Run the command and exit the process; `argv` without the program's name."""
    sys.exit(terminal.guarded(command, sys.argv[1:] if argv is None else argv, prog))


def examined(shapes: "Shapes") -> "list[Verdict]":
    """Try every kernel now, with a bar.

    Raises: ModelError when that cannot be done here.
    """
    from . import choice
    from .errors import ModelError

    bar = terminal.Bar(sys.stderr.isatty())
    stage = terminal.Stage(bar)
    stage.enter("kernels")
    try:
        return choice.examined(shapes, lambda done, total: stage.report("kernels", done, total))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"kernels: cannot be tried in a process of their own: {error}; expected a Python that "
            "runs qwen35_mlx.trials. MLX's own operations are used until then."
        ) from None
    finally:
        bar.close()


def _bandwidth() -> float | None:
    from . import chips, choice

    device = choice.gpu()
    return chips.bandwidth(str(device.get("device_name")), int(device.get("memory_size", 0)))


def report(
    title: str,
    about: dict[str, Any],
    verdicts: "Sequence[Verdict]",
    bandwidth: float | None,
    off: bool = False,
) -> str:
    """The table. bandwidth: of the chip in GB/s, None if it is unknown."""
    from . import proof

    used = proof.chosen(verdicts)
    silent = [v for v in verdicts if v.is_right and math.isnan(v.seconds)]
    rows = [HEADINGS, *(_row(v, bandwidth, used) for v in verdicts if v not in silent)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = [
        " ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    kernels = dict.fromkeys(v.kernel for v in verdicts)
    chip = f"{about['chip']}, " + (f"{bandwidth:g} GB/s, " if bandwidth else "")
    last = [f"{k}: not used: {proof.why_not(k, verdicts)}" for k in kernels if k not in used]
    last.append(f"{len(used)} of {len(kernels)} kernels are used; MLX's operations for the rest.")
    if silent:
        last.append(f"Compared only, and right: {len(silent)} more of so many tokens and formats.")
    if off:
        last.append("QWEN35_REFERENCE is set: no kernel is used, whatever the table says.")
    return "\n".join(
        [
            f"Kernels for {title}",
            f"{chip}macOS {about['macos']}, MLX {about['mlx']}, qwen35-mlx {about['qwen35_mlx']}",
            "",
            *lines,
            "",
            *last,
        ]
    )


def _row(v: "Verdict", bandwidth: float | None, used: frozenset[str]) -> tuple[str, ...]:
    speed = v.nbytes / v.seconds / 1e9 if v.seconds > 0 else math.nan
    return (
        v.kernel,
        v.case,
        "NaN" if v.problem is None and math.isnan(v.error) else _figure(v.error, "{:.0e}"),
        _figure(v.tolerance, "{:.0e}"),
        _figure(1e6 * v.seconds, "{:,.0f}"),
        _figure(1e6 * v.reference_seconds, "{:,.0f}"),
        _figure(speed, "{:.1f}"),
        _figure(100 * speed / bandwidth if bandwidth else math.nan, "{:.0f}%"),
        "yes" if v.kernel in used else "no",
    )


def _figure(value: float, form: str) -> str:
    return "0" if value == 0 else form.format(value) if math.isfinite(value) else "-"


def _as_json(
    title: str, about: dict[str, Any], verdicts: "Sequence[Verdict]", off: bool
) -> dict[str, Any]:
    from dataclasses import asdict

    from . import proof

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    used = frozenset[str]() if off else proof.chosen(verdicts)
    return {
        "metal": True,
        "model": title,
        **{key: value for key, value in about.items() if key != "shapes"},
        "bandwidth_gbps": _bandwidth(),
        "used": sorted(used),
        "trials": [
            {key: finite(value) for key, value in asdict(v).items()}
            | {"used": v.kernel in used, "why_not": proof.why_not(v.kernel, verdicts) or None}
            for v in verdicts
        ],
    }


if __name__ == "__main__":
    main()
