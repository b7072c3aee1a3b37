"""Random checkpoints: python benchmarks/checkpoints.py [NAME ...] [--cache FOLDER]

The family's exact architecture in small sizes: its head dims, layer pattern, tensor names and
tokens, in Hugging Face's layout, which this program, mlx-lm and mlx-vlm all load as it is. There is
no MTP head, since both peers drop it at load; the vision tower is tiny, since mlx-vlm needs one.
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre

ROOT = Path(__file__).resolve().parents[1]
# Shapes and draws are the tests', template and added tokens the demonstration model's.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "train_demo")]

import tiny  # noqa: E402
from tiny_shapes import CONFIGS  # noqa: E402
from tokenizer import ADDED, NOT_SPECIAL, PATTERN, tokenizer_config  # noqa: E402

TEMPLATE = ROOT / "examples" / "train_demo" / "chat_template.jinja"
DEFAULT_CACHE = Path(tempfile.gettempdir()) / "qwen35_mlx-benchmarks"
VERSION = "1"  # of what is drawn; folders of another version are made anew


@dataclass(frozen=True)
class Recipe:
    """`base` is a configuration of tests/tiny_shapes.py; `text` is what differs from it."""

    base: str
    dtype: str
    text: dict[str, Any]


_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
RECIPES = {
    "dense60m": Recipe(
        "dense",
        "bfloat16",
        _HEADS
        | {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048}
        | {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    # float32: MLX's CPU gather_mm knows nothing else, and bfloat16 experts crash the peers there.
    "moe100m": Recipe(
        "moe_untied",
        "float32",
        _HEADS
        | {"vocab_size": 16384, "hidden_size": 384, "num_experts": 32, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
        | {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "tiny": Recipe("dense", "float32", {"vocab_size": 1024}),
}


def make(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """The folder of this checkpoint, written if it is not there yet."""
    recipe, folder = RECIPES[name], cache / name
    stamp = folder / ".complete"
    if stamp.is_file() and stamp.read_text() == VERSION:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = _tokenizer(recipe.text["vocab_size"])
    config = _config(recipe, tokenizer)
    tensors = {n: v for n, v in tiny.draw(config).items() if not n.startswith("mtp.")}
    template = TEMPLATE.read_text(encoding="utf-8")
    stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config(tokenizer, template)),
        "chat_template.jinja": template,
        "generation_config.json": json.dumps({"do_sample": False, "eos_token_id": stops}),
    }
    tiny.write(folder, config, tensors, dtype=recipe.dtype, files=files)
    stamp.write_text(VERSION)
    return folder


def _config(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    config = copy.deepcopy(CONFIGS[recipe.base])
    text = config["text_config"]
    text |= recipe.text
    text["layer_types"] = [
        "full_attention" if (i + 1) % 4 == 0 else "linear_attention"
        for i in range(text["num_hidden_layers"])
    ]
    text["eos_token_id"] = tokenizer.token_to_id("<|endoftext|>")
    config["vision_config"]["out_hidden_size"] = text["hidden_size"]
    for kind in ("image", "video"):
        config[f"{kind}_token_id"] = tokenizer.token_to_id(f"<|{kind}_pad|>")
    for side in ("start", "end"):
        config[f"vision_{side}_token_id"] = tokenizer.token_to_id(f"<|vision_{side}|>")
    return config


def _tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE with exactly `size` ids: the bytes, pairs of bytes, and the added tokens.

    All ids are tokens, so that no program leaves rows of the logits out.
    """
    letters = sorted(pre.ByteLevel.alphabet())
    count = size - len(letters) - len(ADDED)
    merges = [(a, b) for a in letters for b in letters][:count]
    vocab = {piece: i for i, piece in enumerate(letters + [a + b for a, b in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(t, special=t not in NOT_SPECIAL, normalized=False) for t in ADDED]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"({DEFAULT_CACHE})")
    args = parser.parse_args()
    for name in args.names or RECIPES:
        folder = make(name, args.cache)
        print(f"{folder}  {(folder / 'model.safetensors').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
