"""Whether a converted folder is still what the conversion wrote, and what its config.json says.

Every byte of every tensor is read once. Each check stands alone, so that one broken file hides
nothing else.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx import packing, shards
from qwen35_mlx.errors import ModelError, shown
from qwen35_mlx.files import Section, brief, read_json
from qwen35_mlx.packing import Format
from qwen35_mlx.shards import DECLARATION, FORMAT, INDEX, Entry

from .folder import MANIFEST, NEEDED, STATE, TEMPLATE
from .layout import MAIN, NORMS, targets
from .manifest import Manifest, Record, json_or_problem, read_manifest
from .options import Options
from .source import Source
from .values import not_finite
from .writer import READ_BYTES

READERS = 4  # tensors at a time: one thread digests slower than a disk reads
NORMS_FILE = f"{NORMS}.safetensors"
BLOCKS = ("quantization", "quantization_config")  # MLX's programs read either
# Bytes that decode to no number, or times the largest code to none: scales of E8M0 (a power of two)
# and E4M3, codes of E4M3.
BAD_SCALES = {"mxfp4": b"\xfd\xfe\xff", "mxfp8": bytes(range(0xF7, 0x100)), "nvfp4": b"\x7f\xff"}
BAD_CODES = {"mxfp8": b"\x7f\xff"}

Headers = Mapping[str, Mapping[str, Entry]]  # by file and tensor
Progress = Callable[[int, int], None]


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Read everything in a folder that `convert` made and compare it with what belongs there.

    The manifest, each header and digest, the index, config.json's quantization against the widths,
    the tensors that the model of config.json needs, finite values, and exact norms against rounded
    ones.
    progress: bytes of tensors done, in all.
    Returns: a line for each problem, naming the file and the tensor or entry; none if all is well.
    Raises: ModelError when the folder is not one of ours.
    """
    _require_ours(folder)
    problems: list[str] = []
    values = json_or_problem(folder, "config.json", problems)
    manifest = read_manifest(folder, problems)
    headers = _read_headers(folder, manifest, problems)
    records = manifest.tensors if manifest else {}
    if manifest:
        problems += _small_files(folder, manifest)
        problems += _unlike_headers(manifest, headers)
    # The manifest, for it also knows files whose header cannot be read.
    listed = {file: {n: r.entry for n, r in found.items()} for file, found in records.items()}
    entries = listed or headers
    problems += _index(folder, entries, problems)
    formats = _formats(records)
    if values is not None:
        problems += _sidecars(values, entries)
        measured = _model(folder, values, entries, problems)
        problems += _unlike_widths(formats, measured)
        formats = formats or measured
        problems += _quantization(values, formats)
    problems += _contents(headers, records, formats, progress)
    problems += _norms(headers, entries)
    return problems


# -- reading what describes the folder -------------------------------------------------------------


def _require_ours(folder: Path) -> None:
    """Either of config.json and the manifest may be damaged; the other then shows it."""
    try:
        os.listdir(folder)
    except PermissionError as error:  # which looks like an empty folder to the rest
        raise ModelError(
            f"{shown(folder)}: {error.strerror}; expected a folder that can be read. Mend that."
        ) from None
    except OSError:
        pass
    made = (("config.json", (DECLARATION,)), (MANIFEST, ("tensors", "files")))
    for name, keys in made:
        try:
            values = read_json(folder / name) if os.path.isfile(folder / name) else {}
        except ModelError:
            continue
        if all(key in values for key in keys):
            return
    if os.path.isfile(folder / STATE):
        raise ModelError(
            f"{shown(folder)}: is not finished; expected a whole folder. Run the conversion again: "
            "it goes on from there."
        )
    raise ModelError(
        f"{shown(folder)}: was not made by this program's converter; expected a folder with its "
        "config.json and manifest.json. Check the path."
    )


def _read_headers(folder: Path, manifest: Manifest | None, problems: list[str]) -> Headers:
    """The header of each weight file that can be read; what is there and what should be."""
    listed = manifest.tensors if manifest else {}
    there = {path.name for path in folder.glob("*.safetensors")}
    for file in sorted(there - listed.keys()) if manifest else ():
        problems.append(f"{shown(file)}: is not in {MANIFEST}; expected no such file")
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(there | listed.keys()):
        if file not in there:
            problems.append(f"{file}: is missing")
            continue
        try:
            headers[file] = shards.header(folder / file)
        except ModelError as error:
            problems.append(str(error))
    return headers


# -- comparing the descriptions --------------------------------------------------------------------


