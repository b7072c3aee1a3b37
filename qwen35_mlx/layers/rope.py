"""Rotary position embedding on the first dims of a head, with one position per axis (T, H, W)."""

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..config import Rope


class Rotation:
    """Cosines and sines of the positions in one forward pass, computed once for all layers.

    positions: `[3, B, T]` integers, the axes T, H, W. Pair i of the rotary dims follows axis i mod
    3 as far as that axis' section reaches, and T beyond it. On the host: a GPU would take eight
    launches per token for these few values.
    Source: transformers `Qwen3_5TextRotaryEmbedding`; cos and sin stay f32 here.
    """

    def __init__(self, rope: Rope, positions: np.ndarray) -> None:
        axis, frequency = _pairs(rope)
        angle = np.moveaxis(positions[axis].astype(np.float32), 0, -1) * frequency
        factor = np.float32(rope.attention_factor)
        self.cos = mx.array(factor * np.cos(angle))[:, None]  # [B, 1, T, pairs]
        self.sin = mx.array(factor * np.sin(angle))[:, None]


@lru_cache
def _pairs(rope: Rope) -> tuple[np.ndarray, np.ndarray]:
    """Axis `[pairs]` int32 and frequency `[pairs]` f32 of each pair of rotary dims."""
    pairs = rope.rotary_dim // 2
    index = np.arange(pairs)
    reach = 3 * np.array(rope.section)
    axis = np.where(index < reach[index % 3], index % 3, 0).astype(np.int32)
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    frequency = np.float32(1) / np.float32(rope.theta) ** exponent
    if rope.factor != 1.0:
        stretch = _yarn_ramp(rope)
        frequency = frequency * ((1 - stretch) + stretch / rope.factor)
    return axis, frequency.astype(np.float32)


def _yarn_ramp(rope: Rope) -> np.ndarray:
    """0 where a pair turns fast enough to keep its frequency, 1 where it is stretched in full.

    Source: transformers `modeling_rope_utils`, bounds rounded outwards.
    """

    def pair_with(turns: float) -> float:
        span = rope.original_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(span) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with(rope.beta_slow)), rope.rotary_dim - 1)
    index = np.arange(rope.rotary_dim // 2, dtype=np.float32)
    return np.clip((index - low) / max(high - low, 1e-3), 0, 1)
