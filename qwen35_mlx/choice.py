"""Which kernels a model uses on this machine: tried once for each combination, then remembered."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import apart, files, proof
from .errors import ModelError
from .kernels import library
from .proof import Verdict
from .shapes import Shapes
from .version import __version__

REFERENCE = "QWEN35_REFERENCE"
Progress = Callable[[int, int], None]


def use(shapes: Shapes, progress: Progress | None = None) -> None:
    """Let a model that is being loaded use what is right and fast here; nothing without a GPU.

    progress: called with trials done, and in all, if they have to be made, which takes a while.
    """
    if not has_gpu() or wants_reference():
        return
    verdicts = remembered(shapes)
    if verdicts is None:
        try:
            verdicts = examined(shapes, progress)
        except (OSError, RuntimeError):
            # MLX's own operations are right, and `doctor` says what is wrong.
            library.allow((), library.names())
            return
    chosen = proof.chosen(verdicts)
    library.allow(chosen, {verdict.kernel for verdict in verdicts} - chosen)


def has_gpu() -> bool:
    return bool(gpu())


def gpu() -> dict[str, Any]:
    """What MLX says of the GPU that it computes on; empty where that is not one with Metal."""
    is_used = mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu
    return dict(mx.device_info(mx.gpu)) if is_used else {}


def wants_reference() -> bool:
    """Whether $QWEN35_REFERENCE forbids kernels."""
    return os.environ.get(REFERENCE, "0") not in ("", "0")


def examined(shapes: Shapes, progress: Progress | None = None) -> list[Verdict]:
    """Try every kernel on this GPU now, and remember what came out.

    Raises: OSError, RuntimeError as `apart.verdicts`.
    """
    verdicts = apart.verdicts(shapes, progress=progress)
    with suppress(OSError):  # a home that cannot be written to: tried again next time
        _remember(combination(shapes), verdicts)
    return verdicts


def remembered(shapes: Shapes) -> list[Verdict] | None:
    """What an earlier trial of this combination showed; None if there was none."""
    wanted = combination(shapes)
    try:
        kept = files.read_json(_path(wanted))
        if kept["combination"] != wanted:
            return None
        verdicts = [Verdict(**verdict) for verdict in kept["verdicts"]]
    except (ModelError, OSError, LookupError, TypeError, ValueError):
        return None  # none yet, or one that is damaged or cannot be read
    known = library.names()
    is_whole = all(v.kernel in known and _is_possible(v) for v in verdicts)
    return verdicts if verdicts and is_whole else None


def _is_possible(verdict: Verdict) -> bool:
    """Whether a trial could have given it. An error may be infinite, and what is unknown is NaN."""
    texts = (verdict.case, verdict.problem or "")
    sizes = (verdict.nbytes, verdict.error, verdict.tolerance)
    times = (verdict.seconds, verdict.reference_seconds)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) in (int, float) for number in (*sizes, *times))
        and not any(number < 0 for number in sizes)
        and not any(number <= 0 or number > sys.float_info.max for number in times)
    )


def combination(shapes: Shapes) -> dict[str, Any]:
    """What a choice holds for."""
    return {
        "chip": gpu().get("device_name"),
        "macos": platform.mac_ver()[0],
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "qwen35_mlx": __version__,
        "kernels": _sources(),
        "shapes": json.loads(json.dumps(asdict(shapes))),
    }


def _sources() -> str:
    """A digest of all kernels: a development version keeps its number while they change."""
    digest = hashlib.sha256()
    for folder, suffix in (("metal", ".metal"), ("kernels", ".py")):
        found = [f for f in resources(f"qwen35_mlx.{folder}").iterdir() if f.name.endswith(suffix)]
        for file in sorted(found, key=lambda file: file.name):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _path(wanted: dict[str, Any]) -> Path:
    text = json.dumps(wanted, sort_keys=True)
    return files.home() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _remember(wanted: dict[str, Any], verdicts: Sequence[Verdict]) -> None:
    path = _path(wanted)
    kept = {"combination": wanted, "verdicts": [asdict(verdict) for verdict in verdicts]}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
