"""Rotary position embedding on the first dims of a head, with one position per axis (T, H, W)."""

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..config import Rope


class Rotation:
    """Cosines and sines of the positions in one forward pass, computed once for all layers.

    positions: `[3, B, T]` int32, the axes T, H, W. Pair i of the rotary dims follows axis i mod 3
    as far as that axis' section reaches, and T beyond it.
    Source: transformers `Qwen3_5TextRotaryEmbedding`; cos and sin stay f32 here.
    """

    def __init__(self, rope: Rope, positions: mx.array) -> None:
        axis, frequency = _pairs(rope)
        angle = positions[mx.array(axis)].astype(mx.float32)  # [pairs, B, T]
        angle = mx.moveaxis(angle, 0, -1) * mx.array(frequency)
        self.cos = rope.attention_factor * mx.cos(angle)[:, None]  # [B, 1, T, pairs]
        self.sin = rope.attention_factor * mx.sin(angle)[:, None]

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate pairs (i, i + pairs) of `x [B, H, T, D]`; later dims pass through."""
        pairs = self.cos.shape[-1]
        first, second, rest = mx.split(x, [pairs, 2 * pairs], axis=-1)
        a = first * self.cos - second * self.sin
        b = second * self.cos + first * self.sin
        return mx.concatenate([a.astype(x.dtype), b.astype(x.dtype), rest], axis=-1)


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
