"""The multi-token-prediction head: guesses the token after the next one."""

import mlx.core as mx
import mlx.nn as nn

from ..cache import KVState
from ..config import TextConfig
from .decoder import DecoderLayer
from .norm import RMSNorm
from .rope import Rotation


class MTPHead(nn.Module):
    """`norm(layer(fc [norm_e(embedding) | norm_h(hidden)]))`, to be multiplied by the output head.

    `hidden` is the target's after its final norm. Sources: the checkpoint's `mtp.*` names and
    mlx-vlm's `qwen3_5_mtp`; transformers has no such module.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        count = config.mtp_num_hidden_layers
        self.layers = [DecoderLayer(config, is_full_attention=True) for _ in range(count)]
        self.norm = RMSNorm(hidden, eps)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, rotation: Rotation, state: KVState
    ) -> mx.array:
        """embedding: of token t + 1, hidden: of token t, both `[B, T, hidden]`, at t's position."""
        pair = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(mx.concatenate(pair, axis=-1))
        y = None
        for layer in self.layers:
            x, y = layer(x, y, rotation, state)
        return self.norm.add(x, y)[1]