def _small_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    needed = {*NEEDED, TEMPLATE, INDEX, "config.json"}
    for name in sorted(needed - manifest.files.keys()):
        yield f"{MANIFEST}: files: {name} is not listed"
    for name in sorted(needed | manifest.files.keys()):
        if not os.path.isfile(folder / name):
            if name not in ("config.json", INDEX):  # said where they are read
                yield f"{shown(name)}: is missing"
        elif name in manifest.files:
            try:
                with (folder / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                yield f"{shown(name)}: {error.strerror}"
                continue
            if found != manifest.files[name]:
                yield f"{shown(name)}: is not as it was written; its sha256 differs"


def _unlike_headers(manifest: Manifest, headers: Headers) -> Iterator[str]:
    for file in sorted(headers.keys() & manifest.tensors.keys()):
        for name in sorted(headers[file].keys() | manifest.tensors[file].keys()):
            found, listed = headers[file].get(name), manifest.tensors[file].get(name)
            if found is None:
                yield f"{file}: {shown(name)} is missing"
            elif listed is None:
                yield f"{file}: {shown(name)} is not in {MANIFEST}; expected no such tensor"
            elif _typed(found) != _typed(listed.entry):
                yield f"{file}: {shown(name)} is {_typed(found)}; expected {_typed(listed.entry)}"


def _typed(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _index(folder: Path, entries: Headers, problems: list[str]) -> Iterator[str]:
    values = json_or_problem(folder, INDEX, problems)
    if values is None:
        return
    weight_map, metadata = values.get("weight_map"), values.get("metadata")
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        yield f"{INDEX}: has no weight_map with metadata"
        return
    main = {file: found for file, found in entries.items() if file.startswith(MAIN)}
    wanted = {name: file for file, found in main.items() for name in found}
    for name in sorted(wanted.keys() | weight_map.keys()):
        if wanted.get(name) != weight_map.get(name):
            there = wanted.get(name, "no main file")
            yield f"{INDEX}: {shown(name)} is in {brief(weight_map.get(name))}; expected {there}"
    nbytes = sum(entry.nbytes for found in main.values() for entry in found.values())
    if metadata.get("total_size") != nbytes:
        size = brief(metadata.get("total_size"))
        yield f"{INDEX}: total_size is {size}; the main files hold {nbytes}"


def _sidecars(values: dict[str, Any], entries: Headers) -> Iterator[str]:
    """Without them the loader would see neither the MTP head nor the exact norms."""
    ours = values.get(DECLARATION)
    wanted = sorted(file for file in entries if not file.startswith(MAIN))
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        yield f"config.json: {DECLARATION} is {brief(ours)}; expected format {FORMAT}"
    elif ours.get("sidecars") != wanted:
        named = brief(ours.get("sidecars"))
        yield f"config.json: {DECLARATION}: sidecars is {named}; expected {wanted}"


def _model(
    folder: Path, values: dict[str, Any], entries: Headers, problems: list[str]
) -> dict[str, Format | None]:
    """Compare the tensors with the model that config.json describes; their formats by widths."""
    stored: dict[str, Entry] = {}
    # As the loader sees it: exact norms stand for rounded ones.
    for file in sorted(entries, key=lambda file: not file.startswith(MAIN)):
        stored |= entries[file]
    try:
        found = targets(Source(folder, values, stored), Options(None, "uniform"))
    except ModelError as error:
        problems.append(str(error))
        return {}
    return {
        target.name.removesuffix(".weight"): target.pieces[0].view.packing
        for target in found
        if _may_be_packed(target.name, target.shape)
    }


def _may_be_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether config.json has to say how this tensor is stored."""
    return name.endswith(".weight") and len(shape) in (2, 3) and "conv1d" not in name


def _formats(records: Mapping[str, Mapping[str, Record]]) -> dict[str, Format | None]:
    """How each module is stored, as the manifest says it."""
    return {
        name.removesuffix(".weight"): record.packing
        for file, listed in records.items()
        if file != NORMS_FILE
        for name, record in listed.items()
        if _may_be_packed(name, record.entry.shape)
    }


def _unlike_widths(
    listed: Mapping[str, Format | None], measured: Mapping[str, Format | None]
) -> Iterator[str]:
    """Compare the manifest with bits and group sizes that the widths show."""
    for module in sorted(listed.keys() & measured.keys()):
        said, found = listed[module], measured[module]
        if said and found and (said.bits, said.group_size) != (found.bits, found.group_size):
            yield f"{MANIFEST}: {shown(module)} is {_said(said)}; its widths are of {_said(found)}"


def _quantization(values: dict[str, Any], formats: Mapping[str, Format | None]) -> Iterator[str]:
    """Compare both blocks of config.json with what is packed how."""
    for key in BLOCKS:
        try:
            block = packing.declared(Section({key: values.get(key)}, "config.json"))
        except ModelError as error:
            yield str(error)
            continue
        if block is None:
            if any(formats.values()):
                yield f"config.json: {key} is missing; the folder has packed tensors"
            continue
        for module in sorted(block.overrides.keys() - formats.keys() if formats else ()):
            yield f"config.json: {key}: {shown(module)} is no matrix of the folder"
        for module, stored in formats.items():
            if block.of(module) != stored:
                said, found = _said(block.of(module)), _said(stored)
                yield f"config.json: {key}: {shown(module)} is {said}; it is stored as {found}"


def _said(found: Format | None) -> str:
    if found is None:
        return "not packed"
    return f"{found.mode} of {found.bits} bits in groups of {found.group_size}"


# -- reading the weights ---------------------------------------------------------------------------


def _contents(
    headers: Headers,
    records: Mapping[str, Mapping[str, Record]],
    formats: Mapping[str, Format | None],
    progress: Progress | None,
) -> Iterator[str]:
    """Digest and values of every tensor."""
    stored = [
        (name, entry, records.get(file, {}).get(name))
        for file, entries in headers.items()
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset)
    ]
    count = _Count(sum(entry.nbytes for _, entry, _ in stored), progress)

    def problems(one: tuple[str, Entry, Record | None]) -> list[str]:
        return list(_content(*one, formats, count))

    pool = ThreadPoolExecutor(READERS)
    try:
        for found in pool.map(problems, stored):
            yield from found
    finally:
        count.over.set()
        pool.shutdown(cancel_futures=True)


class _Count:
    """Bytes that several threads have read. over: set to end them early."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress
        self.over = threading.Event()
        self._alone = threading.Lock()
        self.moved(0)

    def moved(self, nbytes: int) -> None:
        with self._alone:
            self.done += nbytes
            if self.progress and not self.over.is_set():
                try:
                    self.progress(self.done, self.total)
                except BaseException:
                    self.over.set()  # for the threads whose results come before this one's
                    raise


def _content(
    name: str,
    entry: Entry,
    record: Record | None,
    formats: Mapping[str, Format | None],
    count: _Count,
) -> Iterator[str]:
    """What is wrong with the bytes of one tensor."""
    where, bad = f"{entry.file.name}: {shown(name)}", _bad_bytes(name, entry.dtype, formats)
    state, strange, left = hashlib.sha256(), 0, entry.nbytes
    try:
        for data in _slices(entry, READ_BYTES):
            if count.over.is_set():
                return
            state.update(data)
            strange += not_finite(data, entry.dtype)
            if bad:
                strange += len(data) - len(data.translate(None, bad))
            left -= len(data)
            count.moved(len(data))
    except OSError as error:
        count.moved(left)
        yield f"{where}: {error.strerror or error}"
        return
    if record and state.hexdigest() != record.sha256:
        yield f"{where} is not as it was written; its sha256 differs"
    if strange:
        yield f"{where} holds {strange:,} values that are not finite"


def _slices(entry: Entry, at_once: int) -> Iterator[bytes]:
    """The bytes of one tensor, `at_once` of them at a time. Raises: OSError."""
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        for first in range(0, entry.nbytes, at_once):
            wanted = min(at_once, entry.nbytes - first)
            data = os.pread(descriptor, wanted, entry.offset + first)
            if len(data) != wanted:
                raise OSError("the file ends early")
            yield data
    finally:
        os.close(descriptor)


def _bad_bytes(name: str, dtype: str, formats: Mapping[str, Format | None]) -> bytes:
    """Codes in a packed matrix's part that stand for no number."""
    module, _, part = name.rpartition(".")
    stored = formats.get(module)
    codes = {("scales", "U8"): BAD_SCALES, ("weight", "U32"): BAD_CODES}.get((part, dtype), {})
    return codes.get(stored.mode, b"") if stored else b""


def _norms(headers: Headers, entries: Headers) -> Iterator[str]:
    """Each exact norm rounds to the one that other programs read."""
    main = {n: file for file, found in entries.items() if file.startswith(MAIN) for n in found}
    for name, exact in headers.get(NORMS_FILE, {}).items():
        where = f"{NORMS_FILE}: {shown(name)}"
        if name not in main:
            yield f"{where} stands for no tensor of the main files"
            continue
        rounded = headers.get(main[name], {}).get(name)
        if rounded is None:
            continue  # its file is missing or broken, which was said
        if (exact.dtype, rounded.dtype, exact.shape) != ("F32", "BF16", rounded.shape):
            yield f"{where} is {_typed(exact)}, in {main[name]} {_typed(rounded)}"
        elif not _rounds_to(exact, rounded):
            yield f"{where} does not round to that of {main[name]}"


def _rounds_to(exact: Entry, rounded: Entry) -> bool:
    try:
        halves = _slices(rounded, READ_BYTES // 2)
        for wide, narrow in zip(_slices(exact, READ_BYTES), halves, strict=True):
            found = mx.array(np.frombuffer(wide, np.float32)).astype(mx.bfloat16)
            if np.asarray(found.view(mx.uint16)).tobytes() != narrow:
                return False
    except OSError:
        pass  # said where all contents are read
    return True
