"""Folders of every layout load to the same weights; damaged ones are refused by name."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import qwen35_mlx
import tiny
from qwen35_mlx import checkpoint, config, loader, memory, shards
from qwen35_mlx.errors import ModelError, OutOfMemory

TOKENS = np.arange(3, 40) % 330


def logits(folder: Path, dtype: mx.Dtype | None = None) -> np.ndarray:
    model = qwen35_mlx.load(folder, dtype=dtype)
    positions = np.broadcast_to(np.arange(len(TOKENS), dtype=np.int32), (3, len(TOKENS)))
    prompt = qwen35_mlx.Prompt(TOKENS.astype(np.int32), positions, 0, (), False, ())
    return np.array(model.logits(prompt))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Tensors, np.ndarray]:
    tensors = tiny.draw(tiny.CONFIGS["moe"])
    folder = tiny.write(tmp_path_factory.mktemp("moe"), tiny.CONFIGS["moe"], tensors)
    return tensors, logits(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 3},
        {"experts_fused": False},
        {"experts_fused": False, "shards": 2},
        {"layout": "mlx"},
    ],
    ids=str,
)
def test_every_layout_gives_the_same_logits(
    options: dict, moe: tuple[tiny.Tensors, np.ndarray], tmp_path: Path
) -> None:
    tensors, wanted = moe
    found = logits(tiny.write(tmp_path, tiny.CONFIGS["moe"], tensors, **options))
    assert distance(found, wanted) < 1e-6


def test_bf16_norms_keep_their_exact_sum(tmp_path: Path) -> None:
    """1 + w of a bf16 w is no bf16 number: kept in f32 it must equal the sum exactly."""
    tensors = tiny.draw(tiny.CONFIGS["dense"])
    tiny.write(tmp_path, tiny.CONFIGS["dense"], tensors, dtype="bfloat16")
    arrays = checkpoint.read(tmp_path, shards.entries(tmp_path), mx.bfloat16)
    name = "model.language_model.layers.1.input_layernorm.weight"
    assert arrays[name].dtype == mx.float32
    assert np.array_equal(np.array(arrays[name]), 1 + tiny.rounded(tensors)[name])


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("which", ["dense_tied", "moe_untied"])
def test_packed_folders_equal_their_unpacked_values(mode: str, which: str, tmp_path: Path) -> None:
    """Load a packed folder, and one that holds what its packed matrices decode to."""
    block = {
        "affine": {"group_size": 32, "bits": 4, "mode": "affine"},
        "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    }[mode]
    wide = {"group_size": 32, "bits": 8, "mode": "affine"}
    block = block | {
        "language_model.model.layers.0.linear_attn.out_proj": wide,
        "language_model.model.layers.1.mlp.gate": wide,
        "language_model.model.layers.3.self_attn.k_proj": False,
    }
    conf, tensors = tiny.CONFIGS[which], tiny.draw(tiny.CONFIGS[which])
    packed = tiny.write(tmp_path / "packed", conf, tensors, layout="mlx", quantize=block)
    stored = shards.entries(packed)
    assert "language_model.model.layers.3.self_attn.k_proj.scales" not in stored
    plain = _unpacked(packed, block)
    assert distance(logits(packed), logits(plain)) < 1e-5


def _unpacked(packed: Path, block: dict) -> Path:
    folder = packed.parent / "plain"
    folder.mkdir()
    values = json.loads((packed / "config.json").read_text())
    del values["quantization"], values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    arrays: dict[str, mx.array] = {}
    for file in packed.glob("*.safetensors"):
        arrays |= checkpoint._lazy(file)
    for name in [n for n in arrays if n.endswith(".scales")]:
        path = name.removesuffix(".scales")
        how = block.get(path, {k: block[k] for k in ("group_size", "bits", "mode")})
        weight = mx.dequantize(
            arrays.pop(f"{path}.weight"),
            arrays.pop(name),
            arrays.pop(f"{path}.biases", None),
            **how,
        )
        arrays[f"{path}.weight"] = weight.astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def test_a_text_only_folder_loads_and_has_no_tower(tmp_path: Path) -> None:
    conf, tensors = tiny.CONFIGS["dense"], tiny.draw(tiny.CONFIGS["dense"])
    wanted = logits(tiny.write(tmp_path / "whole", conf, tensors))
    flat = {**conf["text_config"], "dtype": "float32", "text_config": {}}
    kept = {
        n.replace("model.language_model.", "model."): v
        for n, v in tensors.items()
        if not n.startswith(("model.visual", "mtp."))
    }
    tiny.write(tmp_path / "text", flat, kept)
    del flat["text_config"]
    (tmp_path / "text" / "config.json").write_text(json.dumps(flat))
    assert distance(logits(tmp_path / "text"), wanted) < 1e-6
    assert not qwen35_mlx.load(tmp_path / "text").model.has_vision


Damage = Callable[[Path], object]


def _edit_header(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _edit_head(folder: Path, **values: object) -> None:
    _edit_header(folder, lambda header: header[HEAD].update(values))


def _overlap(header: dict) -> None:
    """The last tensor begins where the first does: each length is still right."""
    spans = {n: h["data_offsets"] for n, h in header.items() if n != "__metadata__"}
    begin, stop = spans[max(spans, key=lambda n: spans[n][0])]
    header[max(spans, key=lambda n: spans[n][0])]["data_offsets"] = [0, stop - begin]


def _large_index(folder: Path) -> None:
    with (folder / shards.INDEX).open("r+b") as file:
        file.truncate(65 << 20)


def _edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / shards.INDEX
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _cut(folder: Path, keep: int) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


NORM = "model.language_model.norm.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002.* is missing"),
        (lambda f: _cut(f, 5000), "00002.*damaged"),
        (lambda f: _cut(f, 0), "0 bytes"),
        (lambda f: _cut(f, -1), "its header describes"),
        (lambda f: (f / shards.INDEX).write_text("{}"), "weight_map: found a NoneType"),
        (lambda f: (f / shards.INDEX).write_text("nonsense"), "expected JSON"),
        (
            lambda f: _edit_index(f, lambda m: m.update({NORM: "../x.safetensors"})),
            "of this folder",
        ),
        (lambda f: _edit_index(f, lambda m: m.update({NORM: "weights.bin"})), "of this folder"),
        (lambda f: _edit_index(f, lambda m: m.update(ghost=m[NORM])), "no tensor ghost"),
        (lambda f: _edit_index(f, lambda m: m.pop(NORM)), "does not list"),
        (lambda f: _edit_header(f, lambda h: h.popitem()), "00001.*(damaged|no tensor)"),
        (
            lambda f: _edit_header(f, lambda h: h["lm_head.weight"].update(dtype="F8_E4M3")),
            "spans",
        ),
        (lambda f: _edit_head(f, data_offsets=["0", "4"]), "no usable"),
        (lambda f: _edit_head(f, data_offsets=[0.0, 4.0]), "no usable"),
        (lambda f: _edit_head(f, data_offsets=[False, True]), "no usable"),
        (lambda f: _edit_head(f, data_offsets=[-4, 0]), "no usable"),
        (lambda f: _edit_head(f, data_offsets=[4]), "no usable"),
        (lambda f: _edit_head(f, data_offsets=None), "no usable"),
        (lambda f: _edit_head(f, shape=["2"]), "no usable"),
        (lambda f: _edit_head(f, shape=[2.0]), "no usable"),
        (lambda f: _edit_head(f, shape=[True]), "no usable"),
        (lambda f: _edit_head(f, shape="2"), "no usable"),
        (lambda f: _edit_head(f, shape=[0, 2**31]), "no usable"),
        (lambda f: _edit_head(f, shape=[2] * 4000), "no usable"),
        (lambda f: _edit_head(f, dtype=["F32"]), "no usable"),
        (lambda f: _edit_header(f, lambda h: h.update({HEAD: None})), "no usable"),
        (lambda f: _edit_header(f, _overlap), "begins at byte 0"),
        (lambda f: _edit_header(f, lambda h: h.update(__metadata__=3)), "__metadata__"),
        (lambda f: _edit_header(f, lambda h: h.update(__metadata__={"a": 3})), "__metadata__"),
        (lambda f: _large_index(f), "at most 67,108,864 are read"),
        (
            lambda f: _edit_index(f, lambda m: m.update({NORM: "x" * 300 + ".safetensors"})),
            "xxx.safetensors is missing",
        ),
        (lambda f: _pipe(f / shards.INDEX), "no model.safetensors and no"),
        (lambda f: _pipe(f / "model-00002-of-00002.safetensors"), "00002.* is missing"),
    ],
    ids=[
        "shard gone",
        "shard cut",
        "shard empty",
        "last byte gone",
        "index empty",
        "index no JSON",
        "index leads out",
        "index names no safetensors",
        "index names a ghost",
        "index forgets a tensor",
        "header forgets a tensor",
        "header lies about a dtype",
        "offsets are texts",
        "offsets are floats",
        "offsets are booleans",
        "offsets are negative",
        "one offset",
        "no offsets",
        "shape of texts",
        "shape of floats",
        "shape of booleans",
        "shape is a text",
        "shape too large for an array",
        "shape of thousands of axes",
        "dtype is a list",
        "entry is null",
        "tensors overlap",
        "metadata is a number",
        "metadata holds a number",
        "index too large",
        "index names a file too long to name",
        "index is a pipe",
        "shard is a pipe",
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    damage: Damage, named: str, tmp_path: Path
) -> None:
    tensors = tiny.draw(tiny.CONFIGS["dense"])
    tiny.write(tmp_path, tiny.CONFIGS["dense"], tensors, shards=2)
    damage(tmp_path)
    with pytest.raises(ModelError, match=named) as caught:
        qwen35_mlx.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.pop("mtp.fc.weight"), "mtp.fc.weight is missing"),
        (lambda t: t.pop("model.visual.blocks.1.attn.qkv.bias"), "attn.qkv.bias is missing"),
        (lambda t: t.update(surplus=np.zeros(3, np.float32)), "surplus .*belongs to no part"),
        (
            lambda t: t.update({NORM: np.zeros(95, np.float32)}),
            r"\(95,\); config.json expects \(96,\)",
        ),
    ],
    ids=["norm", "mtp", "vision", "extra", "shape"],
)
def test_tensors_are_exactly_those_of_the_configuration(
    change: Callable[[tiny.Tensors], object], named: str, tmp_path: Path
) -> None:
    tensors = tiny.draw(tiny.CONFIGS["dense"])
    change(tensors)
    tiny.write(tmp_path, tiny.CONFIGS["dense"], tensors)
    with pytest.raises(ModelError, match=named):
        qwen35_mlx.load(tmp_path)


LAYER = "model.language_model.layers.0."
MLX_LAYER = "language_model.model.layers.0."
CONV = "linear_attn.conv1d.weight"
PATCH = "model.visual.patch_embed.proj.weight"
MLX_PATCH = "vision_tower.patch_embed.proj.weight"
EXPERT = LAYER + "mlp.experts.2."
SWITCH = MLX_LAYER + "mlp.switch_mlp."


def _reshaped(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    path = folder / "model.safetensors"
    arrays = {n: mx.contiguous(a) for n, a in checkpoint._lazy(path).items()}
    arrays[name] = mx.zeros(shape)
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)
    (folder / shards.INDEX).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("layout", "name", "shape", "expected"),
    [
        ("huggingface", LAYER + CONV, (4, 1), r"\[C, 1, K\]"),
        ("huggingface", LAYER + CONV, (6, 2, 4), r"\[C, 1, K\]"),
        ("huggingface", PATCH, (), r"\[H, C, T, P, P\]"),
        ("huggingface", PATCH, (80, 1536), r"\[H, C, T, P, P\]"),
        ("huggingface", PATCH, (0, 3, 2, 16, 16), r"\[H, C, T, P, P\]"),
        ("huggingface", EXPERT + "up_proj.weight", (64, 190), r"\[64, 192\]"),
        ("huggingface", EXPERT + "gate_proj.weight", (66, 192), r"\[64, 192\]"),
        ("huggingface", EXPERT + "down_proj.weight", (192, 66), r"\[192, 64\]"),
        ("huggingface", LAYER + "mlp.experts.0.gate_proj.weight", (64,), "two axes"),
        ("mlx", MLX_LAYER + CONV, (4, 1), r"\[C, K, 1\]"),
        ("mlx", MLX_LAYER + CONV, (6, 4, 2), r"\[C, K, 1\]"),
        ("mlx", MLX_PATCH, (80, 1536), r"\[H, T, P, P, C\]"),
        ("mlx", SWITCH + "gate_proj.weight", (8, 65, 192), r"up_proj has shape \[8, 64, 192\]"),
        ("mlx", SWITCH + "up_proj.weight", (64, 192), "three axes"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    layout: str, name: str, shape: tuple[int, ...], expected: str, tmp_path: Path
) -> None:
    tensors = tiny.draw(tiny.CONFIGS["moe"])
    tiny.write(tmp_path, tiny.CONFIGS["moe"], tensors, layout=layout, experts_fused=False)
    _reshaped(tmp_path, name, shape)
    with pytest.raises(ModelError, match=expected) as caught:
        qwen35_mlx.load(tmp_path)
    message = str(caught.value)
    assert name.partition(".layers.")[2] in message and str(tmp_path) in message
    assert str(list(shape)) in message and "\n" not in message


def test_stacked_experts_of_another_rank_are_named(tmp_path: Path) -> None:
    tensors = tiny.draw(tiny.CONFIGS["moe"])
    tiny.write(tmp_path, tiny.CONFIGS["moe"], tensors, layout="mlx")
    for kind in ("gate", "up"):
        _reshaped(tmp_path, f"{SWITCH}{kind}_proj.weight", (8,))
    with pytest.raises(ModelError, match=r"switch_mlp.gate_proj.weight has shape \[8\]"):
        qwen35_mlx.load(tmp_path)


def test_an_mlx_folder_under_hugging_face_names_is_refused_by_its_convolution(
    tmp_path: Path,
) -> None:
    """Its norms already hold 1 + w: taken for Hugging Face's they would become 2 + w."""
    conf, tensors = tiny.CONFIGS["dense"], tiny.draw(tiny.CONFIGS["dense"])
    tiny.write(tmp_path, conf, tensors, layout="mlx")
    arrays = checkpoint._lazy(tmp_path / "model.safetensors")
    kept = {
        n.removeprefix("language_model."): mx.contiguous(a)
        for n, a in arrays.items()
        if not n.startswith("vision_tower")
    }
    mx.eval(kept)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), kept)
    (tmp_path / shards.INDEX).unlink()
    with pytest.raises(ModelError, match=r"layers.0.*\[\d+, 4, 1\]; .*axes are MLX's") as caught:
        qwen35_mlx.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_expert_numbered_beyond_reason_is_refused(tmp_path: Path) -> None:
    tensors = tiny.draw(tiny.CONFIGS["moe"])
    tensors[f"{LAYER}mlp.experts.{'9' * 5000}.up_proj.weight"] = np.zeros((2, 3), np.float32)
    tiny.write(tmp_path, tiny.CONFIGS["moe"], tensors)
    with pytest.raises(ModelError, match="belongs to no part"):
        qwen35_mlx.load(tmp_path)


