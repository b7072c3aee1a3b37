"""The eight sizes as published: config.json and the tensors of each, known without a download."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mlx import config
from qwen35_mlx.family import Size
from qwen35_mlx.shards import ITEM_BYTES, Entry

from . import layout
from .source import Source

# How the repositories are split; a tensor that is larger has a shard of its own.
SHARD_BYTES = 5_000_000_000
F32 = ("linear_attn.A_log", "linear_attn.norm.weight")


@dataclass(frozen=True)
class Tower:
    """A vision tower."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class Shapes:
    """What `Size` does not hold. intermediate_size: of each expert where there are any."""

    num_attention_heads: int
    intermediate_size: int
    num_experts_per_tok: int
    tied: bool
    tower: Tower


T12 = Tower(12, 768, 12, 3072)
T24 = Tower(24, 1024, 16, 4096)
T27 = Tower(27, 1152, 16, 4304)
SHAPES = {
    "0.8B": Shapes(8, 3584, 0, True, T12),
    "2B": Shapes(8, 6144, 0, True, T24),
    "4B": Shapes(16, 9216, 0, True, T24),
    "9B": Shapes(16, 12288, 0, False, T27),
    "27B": Shapes(24, 17408, 0, False, T27),
    "35B-A3B": Shapes(16, 512, 8, False, T27),
    "122B-A10B": Shapes(32, 1024, 8, False, T27),
    "397B-A17B": Shapes(32, 1024, 10, False, T27),
}


def config_values(size: Size) -> dict[str, Any]:
    """The whole config.json of the original folder of `size`, as parsed JSON.

    Source: the repositories' own files; for 2B, 4B and 9B put together from several, with the
    family's constants.
    """
    shapes = SHAPES[size.name]
    kind = "qwen3_5_moe" if size.num_experts else "qwen3_5"
    prefix = "Qwen3_5Moe" if size.num_experts else "Qwen3_5"
    return {
        "architectures": [f"{prefix}ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": kind,
        "text_config": _text_values(size, shapes, kind),
        "tie_word_embeddings": shapes.tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": shapes.tower.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shapes.tower.hidden_size,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": shapes.tower.intermediate_size,
            "model_type": kind,
            "num_heads": shapes.tower.num_heads,
            "num_position_embeddings": 2304,
            "out_hidden_size": size.hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


def source(size: Size) -> Source:
    """The original folder of `size` for planning: its headers as they are, no contents.

    Everything BF16 but `A_log` and the gated norm, experts joined, in shards of the usual size.
    """
    folder, values = Path(size.hf_id), config_values(size)
    entries: dict[str, Entry] = {}
    shard, offset = 1, 0
    for name, shape in layout.published(config.parse(values, size.hf_id)).items():
        dtype = "F32" if name.endswith(F32) else "BF16"
        nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        if offset and offset + nbytes > SHARD_BYTES:
            shard, offset = shard + 1, 0
        file = folder / f"model-{shard:05d}.safetensors"
        entries[name] = Entry(file, dtype, shape, nbytes, offset)
        offset += nbytes
    return Source(folder, values, entries, where=size.hf_id)


def _text_values(size: Size, shapes: Shapes, kind: str) -> dict[str, Any]:
    layers = range(1, size.num_hidden_layers + 1)
    feed_forward = (
        {
            "moe_intermediate_size": shapes.intermediate_size,
            "num_experts": size.num_experts,
            "num_experts_per_tok": shapes.num_experts_per_tok,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": shapes.intermediate_size,
        }
        if size.num_experts
        else {"intermediate_size": shapes.intermediate_size}
    )
    tied = {"tie_word_embeddings": True} if shapes.tied else {}
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "initializer_range": 0.02,
        "layer_types": ["linear_attention" if i % 4 else "full_attention" for i in layers],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": size.linear_num_value_heads,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": f"{kind}_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": shapes.num_attention_heads,
        "num_hidden_layers": size.num_hidden_layers,
        "num_key_value_heads": size.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": 248_320,
        **feed_forward,
        **tied,
    }
