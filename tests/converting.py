"""What the tests of the converter share: folders to convert, and output read without its code."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert import Plan, convert, open_folder, options, plan
from qwen35_mlx.convert.published import config_values
from qwen35_mlx.convert.source import Source, View

import tiny
import tiny_shapes
from qwen35_mlx import family, shards
from qwen35_mlx.family import Size
from qwen35_mlx.shards import Entry

ITEM = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "U32": 4}
SIZES = pytest.mark.parametrize("size", family.SIZES, ids=lambda size: size.name)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
DEMO = Path(__file__).parents[1] / "examples" / "demo-model"
# What a model's repository has beside the weights; the converter copies all but the last.
FILES = {
    "tokenizer.json": (DEMO / "tokenizer.json").read_text("utf-8"),
    "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}),
    "vocab.json": '{"a": 0}',
    "merges.txt": "#version: 0.2",
    "preprocessor_config.json": '{"patch_size": 16}',
    "video_preprocessor_config.json": '{"fps": 2}',
    "generation_config.json": '{"top_k": 20}',
    "README.md": "A model card.",
}


# Values of the codes of FP8, and the matrices that Qwen's FP8 folders have in it.
CODES = np.arange(256)
# Sign, four bits of exponent, three of fraction; all ones in the last seven is no number.
FRACTION, EXPONENT = CODES % 8, CODES // 8 % 16
MAGNITUDE = np.where(
    EXPONENT == 0, FRACTION * 2.0**-9, (8 + FRACTION) * 2.0 ** (EXPONENT.astype(float) - 10)
)
E4M3 = np.where(CODES % 128 == 127, np.nan, np.where(CODES < 128, 1, -1) * MAGNITUDE)
FP8: tuple[str, ...] = (
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
)
FP8 += ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Raw:
    """One stored tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def floats(self) -> np.ndarray:
        """The values of a BF16 or F32 one as `shape` float32."""
        if self.dtype == "F32":
            return np.frombuffer(self.data, np.float32).reshape(self.shape)
        assert self.dtype == "BF16"
        wide = np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(self.shape)


