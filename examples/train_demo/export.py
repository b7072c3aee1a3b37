"""Write trained weights as a Hugging Face folder: python export.py CHECKPOINT OUT_FOLDER."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tokenizer import ADDED, VOCAB_SIZE

FLOAT32 = ("A_log", "linear_attn.norm.weight")
PREPROCESSOR = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def text_config(layers: int, eos: int) -> dict:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": eos,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 448,
        "layer_types": [
            "full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    }


def model_config(tokenizer: Tokenizer, layers: int = 4) -> dict:
    """config.json in the family's form, with this tokenizer's ids."""
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    text = text_config(layers, ids["<|endoftext|>"])
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 128,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 384,
            "model_type": "qwen3_5",
            "num_heads": 2,
            "num_position_embeddings": 144,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def rounded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BF16, but for the two tensors that the family stores in F32."""
    return {
        name: p.detach()
        .to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
        .contiguous()
        for name, p in state.items()
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(state: dict[str, torch.Tensor], config: dict, tokens: Path, out: Path) -> None:
    """The whole folder, written beside `out` and then renamed: nobody reads half of it."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(rounded(state), part / "model.safetensors", metadata={"format": "pt"})
    (part / "model.safetensors").chmod(0o644)
    write_json(part / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokens / name, part / name)
    area = {"longest_edge": 16777216, "shortest_edge": 96 * 96}
    kind = "Qwen2VLImageProcessorFast"
    image = {"size": area, **PREPROCESSOR, "image_processor_type": kind}
    write_json(part / "preprocessor_config.json", image)
    area = {"longest_edge": 25165824, "shortest_edge": 4096}
    video = {"size": area, **PREPROCESSOR, "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(part / "video_preprocessor_config.json", video)
    eos = json.loads((part / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {entry["content"]: int(key) for key, entry in eos.items()}
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[1]}
    write_json(part / "generation_config.json", generation)
    if out.exists():
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        part.rename(out)
        shutil.rmtree(old)
    else:
        part.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    saved = torch.load(args.checkpoint, weights_only=True)
    write_folder(saved["model"], saved["config"], args.checkpoint.parent, args.out)


if __name__ == "__main__":
    main()
