"""The life of an output folder: `OUT.partial` while work goes on, then renamed to `OUT`."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen35_mlx import __version__
from qwen35_mlx.errors import ConversionError, ModelError, shown
from qwen35_mlx.family import from_generation_config
from qwen35_mlx.files import read_json
from qwen35_mlx.image import ImageProcessor
from qwen35_mlx.packing import Format
from qwen35_mlx.shards import DECLARATION, FORMAT, INDEX, declared_sidecars
from qwen35_mlx.template import Template
from qwen35_mlx.tokenizer import Tokenizer
from qwen35_mlx.video import VideoProcessor

from .options import Options
from .plan import Plan
from .source import Source
from .writer import RECORD, flush_folder, write_whole

PARTIAL, STATE, LOCK, MANIFEST = ".partial", "conversion.json", ".lock", "manifest.json"
DOWNLOADS = "source"  # folder in the unfinished one where source files wait, when streamed
NEEDED = ("tokenizer.json", "tokenizer_config.json")
SAMPLING = "generation_config.json"
COPIED = (
    *NEEDED,
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    SAMPLING,
    "LICENSE",
)
TEMPLATE = "chat_template.jinja"


def partial_of(out: Path) -> Path:
    """Where the unfinished folder lies: beside `out`, on the same disk also if `out` is a link."""
    real = Path(os.path.realpath(out))  # Path.resolve raises for a link to itself
    return real.parent / (real.name + PARTIAL)


def state_of(source: Source, name: str, revision: str | None, options: Options) -> dict[str, Any]:
    """What a run must share with the one it goes on from."""
    digest = hashlib.sha256(json.dumps(source.values, sort_keys=True).encode())
    for tensor, entry in sorted(source.entries.items()):
        digest.update(f"{tensor} {entry.file.name} {entry.dtype} {entry.shape} ".encode())
        digest.update(f"{entry.offset};".encode())
    if revision is None:
        # The same shapes trained further are other weights.
        digest.update(str([file.stat().st_mtime_ns for file in source.files]).encode())
        for path in [source.folder / small for small in (*COPIED, TEMPLATE)]:
            digest.update(path.read_bytes() if path.is_file() else b"-")
    return {
        "format": FORMAT,
        "options": options.as_json(),
        "source": {"name": name, "revision": revision, "digest": digest.hexdigest()},
    }


def is_made(out: Path, name: str, options: Options) -> bool:
    """Whether `out` is the complete result of this very conversion.

    Raises: ConversionError when it is anything else but an empty folder or nothing.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        ours = declared_sidecars(out) is not None
    except ModelError:
        ours = False
    if not ours or not (out / MANIFEST).is_file():
        raise ConversionError(
            f"{shown(out)}: exists and was not made by this program's converter; expected a new "
            "folder, or one with its config.json and manifest.json. Choose another --out, or move "
            "it away."
        )
    made = _sound(out / "config.json", read_json(out / "config.json")[DECLARATION])
    if made["options"] != options.as_json() or made["source"].get("name") != name:
        raise ConversionError(
            f"{shown(out)}: was made {_described(made)}; expected a new folder or the same "
            "options. Choose another --out."
        )
    return True


def require_same_source(out: Path, state: dict[str, Any]) -> None:
    """Raises: ConversionError when the complete `out` came of another source of that name."""
    made = _sound(out / "config.json", read_json(out / "config.json")[DECLARATION])
    if made["source"] != origin(state):
        raise ConversionError(
            f"{shown(out)}: was made from another {_source(made)} than this one, or from what it "
            "was before; expected the same. Remove the folder, or choose another --out."
        )


def origin(state: dict[str, Any]) -> dict[str, Any]:
    """What a complete folder says of its source: a commit of the Hub, or a local digest."""
    source: dict[str, Any] = state["source"]
    told = ("name", "revision", *(["digest"] if source["revision"] is None else []))
    return {key: source[key] for key in told}