def raw(values: np.ndarray, dtype: str) -> Raw:
    """float32 values as they are stored; bytes (uint8) as F8_E4M3."""
    if dtype == "BF16":
        data = (tiny.round_bf16(values).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        data = np.ascontiguousarray(values).tobytes()
    assert len(data) == ITEM[dtype] * values.size
    return Raw(dtype, values.shape, data)


def read_file(path: Path) -> dict[str, Raw]:
    """A safetensors file, in the order of its header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, value in header.items():
        begin, end = (8 + length + place for place in value["data_offsets"])
        found[name] = Raw(value["dtype"], tuple(value["shape"]), content[begin:end])
    return found


def write_file(path: Path, tensors: Mapping[str, Raw]) -> None:
    """A safetensors file by hand: MLX cannot write F8_E4M3."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    data = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_sharded(folder: Path, parts: Iterable[Mapping[str, Raw]]) -> None:
    """Several files and their index."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-00009.safetensors"
        write_file(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def main_tensors(folder: Path) -> dict[str, Raw]:
    """What the index names, which is all that other programs read."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Raw] = {}
    for file in sorted(set(index["weight_map"].values())):
        stored = read_file(folder / file)
        assert all(index["weight_map"].pop(name) == file for name in stored)
        found |= stored
    assert not index["weight_map"]
    return found


def differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names whose tensors or files are not the same; comparing them whole would print megabytes."""
    names = found.keys() | expected.keys()
    return sorted(name for name in names if found.get(name) != expected.get(name))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` by its relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@cache
def drawn(name: str) -> tiny.Tensors:
    return tiny.draw(tiny.CONFIGS[name])


def write_source(folder: Path, name: str = "dense", **given: Any) -> Path:
    """A folder as Qwen publishes it, small files and all; `given` goes to `tiny.write`."""
    given = {"dtype": "bfloat16", "files": FILES} | given
    return tiny.write(folder, tiny.CONFIGS[name], drawn(name), **given)


def converted(
    source: Path,
    out: Path,
    *,
    shard_bytes: int | None = None,
    progress: Callable[[Any], None] | None = None,
    **given: Any,
) -> Path:
    """Convert with the options `given`; shard_bytes may be less than the command allows."""
    chosen = options(**given)
    if shard_bytes is not None:
        chosen = replace(chosen, shard_size=shard_bytes)
    made = convert(open_folder(source), out, chosen, name="Qwen/a-model", progress=progress)
    assert made == out
    return out


def entries(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Callable[[str], str] = lambda name: "BF16",
    files: int = 1,
) -> dict[str, Entry]:
    """Headers of files that do not exist, names dealt out to them like cards."""
    found, ends = {}, [4096] * files
    for number, (name, shape) in enumerate(shapes.items()):
        file = number % files
        nbytes = ITEM[dtype(name)] * math.prod(shape)
        path = Path(f"/nowhere/model-{file:05d}.safetensors")
        found[name] = Entry(path, dtype(name), shape, nbytes, ends[file])
        ends[file] += nbytes
    return found


def unfused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same list with each expert's three projections apart."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith(".experts.gate_up_proj"):
            for expert in range(shape[0]):
                stem = f"{name.removesuffix('gate_up_proj')}{expert}"
                half = (shape[1] // 2, shape[2])
                found |= {f"{stem}.gate_proj.weight": half, f"{stem}.up_proj.weight": half}
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix("down_proj")
            found |= {f"{stem}{e}.down_proj.weight": shape[1:] for e in range(shape[0])}
        else:
            found[name] = shape
    return found


def published_dtype(name: str) -> str:
    return "F32" if tiny.stays_float32(name) else "BF16"


def in_folder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors when nothing is packed, the MTP head's among them."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        path = tiny.mlx_name(name)
        if path.endswith("experts.gate_up_proj"):
            stem = path.replace("experts.gate_up_proj", "switch_mlp")
            half = (shape[0], shape[1] // 2, shape[2])
            found |= {f"{stem}.gate_proj.weight": half, f"{stem}.up_proj.weight": half}
        elif path.endswith("experts.down_proj"):
            found[path.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = shape
        elif path.endswith("conv1d.weight"):
            found[path] = (shape[0], shape[2], shape[1])
        elif path.endswith("patch_embed.proj.weight"):
            found[path] = (shape[0], *shape[2:], shape[1])
        else:
            found[path] = shape
    return found


def numbers_apart(name: str) -> str:
    """`layers.3.` and `layers.17.` are one kind."""
    return re.sub(r"\.\d+\.", ".N.", name)


def packed(array: mx.array, mode: str, bits: int, group_size: int) -> dict[str, Raw]:
    """What `mx.quantize` makes of a whole tensor, by part."""
    parts = mx.quantize(array, group_size=group_size, bits=bits, mode=mode)
    found = {}
    for part, value in zip(("weight", "scales", "biases"), parts, strict=False):
        dtype = {mx.uint32: "U32", mx.uint8: "U8", mx.bfloat16: "BF16"}[value.dtype]
        data = np.array(mx.contiguous(value).view(mx.uint8)).tobytes()
        found[part] = Raw(dtype, value.shape, data)
    return found


def unpacked(arrays: Mapping[str, mx.array], module: str, **settings: Any) -> mx.array:
    """A packed matrix of a file that MLX loaded, whole and in BF16."""
    weight, scales = arrays[f"{module}.weight"], arrays[f"{module}.scales"]
    whole = mx.dequantize(weight, scales, arrays.get(f"{module}.biases"), **settings)
    return whole.astype(mx.bfloat16)


def one_matrix(
    path: Path, *tensors: Raw, block: tuple[int, int] | None = None
) -> tuple[Source, View]:
    """A source, which is of no matter, and a view of `tensors[0]`, its scales next."""
    write_file(path, {str(i): tensor for i, tensor in enumerate(tensors)})
    found = list(shards.header(path).values())
    config = tiny.CONFIGS["dense"]
    source = Source(path.parent, config, entries(tiny_shapes.shapes(config)))
    rows, columns = tensors[0].shape
    scales = found[1] if len(found) > 1 else None
    return source, View(found[0], rows, columns, scales=scales, block=block)


def decoded(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32, not yet rounded: each code by the scale of its block."""
    rows, columns = codes.shape
    spread = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:rows, :columns]
    return E4M3[codes].astype(np.float32) * spread


def source_of(
    config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None, files: int = 1
) -> Source:
    """A source whose headers are known and whose files are not there."""
    listed = tiny_shapes.shapes(config) if shapes is None else shapes
    return Source(Path("/nowhere"), config, entries(listed, published_dtype, files))


@cache
def planned(size: Size, files: int = 1, **given: Any) -> Plan:
    """The plan of a size from an independent list of its tensors."""
    return plan(source_of(config_values(size), files=files), options(**given))
