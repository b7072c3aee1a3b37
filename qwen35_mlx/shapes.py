"""What the text of a model's kernels depends on, in plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

from . import config
from .packing import Format

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in config.DTYPES}
Formats = Mapping[str, Format | None]
Pair = tuple[Format | None, Format | None]
Experts = tuple[Format | None, Format | None, Format | None, Format | None]


@dataclass(frozen=True)
class Shapes:
    """What the text of a model's kernels depends on, in plain values.

    dtype: of activations. pairs: of dims that rotate. embedding: how its rows are packed. The rest
    says how joined matrices are packed, of all layers, without repetitions. projections: qkvz and
    ba of the delta nets; experts: of a mixture gate_up, down and the shared expert's two; gate_up:
    of dense layers, 2 dense_inner rows.
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
    projections: tuple[Pair, ...]
    experts: tuple[Experts, ...]
    dense_inner: int
    gate_up: tuple[Format | None, ...]


def shapes_of(given: config.Config, formats: Formats, dtype: mx.Dtype) -> Shapes:
    """The shapes of a model. formats: how its matrices are packed, by path of the module."""
    text, body = given.text, "model.language_model"
    layers = [f"{body}.layers.{n}" for n in range(text.num_hidden_layers)]
    # In the order of the layers. What is packed differently is not joined.
    projections: dict[Pair, None] = {}
    for layer, is_full in zip(layers, text.is_full_attention, strict=True):
        names = ("qkv", "z", "b", "a")
        of = [formats.get(f"{layer}.linear_attn.in_proj_{name}") for name in names]
        if not is_full and of[0] == of[1] and of[2] == of[3]:
            projections[of[0], of[2]] = None
    if any(path.startswith("mtp.") for path in formats):
        layers += [f"mtp.layers.{n}" for n in range(text.mtp_num_hidden_layers)]
    experts: dict[Experts, None] = {}
    gate_up: dict[Format | None, None] = {}
    for mlp in (f"{layer}.mlp" for layer in layers):
        one = f"{mlp}.shared_expert" if text.num_experts else mlp
        gate, up, down = (formats.get(f"{one}.{name}_proj") for name in ("gate", "up", "down"))
        if gate != up:
            continue
        if text.num_experts:
            of = [formats.get(f"{mlp}.experts.{name}_proj") for name in ("gate_up", "down")]
            experts[of[0], of[1], gate, down] = None
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
        projections=tuple(projections),
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
    for name in ("projections", "experts"):
        known[name] = tuple(tuple(map(packing, several)) for several in known[name])
    known["gate_up"] = tuple(map(packing, known["gate_up"]))
    return Shapes(**known)
