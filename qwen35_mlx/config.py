"""config.json as a frozen `Config`; what cannot be run faithfully is refused by name."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError
from .files import LARGEST, Section, brief, is_whole, read_json
from .packing import Quantization, declared

DENSE = ("qwen3_5", "qwen3_5_text")
SPARSE = ("qwen3_5_moe", "qwen3_5_moe_text")
DTYPES = ("bfloat16", "float16", "float32")
# Far above the family's 64 layers and 262,144 positions; what is larger is a damaged file.
LAYERS, POSITIONS = 1000, 1 << 31


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `section`: how many of the `rotary_dim / 2` pairs follow axis T, H, W."""

    theta: float
    rotary_dim: int
    section: tuple[int, int, int]
    factor: float = 1.0  # YaRN context extension; 1 = plain
    original_positions: int = 262144
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # on cos and sin, hence on the rotary dims only


@dataclass(frozen=True)
class TextConfig:
    """The language model. `is_full_attention` has one entry for each layer."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    is_full_attention: tuple[bool, ...]
    rope: Rope
    intermediate_size: int  # 0 on mixture-of-experts sizes
    num_experts: int  # 0 on dense sizes
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    mtp_num_hidden_layers: int

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v side by side."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_position_embeddings: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int


@dataclass(frozen=True)
class Config:
    """A whole model folder's declaration. `vision` is None for text-only folders."""

    text: TextConfig
    vision: VisionConfig | None
    quantization: Quantization | None
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


def read(folder: Path) -> Config:
    """Parse `folder/config.json`.

    Raises: ModelError when it is missing, not JSON, not Qwen3.5, or asks for what is not run.
    """
    path = folder / "config.json"
    if not os.path.isdir(folder):  # Path.is_dir raises for a name too long
        raise ModelError(
            f"{folder}: no such folder; expected a model folder. "
            "Give a local folder, a Hub id such as Qwen/Qwen3.5-4B, or a size such as 4b."
        )
    if not path.is_file():
        raise ModelError(
            f"{folder}: no config.json; expected a Qwen3.5 model folder. Check the path."
        )
    return parse(read_json(path), str(path))


def parse(values: Any, where: str) -> Config:
    """Config of the contents of a config.json; `where` names it in errors.

    Raises: ModelError as `read`.
    """
    top = Section(values, where)
    kind = top.values.get("model_type")
    if kind not in DENSE + SPARSE:
        raise ModelError(
            f"{where}: model_type is {brief(kind)}; expected one of {', '.join(DENSE + SPARSE)}. "
            "This program runs Qwen3.5 only."
        )
    text = top.section("text_config") if "text_config" in top.values else top
    vision = top.section("vision_config") if top.values.get("vision_config") else None
    return Config(
        text=_text(text, sparse=kind in SPARSE),
        vision=_vision(vision) if vision else None,
        quantization=declared(top),
        tie_word_embeddings=top.flag("tie_word_embeddings", text.flag("tie_word_embeddings")),
        dtype=_dtype(text),
        eos_token_ids=_eos_token_ids(top, text),
        image_token_id=top.integer("image_token_id", 248056),
        video_token_id=top.integer("video_token_id", 248057),
        vision_start_token_id=top.integer("vision_start_token_id", 248053),
        vision_end_token_id=top.integer("vision_end_token_id", 248054),
    )


def _dtype(text: Section) -> str:
    dtype = text.get("dtype", text.get("torch_dtype", "bfloat16"))
    if dtype not in DTYPES:
        raise ModelError(
            f"{text.where}: dtype is {brief(dtype)}; expected one of {', '.join(DTYPES)}. "
            "Convert the folder first."
        )
    return str(dtype)


def _eos_token_ids(top: Section, text: Section) -> tuple[int, ...]:
    value = top.values.get("eos_token_id", text.values.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_whole(id) and id <= LARGEST for id in ids):
        raise ModelError(
            f"{top.where}: eos_token_id is {brief(value)}; expected a token id or a list of them."
        )
    return tuple(ids)


def _text(text: Section, sparse: bool) -> TextConfig:
    text.refuse_unless("hidden_act", "silu")
    text.refuse_unless("attention_bias", False, None)
    text.refuse_unless("attn_output_gate", True)
    text.refuse_unless("mlp_only_layers", [], None)
    text.refuse_unless("decoder_sparse_step", 1, None)
    text.refuse_unless("norm_topk_prob", True, None)
    text.refuse_unless("mtp_use_dedicated_embeddings", False, None)
    text.refuse_unless("mtp_num_hidden_layers", 0, 1)
    head_dim = text.size("head_dim", 256)
    config = TextConfig(
        hidden_size=text.size("hidden_size"),
        num_hidden_layers=text.size("num_hidden_layers", most=LAYERS),
        vocab_size=text.size("vocab_size"),
        num_attention_heads=text.size("num_attention_heads"),
        num_key_value_heads=text.size("num_key_value_heads"),
        head_dim=head_dim,
        linear_num_key_heads=text.size("linear_num_key_heads"),
        linear_num_value_heads=text.size("linear_num_value_heads"),
        linear_key_head_dim=text.size("linear_key_head_dim"),
        linear_value_head_dim=text.size("linear_value_head_dim"),
        linear_conv_kernel_dim=text.size("linear_conv_kernel_dim", 4),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_position_embeddings=text.size("max_position_embeddings", 262144, POSITIONS),
        is_full_attention=_layer_types(text),
        rope=_rope(text, head_dim),
        intermediate_size=0 if sparse else text.size("intermediate_size"),
        num_experts=text.size("num_experts") if sparse else 0,
        num_experts_per_tok=text.size("num_experts_per_tok") if sparse else 0,
        moe_intermediate_size=text.size("moe_intermediate_size") if sparse else 0,
        shared_expert_intermediate_size=(
            text.size("shared_expert_intermediate_size") if sparse else 0
        ),
        mtp_num_hidden_layers=text.integer("mtp_num_hidden_layers", 0),
    )
    for few, many, names in (
        (config.num_key_value_heads, config.num_attention_heads, "num_attention_heads"),
        (config.linear_num_key_heads, config.linear_num_value_heads, "linear_num_value_heads"),
    ):
        if many % few:
            raise ModelError(f"{text.where}: {names} is {many}; expected a multiple of {few}.")
    _require_moderate(
        text,
        {
            "num_attention_heads x head_dim": config.num_attention_heads * head_dim,
            "number of the convolution's channels": config.conv_dim,
        },
    )
    if config.num_experts_per_tok > config.num_experts:
        raise ModelError(
            f"{text.where}: num_experts_per_tok is {config.num_experts_per_tok}; "
            f"expected at most num_experts, {config.num_experts}."
        )
    return config


