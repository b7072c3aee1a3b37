"""What the text of a model's kernels depends on, in plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

from . import config
from .packing import Format

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in config.DTYPES}
Formats = Mapping[str, Format | None]
Experts = tuple[Format | None, Format | None, Format | None, Format | None]


@dataclass(frozen=True)
class Shapes:
    """What the text of a model's kernels depends on, in plain values.

    dtype: of activations. pairs: of dims that rotate. embedding: how its rows are packed. experts:
    of each layer of a mixture how gate_up, down and the shared expert's two are packed, without
    repetitions. gate_up: the same of the dense layers' joined matrix of 2 dense_inner rows.
    """

    dtype: str
    vocab: int
    hidden: int
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    pairs: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int
    E: int
    K: int
    inner: int
    shared_inner: int
    embedding: Format | None
    experts: tuple[Experts, ...]
    dense_inner: int
    gate_up: tuple[Format | None, ...]


def shapes_of(given: config.Config, formats: Formats, dtype: mx.Dtype) -> Shapes:
    """The shapes of a model. formats: how its matrices are packed, by path of the module."""
    text, body = given.text, "model.language_model"
    layers = [f"{body}.layers.{n}.mlp" for n in range(text.num_hidden_layers)]
    layers += ["mtp.layers.0.mlp"] if any(path.startswith("mtp.") for path in formats) else []
    # In the order of the layers. Where gate and up differ they are not one matrix.
    experts: dict[Experts, None] = {}
    gate_up: dict[Format | None, None] = {}
    for layer in layers:
        mlp = f"{layer}.shared_expert" if text.num_experts else layer
        gate, up, down = (formats.get(f"{mlp}.{name}_proj") for name in ("gate", "up", "down"))
        if gate != up:
            continue
        if text.num_experts:
            of = f"{layer}.experts"
            routed = formats.get(f"{of}.gate_up_proj"), formats.get(f"{of}.down_proj")
            experts[*routed, gate, down] = None
        else:
            gate_up[gate] = None
    return Shapes(
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        vocab=text.vocab_size,
        hidden=text.hidden_size,
        eps=text.rms_norm_eps,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        pairs=text.rope.rotary_dim // 2,
        k_heads=text.linear_num_key_heads,
        v_heads=text.linear_num_value_heads,
        k_dim=text.linear_key_head_dim,
        v_dim=text.linear_value_head_dim,
        taps=text.linear_conv_kernel_dim,
        E=text.num_experts,
        K=text.num_experts_per_tok,
        inner=text.moe_intermediate_size,
        shared_inner=text.shared_expert_intermediate_size,
        embedding=formats.get(f"{body}.embed_tokens"),
        experts=tuple(experts),
        dense_inner=text.intermediate_size,
        gate_up=tuple(gate_up),
    )


def from_plain(values: Mapping[str, Any]) -> Shapes:
    """What `dataclasses.asdict` and JSON made of `Shapes`."""

    def packing(value: Any) -> Format | None:
        return None if value is None else Format(**value)

    known = {field.name: values[field.name] for field in fields(Shapes)}
    known["embedding"] = packing(known["embedding"])
    known["experts"] = tuple(tuple(map(packing, four)) for four in known["experts"])
    known["gate_up"] = tuple(map(packing, known["gate_up"]))
    return Shapes(**known)
