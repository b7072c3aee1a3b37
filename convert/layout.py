"""Which tensors the folder gets, under mlx-vlm's names, and which rows of the source make them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen35_mlx.checkpoint import ZERO_CENTRED, to_mlx_name
from qwen35_mlx.config import Config
from qwen35_mlx.layers.moe import GroupedLinear
from qwen35_mlx.model import Model
from qwen35_mlx.packing import Format

from . import recipe
from .options import Options
from .source import Source, View

EXPERTS = ".experts."
F32 = (".A_log",)
SMALLEST = 2.0**-100  # what is smaller counts as 0 in the modes whose scales are powers of two
MAIN, MTP, NORMS = "model", "mtp", "norms"  # the files a target's parts go into


@dataclass(frozen=True)
class Piece:
    """`count` rows of `view` from `first` on, which are the target's rows from `at` on."""

    view: View
    first: int
    count: int
    at: int


@dataclass(frozen=True)
class Target:
    """One tensor of the folder, or one packed matrix, which is three.

    name: of the weight, in mlx-vlm's spelling. path: of its module, in that of the published
    checkpoints. shape: unpacked. add_one: the norm is stored around 0 and used as 1 + w. turn:
    shape `[C, T, P, P]` of a patch whose channels go last. exact: also kept in F32 beside the main
    files.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    pieces: tuple[Piece, ...]
    packing: Format | None = None
    add_one: bool = False
    turn: tuple[int, ...] | None = None
    exact: bool = False

    @property
    def file(self) -> str:
        return MTP if self.name.startswith("mtp.") else MAIN

    @property
    def nparameters(self) -> int:
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[str, ...]:
        """What a packed matrix is stored as; a plain one is itself."""
        if self.packing is None:
            return ("",)
        names = ("weight", "scales", "biases")
        return names if self.packing.mode == "affine" else names[:2]

    def part_name(self, part: str) -> str:
        return f"{self.name.removesuffix('.weight')}.{part}" if part else self.name

    def convert(self, rows: mx.array) -> dict[str, mx.array]:
        """What is stored of source rows `[n, columns]`, by part; lazy.

        The exact norm has the key NORMS.
        """
        if self.turn is not None:
            rows = rows.reshape(-1, *self.turn).transpose(0, 2, 3, 4, 1).reshape(rows.shape)
        if self.add_one:
            rows = rows.astype(mx.float32) + 1
        if self.packing is not None:
            f = self.packing
            rows = rows.astype(mx.bfloat16)
            if f.mode.startswith("mx"):
                # The exponent of a group of nothing but such weights wraps around in mx.quantize.
                rows = mx.where(mx.abs(rows) < SMALLEST, mx.zeros_like(rows), rows)
            parts = mx.quantize(rows, f.group_size, f.bits, f.mode)
            return dict(zip(self.parts, parts, strict=True))
        stored = {"": rows.astype(mx.float32 if self.is_f32 else mx.bfloat16)}
        return stored | ({NORMS: rows.astype(mx.float32)} if self.exact else {})

    @property
    def is_f32(self) -> bool:
        """`A_log`; and the norms of the MTP head, which other programs need not read."""
        is_norm = bool(ZERO_CENTRED.search(self.path + ".weight"))
        return self.name.endswith(F32) or (self.file == MTP and is_norm)


def targets(source: Source, options: Options) -> tuple[Target, ...]:
    """Everything `source` becomes, in the order of the model.

    Raises: ModelError when a tensor is missing, misshapen or too many; ConversionError when the
    group size divides nothing.
    """
    model = Model(source.config, source.has_vision, source.has_mtp)
    columns = matrices(model)
    tied = source.config.tie_word_embeddings
    recipe.require_packable(columns, tied, options)
    found: list[Target] = []
    for name, array in dict(tree_flatten(model.parameters())).items():
        path = name.removesuffix(".weight")
        packing = None
        if path in columns:
            packing = recipe.format_of(path, columns[path], tied, options)
        found += _targets(source, name, array.shape, packing)
    source.require_all_used(piece.view for target in found for piece in target.pieces)
    return tuple(found)


def published(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor as Qwen publishes the whole model, experts joined."""
    parameters = dict(tree_flatten(Model(config, has_vision=True, has_mtp=True).parameters()))
    return {
        name.removesuffix(".weight") if EXPERTS in name else name: _shapes(
            config, name, array.shape, is_mlx=False
        )[0]
        for name, array in parameters.items()
    }


