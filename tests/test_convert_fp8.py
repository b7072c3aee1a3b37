"""FP8 folders become what their BF16 copies would, without the copy."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert import job

import converting
import tiny
from converting import FP8, Raw, converted, decoded, differing, main_tensors, raw, read_file
from qwen35_mlx.errors import ModelError


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that slices end inside experts and FP8 blocks."""
    monkeypatch.setattr(job, "SLICE_BYTES", 37 * 2 * 320)


BLOCKS = [(128, 128), (64, 32), (48, 80), (1, 512)]


def drawn_fp8(name: str, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[Raw, Raw]:
    """Every code but those of NaN, in an order of the name's own, and scales for its blocks."""
    draws = tiny.raw(name, int(np.prod(shape))) % np.uint64(254)
    codes = np.where(draws < 127, draws, draws + 1).astype(np.uint8).reshape(shape)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = np.exp2(tiny.normal(f"{name} scale", grid) - 11).astype(np.float32)
    return raw(codes, "F8_E4M3"), raw(scales, "BF16")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_code_of_fp8_is_decoded_in_blocks_that_end_early(
    block: tuple[int, int], tmp_path: Path
) -> None:
    rows, columns = 389, 320
    _, scale = drawn_fp8("a matrix", (rows, columns), block)
    codes = (np.arange(rows)[:, None] * 7 + np.arange(columns)).astype(np.uint8)
    codes[codes % 128 == 127] = 5  # NaN, which the test below refuses
    assert all(len(set(row)) == 254 for row in codes[::97])
    source, view = converting.one_matrix(tmp_path / "a", raw(codes, "F8_E4M3"), scale, block=block)
    expected = tiny.round_bf16(decoded(codes, scale.floats, block))
    for first, count in ((0, rows), (127, 3), (130, 259), (388, 1), (47, 50)):
        values = source.rows(view, first, count)
        assert values.dtype == mx.bfloat16 and values.shape == (count, columns)
        found, part = np.array(values.astype(mx.float32)), slice(first, first + count)
        assert np.array_equal(found, expected[part])
    source.close()


@pytest.mark.parametrize("code", (127, 255))
def test_nan_codes_are_refused_with_their_tensor_and_rows(code: int, tmp_path: Path) -> None:
    _, scale = drawn_fp8("a matrix", (40, 64), (64, 32))
    codes = np.full((40, 64), 126, np.uint8)
    codes[33, 7] = code
    stored = raw(codes, "F8_E4M3")
    source, view = converting.one_matrix(tmp_path / "a", stored, scale, block=(64, 32))
    assert np.isfinite(np.array(source.rows(view, 0, 33).astype(mx.float32))).all()
    with pytest.raises(ModelError, match="holds NaN or infinity in rows 30 to 34"):
        source.rows(view, 30, 5)
    source.close()


def fp8_config() -> dict[str, Any]:
    """Widths that no block divides, and of which a group divides some."""
    config = deepcopy(tiny.CONFIGS["dense"])
    config["text_config"] |= {"hidden_size": 320, "intermediate_size": 389}
    config["vision_config"]["out_hidden_size"] = 320
    return config


def fp8_moe_config() -> dict[str, Any]:
    return deepcopy(tiny.CONFIGS["moe"])


def write_fp8(folder: Path, config: dict[str, Any], block: tuple[int, int]) -> tuple[Path, Path]:
    """The same weights as Qwen's FP8 folders have them, and as BF16."""
    fp8, plain = folder / "fp8", folder / "bf16"
    tensors = tiny.unfused(tiny.rounded(tiny.draw(config)))
    packed: dict[str, Raw] = {}
    for name, values in tensors.items():
        is_fp8 = name.startswith("model.language_model.layers.") and name.split(".")[-2] in FP8
        if not is_fp8:
            packed[name] = raw(values, "F32" if tiny.stays_float32(name) else "BF16")
            continue
        codes, scales = drawn_fp8(name, values.shape, block)
        packed |= {name: codes, f"{name}_scale_inv": scales}
        table = np.frombuffer(codes.data, np.uint8).reshape(values.shape)
        tensors[name] = decoded(table, scales.floats, block)
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    for path, changes in ((fp8, {"quantization_config": method}), (plain, {})):
        tiny.write(path, config | changes, tensors, dtype="bfloat16", files=converting.FILES)
    written = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    assert written == method
    converting.write_file(fp8 / "model.safetensors", packed)
    return fp8, plain


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    ("config", "block", "given"),
    [
        (fp8_config, (128, 128), {"bits": 4}),
        (fp8_config, (128, 128), {"bits": 8, "group_size": 32}),
        (fp8_config, (48, 80), {"bits": 16}),
        (fp8_config, (64, 32), {"mode": "mxfp4"}),
        (fp8_moe_config, (128, 128), {"bits": 4}),
        (fp8_moe_config, (48, 80), {"bits": 3, "recipe": "uniform"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_fp8_gives_the_folder_that_its_bf16_copy_gives_bit_for_bit(
    config: Callable[[], dict[str, Any]],
    block: tuple[int, int],
    given: dict[str, Any],
    tmp_path: Path,
) -> None:
    fp8, plain = write_fp8(tmp_path, config(), block)
    out = converted(fp8, tmp_path / "out", shard_bytes=300_000, **given)
    expected = converted(plain, tmp_path / "expected", shard_bytes=300_000, **given)
    made_of = [_undeclared(folder) for folder in (out, expected)]
    assert made_of[0] != made_of[1]
    found = converting.digests(out)
    assert len(found) > 15 and differing(found, converting.digests(expected)) == []


def _undeclared(folder: Path) -> str:
    """Take the digest of the source out of the folder's declaration; nothing else may differ."""
    config, manifest = folder / "config.json", folder / "manifest.json"
    values, listed = json.loads(config.read_text()), json.loads(manifest.read_text())
    digest: str = values["qwen35_mlx"]["source"].pop("digest")
    config.write_text(json.dumps(values))
    assert listed["files"].pop("config.json")
    manifest.write_text(json.dumps(listed))
    return digest


def test_fp8_weights_and_scales_may_lie_in_different_files(tmp_path: Path) -> None:
    fp8, plain = write_fp8(tmp_path, fp8_config(), (128, 128))
    stored = read_file(fp8 / "model.safetensors")
    (fp8 / "model.safetensors").unlink()
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("_scale_inv")}
    rest = {name: tensor for name, tensor in stored.items() if name not in scales}
    for parts in ([scales, rest], [rest, scales]):
        converting.write_sharded(fp8, parts)
        found = main_tensors(converted(fp8, tmp_path / f"out {len(parts[0])}"))
        expected = main_tensors(converted(plain, tmp_path / f"expected {len(parts[0])}"))
        assert differing(found, expected) == []


def drop_scale(tensors: dict[str, Raw], name: str) -> None:
    del tensors[f"{name}_scale_inv"]


def cut_scale(tensors: dict[str, Raw], name: str) -> None:
    tensors[f"{name}_scale_inv"] = raw(np.ones((2, 3), np.float32), "BF16")


def count_scale(tensors: dict[str, Raw], name: str) -> None:
    tensors[f"{name}_scale_inv"] = Raw("U32", (4, 3), bytes(48))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop_scale, "weight_scale_inv is missing"),
        (cut_scale, r"weight_scale_inv is BF16 \[2, 3\]; expected floats \[4, 3\]"),
        (count_scale, r"weight_scale_inv is U32 \[4, 3\]; expected floats"),
    ],
)
def test_fp8_without_the_scales_of_its_blocks_is_refused(
    change: Callable[[dict[str, Raw], str], None], named: str, tmp_path: Path
) -> None:
    fp8, _ = write_fp8(tmp_path, fp8_config(), (128, 128))
    stored = read_file(fp8 / "model.safetensors")
    change(stored, "model.language_model.layers.0.mlp.gate_proj.weight")
    converting.write_file(fp8 / "model.safetensors", stored)
    with pytest.raises(ModelError, match=named):
        converted(fp8, tmp_path / "out")
