"""What the logits of whole models do not show about the vision tower."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx import config
from qwen35_mlx.layers import vision
from tiny import CONFIGS

PATCHES = np.random.default_rng(0).uniform(-1, 1, (3 * 4 * 6, 1536)).astype(np.float32)
GRID = (3, 4, 6)


@pytest.fixture
def tower() -> vision.VisionTower:
    wide = {**CONFIGS["dense"]["vision_config"], "hidden_size": 96}  # of a width MLX can pack
    values = config.parse({**CONFIGS["dense"], "vision_config": wide}, "tiny").vision
    assert values is not None
    mx.random.seed(1)
    return vision.VisionTower(values)


def distance(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.linalg.norm(a - b) / mx.linalg.norm(b))


def test_a_packed_position_table_equals_its_values(tower: vision.VisionTower) -> None:
    packed = tower.pos_embed.to_quantized(32, 8, "affine")
    tower.pos_embed.weight = packed(mx.arange(49))
    plain = tower(PATCHES, GRID)
    tower.pos_embed = packed
    assert distance(tower(PATCHES, GRID), plain) < 1e-6


def test_slices_run_apart_equal_all_at_once(
    tower: vision.VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tower(PATCHES, GRID)
    monkeypatch.setattr(vision, "PATCHES_AT_ONCE", 48)
    assert vision.slices_at_once(24, 3) == 2
    assert distance(tower(PATCHES, GRID), whole) < 1e-6
