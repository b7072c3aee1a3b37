"""Which kernels a model uses on this machine: tried once for each combination, then remembered."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import files, proof, trials
from .errors import ModelError
from .kernels import library
from .proof import Verdict
from .trials import Shapes
from .version import __version__

REFERENCE = "QWEN35_REFERENCE"
Progress = Callable[[int, int], None]


def use(shapes: Shapes, progress: Progress | None = None) -> None:
    """Let a model that is being loaded use its `kernels`, from now on and in this process."""
    if has_gpu():
        library.allow(kernels(shapes, progress))


def kernels(shapes: Shapes, progress: Progress | None = None) -> frozenset[str]:
    """Names of the kernels to use; none without a GPU, or where $QWEN35_REFERENCE says so.

    progress: called with trials done, and in all, if they have to be made, which takes seconds.
    """
    if not has_gpu() or wants_reference():
        return frozenset()
    verdicts = remembered(shapes)
    if verdicts is None:
        if not proof.can_examine_apart():
            return frozenset()
        try:
            verdicts = examined(shapes, progress)
        except (OSError, RuntimeError):
            return frozenset()  # MLX's own operations are right, and `doctor` says what is wrong
    return proof.chosen(verdicts)


def has_gpu() -> bool:
    return bool(gpu())


def gpu() -> dict[str, Any]:
    """What MLX says of this machine's GPU; empty without Metal."""
    return dict(mx.device_info(mx.gpu)) if mx.metal.is_available() else {}


def wants_reference() -> bool:
    return os.environ.get(REFERENCE, "0") not in ("", "0")


def examined(shapes: Shapes, progress: Progress | None = None) -> list[Verdict]:
    """Try every kernel on this GPU now, and remember what came out.

    Raises: OSError, RuntimeError as `proof.examine_apart`.
    """
    total, done = trials.count(shapes), 0

    def count(_: Verdict) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    verdicts = proof.examine_apart(shapes, progress=count)
    if progress:
        progress(total, total)  # also what these shapes do not need
    with suppress(OSError):  # a home that cannot be written to: tried again next time
        _remember(shapes, verdicts)
    return verdicts


def remembered(shapes: Shapes) -> list[Verdict] | None:
    """What an earlier trial of this combination showed; None if there was none."""
    path = _path(shapes)
    if not path.is_file():
        return None
    try:
        kept = files.read_json(path)
        if kept["combination"] != combination(shapes):
            return None
        return [Verdict(**verdict) for verdict in kept["verdicts"]]
    except (ModelError, KeyError, TypeError):  # damaged: as if there were none
        return None


def combination(shapes: Shapes) -> dict[str, Any]:
    """What a choice holds for."""
    return {
        "chip": gpu().get("device_name"),
        "macos": platform.mac_ver()[0],
        "mlx": version("mlx"),
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


def _path(shapes: Shapes) -> Path:
    text = json.dumps(combination(shapes), sort_keys=True)
    return files.home() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _remember(shapes: Shapes, verdicts: Sequence[Verdict]) -> None:
    path = _path(shapes)
    kept = {"combination": combination(shapes), "verdicts": [asdict(v) for v in verdicts]}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
