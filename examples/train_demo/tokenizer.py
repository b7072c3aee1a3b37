"""Train the byte-level BPE on the model's own world: python tokenizer.py OUT_FOLDER [--seed 0].

The pre-tokenizer, the normalisation (NFC) and the 33 added tokens are the family's, the vocabulary
is this world's: all 256 bytes are in it, so that any text can be written, only with more tokens.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from conversation import render, reply
from requests_world import request_item, result_item, talk_item
from world import clip_item, question_item, scene_item

BASE_SIZE = 960
VOCAB_SIZE = 1024  # 31 rows of padding, as the family has rows that no token uses
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
NOT_SPECIAL = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
SPECIAL_END = (
    *("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
    *("<tts_text_bos_single>", "<|audio_pad|>"),
)
ADDED = SPECIAL + NOT_SPECIAL + SPECIAL_END


def corpus(seed: int, count: int = 3000) -> list[str]:
    """Rendered conversations of every kind, cut at the added tokens: no merges come from those."""
    rng = np.random.default_rng(seed)
    makers = (scene_item, question_item, clip_item, request_item, result_item, talk_item)
    cut = re.compile("|".join(re.escape(token) for token in ADDED))
    texts = []
    for i in range(count):
        item = makers[i % len(makers)](rng)
        for thinking in (False, True):
            text = render(item.messages, item.tools, thinking) + reply(item, thinking)
            texts += [piece for piece in cut.split(text) if piece]
    stamps = [f"<{t / 10:.1f} seconds>" for t in range(1, 60)] * 20
    return texts + stamps


def train(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(PATTERN), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    if tokenizer.get_vocab_size() > BASE_SIZE:
        raise ValueError(f"vocabulary: {tokenizer.get_vocab_size()} entries; expected {BASE_SIZE}")
    for token in ADDED:
        flag = token not in NOT_SPECIAL
        tokenizer.add_tokens([AddedToken(token, special=flag, normalized=False)])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, template: str) -> dict:
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in NOT_SPECIAL,
        }
        for token in ADDED
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL[1:] + SPECIAL_END),
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "audio_token": "<|audio_pad|>",
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "image_token": "<|image_pad|>",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "pretokenize_regex": PATTERN,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(args.seed)
    tokenizer.save(str(args.out / "tokenizer.json"))
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    config = tokenizer_config(tokenizer, template)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (args.out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    (args.out / "chat_template.jinja").write_text(template, encoding="utf-8")


if __name__ == "__main__":
    main()
