"""Configurations of the tiny Qwen3.5 models, and the name and shape of each of their tensors.

Head dims, rope and the layer pattern are the family's; all other sizes differ from one another, so
that a swapped axis cannot pass.
"""

import copy
from typing import Any

# The family's added tokens in its order, moved down behind a base vocabulary of 340 pieces.
BASE_VOCAB = 340
_ADDED = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|>
<|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>
<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>
<|audio_pad|>
"""
TOKEN_ID = {token: BASE_VOCAB + i for i, token in enumerate(_ADDED.split())}

ROPE = {
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
    "rope_type": "default",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}

_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": TOKEN_ID["<|endoftext|>"],
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-06,
    "rope_parameters": ROPE,
    "use_cache": True,
}
_DENSE_TEXT = _TEXT | {
    "model_type": "qwen3_5_text",
    "vocab_size": 389,
    "hidden_size": 96,
    "intermediate_size": 160,
    "linear_num_value_heads": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Widths are multiples of 64, so that this one can also be quantised in the published group size.
_MOE_TEXT = _TEXT | {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 421,
    "hidden_size": 192,
    "linear_num_value_heads": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 320,
    "router_aux_loss_coef": 0.001,
}
_VISION: dict[str, Any] = {
    "deepstack_visual_indexes": [],
    "depth": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "initializer_range": 0.02,
    "num_heads": 2,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_DENSE_VISION = _VISION | {
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_position_embeddings": 49,
    "out_hidden_size": 96,
}
_MOE_VISION = _VISION | {
    "hidden_size": 88,
    "intermediate_size": 104,
    "num_position_embeddings": 36,
    "out_hidden_size": 192,
}


def _config(text: dict, vision: dict, tied: bool, **text_changes: Any) -> dict:
    kind = text["model_type"].removesuffix("_text")
    name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[kind] + "ForConditionalGeneration"
    return copy.deepcopy(
        {
            "architectures": [name],
            "image_token_id": TOKEN_ID["<|image_pad|>"],
            "model_type": kind,
            "text_config": text | {"tie_word_embeddings": tied} | text_changes,
            "tie_word_embeddings": tied,
            "transformers_version": "4.57.0.dev0",
            "video_token_id": TOKEN_ID["<|video_pad|>"],
            "vision_config": vision | {"model_type": kind},
            "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
            "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
        }
    )


CONFIGS: dict[str, dict] = {
    "dense": _config(_DENSE_TEXT, _DENSE_VISION, tied=False),
    "dense_tied": _config(_DENSE_TEXT, _DENSE_VISION, tied=True),
    "dense_yarn": _config(_DENSE_TEXT, _DENSE_VISION, tied=False, rope_parameters=YARN),
    "moe": _config(_MOE_TEXT, _MOE_VISION, tied=True),
    "moe_untied": _config(_MOE_TEXT, _MOE_VISION, tied=False),
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in this model's Hugging Face folder, experts fused."""
    text = config["text_config"]
    width, vocab = text["hidden_size"], text["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.language_model.embed_tokens.weight": (vocab, width)}
    for index, kind in enumerate(text["layer_types"]):
        mixer = _linear_attention(text) if kind == "linear_attention" else _attention(text)
        found |= _under(f"model.language_model.layers.{index}", _norms(width) | mixer | _mlp(text))
    found["model.language_model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, width)
    found |= _under("model.visual", _vision(config["vision_config"]))
    found |= {"mtp.fc.weight": (width, 2 * width)}
    found |= {
        f"mtp.{n}.weight": (width,) for n in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    return found | _under("mtp.layers.0", _norms(width) | _attention(text) | _mlp(text))


def _under(prefix: str, parts: dict) -> dict:
    return {f"{prefix}.{name}": shape for name, shape in parts.items()}


def _norms(width: int) -> dict:
    return {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}


def _linear_attention(text: dict) -> dict:
    width, heads = text["hidden_size"], text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    parts = {
        "in_proj_qkv.weight": (channels, width),
        "in_proj_z.weight": (values, width),
        "in_proj_b.weight": (heads, width),
        "in_proj_a.weight": (heads, width),
        "conv1d.weight": (channels, 1, text["linear_conv_kernel_dim"]),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (text["linear_value_head_dim"],),
        "out_proj.weight": (width, values),
    }
    return _under("linear_attn", parts)


def _attention(text: dict) -> dict:
    width, dim = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
    parts = {
        "q_proj.weight": (2 * queries, width),
        "k_proj.weight": (keys, width),
        "v_proj.weight": (keys, width),
        "o_proj.weight": (width, queries),
        "q_norm.weight": (dim,),
        "k_norm.weight": (dim,),
    }
    return _under("self_attn", parts)


def _gated(prefix: str, width: int, inner: int) -> dict:
    parts = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {f"{prefix}.{name}.weight": shape for name, shape in parts.items()}


def _mlp(text: dict) -> dict:
    width = text["hidden_size"]
    if "num_experts" not in text:
        return _gated("mlp", width, text["intermediate_size"])
    experts, inner = text["num_experts"], text["moe_intermediate_size"]
    return {
        "mlp.gate.weight": (experts, width),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, width),
        "mlp.experts.down_proj": (experts, width, inner),
        **_gated("mlp.shared_expert", width, text["shared_expert_intermediate_size"]),
        "mlp.shared_expert_gate.weight": (1, width),
    }


def _vision(vision: dict) -> dict:
    width, inner, size = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    patch = (vision["in_channels"], vision["temporal_patch_size"], size, size)
    merged = width * vision["spatial_merge_size"] ** 2
    parts: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, *patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (vision["num_position_embeddings"], width),
    }
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.linear_fc1": (inner, width),
        "mlp.linear_fc2": (width, inner),
    }
    modules = {
        f"blocks.{block}.{name}": shape
        for block in range(vision["depth"])
        for name, shape in {"norm1": (width,), "norm2": (width,), **linears}.items()
    }
    modules |= {
        "merger.norm": (width,),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (vision["out_hidden_size"], merged),
    }
    for name, shape in modules.items():
        parts |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return parts