def test_float8_weights_are_refused_by_their_dtype(tmp_path: Path) -> None:
    tensors = tiny.draw(tiny.CONFIGS["dense"])
    folder = tiny.write(tmp_path, tiny.CONFIGS["dense"], tensors)
    stored = {
        name: replace(e, dtype="F8_E4M3") if name == NORM else e
        for name, e in shards.entries(folder).items()
    }
    with pytest.raises(ModelError, match="F8_E4M3.*Convert"):
        checkpoint.read(folder, stored, mx.bfloat16)


def test_a_model_too_large_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path, tiny.CONFIGS["dense"], tiny.draw(tiny.CONFIGS["dense"]))
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    with pytest.raises(OutOfMemory, match=r"needs 0\.\d GB; 0\.0 GB are free\. Free some"):
        loader.load(folder, config.read(folder))


def test_weights_that_are_a_pipe_are_refused_unopened(tmp_path: Path) -> None:
    _pipe(tmp_path / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(ModelError, match=r"no model\.safetensors and no"):
        shards.entries(tmp_path)
    with pytest.raises(ModelError, match="no such plain file; expected safetensors"):
        shards.header(tmp_path / "model.safetensors")


def test_what_mlx_cannot_read_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for data in (b"", bytes(40), struct.pack("<Q", 9) + b'{"a":{}} ' + bytes(8)):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors: .*expected safeten") as caught:
            checkpoint._lazy(path)
        assert "\n" not in str(caught.value)


def test_progress_counts_to_all_bytes(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, tiny.CONFIGS["dense"], tiny.draw(tiny.CONFIGS["dense"]))
    seen: list[qwen35_mlx.Progress] = []
    qwen35_mlx.load(folder, progress=seen.append)
    assert seen[-1].stage == "load" and seen[-1].done == seen[-1].total > 0
