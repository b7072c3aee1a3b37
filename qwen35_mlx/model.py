"""The whole network on one page: embed (+ picture rows) -> layers -> norm -> logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cache import Cache, KVState
from .config import Config
from .kernels.embed import embed
from .layers.decoder import DecoderLayer
from .layers.matrix import matrix
from .layers.mtp import MTPHead
from .layers.norm import RMSNorm
from .layers.rope import Rotation
from .layers.vision import VisionTower


class LanguageModel(nn.Module):
    """Token embedding, decoder layers, final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, full) for full in text.is_full_attention]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)


class Backbone(nn.Module):
    """What checkpoints keep under `model.`: the language model and the vision tower."""

    def __init__(self, config: Config, has_vision: bool) -> None:
        super().__init__()
        self.language_model = LanguageModel(config)
        if config.vision and has_vision:
            self.visual = VisionTower(config.vision)


class Model(nn.Module):
    """Qwen3.5 as a function. Parameter names are those of the published checkpoints until `join`.

    has_vision, has_mtp: whether the folder holds these parts; both may be absent. dtype: of
    matrices and activations.
    """

    def __init__(
        self, config: Config, has_vision: bool, has_mtp: bool, dtype: mx.Dtype = mx.float32
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.has_vision, self.has_mtp = has_vision, has_mtp
        self.model = Backbone(config, has_vision)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if has_mtp:
            self.mtp = MTPHead(config.text)

    def join(self) -> None:
        """Store matrices that share an input as one; needed before the first call.

        Until then parameters have the names of the published checkpoints.
        """
        for layer in [
            *self.model.language_model.layers,
            *(self.mtp.layers if self.has_mtp else []),
        ]:
            layer.join()

    def embed(self, tokens: mx.array) -> mx.array:
        """`[B, T]` token ids -> `[B, T, hidden]`."""
        return embed(tokens, matrix(self.model.language_model.embed_tokens), self.dtype)

    def see(self, patches: np.ndarray, grid: tuple[int, int, int]) -> mx.array:
        """Rows `[N / 4, hidden]` for one picture or clip; see `VisionTower`."""
        return self.model.visual(patches, grid)

    def __call__(self, x: mx.array, positions: np.ndarray, cache: Cache) -> mx.array:
        """Read T more tokens.

        x: `[B, T, hidden]` embeddings; positions: `[3, B, T]` integers, axes T, H, W.
        Returns: `[B, T, hidden]` after the final norm. `cache` moves on by T tokens.
        """
        body = self.model.language_model
        rotation = Rotation(self.config.text.rope, positions)
        y = None
        for layer, state in zip(body.layers, cache.states, strict=True):
            x, y = layer(x, y, rotation, state)
        cache.length += x.shape[1]
        return body.norm.add(x, y)[1]

    def logits(self, hidden: mx.array) -> mx.array:
        """`[..., hidden]` -> `[..., V]`. Rows past the tokenizer's tokens are padding."""
        if self.config.tie_word_embeddings:
            return self.model.language_model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def draft(
        self, tokens: mx.array, hidden: mx.array, positions: np.ndarray, state: KVState
    ) -> mx.array:
        """Logits `[B, T, V]` of the MTP head for the tokens after `tokens`.

        tokens: `[B, T]`, each the one after the token whose final hidden state `[B, T, hidden]` is
        given, at that token's positions `[3, B, T]`; `state` is the head's own.
        """
        rotation = Rotation(self.config.text.rope, positions)
        return self.logits(self.mtp(self.embed(tokens), hidden, rotation, state))
