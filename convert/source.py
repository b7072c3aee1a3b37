"""The folder a conversion reads: which tensors it has, and any rows of them decoded to floats.

Every tensor is seen as `[rows, columns]`; a vector is one row. Rows are read from the file where
they lie, so no tensor is ever whole in memory.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx import checkpoint, config, shards
from qwen35_mlx.checkpoint import FOREIGN_MTP
from qwen35_mlx.errors import ModelError, shown
from qwen35_mlx.files import LARGEST, Section, brief, is_whole, read_json
from qwen35_mlx.packing import Format, measured
from qwen35_mlx.shards import DECLARATION, Entry

from .values import not_finite

PLAIN = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8}
NUMPY["F8_E4M3"] = np.uint8
OTHER_FORMS = {".gguf": "GGUF"} | dict.fromkeys((".bin", ".pt", ".pth"), "PyTorch's pickle form")
SCALE = "_scale_inv"  # FP8's scales: `X.weight_scale_inv` beside `X.weight`


@dataclass(frozen=True)
class View:
    """One stored matrix as rows of `columns` floats. packing, block: of a packed or FP8 one."""

    entry: Entry
    rows: int
    columns: int
    packing: Format | None = None
    scales: Entry | None = None
    biases: Entry | None = None
    block: tuple[int, int] | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All stored tensors its rows are read from."""
        return tuple(e for e in (self.entry, self.scales, self.biases) if e is not None)


