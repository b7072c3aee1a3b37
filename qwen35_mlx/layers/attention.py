"""Full attention with an output gate per head and rotary positions on a quarter of each head."""

import mlx.core as mx
import mlx.nn as nn

from ..cache import KVState
from ..config import TextConfig
from ..kernels.attention import attention
from ..kernels.attention_prepare import attention_prepare
from ..kernels.fused import sigmoid_gate
from .joined import joined
from .norm import RMSNorm
from .rope import Rotation


class Attention(nn.Module):
    """Gated attention. Source: transformers `Qwen3_5Attention`.

    `q_proj` rows are, per head, D query rows then D gate rows. q and k are normalised before
    the rotation; gate and v are not.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        D, hidden = config.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, 2 * D * self.heads, bias=False)
        self.k_proj = nn.Linear(hidden, D * self.kv_heads, bias=False)
        self.v_proj = nn.Linear(hidden, D * self.kv_heads, bias=False)
        self.o_proj = nn.Linear(D * self.heads, hidden, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def join(self) -> None:
        """Store what reads the same input as one matrix; needed before the first call."""
        self.qkv = joined(self, "q_proj", "k_proj", "v_proj")

    def __call__(self, x: mx.array, rotation: Rotation, state: KVState) -> mx.array:
        """x: `[B, T, hidden]`; the new keys and values are appended to `state`."""
        q, gate, kv = attention_prepare(
            self.qkv(x),
            self.q_norm.weight,
            self.k_norm.weight,
            rotation.cos,
            rotation.sin,
            heads=self.heads,
            kv_heads=self.kv_heads,
            eps=self.q_norm.eps,
        )
        keys, values = state.append(kv)
        out = attention(q, keys, values, self.head_dim**-0.5, causal=True)
        return self.o_proj(sigmoid_gate(out.swapaxes(1, 2).reshape(gate.shape), gate))
