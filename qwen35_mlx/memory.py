"""What a model and a prompt need, and what this machine has: known before anything is loaded."""

from pathlib import Path

import mlx.core as mx

from .config import Config, TextConfig
from .errors import OutOfMemory
from .kernels.attention import SCORE_BYTES
from .kernels.gated_delta import CHUNK
from .layers.vision import PATCHES_AT_ONCE

GB = 1e9


def available() -> int:
    """Bytes this process may still use: of the GPU's working set, or of free memory."""
    if mx.metal.is_available():
        limit = int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
        return limit - mx.get_active_memory()
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + mx.get_cache_memory()
    raise OSError("/proc/meminfo has no MemAvailable")


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


def prompt_bytes(config: Config, tokens: int, patches: int, chunk: int, itemsize: int = 2) -> int:
    """Peak beside the weights while `tokens` tokens are read `chunk` at a time, rounded up.

    patches: of the pictures and clips in the prompt. itemsize: bytes of an activation.
    Cache and states twice, for they are copied when they grow or move on; and one layer's arrays
    for a chunk, counted in measured multiples of the widest ones.
    """
    text = config.text
    rows = min(tokens, chunk)
    values = text.linear_num_value_heads * text.linear_value_head_dim
    recurrence = 4 * (12 * text.conv_dim + 8 * values + 6 * CHUNK * text.linear_num_value_heads)
    widest = max(text.intermediate_size, text.num_experts_per_tok * text.moe_intermediate_size)
    activations = itemsize * (4 * widest + 8 * text.hidden_size)
    scores = min(SCORE_BYTES, 4 * text.num_attention_heads * rows * tokens)
    working = rows * (recurrence + activations) + scores + _vision_bytes(config, patches, itemsize)
    return 2 * kv_bytes(text, tokens, itemsize) + 2 * state_bytes(text) + working


def _vision_bytes(config: Config, patches: int, itemsize: int) -> int:
    """One layer of the tower on as many patches as run at once, and what it gives."""
    vision = config.vision
    if vision is None or patches == 0:
        return 0
    rows = min(patches, PATCHES_AT_ONCE)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    layer = rows * itemsize * (4 * vision.intermediate_size + 12 * vision.hidden_size)
    layer += rows * (4 + itemsize) * pixels
    scores = 2 * min(SCORE_BYTES, 4 * vision.num_heads * rows * rows)
    return layer + scores + patches * itemsize * config.text.hidden_size // 2
