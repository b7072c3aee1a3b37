"""What is said to be needed is what is needed."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert.published import config_values

import qwen35_mlx
import tiny
from qwen35_mlx import config, engine, family, memory
from qwen35_mlx.cache import Cache
from qwen35_mlx.errors import OutOfMemory
from qwen35_mlx.layers import vision


@pytest.mark.parametrize("size", family.SIZES, ids=lambda size: size.name)
def test_cache_bytes_are_those_of_the_family(size: family.Size) -> None:
    text = config.parse(config_values(size), size.name).text
    assert memory.kv_bytes(text, 1) == size.kv_bytes_per_token
    assert memory.state_bytes(text) == size.state_bytes


def test_a_cache_weighs_what_was_announced(tmp_path: Path) -> None:
    values = tiny.CONFIGS["dense"]
    model = qwen35_mlx.load(tiny.write(tmp_path, values, tiny.draw(values)))
    text = model.config.text
    tokens, positions = np.arange(9, dtype=np.int32), np.zeros((3, 9), np.int32)
    cache = Cache(text, capacity=256)
    engine.read_prompt(model.model, qwen35_mlx.Prompt(tokens, positions, 0), cache)
    convolutions = 3 * text.conv_dim * 4 * text.is_full_attention.count(False)
    announced = memory.state_bytes(text) + memory.kv_bytes(text, 256, 4) + convolutions
    assert cache.nbytes == announced


@pytest.mark.parametrize("which", ["dense", "moe"])
@pytest.mark.parametrize("T", [64, 200, 1000])
def test_reading_a_prompt_stays_within_its_estimate(
    which: str, T: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = tiny.CONFIGS[which]
    model = qwen35_mlx.load(tiny.write(tmp_path_factory.mktemp(which), values, tiny.draw(values)))
    tokens = (np.arange(T) % 330).astype(np.int32)
    prompt = qwen35_mlx.Prompt(tokens, np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)), 0)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    engine.read_prompt(model.model, prompt, Cache(model.config.text))
    used = mx.get_peak_memory() - before
    announced = memory.prompt_bytes(model.config, T, [], engine.CHUNK, 4)
    assert announced / 3 < used < announced


@pytest.mark.parametrize("at_once", [vision.PATCHES_AT_ONCE, 200])
@pytest.mark.parametrize("grid", [(1, 20, 24), (3, 16, 12)])
def test_looking_at_a_picture_stays_within_its_estimate(
    grid: vision.Grid, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "PATCHES_AT_ONCE", at_once)
    values = tiny.CONFIGS["dense"]
    model = qwen35_mlx.load(tiny.write(tmp_path, values, tiny.draw(values)))
    patches = np.zeros((grid[0] * grid[1] * grid[2], 1536), np.float32)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.model.see(patches, grid))
    used = mx.get_peak_memory() - before
    whole = memory.prompt_bytes(model.config, 1, [grid], engine.CHUNK, 4)
    announced = whole - memory.prompt_bytes(model.config, 1, [], engine.CHUNK, 4)
    assert announced / 4 < used < announced


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 3_200_000_000)
    memory.require(3_100_000_000, "x", "y")
    with pytest.raises(OutOfMemory, match=r"^x: needs 4\.5 GB; 3\.2 GB are free\. y$"):
        memory.require(4_500_000_000, "x", "y")


def test_this_machine_has_memory() -> None:
    assert 100_000_000 < memory.available() < 10_000_000_000_000
