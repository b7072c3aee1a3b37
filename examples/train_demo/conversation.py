"""From an item of the world to numbers: prompt, token ids, patches, M-RoPE positions, targets.

The rules are those of inference: template, one `<|image_pad|>` expanded to one token per merged
cell, a video written as `<0.2 seconds><|vision_start|>...<|vision_end|>` for each pair of frames
in place of the template's own markers.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from tokenizers import Tokenizer

from world import CELL, FPS, SIDE, Item

PATCH, MERGE = 16, 2
GRID = SIDE // PATCH  # 6 patches, 3 merged cells a side
MERGED = SIDE // CELL
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|image_pad|>"


@dataclass(frozen=True)
class Sample:
    """`ids` `[L]`; `target` `[L]` bool: the token is to be learned; `positions` `[3, L]`;
    `patches` `[slices, 36, 1536]` f32 in the order of the placeholders."""

    ids: np.ndarray
    target: np.ndarray
    positions: np.ndarray
    patches: np.ndarray
    task: str


def refuse(message: str) -> None:
    raise ValueError(message)


@cache
def template() -> Template:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    env.globals["raise_exception"] = refuse
    path = Path(__file__).with_name("chat_template.jinja")
    return env.from_string(path.read_text(encoding="utf-8"))


def render(messages: list[dict], tools: list[dict] | None, thinking: bool) -> str:
    """The prompt as the chat template writes it, up to where the model goes on."""
    return template().render(
        messages=messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
    )


def call_text(call: dict) -> str:
    lines = [f"<tool_call>\n<function={call['name']}>"]
    lines += [f"<parameter={k}>\n{v}\n</parameter>" for k, v in call["arguments"].items()]
    return "\n".join([*lines, "</function>\n</tool_call>"])


def reply(item: Item, thinking: bool) -> str:
    """What the model should write after the prompt, with its end mark."""
    text = call_text(item.call) if item.call else item.answer
    return (f"{item.reasoning}\n</think>\n\n" if thinking else "") + text + "<|im_end|>"


def patches(frames: list[Image.Image]) -> np.ndarray:
    """`[len(frames) / 2, 36, 1536]`: pairs of frames, patches in 2x2 merge blocks, each in the
    order (channel, time, y, x)."""
    x = np.stack([np.asarray(frame) for frame in frames]).astype(np.float32)
    x = (x / 255 - 0.5) / 0.5
    x = x.reshape(-1, 2, MERGED, MERGE, PATCH, MERGED, MERGE, PATCH, 3)
    # axes: slice, time, row block, row, y, column block, column, x, channel
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(x.reshape(len(x), GRID * GRID, -1))


def media_frames(messages: list[dict]) -> list[list[Image.Image]]:
    """The frames of every picture (doubled) and clip in the order of the messages."""
    found = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            if part["type"] == "image":
                found.append([part["image"]] * 2)
            elif part["type"] == "video":
                found.append(part["video"])
    return found


def expand(prompt: str, messages: list[dict]) -> str:
    """Write each placeholder as often as there are merged cells, and the clip's time stamps."""
    cells = MERGED * MERGED
    prompt = prompt.replace(IMAGE, IMAGE * cells)
    for frames in media_frames(messages):
        if VIDEO not in prompt or frames[0] is frames[1]:
            continue
        stamps = [(i + 0.5) / FPS for i in range(0, len(frames), 2)]
        body = "<|video_pad|>" * cells
        text = "".join(f"<{t:.1f} seconds><|vision_start|>{body}<|vision_end|>" for t in stamps)
        prompt = prompt.replace(VIDEO, text, 1)
    return prompt


def mrope(is_pad: np.ndarray) -> np.ndarray:
    """`[3, L]` positions: text counts on, each run of 9 placeholders is one block of 3 by 3."""
    out = np.zeros((3, len(is_pad)), np.int64)
    p = i = 0
    while i < len(is_pad):
        if is_pad[i]:
            cell = np.arange(MERGED * MERGED)
            out[:, i : i + len(cell)] = p + np.stack([cell * 0, cell // MERGED, cell % MERGED])
            i, p = i + len(cell), p + MERGED
        else:
            out[:, i] = p
            i, p = i + 1, p + 1
    return out


def history_targets(ids: list[int], tokenizer: Tokenizer) -> np.ndarray:
    """Earlier answers in the prompt are learned too, unless they open with `<think>`: never written
    that way by the model."""
    start, end, think, assistant = (
        tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<think>", "assistant")
    )
    target = np.zeros(len(ids), bool)
    for i, token in enumerate(ids[:-3]):
        if token == start and ids[i + 1] == assistant and ids[i + 3] != think and end in ids[i:]:
            target[i + 3 : ids.index(end, i) + 1] = True
    return target


def encode(item: Item, thinking: bool, tokenizer: Tokenizer) -> Sample:
    """One training or evaluation sample. Prompt and reply are tokenized apart, as at inference."""
    prompt = expand(render(item.messages, item.tools, thinking), item.messages)
    head = tokenizer.encode(prompt, add_special_tokens=False).ids
    tail = tokenizer.encode(reply(item, thinking), add_special_tokens=False).ids
    ids = np.array(head + tail)
    target = np.concatenate([history_targets(head, tokenizer), np.ones(len(tail), bool)])
    pads = [tokenizer.token_to_id(t) for t in (IMAGE, "<|video_pad|>")]
    media = media_frames(item.messages)
    shape = (0, GRID * GRID, 3 * 2 * PATCH * PATCH)
    pixels = np.concatenate([np.zeros(shape, np.float32), *map(patches, media)])
    return Sample(ids, target, mrope(np.isin(ids, pads)), pixels, item.task)
