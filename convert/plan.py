"""A whole conversion before any weight is read: every output file with every offset, and its cost.

The same source and options give the same plan, however the source arrives; so a run that was
interrupted goes on with the files that were finished.
"""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen35_mlx.packing import Format
from qwen35_mlx.shards import ITEM_BYTES

from .layout import MAIN, MTP, NORMS, Piece, Target, targets
from .options import Options
from .source import Source

SLICE_BYTES = 8 << 20  # of floats converted at once
# Python and MLX take this much, and a slice lies in memory a few times over; measured by
# benchmarks/conversion_memory.py.
PROCESS_BYTES, SLICES = 200_000_000, 8


@dataclass(frozen=True)
class Part:
    """One tensor of an output file. row_bytes: of one row of its target."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int
    nbytes: int
    packing: Format | None


@dataclass(frozen=True)
class OutFile:
    """One safetensors file to be: header and places are known before the contents."""

    name: str
    parts: tuple[Part, ...]

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, padded so that the data begins on a multiple of 8."""
        values: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        offset = 0
        for part in self.parts:
            span = [offset, offset + part.nbytes]
            values[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": span}
            offset = span[1]
        text = json.dumps(values, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Where each part begins in the file, and its bytes."""
        found, offset = {}, len(self.header)
        for part in self.parts:
            found[part.name] = (offset, part.nbytes)
            offset += part.nbytes
        return found

    @property
    def data_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Plan:
    """What a conversion will read, write and need. files: the main ones first."""

    options: Options
    targets: tuple[Target, ...]
    files: tuple[OutFile, ...]
    left_out: Mapping[str, str]
    source_bytes: int
    source_files: Mapping[Path, int]

    @property
    def main_files(self) -> tuple[OutFile, ...]:
        """Those the index names, which other programs read."""
        return tuple(file for file in self.files if file.name.startswith(f"{MAIN}"))

    @property
    def main_bytes(self) -> int:
        """Tensor data of the main files, headers not counted."""
        return sum(file.data_bytes for file in self.main_files)

    @property
    def output_bytes(self) -> int:
        """All safetensors files."""
        return sum(file.nbytes for file in self.files)

    @property
    def nparameters(self) -> int:
        return sum(target.nparameters for target in self.targets)

    @property
    def bits_per_weight(self) -> float:
        """Over everything that is stored, exact norms too."""
        return 8 * sum(file.data_bytes for file in self.files) / self.nparameters

    @property
    def peak_memory(self) -> int:
        """Bytes the process needs, whatever the size of the model; rounded up."""
        return PROCESS_BYTES + SLICES * SLICE_BYTES

    @cached_property
    def file_of(self) -> dict[str, OutFile]:
        """The output file of each part's name; an exact norm's is under `NORMS` + its name."""
        return {
            (NORMS + part.name if file.name.startswith(NORMS) else part.name): file
            for file in self.files
            for part in file.parts
        }

    @cached_property
    def steps(self) -> dict[Path, list[tuple[Target, Piece]]]:
        """Pieces by the source file that completes what they need, in the order of the files."""
        order = {file: i for i, file in enumerate(self.source_files)}
        found: dict[Path, list[tuple[Target, Piece]]] = {file: [] for file in order}
        for target in self.targets:
            for piece in target.pieces:
                last = max((e.file for e in piece.view.entries), key=order.__getitem__)
                found[last].append((target, piece))
        return found

    def destinations(self, target: Target) -> tuple[str, ...]:
        """Names of the output files that `target` goes into."""
        main = self.file_of[target.part_name(target.parts[0])].name
        return (main, f"{NORMS}.safetensors") if target.exact else (main,)


def plan(source: Source, options: Options) -> Plan:
    """Plan the conversion of `source`.

    Raises: ModelError for tensors that do not fit the configuration; ConversionError for options
    that do not fit the model.
    """
    found = targets(source, options)
    sizes: dict[Path, int] = defaultdict(int)
    for entry in source.entries.values():
        sizes[entry.file] += entry.nbytes
    files = {file: sizes[file] for file in source.files}
    return Plan(
        options, found, _files(found, files, options), source.left_out, source.nbytes, files
    )


def _files(
    found: tuple[Target, ...], source_files: Mapping[Path, int], options: Options
) -> tuple[OutFile, ...]:
    """Main shards in the order in which the source gives their last rows, then the sidecars."""
    order = {file: i for i, file in enumerate(source_files)}

    def complete_at(target: Target) -> int:
        return max(order[e.file] for piece in target.pieces for e in piece.view.entries)

    groups: list[list[Part]] = [[]]
    size = 0
    for target in sorted((t for t in found if t.file == MAIN), key=complete_at):
        parts = _parts(target)
        nbytes = sum(part.nbytes for part in parts)
        if groups[-1] and size + nbytes > options.shard_size:
            groups.append([])
            size = 0
        groups[-1] += parts
        size += nbytes
    named = [
        ("model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}"
         ".safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]  # fmt: skip
    named.append((f"{MTP}.safetensors", [p for t in found if t.file == MTP for p in _parts(t)]))
    exact = [_part(t.name, "F32", t.shape, t.rows, None) for t in found if t.exact]
    named.append((f"{NORMS}.safetensors", exact))
    # Wide items first, so that each tensor begins on a multiple of its own.
    return tuple(
        OutFile(name, tuple(sorted(parts, key=lambda part: -ITEM_BYTES[part.dtype])))
        for name, parts in named
        if parts
    )


def _parts(target: Target) -> list[Part]:
    if target.packing is None:
        dtype = "F32" if target.is_f32 else "BF16"
        return [_part(target.name, dtype, target.shape, target.rows, None)]
    f = target.packing
    head = target.shape[:-1]
    width, groups = target.columns * f.bits // 32, target.columns // f.group_size
    scale = "BF16" if f.mode == "affine" else "U8"
    kinds = {"weight": ("U32", width), "scales": (scale, groups), "biases": (scale, groups)}
    return [
        _part(target.part_name(part), kinds[part][0], (*head, kinds[part][1]), target.rows, f)
        for part in target.parts
    ]


def _part(name: str, dtype: str, shape: tuple[int, ...], rows: int, packing: Format | None) -> Part:
    nbytes = ITEM_BYTES[dtype] * math.prod(shape)
    return Part(name, dtype, shape, nbytes // rows, nbytes, packing)
