"""The sparse feed-forward block: K of E experts per token, and one that every token visits."""

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from ..kernels.fused import swiglu_of
from ..kernels.moe import by_expert, grouped_matmul
from ..kernels.moe_combine import moe_combine
from ..kernels.moe_down import moe_down
from ..kernels.moe_gate_up import moe_gate_up
from ..kernels.moe_route import moe_route
from ..kernels.packed import MAX_TOKENS, Packed
from ..packing import Format
from .joined import SideBySide
from .matrix import matrix, plain
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

    @property
    def matrices(self) -> Packed:
        return Packed(self.weight, self.get("scales"), self.get("biases"), self.packing)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """x: `[N, 1, in]`, chosen: `[N]` in rising order -> `[N, 1, out]`."""
        return grouped_matmul(x, chosen, True, *self.matrices)


class Experts(nn.Module):
    """The routed experts; `gate_up_proj` holds the gate rows, then the up rows."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = GroupedLinear(E, hidden, 2 * inner)
        self.down_proj = GroupedLinear(E, inner, hidden)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """x: `[N, hidden]`, chosen: `[N]` in rising order -> `[N, hidden]`."""
        return self.down_proj(swiglu_of(self.gate_up_proj(x[:, None], chosen)), chosen)[:, 0]


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
        # One row: unpacked it is a few KB, and the router's kernel takes it along.
        self.shared_gate = plain(self.pop("shared_expert_gate"))[0]

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        routed = moe_route(logits, self.chosen_per_token, rows, self.shared_gate)
        few = len(rows) <= MAX_TOKENS and not isinstance(self.shared_expert.gate_up, SideBySide)
        return (self._few(rows, *routed) if few else self._many(rows, *routed)).reshape(x.shape)

    def _few(self, x: mx.array, chosen: mx.array, weights: mx.array, shared: mx.array) -> mx.array:
        """Each expert's matrices are read once, and the shared one is one more expert."""
        ours, routed = self.shared_expert, self.experts
        h = moe_gate_up(x, chosen, routed.gate_up_proj.matrices, matrix(ours.gate_up))
        down = routed.down_proj.matrices, matrix(ours.down_proj)
        return moe_down(h, chosen, weights, shared, *down)

    def _many(self, x: mx.array, chosen: mx.array, weights: mx.array, shared: mx.array) -> mx.array:
        """Rows sorted by expert, so that one product serves all rows of an expert."""
        tokens, experts, back = by_expert(chosen)
        y = self.experts(x[tokens], experts)
        return moe_combine(y, back, weights, shared, self.shared_expert(x))
