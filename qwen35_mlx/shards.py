"""The safetensors files of a model folder: which tensors they hold and where, from headers."""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError
from .files import Section, brief, is_whole, read_json

INDEX = "model.safetensors.index.json"
DECLARATION, FORMAT = "qwen35_mlx", 1  # our key in config.json, and the version of what it says
PLAIN_NAME = re.compile(r"[\w][\w.\-]*\.safetensors")
HEADER_BYTES = 256 << 20
AXES, LONGEST_AXIS = 8, (1 << 31) - 1  # MLX counts along an axis in 32 bits
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stored tensor, as the safetensors header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int  # of its first byte in the file


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder, from headers alone.

    One of our folders has more than its index names: the MTP head, and norms in F32, which stand
    for the rounded ones of the same name.
    Raises: ModelError for a missing shard, a broken index or header, a truncated file.
    """

    def is_there(name: str) -> bool:
        # os.path answers False where Path raises: names too long. Opening a pipe would wait.
        return os.path.isfile(folder / name)

    return described(folder, is_there, lambda names: (header(folder / name) for name in names))


def described(
    folder: Path,
    is_there: Callable[[str], bool],
    headers: Callable[[Sequence[str]], Iterable[dict[str, Entry]]],
) -> dict[str, Entry]:
    """The same of a folder whose weight files may lie elsewhere; `folder` holds the small ones.

    is_there: whether there is a weight file of that name. headers: what `header` says of each.
    """
    found = _indexed(folder, is_there, headers)
    for stored in headers(declared_sidecars(folder) or ()):
        found |= stored
    return found


def declared_sidecars(folder: Path) -> tuple[str, ...] | None:
    """What config.json of one of our folders names beside the index; None in other folders.

    Raises: ModelError for a declaration this release does not know.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):
        return None
    top = Section(read_json(path), str(path))
    if top.get(DECLARATION) is None:
        return None
    ours = top.section(DECLARATION)
    if ours.get("format") != FORMAT:
        raise ModelError(
            f"{ours.where}: format is {brief(ours.get('format'))}; this release reads {FORMAT}. "
            "Update the project or convert the model again."
        )
    names = ours.get("sidecars", [])
    if not isinstance(names, list) or not all(
        isinstance(name, str) and PLAIN_NAME.fullmatch(name) for name in names
    ):
        raise ModelError(
            f"{ours.where}: sidecars is {brief(names)}; expected .safetensors files of this "
            "folder. Convert the model again."
        )
    return tuple(names)


def _indexed(
    folder: Path,
    is_there: Callable[[str], bool],
    headers: Callable[[Sequence[str]], Iterable[dict[str, Entry]]],
) -> dict[str, Entry]:
    index, single = folder / INDEX, "model.safetensors"
    if not os.path.isfile(index):
        if not is_there(single):
            raise ModelError(
                f"{folder}: no {single} and no {INDEX}; expected the weights of a model. "
                "Download the folder again."
            )
        return dict(*headers([single]))
    weight_map = _weight_map(index, is_there)
    names = sorted(set(weight_map.values()))
    found: dict[str, Entry] = {}
    for name, stored in zip(names, headers(names), strict=True):
        wanted = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in sorted(wanted - stored.keys()):
            raise ModelError(
                f"{folder / name}: no tensor {tensor}; {INDEX} expects it there. "
                "Download the folder again."
            )
        for tensor in sorted(stored.keys() - wanted):
            raise ModelError(
                f"{folder / name}: holds {tensor}, which {INDEX} does not list for it. "
                "Download the folder again."
            )
        found |= stored
    return found


def _weight_map(index: Path, is_there: Callable[[str], bool]) -> dict[str, str]:
    weight_map = Section(read_json(index), str(index)).section("weight_map").values
    for tensor, name in weight_map.items():
        # A plain name: an index must not lead out of the folder it lies in.
        plain = isinstance(name, str) and PLAIN_NAME.fullmatch(name)
        if not plain:
            raise ModelError(
                f"{index}: {tensor} lies in {name!r}; expected a .safetensors file of this folder. "
                "Download the index again."
            )
        if not is_there(name):
            raise ModelError(
                f"{index.parent}: {name} is missing; {INDEX} names it. Download the folder again."
            )
    return weight_map


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against the file's length.

    Raises: ModelError naming the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such plain file; expected safetensors. Download it again.")
    try:
        with path.open("rb") as file:
            return parse_header(path, path.stat().st_size, file.read)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; expected a readable file.") from None


def parse_header(path: Path, size: int, read: Callable[[int], bytes]) -> dict[str, Entry]:
    """The same from a file of `size` bytes wherever it lies; `read(n)` gives its next n bytes."""

    def broken(what: str) -> ModelError:
        return ModelError(f"{path}: {what}. The file is damaged; download it again.")

    start = read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(HEADER_BYTES, size - 8):
        raise broken(f"{size} bytes with a header of {length}; expected safetensors")
    try:
        values = json.loads(read(length))
    except (ValueError, RecursionError):
        raise broken("its header is not JSON") from None
    if not isinstance(values, dict):
        raise broken("its header is not a JSON object")
    notes = values.pop("__metadata__", None) or {}  # MLX writes null for none
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise broken("its __metadata__ is no object of texts")
    data = 8 + length
    found: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in values.items():
        try:
            begin, stop = value["data_offsets"]
            shape, dtype = value["shape"], value["dtype"]
            usable = isinstance(shape, list) and all(map(is_whole, (begin, stop, *shape)))
            if not usable or len(shape) > AXES or max(shape, default=0) > LONGEST_AXIS:
                raise ValueError
            nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        except (KeyError, TypeError, ValueError):
            raise broken(f"{name} has no usable dtype, shape and offsets") from None
        if stop - begin != nbytes:
            raise broken(f"{name} spans {stop - begin} bytes; its shape needs {nbytes}")
        spans.append((begin, stop, name))
        found[name] = Entry(path, dtype, tuple(shape), nbytes, data + begin)
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise broken(f"{name} begins at byte {begin}; the one before it ends at {end}")
        end = stop
    if data + end != size:
        raise broken(f"holds {size} bytes; its header describes {data + end}")
    return found