def _sound(path: Path, found: Any) -> dict[str, Any]:
    """The declaration or state in `path`, if it has the parts that are compared."""
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), dict) for key in ("options", "source")
    ):
        raise ConversionError(
            f"{shown(path)}: does not say what it was made of; expected what this program wrote. "
            "Remove the folder to begin anew."
        )
    return found


def require_apart(source: Path, out: Path) -> None:
    """Raises: ConversionError when writing `out` could touch the source."""
    theirs, ours = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    for folder in (ours, partial_of(ours)):
        if folder == theirs or theirs in folder.parents or folder in theirs.parents:
            raise ConversionError(
                f"{shown(out)}: is the source, or lies inside it, or holds it; expected a folder "
                "apart. Choose another --out."
            )


def require_small_files(folder: Path) -> None:
    """Raises: ModelError when a chat would lack its tokenizer or template, or one is damaged."""
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ModelError(
                f"{shown(folder)}: no {name}; a converted folder without it would not run. "
                "Copy it from the model's repository."
            )
    for small in (Template, Tokenizer, ImageProcessor, VideoProcessor):
        small.read(folder)
    for name in COPIED:
        if name.endswith(".json") and (folder / name).is_file():
            values = read_json(folder / name)
            if name == SAMPLING:
                from_generation_config(values, str(folder / name))


