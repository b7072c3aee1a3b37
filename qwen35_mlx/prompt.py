"""A conversation as the model reads it: tokens, positions and patches.

Messages are checked, rendered by the folder's template, and their placeholders filled: a picture
takes one token for each merged block of patches, a clip one such block for each temporal slice,
each after its time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import image, video
from .errors import InputError, ModelError
from .image import ImageProcessor, Media
from .messages import Source, checked_messages, checked_tools, holder_of
from .template import Template
from .tokenizer import Tokenizer
from .video import VideoProcessor

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class MediaTokens:
    """The ids config.json gives for the placeholders."""

    image: int
    video: int
    vision_start: int
    vision_end: int


@dataclass(frozen=True)
class Prompt:
    """What the engine reads."""

    tokens: np.ndarray  # `[T]` int32, placeholders expanded
    positions: np.ndarray  # `[3, T]` int32: time, row, column
    delta: int  # the token at cache index c after the prompt has position c + delta on all axes
    media: tuple[Media, ...] = ()  # in the order of their placeholders in `tokens`
    thinking: bool = False  # the text ends inside an open <think>
    tools: tuple[dict[str, Any], ...] = ()  # as given; their schemas type the arguments of calls


def build(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool | None,
    *,
    template: Template,
    tokenizer: Tokenizer,
    image_processor: ImageProcessor | None,
    video_processor: VideoProcessor | None,
    ids: MediaTokens,
    allow_url: bool = False,
) -> Prompt:
    """The prompt of a conversation in OpenAI's shape, up to the opening of the next answer.

    `thinking` None takes the template's own default. Pictures and clips are opened here, addresses
    only with `allow_url`.

    Raises: InputError for whatever in messages, tools, pictures or clips cannot be used.
    Source: transformers `models/qwen3_vl/processing_qwen3_vl.py`. Differs for clips: the
    `<|vision_start|>` and `<|vision_end|>` around a clip's placeholder are replaced with it, as
    when the models were released; transformers keeps them since 5.12.
    """
    plain, sources = checked_messages(messages)
    given = checked_tools(tools)
    if sources:
        _check_ids(tokenizer, ids)
    text = template.render(plain, given, thinking)
    _check_count(text, IMAGE_PAD, sum(not s.is_video for s in sources), plain, given)
    _check_count(text, VIDEO_PAD, sum(s.is_video for s in sources), plain, given)
    media = [_open(s, image_processor, video_processor, allow_url) for s in sources]
    merge = 1 if image_processor is None else image_processor.merge_size
    tokens, ordered = expand(text, media, tokenizer, ids, merge)
    places, delta = positions(tokens, ordered, ids, merge)
    return Prompt(tokens, places, delta, ordered, is_thinking(text), given)


def from_text(text: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a raw text without a template. Raises: InputError: empty, or placeholders."""
    for pad in (IMAGE_PAD, VIDEO_PAD):
        if pad in text:
            raise InputError(
                f"text: it holds {pad}, the place of a picture or clip, and raw text has none. "
                "Remove it, or give messages."
            )
    prompt = from_tokens(tokenizer.encode(text))
    return Prompt(prompt.tokens, prompt.positions, prompt.delta, thinking=is_thinking(text))


def from_tokens(tokens: Sequence[int] | np.ndarray) -> Prompt:
    """The prompt of raw token ids, without pictures. Raises: InputError when there are none."""
    array = np.asarray(tokens, dtype=np.int32)
    if array.size == 0:
        raise InputError("prompt: no tokens; at least one was expected. Give some text.")
    places = np.broadcast_to(np.arange(array.size, dtype=np.int32), (3, array.size))
    return Prompt(array, places.copy(), 0)


def is_thinking(text: str) -> bool:
    """Whether `text` ends inside a reasoning block of its last turn."""
    turn = text[text.rfind("<|im_start|>") + 1 :]
    return turn.rfind("<think>") > turn.rfind("</think>")


def expand(
    text: str, media: Sequence[Media], tokenizer: Tokenizer, ids: MediaTokens, merge_size: int
) -> tuple[np.ndarray, tuple[Media, ...]]:
    """Tokens `[T]` int32 of a rendered text with every placeholder at its full length, and the
    media in the order of their placeholders. `media` holds pictures in order and clips in order.

    The times of a clip are text and may join a token with what precedes them, so they are written
    before tokenising. Placeholders are tokens of their own on any side, so they are multiplied
    after it, which is exact and spares a megabyte of text for a long clip.
    """
    clips = [medium for medium in media if medium.is_video]
    parts = text.split(VISION_START + VIDEO_PAD + VISION_END)
    if len(parts) != len(clips) + 1:
        raise InputError(
            f"chat template: {len(parts) - 1} places for {len(clips)} clips; each clip's "
            f"{VIDEO_PAD} was expected between {VISION_START} and {VISION_END}. "
            "Use the model's own template."
        )
    slices = [_slices(clip) for clip in clips]
    text = parts[0] + "".join(s + part for s, part in zip(slices, parts[1:], strict=True))
    tokens = np.asarray(tokenizer.encode(text), dtype=np.int32)
    repeats = np.ones(tokens.size, dtype=np.int64)
    found: list[tuple[int, Media]] = []
    for id, kind in ((ids.image, False), (ids.video, True)):
        at = np.flatnonzero(tokens == id)
        chosen = [medium for medium in media if medium.is_video is kind]
        counts = [medium.grid[0] if kind else 1 for medium in chosen]
        if at.size != sum(counts):
            raise ValueError(f"{at.size} tokens {id} for {sum(counts)} blocks of patches")
        first = np.cumsum([0, *counts])[:-1]
        found += [(int(at[i]), medium) for i, medium in zip(first, chosen, strict=True)]
        repeats[at] = np.repeat([_block(medium, merge_size) for medium in chosen], counts)
    return np.repeat(tokens, repeats), tuple(m for _, m in sorted(found, key=lambda f: f[0]))


