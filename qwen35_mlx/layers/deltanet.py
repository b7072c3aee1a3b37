"""Gated DeltaNet: a short causal convolution, then a matrix state instead of a KV cache."""

import mlx.core as mx
import mlx.nn as nn

from ..cache import DeltaState
from ..config import TextConfig
from ..kernels.fused import fused, silu
from ..kernels.gated_delta import gated_delta
from .joined import joined

L2_EPS = 1e-6  # added to the sum of squares, not to their mean


class CausalConv(nn.Module):
    """Depthwise convolution over time; `weight [taps, channels]`, the last tap is the present."""

    def __init__(self, taps: int, channels: int) -> None:
        super().__init__()
        self.weight = mx.zeros((taps, channels))

    def __call__(self, window: mx.array) -> mx.array:
        """window: `[B, taps - 1 + T, channels]` -> `[B, T, channels]` f32."""
        taps = self.weight.shape[0]
        T = window.shape[1] - taps + 1
        window, weight = window.astype(mx.float32), self.weight.astype(mx.float32)
        out = weight[0] * window[:, :T]
        for j in range(1, taps):
            out = out + weight[j] * window[:, j : j + T]
        return out


class GatedRMSNorm(nn.Module):
    """`rms_norm(x; weight) * silu(gate)` per head, in f32. The norm comes before the gate."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        """x: `[..., D]` f32; gate: the same shape. Returns: f32."""
        return mx.fast.rms_norm(x, self.weight, self.eps) * silu(gate.astype(mx.float32))


@fused
def log_decay(a: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    """`-exp(A_log) softplus(a + dt_bias)` in f32, at most 0; in bf16 its error reaches 6%."""
    return -mx.exp(A_log) * mx.logaddexp(a.astype(mx.float32) + dt_bias, 0.0)


class GatedDeltaNet(nn.Module):
    """Linear attention. Source: transformers `Qwen3_5GatedDeltaNet`.

    Differs in type only: after the projections everything is f32 until `out_proj`, where
    transformers keeps the convolution and the gate product in the activations' type.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.k_heads, self.v_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.k_dim, self.v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        values, hidden = self.v_heads * self.v_dim, config.hidden_size
        self.in_proj_qkv = nn.Linear(hidden, config.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, self.v_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, self.v_heads, bias=False)
        self.conv1d = CausalConv(config.linear_conv_kernel_dim, config.conv_dim)
        self.A_log = mx.zeros((self.v_heads,))
        self.dt_bias = mx.zeros((self.v_heads,))
        self.norm = GatedRMSNorm(self.v_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def join(self) -> None:
        """Store what reads the same input as one matrix; needed before the first call."""
        self.qkvz = joined(self, "in_proj_qkv", "in_proj_z")
        self.ba = joined(self, "in_proj_b", "in_proj_a")

    def __call__(self, x: mx.array, state: DeltaState) -> mx.array:
        """x: `[B, T, hidden]`; `state` moves on by T tokens."""
        B, T, _ = x.shape
        qkv, z = mx.split(self.qkvz(x), [self.conv1d.weight.shape[-1]], axis=-1)
        b, a = mx.split(self.ba(x), 2, axis=-1)
        mixed = silu(self.conv1d(state.window(qkv)))
        keys = self.k_heads * self.k_dim
        q, k, v = mx.split(mixed, [keys, 2 * keys], axis=-1)
        q = _unit(q.reshape(B, T, self.k_heads, self.k_dim)) * self.k_dim**-0.5
        k = _unit(k.reshape(B, T, self.k_heads, self.k_dim))
        v = v.reshape(B, T, self.v_heads, self.v_dim)
        beta = mx.sigmoid(b.astype(mx.float32))
        log_g = log_decay(a, self.A_log, self.dt_bias)
        out, state.memory = gated_delta(q, k, v, log_g, beta, state.memory)
        # Nothing else waits for the states: left for last, each would hold its layer's chunk.
        out = mx.depends([out], state.arrays())[0]
        z = z.reshape(B, T, self.v_heads, self.v_dim)
        return self.out_proj(self.norm(out, z).reshape(B, T, -1).astype(x.dtype))


def _unit(x: mx.array) -> mx.array:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last axis."""
    D = x.shape[-1]
    # As one rms_norm: mean(x^2) + eps / D is (sum(x^2) + eps) / D.
    return mx.fast.rms_norm(x, None, L2_EPS / D) * D**-0.5