def matrices(model: Model) -> dict[str, int]:
    """Columns of every matrix of the model, by module path."""
    kinds = nn.Linear | nn.Embedding | GroupedLinear
    return {p: m.weight.shape[-1] for p, m in model.named_modules() if isinstance(m, kinds)}


def _targets(
    source: Source, name: str, shape: tuple[int, ...], packing: Format | None
) -> Iterator[Target]:
    """The one target of a parameter of the model, or the two of joined gate and up experts."""
    path = name.removesuffix(".weight")
    if EXPERTS in name:
        yield from _experts(source, path, shape, packing)
        return
    stored, folder_shape, rows = _shapes(source.config, name, shape, source.is_mlx)
    view = source.view(_stored_name(source, name), stored, rows)
    is_norm = bool(ZERO_CENTRED.search(name))
    yield Target(
        name=to_mlx_name(name),
        path=path,
        shape=folder_shape,
        rows=rows,
        columns=view.columns,
        pieces=(Piece(view, 0, rows, 0),),
        packing=packing,
        add_one=is_norm and not source.is_mlx,
        turn=stored[1:] if len(stored) == 5 and not source.is_mlx else None,
        exact=_is_exact(source, name, view, is_norm),
    )


def _is_exact(source: Source, name: str, view: View, is_norm: bool) -> bool:
    """Norms whose F32 value BF16 would round, outside the MTP head, which keeps F32 itself."""
    if name.startswith("mtp.") or not (is_norm or name.endswith("linear_attn.norm.weight")):
        return False
    return not source.is_mlx or view.entry.dtype == "F32"


def _shapes(
    config: Config, name: str, shape: tuple[int, ...], is_mlx: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape in the source, in our folder, and rows, of the model's parameter `name`."""
    if name.endswith("conv1d.weight"):
        taps, channels = shape
        ours = (channels, taps, 1)
        return (ours if is_mlx else (channels, 1, taps)), ours, channels
    if name.endswith("patch_embed.proj.weight"):
        vision = config.vision
        assert vision is not None
        size, frames, channels = vision.patch_size, vision.temporal_patch_size, vision.in_channels
        patch = (shape[0], frames, size, size, channels)
        theirs = (shape[0], channels, frames, size, size)
        return (patch if is_mlx else theirs), patch, shape[0]
    return shape, shape, 1 if len(shape) == 1 else math.prod(shape[:-1])


def _experts(
    source: Source, path: str, shape: tuple[int, ...], packing: Format | None
) -> Iterator[Target]:
    """`experts.gate_up_proj` as gate and up, `experts.down_proj` as it is."""
    E, out, columns = shape
    stem = path.rpartition(EXPERTS)[0]
    halves = ("gate", "up") if path.endswith("gate_up_proj") else ("down",)
    height = out // len(halves)
    fused = _text_name(source, path)
    joined = source.view(fused, shape, E * out) if source.has(fused) else None
    for number, half in enumerate(halves):
        name = f"{to_mlx_name(stem)}.switch_mlp.{half}_proj.weight"
        if source.is_mlx:
            whole = source.view(name, (E, height, columns), E * height)
            pieces = [Piece(whole, 0, E * height, 0)]
        elif joined is None:
            loose = f"{_text_name(source, stem)}.experts.{{}}.{half}_proj.weight"
            each = [source.view(loose.format(e), (height, columns), height) for e in range(E)]
            pieces = [Piece(view, 0, height, e * height) for e, view in enumerate(each)]
        elif len(halves) == 1:
            pieces = [Piece(joined, 0, E * height, 0)]
        else:
            starts = [e * out + number * height for e in range(E)]
            pieces = [Piece(joined, start, height, e * height) for e, start in enumerate(starts)]
        yield Target(name, path, (E, height, columns), E * height, columns, tuple(pieces), packing)


def _stored_name(source: Source, name: str) -> str:
    return to_mlx_name(name) if source.is_mlx else _text_name(source, name)


def _text_name(source: Source, name: str) -> str:
    """A Hugging Face name; folders of the language model alone leave one part out."""
    short = name.replace("model.language_model.", "model.")
    return short if source.has("model.embed_tokens.weight") else name
