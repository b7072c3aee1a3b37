"""Gated DeltaNet: a short causal convolution, then a matrix state instead of a KV cache."""

import mlx.core as mx
import mlx.nn as nn

from ..cache import DeltaState
from ..config import TextConfig
from ..kernels.delta_prepare import delta_prepare
from ..kernels.delta_project import delta_project
from ..kernels.delta_step import MAX_TOKENS, delta_step, gated_norm
from ..kernels.gated_delta import gated_delta
from .joined import SideBySide, joined
from .matrix import matrix


class Scale(nn.Module):
    """`weight`, a factor for each channel of a head or tap of a channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = mx.ones(shape)


class GatedDeltaNet(nn.Module):
    """Linear attention. Source: transformers `Qwen3_5GatedDeltaNet`.

    Differs in type only: after the projections everything is f32 until `out_proj`, where
    transformers keeps the convolution and the gate product in the activations' type.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.k_heads, self.k_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.eps = config.rms_norm_eps
        heads, hidden = config.linear_num_value_heads, config.hidden_size
        values = heads * config.linear_value_head_dim
        self.in_proj_qkv = nn.Linear(hidden, config.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, heads, bias=False)
        self.conv1d = Scale(config.linear_conv_kernel_dim, config.conv_dim)
        self.A_log = mx.zeros((heads,))
        self.dt_bias = mx.zeros((heads,))
        self.norm = Scale(config.linear_value_head_dim)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def join(self) -> None:
        """Store what reads the same input as one matrix; needed before the first call."""
        self.qkvz = joined(self, "in_proj_qkv", "in_proj_z")
        self.ba = joined(self, "in_proj_b", "in_proj_a")

    def __call__(self, x: mx.array, state: DeltaState) -> mx.array:
        """x: `[B, T, hidden]`; `state` moves on by T tokens."""
        y = self._mixed(*self._projected(x), state)
        # Nothing else waits for the states: left for last, each would hold its layer's chunk.
        y = mx.depends([y], state.arrays())[0]
        return self.out_proj(y)

    def _projected(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """`[B, T, q | k | v | z]` and `[B, T, b | a]`."""
        if isinstance(self.qkvz, SideBySide) or isinstance(self.ba, SideBySide):
            return self.qkvz(x), self.ba(x)
        return delta_project(x, matrix(self.qkvz), matrix(self.ba))

    def _mixed(self, qkvz: mx.array, ba: mx.array, state: DeltaState) -> mx.array:
        """All between the projections, in one launch for few tokens: `[B, T, Hv Dv]`."""
        B, T, _ = qkvz.shape
        conv, memory = state.begun(B, qkvz.dtype)
        heads, dim, norm = self.k_heads, self.k_dim, self.norm.weight
        weights = self.conv1d.weight, self.A_log, self.dt_bias
        if T <= MAX_TOKENS:
            y, state.conv, state.memory = delta_step(
                qkvz, ba, conv, memory, *weights, norm, k_heads=heads, k_dim=dim, eps=self.eps
            )
            return y
        q, k, v, log_g, beta, state.conv = delta_prepare(
            qkvz, ba, conv, *weights, k_heads=heads, k_dim=dim
        )
        o, state.memory = gated_delta(q, k, v, log_g, beta, memory)
        return gated_norm(o, qkvz, norm, self.eps)
