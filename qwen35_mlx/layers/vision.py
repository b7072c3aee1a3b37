"""The vision tower: patches of one picture or clip in, one row per language-model token out."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import VisionConfig
from ..kernels.attention import attention
from ..kernels.fused import gelu_erf, gelu_tanh

LAYER_NORM_EPS = 1e-6
ROPE_THETA = 10000.0
# Slices of a clip do not see each other: a long clip runs in groups of about this many patches.
PATCHES_AT_ONCE = 16384

Grid = tuple[int, int, int]  # temporal slices, rows and columns of patches


def slices_at_once(patches: int, t: int) -> int:
    """How many of t slices of so many patches each the tower runs together."""
    return max(1, min(t, PATCHES_AT_ONCE // patches))


class PatchEmbed(nn.Module):
    """Linear map of a flat patch (channel, time, y, x); in checkpoints a 3-D convolution."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.proj = nn.Linear(pixels, config.hidden_size)

    def __call__(self, patches: mx.array) -> mx.array:
        return self.proj(patches)


class VisionAttention(nn.Module):
    """Full attention inside each temporal slice. Source: transformers `Qwen3_5VisionAttention`."""

    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """x: `[t, n, dims]`, n patches of each of t slices; cos, sin: `[n, D / 2]` f32."""
        t, n, dims = x.shape
        qkv = self.qkv(x).reshape(t, n, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        q, k = _rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin)
        out = attention(q, k, qkv[2], (dims // self.heads) ** -0.5, causal=False)
        return self.proj(out.swapaxes(1, 2).reshape(t, n, dims))


class VisionMLP(nn.Module):
    """`linear_fc2(gelu(linear_fc1 x))`."""

    def __init__(self, dims: int, inner: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(dims, inner)
        self.linear_fc2 = nn.Linear(inner, dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(gelu_tanh(self.linear_fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Four consecutive patches, one 2 x 2 block, become one row of the language model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.block = config.spatial_merge_size**2
        inner = config.hidden_size * self.block
        self.norm = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPS)
        self.linear_fc1 = nn.Linear(inner, inner)
        self.linear_fc2 = nn.Linear(inner, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """`[t, n, dims]` -> `[t n / 4, out_hidden_size]`."""
        rows = self.norm(x).reshape(-1, self.block * x.shape[-1])
        return self.linear_fc2(gelu_erf(self.linear_fc1(rows)))


class VisionTower(nn.Module):
    """Source: transformers `Qwen3_5VisionModel`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)

    def __call__(self, patches: np.ndarray, grid: Grid) -> mx.array:
        """patches: `[N, C * tp * p * p]` f32 in merge-block order, N = t gh gw; grid: (t, gh, gw).

        Returns: `[N / 4, out_hidden_size]` in the tower's type. Evaluated group by group.
        """
        t, gh, gw = grid
        row, column = _patch_coordinates(gh, gw, self.config.spatial_merge_size)
        positions = self._positions(row, column, gh, gw)
        cos, sin = self._angles(row, column)
        slices = patches.reshape(t, gh * gw, -1)
        step = slices_at_once(gh * gw, t)
        rows = []
        for start in range(0, t, step):
            x = mx.array(slices[start : start + step]).astype(positions.dtype)
            x = self.patch_embed(x) + positions
            for block in self.blocks:
                x = block(x, cos, sin)
            rows.append(self.merger(x))
            mx.eval(rows[-1])
        return mx.concatenate(rows) if len(rows) > 1 else rows[0]

    def _positions(self, row: np.ndarray, column: np.ndarray, gh: int, gw: int) -> mx.array:
        """The learned square table, resampled bilinearly to the grid with its corners aligned."""
        side = round(self.config.num_position_embeddings**0.5)
        y = row.astype(np.float32) * np.float32((side - 1) / max(gh - 1, 1))
        x = column.astype(np.float32) * np.float32((side - 1) / max(gw - 1, 1))
        y0, x0 = y.astype(np.int32), x.astype(np.int32)
        y1, x1 = np.minimum(y0 + 1, side - 1), np.minimum(x0 + 1, side - 1)
        fy, fx = y - y0, x - x0
        total = mx.array(0.0)
        for table_row, table_column, weight in (
            (y0, x0, (1 - fy) * (1 - fx)),
            (y0, x1, (1 - fy) * fx),
            (y1, x0, fy * (1 - fx)),
            (y1, x1, fy * fx),
        ):
            corner = self.pos_embed(mx.array(table_row * side + table_column))
            total = total + corner.astype(mx.float32) * mx.array(weight)[:, None]
        # Of a norm: the table itself may be packed, and its weights integers.
        return total.astype(self.merger.norm.weight.dtype)

    def _angles(self, row: np.ndarray, column: np.ndarray) -> tuple[mx.array, mx.array]:
        """cos and sin `[n, D / 2]`: half of the pairs turns by row, half by column."""
        D = self.config.hidden_size // self.config.num_heads
        exponent = np.arange(0, D // 2, 2, dtype=np.float32) / np.float32(D // 2)
        frequency = np.float32(1) / np.float32(ROPE_THETA) ** exponent
        angle = np.concatenate([row[:, None] * frequency, column[:, None] * frequency], axis=-1)
        angle_ = mx.array(angle.astype(np.float32))
        return mx.cos(angle_), mx.sin(angle_)


def _patch_coordinates(gh: int, gw: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each of the gh gw patches: merge blocks row by row, then inside a block."""
    row, column = np.mgrid[0:gh, 0:gw].astype(np.int32)

    def ordered(a: np.ndarray) -> np.ndarray:
        blocks = a.reshape(gh // merge, merge, gw // merge, merge).transpose(0, 2, 1, 3)
        return blocks.reshape(-1)

    return ordered(row), ordered(column)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate pairs (i, i + D / 2) of `x [t, H, n, D]` in f32."""
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate(rotated, axis=-1).astype(x.dtype)
