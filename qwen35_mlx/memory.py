"""What a model and a prompt need, and what this machine has: known before anything is loaded."""

import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from .cache import GROWTH
from .config import Config, TextConfig
from .errors import OutOfMemory
from .kernels.attention import SCORE_BYTES
from .kernels.gated_delta import CHUNK
from .layers.vision import Grid, slices_at_once

GB = 1e9


def capacity() -> int:
    """Bytes a process may ever use: of the GPU's working set on a Mac, of the machine elsewhere."""
    if mx.metal.is_available():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available() -> int:
    """Bytes this process may still use."""
    meminfo = Path("/proc/meminfo")
    if mx.metal.is_available() or not meminfo.exists():
        return capacity() - mx.get_active_memory()
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 + mx.get_cache_memory()


def require(needed: int, what: str, advice: str) -> None:
    """Raises: OutOfMemory with both numbers when `needed` bytes are not there."""
    there = available()
    if needed > there:
        raise OutOfMemory(
            f"{what}: needs {needed / GB:.1f} GB; {max(there, 0) / GB:.1f} GB are free. {advice}"
        )


def kv_bytes(text: TextConfig, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of `tokens` tokens in all attention layers."""
    per_layer = 2 * text.num_key_value_heads * text.head_dim * itemsize
    return sum(text.is_full_attention) * per_layer * tokens


def state_bytes(text: TextConfig) -> int:
    """Recurrent states of one sequence, f32."""
    per_layer = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return 4 * per_layer * (len(text.is_full_attention) - sum(text.is_full_attention))


def prompt_bytes(
    config: Config, tokens: int, grids: Sequence[Grid], chunk: int, itemsize: int = 2
) -> int:
    """Peak beside the weights while `tokens` tokens are read `chunk` at a time, rounded up.

    grids: (t, gh, gw) of the pictures and clips in the prompt. itemsize: bytes of an activation.
    The cache, the states twice, for they are copied as they move on, and one layer's arrays for a
    chunk, counted in measured multiples of the widest ones.
    """
    text = config.text
    rows = min(tokens, chunk)
    values = text.linear_num_value_heads * text.linear_value_head_dim
    recurrence = 4 * (12 * text.conv_dim + 8 * values + 6 * CHUNK * text.linear_num_value_heads)
    widest = max(text.intermediate_size, text.num_experts_per_tok * text.moe_intermediate_size)
    activations = itemsize * (4 * widest + 8 * text.hidden_size)
    scores = _score_bytes(text.num_attention_heads * rows * tokens)
    working = rows * (recurrence + activations) + scores + _vision_bytes(config, grids, itemsize)
    cache = kv_bytes(text, max(tokens, GROWTH) + GROWTH, itemsize) + 2 * state_bytes(text)
    return cache + working


def _score_bytes(scores: int) -> int:
    """Scores and their softmax, as far as they are made at once."""
    return 2 * min(SCORE_BYTES, 4 * scores)


def _vision_bytes(config: Config, grids: Sequence[Grid], itemsize: int) -> int:
    """One layer of the tower on the patches that run at once, and what it gives."""
    vision = config.vision
    if vision is None or not grids:
        return 0
    rows = max(slices_at_once(gh * gw, t) * gh * gw for t, gh, gw in grids)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    layer = itemsize * (4 * vision.intermediate_size + 12 * vision.hidden_size + patch) + 4 * patch
    scores = _score_bytes(vision.num_heads * rows * max(gh * gw for _, gh, gw in grids))
    seen = sum(t * gh * gw for t, gh, gw in grids) // vision.spatial_merge_size**2
    return rows * layer + scores + 2 * seen * itemsize * config.text.hidden_size
