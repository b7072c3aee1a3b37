"""Every layout of a source gives the same folder, and every packed matrix is `mx.quantize`'s."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert import job, open_folder, options, plan
from qwen35_mlx.convert.layout import Piece, Target

import converting
import tiny
from converting import converted, differing, main_tensors, raw, read_file
from qwen35_mlx.packing import Format

FORMATS = (
    *(("affine", bits, group) for bits in (3, 4, 5, 6, 8) for group in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "unfused": {"experts_fused": False},
    "unfused, dealt to five files": {"experts_fused": False, "shards": 5},
    "three files": {"shards": 3},
}


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that slices end inside experts and FP8 blocks."""
    monkeypatch.setattr(job, "SLICE_BYTES", 37 * 2 * 320)


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    ("name", "mode", "bits", "group_size"),
    [("moe", *format) for format in FORMATS] + [("dense", *format) for format in FORMATS[::6]],
)
def test_uniform_is_what_mlx_quantize_makes_of_each_whole_tensor(
    name: str, mode: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    source = converting.write_source(tmp_path / "source", name)
    made = converted(
        source, tmp_path / "out", recipe="uniform", mode=mode, bits=bits, group_size=group_size
    )
    block = {"group_size": group_size, "bits": bits, "mode": mode}
    reference = converting.write_source(tmp_path / "mlx", name, layout="mlx", quantize=block)
    assert differing(main_tensors(made), main_tensors(reference)) == []


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_of_the_published_weights_gives_the_same_tensors(
    layout: str, tmp_path: Path
) -> None:
    plain = converting.write_source(tmp_path / "plain", "moe_untied")
    source = converting.write_source(tmp_path / "source", "moe_untied", **LAYOUTS[layout])
    found = converted(source, tmp_path / "out", bits=4, shard_bytes=150_000)
    expected = converted(plain, tmp_path / "expected", bits=4)
    assert len(list(found.glob("model-*.safetensors"))) > 9
    assert differing(main_tensors(found), main_tensors(expected)) == []
    for file in ("mtp.safetensors", "norms.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.usefixtures("small_slices")
def test_files_of_a_source_in_an_awkward_order_give_the_same_tensors(tmp_path: Path) -> None:
    """The experts of one layer lie in files before and after it, backwards."""
    plain = converting.write_source(tmp_path / "plain", "moe")
    source = converting.write_source(tmp_path / "source", "moe", experts_fused=False)
    stored = read_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(stored, reverse=True)
    parts = [names[start::4] for start in (2, 0, 3, 1)]
    converting.write_sharded(source, [{n: stored[n] for n in part} for part in parts])
    experts = [n for n in names if ".layers.1.mlp.experts." in n]
    assert all(set(experts) & set(part) for part in parts)
    found = converted(source, tmp_path / "out", bits=4, shard_bytes=200_000)
    expected = main_tensors(converted(plain, tmp_path / "expected", bits=4))
    assert differing(main_tensors(found), expected) == []


def test_a_folder_of_the_language_model_alone_gives_its_part(tmp_path: Path) -> None:
    whole = converting.write_source(tmp_path / "whole")
    source = converting.write_source(tmp_path / "source")
    stored = read_file(source / "model.safetensors")
    text = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in stored.items()
        if ".visual." not in name
    }
    converting.write_file(source / "model.safetensors", text)
    values = json.loads((source / "config.json").read_text())
    alone = values["text_config"] | {"tie_word_embeddings": values["tie_word_embeddings"]}
    (source / "config.json").write_text(json.dumps(alone))
    given: dict[str, Any] = {"bits": 4, "group_size": 32}
    found = main_tensors(converted(source, tmp_path / "out", **given))
    expected = main_tensors(converted(whole, tmp_path / "expected", **given))
    part = {n: tensor for n, tensor in expected.items() if not n.startswith("vision_tower.")}
    assert len(part) < len(expected) and differing(found, part) == []
    assert open_folder(source).lacking == open_folder(whole).lacking == []


def test_a_part_that_is_declared_and_not_there_is_named(tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", "moe", layout="mlx")
    assert open_folder(source).lacking == ["MTP head"]
    stored = read_file(source / "model.safetensors")
    (source / "model.safetensors.index.json").unlink()
    foreign = {"language_model.mtp.norm.weight": stored["language_model.model.norm.weight"]}
    text = {name: tensor for name, tensor in stored.items() if not name.startswith("vision_tower.")}
    converting.write_file(source / "model.safetensors", text | foreign)
    assert open_folder(source).lacking == ["vision tower", "MTP head"]
    values = json.loads((source / "config.json").read_text())
    del values["vision_config"], values["text_config"]["mtp_num_hidden_layers"]
    (source / "config.json").write_text(json.dumps(values))
    assert open_folder(source).lacking == []


def test_a_source_may_be_planned_more_than_once(tmp_path: Path) -> None:
    source = open_folder(converting.write_source(tmp_path / "source", "moe", experts_fused=False))
    first, other, again = (plan(source, options(bits)) for bits in (4, 16, 4))
    assert first == again != other


@pytest.mark.parametrize("name", ["dense_tied", "moe_untied"])
def test_unpacked_tensors_hold_the_source_values(name: str, tmp_path: Path) -> None:
    """Norms: 1 + w rounded once in the main files, exact beside them; axes as MLX has them."""
    source = converting.write_source(tmp_path / "source", name)
    made = converted(source, tmp_path / "out", bits=16)
    tensors = tiny.rounded(converting.drawn(name))
    main, head, norms = {}, {}, {}
    centred = {tiny.mlx_name(n) for n in tensors if tiny.is_zero_centred(n)}
    for path, values in expected_values(tensors).items():
        whole = values + np.float32(1) if path in centred else values
        if path.startswith("mtp."):
            head[path] = raw(whole, "F32" if path in centred else "BF16")
            continue
        main[path] = raw(whole, "F32" if path.endswith("A_log") else "BF16")
        if path in centred or path.endswith("linear_attn.norm.weight"):
            norms[path] = raw(whole, "F32")
    assert differing(main_tensors(made), main) == []
    assert differing(read_file(made / "mtp.safetensors"), head) == []
    assert differing(read_file(made / "norms.safetensors"), norms) == []
    rounded = [n for n in norms if (main[n].floats != norms[n].floats).any()]
    assert len(rounded) > len(norms) // 2


def expected_values(tensors: tiny.Tensors) -> tiny.Tensors:
    """The values under the folder's names and axes, norms as they are published."""
    found = {}
    for name, values in tensors.items():
        path = tiny.mlx_name(name)
        if path.endswith("conv1d.weight"):
            found[path] = values.transpose(0, 2, 1)
        elif path.endswith("patch_embed.proj.weight"):
            found[path] = values.transpose(0, 2, 3, 4, 1)
        elif path.endswith("experts.gate_up_proj"):
            stem = path.replace("experts.gate_up_proj", "switch_mlp")
            gate, up = np.split(values, 2, axis=1)
            found |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif path.endswith("experts.down_proj"):
            found[path.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = values
        else:
            found[path] = values
    return {path: np.ascontiguousarray(values) for path, values in found.items()}


# Columns of the widest matrices of each size; their rows do not matter to each other.
WIDTHS = {
    "0.8B": 3584, "2B": 6144, "4B": 9216, "9B": 12288, "27B": 17408, "35B-A3B": 4096,
    "122B-A10B": 8192, "397B-A17B": 4096,
}  # fmt: skip


@pytest.mark.parametrize("size", WIDTHS)
def test_slices_of_true_width_are_those_of_the_whole_matrix(
    size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, columns = 61, WIDTHS[size]
    monkeypatch.setattr(job, "SLICE_BYTES", 5 * 2 * columns)
    noise = np.random.default_rng(columns).standard_normal((rows, columns), np.float32)
    source, view = converting.one_matrix(tmp_path / "a.safetensors", raw(noise / 8, "BF16"))
    whole = mx.array(tiny.round_bf16(noise / 8)).astype(mx.bfloat16)
    for format in FORMATS:
        target = Target("w.weight", "w", (rows, columns), rows, columns, (), Format(*format))
        found: dict[str, bytes] = {}
        for first, count in job._slices(Piece(view, 0, rows, 0)):
            assert count <= 5
            for part, value in target.convert(source.rows(view, first, count)).items():
                assert value.shape[0] == count
                data = np.array(mx.contiguous(value).view(mx.uint8)).tobytes()
                found[part] = found.get(part, b"") + data
        expected = {part: value.data for part, value in converting.packed(whole, *format).items()}
        assert differing(found, expected) == [], format
    source.close()


# -- MLX folders -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    "block",
    [
        {"group_size": 64, "bits": 8, "mode": "affine"},
        {"group_size": 32, "bits": 6, "mode": "affine"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {
            "group_size": 64,
            "bits": 8,
            "mode": "affine",
            "language_model.model.layers.1.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 5},
            "language_model.model.layers.2.linear_attn.out_proj": False,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [3, 4])
def test_an_mlx_folder_goes_to_fewer_bits_through_bf16(
    block: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    source = converting.write_source(tmp_path / "source", "moe", layout="mlx", quantize=block)
    before = mx.load(str(source / "model.safetensors"))
    assert isinstance(before, dict)
    made = converted(source, tmp_path / "out", bits=bits, recipe="uniform", group_size=32)
    found, expected = main_tensors(made), read_file(source / "model.safetensors")
    for name in [n for n in expected if f"{n.removesuffix('.weight')}.weight" == n]:
        module = name.removesuffix(".weight")
        if f"{module}.scales" in before:
            settings = {k: block[k] for k in ("group_size", "bits", "mode")}
            whole = converting.unpacked(before, module, **settings | (block.get(module) or {}))
            for part in ("weight", "scales", "biases"):
                expected.pop(f"{module}.{part}", None)
        elif f"{module}.scales" in found:
            whole = before[name]
            del expected[name]
        else:
            continue
        parts_of = converting.packed(whole, "affine", bits, 32)
        expected |= {f"{module}.{part}": value for part, value in parts_of.items()}
    assert differing(found, expected) == []
    assert not (made / "mtp.safetensors").exists() and not (made / "norms.safetensors").exists()


def test_scales_in_float16_become_bfloat16(tmp_path: Path) -> None:
    block = {"group_size": 64, "bits": 8, "mode": "affine"}
    source = converting.write_source(tmp_path / "source", "moe", layout="mlx", quantize=block)
    plain = main_tensors(converted(source, tmp_path / "expected", bits=4))
    arrays = mx.load(str(source / "model.safetensors"))
    assert isinstance(arrays, dict)
    halves = [n for n in arrays if n.endswith((".scales", ".biases"))]
    assert halves
    arrays |= {n: arrays[n].astype(mx.float16) for n in halves}
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    found = main_tensors(converted(source, tmp_path / "out", bits=4))
    # Half floats hold these scales but for the smallest, so nearly all numbers stay.
    same = sum(found[n] == plain[n] for n in plain)
    assert found.keys() == plain.keys() and same > 0.9 * len(plain)


def test_a_foreign_mtp_head_is_left_out_with_the_reason(tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", "moe", layout="mlx")
    stored = read_file(source / "model.safetensors")
    extra = {"language_model.mtp.fc.weight": raw(np.ones((192, 384), np.float32), "BF16")}
    (source / "model.safetensors.index.json").unlink()
    converting.write_file(source / "model.safetensors", stored | extra)
    made = converted(source, tmp_path / "out", bits=4)
    left_out = json.loads((made / "manifest.json").read_text())["left_out"]
    assert list(left_out) == list(extra) and "norms are stored" in left_out[next(iter(extra))]


def test_matrices_in_float32_are_rounded_to_bfloat16_before_they_are_packed(tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", "moe")
    wide = converting.write_source(tmp_path / "wide", "moe", dtype="float32")
    found, expected = (
        main_tensors(converted(folder, tmp_path / f"{folder.name} out", recipe="uniform"))
        for folder in (wide, source)
    )
    packed = [name for name in expected if f"{name.rpartition('.')[0]}.scales" in expected]
    assert len(packed) > 100
    assert differing({n: found[n] for n in packed}, {n: expected[n] for n in packed}) == []


def test_matrices_in_float16_are_rounded_to_bfloat16_before_they_are_packed(tmp_path: Path) -> None:
    halves = {name: values.astype(np.float16) for name, values in converting.drawn("moe").items()}
    made = []
    for dtype in ("F16", "BF16"):
        source = converting.write_source(tmp_path / dtype, "moe")
        stored = read_file(source / "model.safetensors")
        for name, values in halves.items():
            if stored[name].dtype == "BF16":
                given = values if dtype == "F16" else values.astype(np.float32)
                stored[name] = raw(given, dtype)
        converting.write_file(source / "model.safetensors", stored)
        made.append(main_tensors(converted(source, tmp_path / f"{dtype} out", recipe="uniform")))
    packed = [name for name in made[0] if f"{name.rpartition('.')[0]}.scales" in made[0]]
    assert len(packed) > 100
    assert differing({n: made[0][n] for n in packed}, {n: made[1][n] for n in packed}) == []
