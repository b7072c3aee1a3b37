"""Folders of the true widths of all eight sizes, two layers of each, from every layout.

The sources are sparse: the first and the last row of each matrix hold values, the rest zeros.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert import Plan, open_folder, plan
from qwen35_mlx.convert.options import options
from qwen35_mlx.convert.published import config_values
from qwen35_mlx.convert.verify import verify

import converting
import tiny
import tiny_shapes
from converting import FP8, ITEM, SIZES, Raw, decoded, raw
from qwen35_mlx import family

BLOCK = 128
HAVE_FP8 = ("27B", "35B-A3B", "122B-A10B", "397B-A17B")
Shapes = dict[str, tuple[int, ...]]
Rows = Iterator[tuple[int, Raw]]  # of a matrix, and their numbers
pytestmark = pytest.mark.slow


def short(size: family.Size) -> dict[str, Any]:
    """The size with one layer of each kind, few tokens and experts, and one layer of its tower."""
    config = config_values(size)
    text = config["text_config"]
    text |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    text["vocab_size"] = 300
    if size.num_experts:
        text |= {"num_experts": 3, "num_experts_per_tok": 2}
    config["vision_config"]["depth"] = 1
    return config


def is_fp8(name: str) -> bool:
    return ".layers." in name and name.split(".")[-2] in FP8


def edges(name: str, shape: tuple[int, ...], layout: str) -> Rows:
    """First and last row of a tensor whose experts are apart, a vector whole.

    layout: "fp8", or what that is decoded: "fp8 as bf16"; in any other the values as drawn.
    """
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    for row in sorted({0, rows - 1}):
        values = (tiny.normal(f"{name} {row}", (1, columns)) / 8).astype(np.float32)
        if "fp8" in layout and is_fp8(name):
            codes = (tiny.raw(f"{name} {row}", columns) % np.uint64(127)).astype(np.uint8)[None]
            grid = scales(name, shape).floats[row // BLOCK][None]
            values = decoded(codes, grid, (1, BLOCK))
            yield row, raw(codes, "F8_E4M3") if layout == "fp8" else raw(values, "BF16")
        else:
            yield row, raw(values, converting.published_dtype(name))


def scales(name: str, shape: tuple[int, ...]) -> Raw:
    grid = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    return raw(np.exp2(tiny.normal(f"{name} scale", grid) - 11).astype(np.float32), "BF16")


def filled(name: str, shape: tuple[int, ...], layout: str) -> Rows:
    """The same of a tensor whose experts may be joined."""
    apart = converting.unfused({name: shape})
    width = 0 if apart.keys() == {name} else next(iter(apart.values()))[0]
    for number, (part, its_shape) in enumerate(apart.items()):
        for row, values in edges(part, its_shape, layout):
            yield number * width + row, values


def write_sparse(path: Path, shapes: Shapes, layout: str) -> None:
    header: dict[str, Any] = {}
    rows: dict[str, list[tuple[int, Raw]]] = {}
    end = 0
    for name, shape in shapes.items():
        rows[name] = list(filled(name, shape, layout))
        dtype = rows[name][0][1].dtype
        begin, end = end, end + ITEM[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        if dtype == "F8_E4M3":
            scale = scales(name, shape)
            span = [end, end + len(scale.data)]
            header[f"{name}_scale_inv"] = {"dtype": "BF16", "shape": scale.shape}
            header[f"{name}_scale_inv"]["data_offsets"] = span
            rows[f"{name}_scale_inv"] = [(0, scale)]
            end = span[1]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, stored in rows.items():
            for row, values in stored:
                begin = header[name]["data_offsets"][0] + row * len(values.data)
                file.seek(8 + len(text) + begin)
                file.write(values.data)
        file.truncate(8 + len(text) + end)


def write(folder: Path, config: dict[str, Any], layout: str) -> Path:
    """A source in one of the layouts: "joined", "apart", "fp8", "fp8 as bf16"."""
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    changes = {"quantization_config": method} if layout == "fp8" else {}
    tiny.write(folder, config | changes, {}, files=converting.FILES)
    shapes = tiny_shapes.shapes(config)
    shapes = shapes if layout == "joined" else converting.unfused(shapes)
    write_sparse(folder / "model.safetensors", shapes, layout)
    return folder


def assert_rows_are_quantized(made: Path, planned: Plan, config: dict[str, Any]) -> None:
    """Each packed matrix has, at its edges, what MLX makes of those rows alone."""
    stored = open_folder(made).entries
    checked = 0
    for name, shape in converting.unfused(tiny_shapes.shapes(config)).items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        begin = int(expert[1]) * shape[0] if expert else 0
        path = tiny.mlx_name(re.sub(r"\.experts\.\d+\.", ".switch_mlp.", name))
        target = next(target for target in planned.targets if target.name == path)
        if target.packing is None:
            continue
        f = target.packing
        for row, values in edges(name, shape, "joined"):
            given = mx.array(values.floats).astype(mx.bfloat16)
            for part, expected in converting.packed(given, f.mode, f.bits, f.group_size).items():
                entry = stored[target.part_name(part)]
                with entry.file.open("rb") as file:
                    file.seek(entry.offset + (begin + row) * len(expected.data))
                    assert file.read(len(expected.data)) == expected.data, (name, row, part)
            checked += 1
    assert checked > 20


@SIZES
def test_layouts_of_a_size_give_the_same_folder(size: family.Size, tmp_path: Path) -> None:
    config = short(size)
    pairs: list[tuple[str, ...]] = [("joined", "apart") if size.num_experts else ("joined",)]
    pairs += [("fp8 as bf16", "fp8")] if size.name in HAVE_FP8 else []
    for pair in pairs:
        found = []
        for layout in pair:
            source, out = write(tmp_path / "source", config, layout), tmp_path / "out"
            assert 512 * os.stat(source / "model.safetensors").st_blocks < 200_000_000
            converting.converted(source, out, bits=4)
            assert verify(out) == []
            found.append(
                {n: d for n, d in converting.digests(out).items() if n.endswith(".safetensors")}
            )
            if layout == "joined":
                planned = plan(open_folder(source), options(bits=4))
                assert_rows_are_quantized(out, planned, config)
            for path in (*source.iterdir(), *out.iterdir()):
                path.unlink()
            out.rmdir()
        assert all(one == found[0] for one in found)
