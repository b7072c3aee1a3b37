"""The sparse feed-forward block: K of E experts per token, and one that every token visits."""

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from ..kernels.fused import swiglu
from ..kernels.moe import SORT_FROM, by_expert, grouped_matmul, route
from ..packing import Format
from .mlp import MLP


class GroupedLinear(nn.Module):
    """E matrices `[E, out, in]` without bias, one chosen per row."""

    def __init__(self, E: int, dims_in: int, dims_out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((E, dims_out, dims_in))
        self.packing: Format | None = None

    def pack(self, packing: Format) -> None:
        """Expect weights in this packed format instead of plain ones."""
        packed = mx.quantize(self.weight, packing.group_size, packing.bits, packing.mode)
        for name, value in zip(("weight", "scales", "biases"), packed, strict=False):
            self[name] = value
        self.packing = packing

    def __call__(self, x: mx.array, chosen: mx.array, is_sorted: bool) -> mx.array:
        """x: `[..., 1, in]`, chosen: `[...]` -> `[..., 1, out]`."""
        return grouped_matmul(
            x,
            chosen,
            is_sorted,
            self.weight,
            self.get("scales"),
            self.get("biases"),
            self.packing,
        )


class Experts(nn.Module):
    """The routed experts; `gate_up_proj` holds the gate rows, then the up rows."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = GroupedLinear(E, hidden, 2 * inner)
        self.down_proj = GroupedLinear(E, inner, hidden)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x: `[N, hidden]`; chosen, weights: `[N, K]` -> the weighted sum `[N, hidden]` f32."""
        N, K = chosen.shape
        if N * K < SORT_FROM:
            y = self._each(x[:, None, None], chosen, is_sorted=False)[:, :, 0]
        else:
            tokens, experts, back = by_expert(chosen)
            y = self._each(x[tokens][:, None], experts, is_sorted=True)[:, 0]
            y = y[back].reshape(N, K, -1)
        return (weights[:, None] @ y.astype(mx.float32))[:, 0]

    def _each(self, x: mx.array, chosen: mx.array, is_sorted: bool) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x, chosen, is_sorted), 2, axis=-1)
        return self.down_proj(swiglu(gate, up), chosen, is_sorted)


class SparseMLP(nn.Module):
    """`sum_k w_k expert_k(x) + sigmoid(shared_expert_gate x) shared_expert(x)`.

    Source: transformers `Qwen3_5MoeSparseMoeBlock`; sums are f32 here.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.chosen_per_token = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def join(self) -> None:
        """Store what reads the same input as one matrix; needed before the first call."""
        self.shared_expert.join()

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = route(self.gate(rows), self.chosen_per_token)
        shared = self.shared_expert(rows).astype(mx.float32)
        open_ = mx.sigmoid(self.shared_expert_gate(rows).astype(mx.float32))
        y = self.experts(rows, chosen, weights) + open_ * shared
        return y.astype(x.dtype).reshape(x.shape)
