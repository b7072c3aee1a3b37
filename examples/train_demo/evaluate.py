"""Held-out figures in transformers' own model: python evaluate.py MODEL_FOLDER [--dtype bfloat16].

Greedy decoding gives a reply exactly if, with the right tokens before it, every next token's argmax
is right; so one pass over prompt and right reply decides. `--generate N` decodes N of each set for
good and compares the texts. Pictures go through transformers' image processor, and the positions
are its own.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil, Qwen3_5ForConditionalGeneration

from conversation import Sample, encode, media_frames, reply
from model import Demo
from requests_world import result_item, talk_item
from world import (
    GREY,
    Item,
    held_out_clips,
    held_out_scenes,
    held_out_tool_requests,
    question_item,
)


def many(make: Callable[[np.random.Generator], Item], count: int, seed: int) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [make(rng) for _ in range(count)]


def greyed(item: Item) -> Item:
    """The same question and expected answer, with the picture taken away."""
    content = [{"type": "image", "image": GREY}, item.messages[-1]["content"][1]]
    turns = [*item.messages[:-1], {"role": "user", "content": content}]
    return Item(item.task, item.key, turns, item.answer, item.reasoning)


class Judge:
    """A folder loaded in transformers, and its draft head in the training code."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        config = self.model.config
        self.pads = {config.image_token_id: 1, config.video_token_id: 2}
        ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
        parts = {"text_config": config.text_config, "vision_config": config.vision_config}
        self.demo = Demo({**ids, **{k: v.to_dict() for k, v in parts.items()}})
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.demo.load_state_dict({k: file.get_tensor(k).float() for k in file.keys()})  # noqa: SIM118

    def inputs(self, item: Item, ids: np.ndarray, sample: Sample) -> dict[str, torch.Tensor]:
        types = np.zeros_like(ids)
        for token, kind in self.pads.items():
            types[ids == token] = kind
        out = {"input_ids": torch.from_numpy(ids)[None]}
        frames = media_frames(item.messages)
        if not frames:
            return out
        out["mm_token_type_ids"] = torch.from_numpy(types)[None]
        if (types == 2).any():
            pixels = torch.from_numpy(sample.patches).flatten(0, 1)
            grid = torch.tensor([[len(sample.patches), 6, 6]])
            return {**out, "pixel_values_videos": pixels, "video_grid_thw": grid}
        done = self.images([pair[0] for pair in frames], return_tensors="pt")
        return {**out, "pixel_values": done.pixel_values, "image_grid_thw": done.image_grid_thw}

    @torch.no_grad()
    def exact(self, item: Item, thinking: bool) -> tuple[bool, int, int]:
        """(reply exact, draft tokens right, draft tokens) for the last reply."""
        sample = encode(item, thinking, self.tokenizer)
        inputs = self.inputs(item, sample.ids, sample)
        self.model.model.rope_deltas = None
        logits = self.model(**inputs).logits[0]
        count = len(self.tokenizer.encode(reply(item, thinking), add_special_tokens=False).ids)
        ids = torch.from_numpy(sample.ids)
        right = bool((logits[-count - 1 : -1].argmax(-1) == ids[-count:]).all())
        position = torch.from_numpy(sample.positions)[:, None]
        hidden = self.demo.hidden(ids[None], position, torch.from_numpy(sample.patches))
        drafts = self.demo.logits(self.demo.drafts(ids[None], position, hidden))[0].argmax(-1)
        good = int((drafts[-count:-1] == ids[1 - count :]).sum()) if count > 1 else 0
        return right, good, count - 1

    @torch.no_grad()
    def decoded(self, item: Item, thinking: bool) -> str:
        sample = encode(item, thinking, self.tokenizer)
        count = len(self.tokenizer.encode(reply(item, thinking), add_special_tokens=False).ids)
        self.model.model.rope_deltas = None
        inputs = self.inputs(item, sample.ids[:-count], sample)
        out = self.model.generate(**inputs, max_new_tokens=count + 8, do_sample=False)
        new = out[0, len(sample.ids) - count :].tolist()
        return self.tokenizer.decode(new, skip_special_tokens=False)


def sets(count: int, seed: int) -> dict[str, list[Item]]:
    scenes = held_out_scenes(4 * count, seed)
    return {
        "scene": scenes,
        "scene, picture grey": [greyed(item) for item in scenes],
        "clip": held_out_clips(count, seed),
        "tool": held_out_tool_requests(count, seed),
        "question": many(question_item, count, seed),
        "result": many(result_item, count, seed),
        "talk": many(talk_item, count, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--count", type=int, default=50, help="of each set; four times for scenes")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--generate", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(args.folder, getattr(torch, args.dtype))
    for name, items in sets(args.count, args.seed).items():
        for thinking in (False, True):
            found = np.array([judge.exact(item, thinking) for item in items])
            exact, good, tokens = found.sum(0)
            line = f"{name}{' thinking' * thinking}: exact {exact} of {len(items)}"
            line += f", draft tokens right {good / tokens:.3f}"
            if args.generate:
                part = items[: args.generate]
                same = [judge.decoded(i, thinking) == reply(i, thinking) for i in part]
                line += f"; decoded: {sum(same)} of {len(part)}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