def _require_moderate(section: Section, products: Mapping[str, int]) -> None:
    """Sizes that are fine alone may be absurd together."""
    for name, value in products.items():
        if value > LARGEST:
            raise ModelError(
                f"{section.where}: {name} is {value:,}; expected at most {LARGEST:,}. "
                "Download the folder again."
            )


def _layer_types(text: Section) -> tuple[bool, ...]:
    count = text.size("num_hidden_layers", most=LAYERS)
    interval = text.size("full_attention_interval", 4)
    kinds = text.values.get("layer_types")
    if kinds is None:
        return tuple((i + 1) % interval == 0 for i in range(count))
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ModelError(f"{text.where}: layer_types; expected a list of {count} names.")
    for kind in kinds:
        if kind not in ("linear_attention", "full_attention"):
            raise ModelError(
                f"{text.where}: layer_types holds {brief(kind)}; "
                "expected 'linear_attention' or 'full_attention'."
            )
    return tuple(kind == "full_attention" for kind in kinds)


def _rope(text: Section, head_dim: int) -> Rope:
    """`rope_parameters`, or the older `rope_scaling` + `rope_theta`, as transformers reads both."""
    values = text.values.get("rope_parameters") or text.values.get("rope_scaling") or {}
    rope = Section(values, f"{text.where}: rope_parameters")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", "mrope", "yarn"):
        raise ModelError(f"{rope.where}: rope_type is {brief(kind)}; expected 'default' or 'yarn'.")
    rope.refuse_unless("mrope_interleaved", True)
    fraction = rope.number("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    if fraction > 1:
        raise ModelError(
            f"{rope.where}: partial_rotary_factor is {fraction:g}; expected at most 1."
        )
    theta = rope.number("rope_theta", text.get("rope_theta", 1e7), above=1)
    rotary_dim = int(head_dim * fraction)
    section = values.get("mrope_section", [11, 11, 10])
    numbers = section if isinstance(section, list) and all(map(is_whole, section)) else []
    if len(numbers) != 3 or sum(numbers) != rotary_dim // 2:
        raise ModelError(
            f"{rope.where}: mrope_section is {brief(section)}; "
            f"expected three whole numbers with sum {rotary_dim // 2}."
        )
    axes = (numbers[0], numbers[1], numbers[2])
    if kind != "yarn":
        return Rope(theta, rotary_dim, axes)
    return _yarn(rope, theta, rotary_dim, axes, text)


def _yarn(
    rope: Section, theta: float, rotary_dim: int, axes: tuple[int, int, int], text: Section
) -> Rope:
    """YaRN's settings. Source: transformers `modeling_rope_utils._compute_yarn_parameters`."""
    rope.refuse_unless("truncate", True, None)
    rope.refuse_unless("mscale", None)
    rope.refuse_unless("mscale_all_dim", None)
    trained = text.size("max_position_embeddings", 262144, POSITIONS)
    factor = rope.number("factor")
    if factor < 1:
        raise ModelError(f"{rope.where}: factor is {factor:g}; expected at least 1.")
    return Rope(
        theta,
        rotary_dim,
        axes,
        factor=factor,
        original_positions=rope.size("original_max_position_embeddings", trained, POSITIONS),
        beta_fast=rope.number("beta_fast", 32),
        beta_slow=rope.number("beta_slow", 1),
        attention_factor=rope.number("attention_factor", 0.1 * math.log(factor) + 1.0),
    )


def _vision(vision: Section) -> VisionConfig:
    vision.refuse_unless("hidden_act", "gelu_pytorch_tanh")
    vision.refuse_unless("deepstack_visual_indexes", [], None)
    config = VisionConfig(
        depth=vision.size("depth", most=LAYERS),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        num_heads=vision.size("num_heads"),
        num_position_embeddings=vision.size("num_position_embeddings"),
        out_hidden_size=vision.size("out_hidden_size"),
        patch_size=vision.size("patch_size", 16),
        temporal_patch_size=vision.size("temporal_patch_size", 2),
        spatial_merge_size=vision.size("spatial_merge_size", 2),
        in_channels=vision.size("in_channels", 3),
    )
    _require_moderate(
        vision,
        {
            "number of the values of a patch": (
                config.in_channels * config.temporal_patch_size * config.patch_size**2
            ),
            "width of the merger": config.hidden_size * config.spatial_merge_size**2,
        },
    )
    if config.hidden_size % (4 * config.num_heads):
        raise ModelError(
            f"{vision.where}: hidden_size is {config.hidden_size}; "
            f"expected a multiple of 4 x num_heads, {4 * config.num_heads}."
        )
    return config
