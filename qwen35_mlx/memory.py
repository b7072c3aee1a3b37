"""What a model and a prompt need, and what this machine has: known before anything is loaded."""

from pathlib import Path

import mlx.core as mx

from .config import Config, TextConfig
from .errors import OutOfMemory

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


def prompt_bytes(config: Config, tokens: int, chunk: int, itemsize: int = 2) -> int:
    """Peak beside the weights while `tokens` tokens are read `chunk` at a time, estimated.

    The cache, and one layer's intermediate arrays for a chunk: in the recurrence about eight arrays
    of q, k and v's size in f32 and six of chunk x 64 per head.
    """
    text = config.text
    rows = min(tokens, chunk)
    widest = max(text.intermediate_size, text.num_experts_per_tok * text.moe_intermediate_size)
    recurrence = rows * 4 * (8 * text.conv_dim + 6 * 64 * text.linear_num_value_heads)
    feed_forward = rows * itemsize * 4 * widest
    working = recurrence + feed_forward + rows * itemsize * 8 * text.hidden_size
    return kv_bytes(text, tokens, itemsize) + 2 * state_bytes(text) + working