class Source:
    """A Qwen3.5 folder in any layout that is read; see `open_folder`.

    is_mlx: mlx-community's names and `1 + w` norms, which our own folders share. left_out: why a
    tensor is not used, by name.
    """

    def __init__(
        self,
        folder: Path,
        values: dict[str, Any],
        entries: Mapping[str, Entry],
        where: str | None = None,
    ) -> None:
        """values: config.json. entries: from the headers; their files need not be there yet."""
        self.folder, self.values, self.where = folder, values, where or shown(folder)
        plain, self.block = _without_fp8(values, f"{self.where}: config.json")
        self.config = config.parse(plain, f"{self.where}: config.json")
        self.entries = dict(entries)
        self.is_mlx = checkpoint.is_mlx(self.entries, folder)
        self.left_out: dict[str, str] = {}
        self._descriptors: dict[Path, int] = {}
        self._leave_out()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files in the order in which they are read."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def has_vision(self) -> bool:
        prefix = "vision_tower." if self.is_mlx else "model.visual."
        return any(name.startswith(prefix) for name in self.entries)

    @property
    def has_mtp(self) -> bool:
        return any(n.startswith("mtp.") for n in self.entries if n not in self.left_out)

    @property
    def lacking(self) -> list[str]:
        """Parts of the model that config.json declares and no usable tensor is of."""
        declared = {
            "vision tower": (self.config.vision is not None, self.has_vision),
            "MTP head": (self.config.text.mtp_num_hidden_layers > 0, self.has_mtp),
        }
        return [part for part, (said, there) in declared.items() if said and not there]

    def has(self, name: str) -> bool:
        return name in self.entries

    def view(self, name: str, shape: tuple[int, ...], rows: int) -> View:
        """The weight `name`, which must have `shape` once decoded, as `rows` rows.

        Raises: ModelError when it is missing, misshapen, or of a dtype that is not read.
        """
        entry = self._entry(name)
        if entry.dtype in ("U32", "U8"):
            return self._packed(name, entry, shape, rows)
        if entry.shape != shape:
            raise ModelError(
                f"{entry.file}: {name} has shape {list(entry.shape)}; config.json expects "
                f"{list(shape)}. Check that both are of one model."
            )
        columns = math.prod(shape) // rows
        if entry.dtype == "F8_E4M3":
            scales = self._fp8_scales(name, entry)
            return View(entry, rows, columns, scales=scales, block=self.block)
        if entry.dtype not in PLAIN:
            raise ModelError(
                f"{entry.file}: {name} is {entry.dtype}; expected BF16, F16, F32, F8_E4M3 with "
                "scales, or an MLX packing. Take the model's BF16 folder."
            )
        return View(entry, rows, columns)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ModelError(
                f"{self.where}: {name} is missing; expected all tensors of the model that "
                "config.json describes. Download the folder again."
            )
        return self.entries[name]

    def _packed(self, name: str, entry: Entry, shape: tuple[int, ...], rows: int) -> View:
        stem = name.removesuffix(".weight")
        quantization = self.config.quantization
        if quantization is None or entry.dtype != "U32":
            raise ModelError(
                f"{entry.file}: {name} is {entry.dtype}, and config.json declares no MLX "
                "quantization of it; expected floats. Take the model's BF16 folder."
            )
        declared = quantization.of(stem) or quantization.default
        is_affine = declared.mode == "affine"
        scales = self._entry(f"{stem}.scales")
        biases = self._entry(f"{stem}.biases") if is_affine else None
        where, kinds = f"{entry.file}: {name}", tuple(PLAIN) if is_affine else ("U8",)
        for part in (entry, scales, biases or scales):
            fits = len(part.shape) == len(shape) and part.shape[:-1] == shape[:-1]
            alike = part is entry or (part.dtype in kinds and part.shape == scales.shape)
            if not fits or not alike:
                raise ModelError(
                    f"{where} {list(entry.shape)} has a part {part.dtype} {list(part.shape)}; "
                    f"expected {list(shape)} in an {declared.mode} packing. Check that "
                    "config.json is of the same model."
                )
        packing = measured(where, entry.shape, scales.shape, shape[-1], declared)
        return View(entry, rows, shape[-1], packing, scales, biases)

    def _fp8_scales(self, name: str, entry: Entry) -> Entry:
        if len(entry.shape) != 2:
            raise ModelError(
                f"{entry.file}: {name} is F8_E4M3 of shape {list(entry.shape)}; expected FP8 in "
                "matrices only, each expert apart, as Qwen's FP8 folders have it. Take one of "
                "those, or the model's BF16 folder."
            )
        if self.block is None:
            raise ModelError(
                f"{self.where}: {name} is F8_E4M3, and config.json declares no FP8 blocks; "
                "expected quantization_config with weight_block_size. Download config.json again."
            )
        scales = self._entry(name + SCALE)
        height, width = self.block
        expected = (-(-entry.shape[0] // height), -(-entry.shape[1] // width))
        if scales.shape != expected or scales.dtype not in PLAIN:
            raise ModelError(
                f"{scales.file}: {name}{SCALE} is {scales.dtype} {list(scales.shape)}; expected "
                f"floats {list(expected)}. Download the folder again."
            )
        return scales

    def _leave_out(self) -> None:
        foreign = self.is_mlx and DECLARATION not in self.values
        tied = self.config.tie_word_embeddings
        for name in self.entries:
            if foreign and name.startswith(FOREIGN_MTP):
                self.left_out[name] = "nothing in this layout declares how its norms are stored"
            elif tied and name.startswith(("lm_head.", "language_model.lm_head.")):
                self.left_out[name] = "tied: the embedding is the output head"

    def require_all_used(self, views: Iterable[View]) -> None:
        """Raises: ModelError for a tensor that is in none of `views` and not left out."""
        used = {entry for view in views for entry in view.entries}
        for name in sorted(self.entries.keys() - self.left_out.keys()):
            entry = self.entries[name]
            if entry not in used:
                raise ModelError(
                    f"{entry.file}: {name} {list(entry.shape)} belongs to no part of the model "
                    "that config.json describes; expected no such tensor. Check that both are of "
                    "one model."
                )

    # -- reading ---------------------------------------------------------------------------------

    def rows(self, view: View, first: int, count: int) -> mx.array:
        """`[count, columns]` from row `first` on; FP8 and packed ones as BF16, others as stored."""
        stored = self._read(view.entry, view.rows, first, count)
        if view.packing is not None and view.scales is not None:
            scales = self._read(view.scales, view.rows, first, count)
            # Foreign scales in F16 may overflow in products with F16 activations; BF16 does not.
            scales = scales if scales.dtype == mx.uint8 else scales.astype(mx.bfloat16)
            biases = None
            if view.biases is not None:
                biases = self._read(view.biases, view.rows, first, count).astype(mx.bfloat16)
            f = view.packing
            whole = mx.dequantize(stored, scales, biases, f.group_size, f.bits, f.mode)
            return whole.astype(mx.bfloat16)
        if view.block is not None and view.scales is not None:
            height, width = view.block
            top, bottom = first // height, -(-(first + count) // height)
            scales = self._read(view.scales, view.scales.shape[0], top, bottom - top)
            scales = mx.repeat(scales.astype(mx.float32), width, axis=1)[:, : view.columns]
            row = mx.arange(first, first + count) // height - top
            return (mx.from_fp8(stored, mx.float32) * scales[row]).astype(mx.bfloat16)
        return stored

    def _read(self, entry: Entry, rows: int, first: int, count: int) -> mx.array:
        width = entry.nbytes // rows
        wanted = count * width
        try:
            data = os.pread(self._descriptor(entry.file), wanted, entry.offset + first * width)
        except OSError as error:
            raise ModelError(f"{entry.file}: {error.strerror}; expected to read on.") from None
        if len(data) != wanted:
            raise ModelError(
                f"{entry.file}: ends {wanted - len(data):,} bytes early; expected it to stay as "
                "its header says. Download it again."
            )
        # Packing would hide it, since MLX's extremes of a group leave it out.
        if not_finite(data, entry.dtype):
            name = next((n for n, e in self.entries.items() if e == entry), "a tensor")
            raise ModelError(
                f"{entry.file}: {name} holds NaN or infinity in rows {first} to "
                f"{first + count - 1}; expected numbers. The file is damaged; download it again."
            )
        array = mx.array(np.frombuffer(data, NUMPY[entry.dtype]).reshape(count, -1))
        return array.view(mx.bfloat16) if entry.dtype == "BF16" else array

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{file}: {error.strerror}; expected a readable file.") from None
        return self._descriptors[file]

    def close(self, file: Path | None = None) -> None:
        """Give back the descriptor of `file`, or all."""
        for path in [file] if file else list(self._descriptors):
            if path in self._descriptors:
                os.close(self._descriptors.pop(path))


def open_folder(folder: Path) -> Source:
    """A local folder, from its headers alone.

    Raises: ModelError for what is not a Qwen3.5 folder, is damaged, or is packed in a way that is
    not read.
    """
    _refuse_other_forms(folder)
    return Source(folder, read_values(folder), shards.entries(folder))


def read_values(folder: Path) -> dict[str, Any]:
    """The folder's config.json as parsed JSON; what `config.read` says when there is none."""
    if not os.path.isfile(folder / "config.json"):
        config.read(folder)  # raises, with advice
    return read_json(folder / "config.json")


def _refuse_other_forms(folder: Path) -> None:
    """Raises: ModelError for weights in a form that is not read, with no others beside them."""
    files = sorted(folder.glob("*")) if os.path.isdir(folder) else []
    if any(file.suffix == ".safetensors" for file in files):
        return
    for file in files:
        if file.suffix in OTHER_FORMS:
            raise ModelError(
                f"{file}: is {OTHER_FORMS[file.suffix]}; expected safetensors. Take the model's "
                "original folder, such as Qwen/Qwen3.5-9B."
            )


def _without_fp8(
    values: dict[str, Any], where: str
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """config.json as of a folder that is not FP8, and the blocks of its scales if it is.

    Raises: ModelError for packings that are not read.
    """
    block = values.get("quantization_config")
    if not isinstance(block, dict) or "quant_method" not in block:
        return values, None
    section = Section(block, f"{where}: quantization_config")
    method = section.get("quant_method")
    if method != "fp8":
        raise ModelError(
            f"{where}: weights are packed as {brief(method)}; expected BF16, Qwen's FP8 or an MLX "
            "folder. Take the model's BF16 folder, such as Qwen/Qwen3.5-9B."
        )
    section.refuse_unless("fmt", "e4m3", None)
    sizes = block.get("weight_block_size")
    usable = isinstance(sizes, list) and all(is_whole(n) and 0 < n <= LARGEST for n in sizes)
    if not isinstance(sizes, list) or len(sizes) != 2 or not usable:
        raise ModelError(
            f"{section.where}: weight_block_size is {brief(sizes)}; expected two sizes such as "
            "[128, 128]. Take the model's BF16 folder."
        )
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    return plain, (sizes[0], sizes[1])
