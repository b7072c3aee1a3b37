"""The dense feed-forward block."""

import mlx.core as mx
import mlx.nn as nn

from ..kernels.fused import swiglu_of
from ..kernels.gate_up import gate_up
from .joined import SideBySide, joined
from .matrix import matrix


class MLP(nn.Module):
    """`down(silu(gate x) * up x)`. Source: transformers `Qwen3_5MLP`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def join(self) -> None:
        """Store what reads the same input as one matrix; needed before the first call."""
        self.gate_up = joined(self, "gate_proj", "up_proj")

    def __call__(self, x: mx.array) -> mx.array:
        if isinstance(self.gate_up, SideBySide):
            return self.down_proj(swiglu_of(self.gate_up(x)))
        return self.down_proj(gate_up(x, matrix(self.gate_up)))
