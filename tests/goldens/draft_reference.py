"""The MTP head in plain float64 NumPy, and mlx-vlm's drafter on the same tensors to check it by.

transformers has no MTP module, so these few lines are the reference of the draft logits.
"""

from typing import Any

import numpy as np

from tiny import Tensors

EMBEDDING = "model.language_model.embed_tokens.weight"


def draft(config: dict, tensors: Tensors, tokens: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Draft logits `[T, V]` float64 for the token after next.

    `tokens` `[T]` are the prompt's shifted by one, `hidden` `[T, H]` the target's states after its
    final norm; row i of both meets at position i.
    """
    text = config["text_config"]
    weights = {n: v.astype(np.float64) for n, v in tensors.items() if n.startswith("mtp.")}
    table = tensors[EMBEDDING].astype(np.float64)
    halves = (
        _norm(table[tokens], weights["mtp.pre_fc_norm_embedding.weight"]),
        _norm(hidden.astype(np.float64), weights["mtp.pre_fc_norm_hidden.weight"]),
    )
    x = np.concatenate(halves, axis=-1) @ weights["mtp.fc.weight"].T
    layer = {n.removeprefix("mtp.layers.0."): v for n, v in weights.items() if "mtp.layers.0." in n}
    x = x + _attention(text, layer, _norm(x, layer["input_layernorm.weight"]))
    x = x + _feed_forward(text, layer, _norm(x, layer["post_attention_layernorm.weight"]))
    head = table if config["tie_word_embeddings"] else tensors["lm_head.weight"].astype(np.float64)
    return _norm(x, weights["mtp.norm.weight"]) @ head.T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + weight)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _rotate(x: np.ndarray, rope: dict) -> np.ndarray:
    """Rotate the first quarter of `[T, heads, D]`; a text's three position axes are equal."""
    half = int(x.shape[-1] * rope["partial_rotary_factor"]) // 2
    frequency = rope["rope_theta"] ** (-np.arange(half) / half)
    angle = (np.arange(len(x))[:, None] * frequency)[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _attention(text: dict, layer: Tensors, x: np.ndarray) -> np.ndarray:
    count, dim = len(x), text["head_dim"]
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    both = (x @ layer["self_attn.q_proj.weight"].T).reshape(count, heads, 2, dim)
    query, gate = both[:, :, 0], both[:, :, 1]
    key = (x @ layer["self_attn.k_proj.weight"].T).reshape(count, groups, dim)
    value = (x @ layer["self_attn.v_proj.weight"].T).reshape(count, groups, dim)
    rope = text["rope_parameters"]
    query = _rotate(_norm(query, layer["self_attn.q_norm.weight"]), rope)
    key = _rotate(_norm(key, layer["self_attn.k_norm.weight"]), rope)
    key, value = (np.repeat(part, heads // groups, axis=1) for part in (key, value))
    scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(dim)
    scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
    mixed = np.einsum("hts,shd->thd", _softmax(scores), value) * _sigmoid(gate)
    return mixed.reshape(count, -1) @ layer["self_attn.o_proj.weight"].T


def _gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    opened = x @ gate.T
    return (opened * _sigmoid(opened) * (x @ up.T)) @ down.T


def _feed_forward(text: dict, layer: Tensors, x: np.ndarray) -> np.ndarray:
    def module(prefix: str) -> np.ndarray:
        parts = (layer[f"{prefix}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return _gated(x, *parts)

    if "num_experts" not in text:
        return module("mlp")
    share = _softmax(x @ layer["mlp.gate.weight"].T)
    chosen = np.argsort(-share, axis=-1)[:, : text["num_experts_per_tok"]]
    result = _sigmoid(x @ layer["mlp.shared_expert_gate.weight"].T) * module("mlp.shared_expert")
    for row, experts in enumerate(chosen):
        total = share[row, experts].sum()
        for expert in experts:
            gate, up = np.split(layer["mlp.experts.gate_up_proj"][expert], 2)
            down = layer["mlp.experts.down_proj"][expert]
            result[row] += share[row, expert] / total * _gated(x[row], gate, up, down)
    return result


def mlx_vlm_draft(
    config: dict, tensors: Tensors, tokens: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """The same logits from mlx-vlm's `qwen3_5_mtp` drafter, float32."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_vlm.speculative.drafters.qwen3_5_mtp.config import Qwen3_5MTPConfig
    from mlx_vlm.speculative.drafters.qwen3_5_mtp.qwen3_5_mtp import Qwen3_5MTPDraftModel

    model: Any = Qwen3_5MTPDraftModel(Qwen3_5MTPConfig.from_dict(config))
    mtp = {n: mx.array(v) for n, v in tensors.items() if n.startswith("mtp.")}
    model.load_weights(list(model.sanitize(mtp).items()), strict=True)
    target: Any = nn.Module()
    target.embed_tokens = nn.Embedding(*tensors[EMBEDDING].shape)
    target.embed_tokens.weight = mx.array(tensors[EMBEDDING])
    if not config["tie_word_embeddings"]:
        head = mx.array(tensors["lm_head.weight"])
        target.lm_head = lambda x: x @ head.T
    model.reset(target)
    states = model._forward_tokens(mx.array(tokens)[None], mx.array(hidden)[None], mx.int32)
    return np.array(model._lm_head_fn(states)[0])
