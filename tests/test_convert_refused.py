"""Sources that cannot be converted are refused by name, on one line, before anything is written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen35_mlx.convert import convert, open_folder, options

import converting
from converting import Raw, converted, read_file
from qwen35_mlx.errors import ModelError


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "packed as 'gptq'.*Take the model's BF16 folder"),
        ({"quant_method": "awq"}, "packed as 'awq'.*Take the model's BF16 folder"),
        ({"quant_method": "bitsandbytes"}, "packed as 'bitsandbytes'.*Take the model's BF16"),
        ({"quant_method": "compressed-tensors"}, "packed as 'compressed-tensors'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8"}, "weight_block_size is None; expected two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size is"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, "weight_block_size is"),
    ],
    ids=str,
)
def test_other_packings_are_refused_with_one_line(
    method: dict[str, Any], named: str, tmp_path: Path
) -> None:
    source = converting.write_source(tmp_path / "source")
    change_json(source / "config.json", lambda v: v.update(quantization_config=method))
    with pytest.raises(ModelError, match=named) as raised:
        converted(source, tmp_path / "out")
    assert len(str(raised.value).splitlines()) == 1 and "config.json" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("qwen3.5-9b-q4_k_m.gguf", "GGUF"),
        ("pytorch_model.bin", "PyTorch's pickle form"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch's pickle form"),
        ("consolidated.00.pth", "PyTorch's pickle form"),
        ("weights.pt", "PyTorch's pickle form"),
    ],
)
def test_other_forms_of_weights_are_refused_by_name(
    name: str, named: str, with_config: bool, tmp_path: Path
) -> None:
    source = converting.write_source(tmp_path / "source")
    (source / name).write_bytes(b"weights")
    open_folder(source)  # beside safetensors they are of no matter
    (source / "model.safetensors").unlink()
    if not with_config:
        (source / "config.json").unlink()
    with pytest.raises(ModelError, match=f"{name}: is {named}; expected safetensors. Take the"):
        open_folder(source)


def bare_fp8(stored: dict[str, Raw]) -> None:
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    stored[name] = Raw("F8_E4M3", stored[name].shape, stored[name].data[::2])


def doubles(stored: dict[str, Raw]) -> None:
    name = "mtp.norm.weight"
    stored[name] = Raw("F64", stored[name].shape, 4 * stored[name].data)


def packed_without_a_word(stored: dict[str, Raw]) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    shape = stored[name].shape
    stored[name] = Raw("U32", (shape[0], shape[1] // 2), stored[name].data)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (bare_fp8, "down_proj.weight is F8_E4M3, and config.json declares no FP8 blocks"),
        (doubles, "mtp.norm.weight is F64; expected BF16, F16, F32"),
        (packed_without_a_word, "up_proj.weight is U32, and config.json declares no MLX"),
    ],
)
def test_a_kind_of_number_that_is_not_read_is_refused(
    change: Callable[[dict[str, Raw]], None], named: str, tmp_path: Path
) -> None:
    source = converting.write_source(tmp_path / "source")
    stored = read_file(source / "model.safetensors")
    change(stored)
    converting.write_file(source / "model.safetensors", stored)
    with pytest.raises(ModelError, match=named):
        converted(source, tmp_path / "out", group_size=32)


@pytest.mark.parametrize("name", ["norm.weight", "layers.2.mlp.experts.gate_up_proj"])
def test_fp8_of_other_axes_than_two_is_refused_by_name(name: str, tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", "moe")
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    change_json(source / "config.json", lambda v: v.update(quantization_config=block))
    stored = read_file(source / "model.safetensors")
    name = f"model.language_model.{name}"
    shape = stored[name].shape
    scales = (*shape[:-2], *(-(-count // 128) for count in shape[-2:]))
    stored[name] = Raw("F8_E4M3", shape, stored[name].data[::2])
    stored[f"{name}_scale_inv"] = converting.raw(np.ones(scales, np.float32), "F32")
    converting.write_file(source / "model.safetensors", stored)
    said = f"{name} is F8_E4M3 of shape .*; expected FP8 in matrices only, each expert apart"
    with pytest.raises(ModelError, match=said) as raised:
        converted(source, tmp_path / "out")
    assert str(list(shape)) in str(raised.value)


MODULE = "language_model.model.layers.3.self_attn.o_proj"


def whole_scales(stored: dict[str, Raw]) -> None:
    scales = stored[f"{MODULE}.scales"]
    stored[f"{MODULE}.scales"] = Raw("U32", scales.shape, 2 * scales.data)


def whole_biases(stored: dict[str, Raw]) -> None:
    biases = stored[f"{MODULE}.biases"]
    stored[f"{MODULE}.biases"] = Raw("U8", biases.shape, biases.data[::2])


def no_axes(part: str) -> Callable[[dict[str, Raw]], None]:
    def change(stored: dict[str, Raw]) -> None:
        dtype = stored[f"{MODULE}.{part}"].dtype
        stored[f"{MODULE}.{part}"] = Raw(dtype, (), bytes(converting.ITEM[dtype]))

    return change


def other_biases(stored: dict[str, Raw]) -> None:
    biases = stored[f"{MODULE}.biases"]
    shape = (biases.shape[0], biases.shape[1] // 2)
    stored[f"{MODULE}.biases"] = Raw("BF16", shape, biases.data[::2])


@pytest.mark.parametrize(
    "change",
    [
        whole_scales,
        whole_biases,
        no_axes("weight"),
        no_axes("scales"),
        no_axes("biases"),
        other_biases,
    ],
    ids=["scales U32", "biases U8", "weight []", "scales []", "biases []", "biases short"],
)
def test_a_packed_matrix_with_impossible_parts_is_refused_by_name(
    change: Callable[[dict[str, Raw]], None], tmp_path: Path
) -> None:
    block = {"group_size": 32, "bits": 8, "mode": "affine"}
    source = converting.write_source(tmp_path / "source", layout="mlx", quantize=block)
    stored = read_file(source / "model.safetensors")
    change(stored)
    converting.write_file(source / "model.safetensors", stored)
    with pytest.raises(ModelError, match="o_proj"):
        converted(source, tmp_path / "out", group_size=32)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        values = json.loads(content[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return edit


def overlap(values: dict[str, Any]) -> None:
    """The head's bytes would begin where those of the first tensor do."""
    begin, end = values["lm_head.weight"]["data_offsets"]
    values["lm_head.weight"]["data_offsets"] = [0, end - begin]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (cut_short, "its header describes"),
        (huge_header, "with a header of 4611686018427387904"),
        (edit_header(overlap), "the one before it ends at"),
        (edit_header(lambda v: v["lm_head.weight"].update(dtype="F4")), "lm_head.weight has no"),
        (
            edit_header(lambda v: v["lm_head.weight"].update(shape=[-1, 96])),
            "lm_head.weight has no",
        ),
    ],
    ids=["cut short", "huge header", "overlap", "dtype", "shape"],
)
def test_a_damaged_file_is_refused_by_name(
    change: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    source = converting.write_source(tmp_path / "source")
    change(source / "model.safetensors")
    with pytest.raises(ModelError, match=f"model.safetensors: .*{named}"):
        converted(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", shards=2)
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    index = source / "model.safetensors.index.json"
    change_json(index, lambda v: v["weight_map"].update({"lm_head.weight": name}))
    said = "expected a .safetensors file of this folder. Download the index again.$"
    with pytest.raises(ModelError, match=said):
        converted(source, tmp_path / "out")


def test_a_file_that_is_cut_after_the_plan_is_named(tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", shards=3)
    opened, last = open_folder(source), source / "model-00003-of-00003.safetensors"
    cut_short(last)
    with pytest.raises(ModelError, match="model-00003-of-00003.safetensors: ends .* early"):
        convert(opened, tmp_path / "out", options(16), name="a")
    assert not (tmp_path / "out").exists()