def positions(
    tokens: np.ndarray, media: Sequence[Media], ids: MediaTokens, merge_size: int
) -> tuple[np.ndarray, int]:
    """Positions `[3, T]` int32 (time, row, column) of `tokens` `[T]`, and the delta after them.

    Text advances all three axes by one. A block of patches, R by C after merging, keeps the time p
    it starts at, counts p + row and p + column, and text goes on at p + max(R, C). Each temporal
    slice of a clip is a block.

    Raises: ValueError when placeholders and `media`, in the order of their placeholders, disagree.
    Source: transformers `models/qwen3_5/modeling_qwen3_5.py` `get_rope_index`.
    """
    grids = [(m.grid[1], m.grid[2], m.is_video) for m in media for _ in range(m.grid[0])]
    blocks = np.asarray(grids, dtype=np.int64).reshape(-1, 3)
    rows, columns = blocks[:, 0] // merge_size, blocks[:, 1] // merge_size
    lengths = rows * columns
    firsts = np.cumsum(lengths) - lengths
    seen = (tokens == ids.image) | (tokens == ids.video)
    at = np.flatnonzero(seen)
    if at.size != lengths.sum():
        raise ValueError(f"{at.size} placeholder tokens; the media fill {lengths.sum()}")
    starts, ends = at[firsts], at[firsts + lengths - 1]
    if not np.array_equal(ends - starts + 1, lengths):
        raise ValueError("a block of placeholder tokens is interrupted or of another length")
    if not np.array_equal(tokens[starts] == ids.video, blocks[:, 2].astype(bool)):
        raise ValueError("a picture stands at a clip's placeholder, or a clip at a picture's")
    advance = np.where(seen, 0, 1)
    advance[ends] = np.maximum(rows, columns)
    time = np.cumsum(advance) - advance
    places = np.repeat(time[None].astype(np.int32), 3, axis=0)
    within = np.arange(at.size) - np.repeat(firsts, lengths)
    width = np.repeat(columns, lengths)
    places[1, at] += (within // width).astype(np.int32)
    places[2, at] += (within % width).astype(np.int32)
    return places, int(places.max(initial=-1)) + 1 - tokens.size


def _slices(clip: Media) -> str:
    if len(clip.timestamps) != clip.grid[0]:
        raise ValueError(f"{len(clip.timestamps)} times for {clip.grid[0]} slices of a clip")
    block = VISION_START + VIDEO_PAD + VISION_END
    return "".join(f"<{seconds:.1f} seconds>{block}" for seconds in clip.timestamps)


def _block(medium: Media, merge_size: int) -> int:
    _, gh, gw = medium.grid
    return (gh // merge_size) * (gw // merge_size)


def _open(
    source: Source,
    image_processor: ImageProcessor | None,
    video_processor: VideoProcessor | None,
    allow_url: bool,
) -> Media:
    processor = video_processor if source.is_video else image_processor
    if processor is None:
        raise InputError(
            f"{source.where}: this model has no vision tower; text was expected. "
            "Use a folder with the vision tower."
        )
    if source.is_video:
        assert video_processor is not None
        return video.patches(
            video.open_video(source.value, source.where, source.fps), video_processor
        )
    return image.patches(image.open_image(source.value, source.where, allow_url), processor)


def _check_ids(tokenizer: Tokenizer, ids: MediaTokens) -> None:
    for token, id in ((IMAGE_PAD, ids.image), (VIDEO_PAD, ids.video)):
        if (found := tokenizer.id_of(token)) != id:
            raise ModelError(
                f"tokenizer.json: {token} is {found}; config.json says {id}. "
                "Take both files from the same model."
            )


def _check_count(
    text: str,
    pad: str,
    expected: int,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
) -> None:
    """A placeholder in somebody's text would take a picture's place, so the count must agree."""
    found = text.count(pad)
    if found != expected:
        holder = holder_of(pad, messages, tools)
        what = "of a picture" if pad == IMAGE_PAD else "of a clip"
        if holder is not None:
            raise InputError(f"{holder}: its text holds {pad}, the place {what}. Remove it.")
        raise InputError(
            f"chat template: {found} places {what} for {expected} given; one for each was "
            "expected. Use the model's own template."
        )
