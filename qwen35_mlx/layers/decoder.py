"""One layer of the language model: a mixer and a feed-forward block, each on a normalised input."""

import mlx.core as mx
import mlx.nn as nn

from ..cache import DeltaState, KVState
from ..config import TextConfig
from .attention import Attention
from .deltanet import GatedDeltaNet
from .mlp import MLP
from .moe import SparseMLP
from .norm import RMSNorm
from .rope import Rotation


class DecoderLayer(nn.Module):
    """Source: transformers `Qwen3_5DecoderLayer`."""

    def __init__(self, config: TextConfig, is_full_attention: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if is_full_attention:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        if config.num_experts:
            self.mlp: SparseMLP | MLP = SparseMLP(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def join(self) -> None:
        """Store what reads the same input as one matrix; needed before the first call."""
        mixer = self.self_attn if "self_attn" in self else self.linear_attn
        mixer.join()
        self.mlp.join()

    def __call__(
        self, x: mx.array, y: mx.array | None, rotation: Rotation, state: KVState | DeltaState
    ) -> tuple[mx.array, mx.array]:
        """The residual stream is `x + y`, added where it is normalised next.

        x, y: `[B, T, hidden]`, y None before the first layer; `state` is this layer's own and moves
        on by T tokens. Returns: the same two, after this layer.
        """
        x, normed = self.input_layernorm.add(x, y)
        if isinstance(state, KVState):
            y = self.self_attn(normed, rotation, state)
        else:
            y = self.linear_attn(normed, state)
        x, normed = self.post_attention_layernorm.add(x, y)
        return x, self.mlp(normed)
