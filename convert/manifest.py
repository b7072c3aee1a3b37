"""The manifest of a converted folder as `verify` reads it: nothing in it is taken on trust."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mlx import packing, shards
from qwen35_mlx.errors import ModelError, shown
from qwen35_mlx.files import Section, brief, is_whole, read_json
from qwen35_mlx.packing import Format
from qwen35_mlx.shards import FORMAT, ITEM_BYTES, PLAIN_NAME, Entry

from .folder import MANIFEST

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """What the manifest says of one tensor; the entry's offset is not known to it."""

    entry: Entry
    packing: Format | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Tensors by file and name; digests of the small files by name."""

    tensors: Mapping[str, Mapping[str, Record]]
    files: Mapping[str, str]


def json_or_problem(folder: Path, name: str, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object `name`; None, and a line in `problems`, when it cannot be read."""
    if not os.path.isfile(folder / name):
        problems.append(f"{name}: is missing")
        return None
    try:
        return read_json(folder / name)
    except ModelError as error:
        problems.append(str(error))
        return None


def read_manifest(folder: Path, problems: list[str]) -> Manifest | None:
    """The manifest without those entries that are malformed; None when there is nothing to use."""
    values = json_or_problem(folder, MANIFEST, problems)
    if values is None:
        return None
    if values.get("format") != FORMAT:
        problems.append(f"{MANIFEST}: format is {brief(values.get('format'))}; expected {FORMAT}")
        return None
    tensors: dict[str, dict[str, Record]] = {}
    digests: dict[str, str] = {}
    try:
        top = Section(values, MANIFEST)
        for name, digest in top.section("files").values.items():
            # A plain name: a manifest must not lead out of the folder it lies in.
            if Path(name).name == name and DIGEST.fullmatch(str(digest)):
                digests[name] = digest
            else:
                problems.append(f"{MANIFEST}: files: {shown(name)} is {brief(digest)}")
        for file in top.section("tensors").values:
            if PLAIN_NAME.fullmatch(file):
                listed = top.section("tensors").section(file).values
                tensors[file] = dict(_records(folder / file, listed, problems))
            else:
                problems.append(f"{MANIFEST}: {shown(file)} is no .safetensors file")
    except ModelError as error:
        problems.append(str(error))
    return Manifest(tensors, digests)


def _records(
    file: Path, listed: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[str, Record]]:
    for name, value in listed.items():
        try:
            yield name, _record(file, Section(value, f"{MANIFEST}: {file.name}: {shown(name)}"))
        except ModelError as error:
            problems.append(str(error))


def _record(file: Path, section: Section) -> Record:
    dtype, shape, digest = (section.get(key) for key in ("dtype", "shape", "sha256"))
    is_shape = isinstance(shape, list) and len(shape) <= shards.AXES and all(map(is_whole, shape))
    if not is_shape or str(dtype) not in ITEM_BYTES or not DIGEST.fullmatch(str(digest)):
        raise ModelError(f"{section.where} is {brief(section.values)}")
    found = None
    if "bits" in section.values:
        settings = {key: section.get(key) for key in ("bits", "group_size", "mode")}
        declared = packing.declared(Section({"quantization": settings}, section.where))
        found = declared.default if declared else None
    nbytes = ITEM_BYTES[dtype] * math.prod(shape)
    return Record(Entry(file, dtype, tuple(shape), nbytes, 0), found, digest)