@contextmanager
def begun(out: Path, state: dict[str, Any]) -> Iterator[Path]:
    """The unfinished folder of `out`, new or as an earlier run left it; ours alone meanwhile.

    Raises: ConversionError when it was begun otherwise, or another program is at it.
    """
    partial = partial_of(out)
    if partial.exists() and not _is_begun(partial):
        raise ConversionError(
            f"{shown(partial)}: exists and was not begun by this program; expected a new "
            "folder. Move it away."
        )
    _make(partial)
    _require_plain(partial)
    with (partial / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConversionError(
                f"{shown(partial)}: another conversion writes there; expected to be alone. "
                "Wait for it, or stop it."
            ) from None
        if not (partial / STATE).is_file():
            write_whole(partial / STATE, json.dumps(state, indent=1))
        _require_same(partial, _state(partial / STATE), state)
        yield partial


def _make(partial: Path) -> None:
    """With the folders above it; none of those stays when it cannot be made."""
    above = [path for path in partial.parents if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError:
        for path in above:
            with suppress(OSError):
                path.rmdir()
        raise


def discard(partial: Path) -> None:
    """Take away an unfinished folder in which nothing was done yet."""
    for name in (STATE, LOCK):
        (partial / name).unlink(missing_ok=True)
    with suppress(OSError):
        partial.rmdir()


def _require_plain(partial: Path) -> None:
    """A link in there would lead what is written to where nobody named it."""
    for path in (partial, *partial.iterdir()):
        is_folder = path in (partial, partial / DOWNLOADS)
        mode = path.lstat().st_mode
        if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
            raise ConversionError(
                f"{shown(path)}: is no plain {'folder' if is_folder else 'file'}; expected what "
                "this program wrote. Move it away."
            )


def _state(path: Path) -> dict[str, Any]:
    try:
        return _sound(path, read_json(path))
    except ModelError:
        return _sound(path, None)


def _is_begun(partial: Path) -> bool:
    """Whether a run of ours made the folder, be it that it ended before it wrote anything."""
    if not partial.is_dir():
        return False
    return (partial / STATE).is_file() or all(
        path.name.startswith((LOCK, STATE)) for path in partial.iterdir()
    )


def _require_same(partial: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before == now:
        return
    if before.get("options") == now["options"]:
        revision = (before.get("source") or {}).get("revision")
        instead = f", or give --revision {revision} to go on" if revision else ""
        raise ConversionError(
            f"{shown(partial)}: was begun from {_source(before)}; the source is now "
            f"{_source(now)}, and not the same. Remove the folder to begin anew{instead}."
        )
    raise ConversionError(
        f"{shown(partial)}: was begun {_described(before)}; expected the same options. "
        "Give those, remove the folder, or choose another --out."
    )


def _source(state: dict[str, Any]) -> str:
    source = state.get("source", {})
    revision = source.get("revision")
    return f"{source.get('name')}" + (f" at {revision}" if revision else "")


def _described(state: dict[str, Any]) -> str:
    given = state.get("options") or {}
    said = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items() if value)
    return f"from {_source(state)} with {said}"


def copy_small_files(source: Path, partial: Path) -> None:
    """Tokenizer, processors and the chat template, which always gets a file of its own."""
    for name in COPIED:
        if (source / name).is_file():
            temporary = partial / f"{name}.tmp"
            shutil.copyfile(source / name, temporary)
            temporary.rename(partial / name)
    write_whole(partial / TEMPLATE, Template.read(source).source)


def finish(partial: Path, out: Path, plan: Plan, source: Source, state: dict[str, Any]) -> None:
    """Write what makes the folder a model, then give it its name."""
    write_whole(partial / INDEX, json.dumps(_index(plan), indent=1))
    declaration = {
        "format": FORMAT,
        "version": __version__,
        "source": origin(state),
        "options": state["options"],
        "sidecars": [f.name for f in plan.files if f not in plan.main_files],
        "manifest": MANIFEST,
    }
    write_whole(partial / "config.json", json.dumps(_config(plan, source, declaration), indent=1))
    write_whole(partial / MANIFEST, json.dumps(_manifest(partial, plan), indent=1))
    flush_folder(partial)
    partial.rename(os.path.realpath(out))
    flush_folder(partial.parent)
    tidy(out)


def tidy(out: Path) -> None:
    """Take away what served the way to the finished folder; a run may have ended just before."""
    for path in [out / STATE, out / LOCK, *out.glob(f"*{RECORD}")]:
        path.unlink(missing_ok=True)


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {part.name: file.name for file in plan.main_files for part in file.parts}
    return {
        "metadata": {"total_size": plan.main_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _config(plan: Plan, source: Source, declaration: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json, in BF16, with both quantization blocks and our declaration."""
    values = json.loads(json.dumps(source.values))
    text = values.get("text_config", values)
    for section in (values, text):
        for key in ("quantization", "quantization_config"):
            section.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = "bfloat16"
    text.setdefault("dtype", "bfloat16")
    if isinstance(values.get("vision_config"), dict):
        # LM Studio refuses the names that transformers 5 gives the tower.
        values["vision_config"]["model_type"] = values["model_type"]
    block = quantization_block(plan)
    if block is not None:
        values["quantization"] = values["quantization_config"] = block
    values[DECLARATION] = declaration
    return values


def quantization_block(plan: Plan) -> dict[str, Any] | None:
    """MLX's description of what is packed how: a default, and every module that differs."""
    packed = [target for target in plan.targets if target.packing]
    if not packed:
        return None
    default = plan.options.base or packed[0].packing
    assert default is not None
    block: dict[str, Any] = _settings(default)
    for target in plan.targets:
        is_matrix = target.name.endswith(".weight") and len(target.shape) in (2, 3)
        if target.packing != default and is_matrix and "conv1d" not in target.name:
            module = target.name.removesuffix(".weight")
            block[module] = _settings(target.packing) if target.packing else False
    return block


def _settings(packing: Format) -> dict[str, Any]:
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


def _manifest(partial: Path, plan: Plan) -> dict[str, Any]:
    """Every tensor of every file with its digest, and the digests of the small files."""
    tensors = {}
    for file in plan.files:
        digests = read_json(partial / (file.name + RECORD))
        tensors[file.name] = {
            part.name: {
                "dtype": part.dtype,
                "shape": part.shape,
                **(_settings(part.packing) if part.packing else {}),
                "sha256": digests[part.name],
            }
            for part in file.parts
        }
    small = {
        name: hashlib.sha256((partial / name).read_bytes()).hexdigest()
        for name in sorted((*COPIED, TEMPLATE, INDEX, "config.json"))
        if (partial / name).is_file()
    }
    return {
        "format": FORMAT,
        "tensors": tensors,
        "files": small,
        "left_out": dict(sorted(plan.left_out.items())),
    }
