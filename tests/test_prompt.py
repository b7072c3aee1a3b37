"""Messages to tokens, positions and patches: against the reference, and with everything broken."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from goldens.make_positions import CASES, END, FILE, IMAGE, MERGE, START, VIDEO
from qwen35_mlx import prompt
from qwen35_mlx.errors import InputError, ModelError
from qwen35_mlx.image import ImageProcessor, Media
from qwen35_mlx.prompt import MediaTokens, Prompt
from qwen35_mlx.template import Template
from qwen35_mlx.tokenizer import Tokenizer
from qwen35_mlx.video import VideoProcessor
from test_template import SHIPPED
from test_tokenizer import backend

TOKENIZER = Tokenizer(backend())
TEMPLATE = Template(SHIPPED.read_text())
PICTURES = ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 96)
CLIPS = VideoProcessor(min_pixels=32 * 32, max_pixels=8 * 64 * 96)
USER: dict[str, Any] = {"role": "user", "content": "hi"}


def known(token: str) -> int:
    id = TOKENIZER.id_of(token)
    assert id is not None
    return id


IDS = MediaTokens(
    *map(known, ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"))
)


def medium(t: int, gh: int, gw: int, times: tuple[float, ...] = ()) -> Media:
    return Media(np.zeros((t * gh * gw, 5), np.float32), (t, gh, gw), times)


def picture(width: int, height: int, color: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), color)


def image_part(width: int, height: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(width, height)}


def video_part(frames: int, width: int = 40, height: int = 72, fps: float = 2) -> dict[str, Any]:
    return {"type": "video", "video": [picture(width, height)] * frames, "fps": fps}


def build(messages: Any, tools: Any = None, thinking: bool | None = None, **changed: Any) -> Prompt:
    given = {
        "template": TEMPLATE,
        "tokenizer": TOKENIZER,
        "image_processor": PICTURES,
        "video_processor": CLIPS,
        "ids": IDS,
        **changed,
    }
    return prompt.build(messages, tools, thinking, **given)


def written_out(text: str, media: tuple[Media, ...], merge: int = 2) -> list[int]:
    """What transformers does: every placeholder at full length in the text, then the tokenizer."""
    for one in media:
        block = one.grid[1] * one.grid[2] // merge**2
        if not one.is_video:
            text = text.replace("<|image_pad|>", "<picture>" * block, 1)
            continue
        slices = [
            f"<{time:.1f} seconds><|vision_start|>{'<clip>' * block}<|vision_end|>"
            for time in one.timestamps
        ]
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "".join(slices), 1)
    text = text.replace("<picture>", "<|image_pad|>").replace("<clip>", "<|video_pad|>")
    return TOKENIZER.encode(text)


@pytest.mark.parametrize("name", CASES)
def test_positions_are_the_references(name: str) -> None:
    with np.load(FILE) as kept:
        tokens, grids = kept[f"{name}.tokens"], kept[f"{name}.grids"].tolist()
        expected, delta = kept[f"{name}.positions"], int(kept[f"{name}.delta"])
    media = [medium(t, gh, gw, (0.0,) * t if clip else ()) for clip, t, gh, gw in grids]
    ids = MediaTokens(IMAGE, VIDEO, START, END)
    places, found = prompt.positions(tokens.astype(np.int32), media, ids, MERGE)
    assert places.dtype == np.int32 and places.shape == (3, len(tokens))
    np.testing.assert_array_equal(places, expected)
    assert found == delta
    # what follows goes on where the longest axis ended
    assert len(tokens) + found == places.max() + 1


def test_positions_of_a_long_clip_are_made_at_once() -> None:
    block = np.array([1, START, *[VIDEO] * (30 * 20), END], np.int32)
    tokens = np.tile(block, 384)
    ids = MediaTokens(IMAGE, VIDEO, START, END)
    places, delta = prompt.positions(tokens, [medium(384, 60, 40, (0.0,) * 384)], ids, 2)
    assert places.shape == (3, 384 * 603)
    # each slice: three tokens of text and 30 rows
    assert places.max() + 1 == 384 * 33 and delta == 384 * 33 - 384 * 603
    assert places[:, 602].tolist() == [32, 32, 32] and places[:, 601].tolist() == [2, 31, 21]


@pytest.mark.parametrize(
    ("tokens", "media"),
    [
        ([1, IMAGE, 2], []),
        ([1, 2], [medium(1, 2, 2)]),
        ([IMAGE, 1, IMAGE], [medium(1, 2, 4)]),
        ([VIDEO, VIDEO], [medium(1, 2, 4)]),
        ([IMAGE, IMAGE], [medium(1, 2, 4, (0.5,))]),
        ([IMAGE, IMAGE, IMAGE], [medium(1, 2, 4)]),
    ],
)
def test_placeholders_that_do_not_fit_the_media_are_an_internal_error(
    tokens: list[int], media: list[Media]
) -> None:
    ids = MediaTokens(IMAGE, VIDEO, START, END)
    with pytest.raises(ValueError, match=r"placeholder|block|picture"):
        prompt.positions(np.array(tokens, np.int32), media, ids, 2)


def test_a_text_prompt_counts_up_on_all_axes() -> None:
    made = build([USER])
    assert made.tokens.dtype == made.positions.dtype == np.int32
    assert made.tokens.tolist() == TOKENIZER.encode(TEMPLATE.render([USER]))
    np.testing.assert_array_equal(made.positions, np.tile(np.arange(len(made.tokens)), (3, 1)))
    assert (made.delta, made.media, made.tools) == (0, (), ())


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "picture": [{"role": "user", "content": [image_part(64, 96), {"type": "text", "text": "?"}]}],
    "two_pictures": [
        {"role": "user", "content": [image_part(96, 32), {"text": "and:"}, image_part(32, 64)]}
    ],
    "clip": [{"role": "user", "content": [{"text": "look:"}, video_part(6), {"text": "<x>"}]}],
    "odd_clip": [{"role": "user", "content": [{"text": "a <"}, video_part(5, fps=3)]}],
    "picture_then_clip": [
        {"role": "user", "content": [image_part(64, 32), video_part(4), {"text": "?"}]}
    ],
    "clip_then_picture": [
        {"role": "user", "content": [video_part(4), {"text": "1 <"}, image_part(32, 96)]}
    ],
    "over_several_turns": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [video_part(8), image_part(64, 64)]},
        {"role": "assistant", "content": "größer 日本"},
        {"role": "tool", "content": [image_part(32, 32)]},
        {"role": "user", "content": [{"text": "é"}, image_part(96, 64), video_part(4, 72, 40)]},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_placeholders_become_what_the_written_out_text_becomes(name: str) -> None:
    messages = CONVERSATIONS[name]
    made = build(messages)
    plain, _ = prompt.checked_messages(messages)
    assert made.tokens.tolist() == written_out(TEMPLATE.render(plain), made.media)
    at = np.isin(made.tokens, (IDS.image, IDS.video))
    assert at.sum() == sum(len(m.patches) for m in made.media) // 4
    # in the order of their placeholders
    kinds = [m.is_video for m in made.media for _ in range(m.grid[0])]
    starts = np.flatnonzero(made.tokens == IDS.vision_start) + 1
    assert (made.tokens[starts] == IDS.video).tolist() == kinds
    lengths = [m.grid[1] * m.grid[2] // 4 for m in made.media for _ in range(m.grid[0])]
    ends = np.flatnonzero(made.tokens == IDS.vision_end)
    assert (ends - starts).tolist() == lengths
    again, delta = prompt.positions(made.tokens, made.media, IDS, 2)
    np.testing.assert_array_equal(made.positions, again)
    assert made.delta == delta <= 0


def test_the_text_before_a_clip_may_join_its_time() -> None:
    """The reason times are written before tokenising: `x <` splits otherwise than `x ` and `<`."""
    text = "look <|vision_start|><|video_pad|><|vision_end|>"
    clip = medium(2, 4, 2, (0.25, 1.25))
    tokens, media = prompt.expand(text, [clip], TOKENIZER, IDS, 2)
    assert TOKENIZER.decode(tokens) == "look <0.2 seconds><1.2 seconds>"  # halves round to even
    assert tokens.tolist() == written_out(text, (clip,))
    assert media == (clip,)
    assert TOKENIZER.encode("k <0") != TOKENIZER.encode("k ") + TOKENIZER.encode("<0")


def test_the_tokens_around_a_clip_replace_the_templates() -> None:
    made = build([{"role": "user", "content": [video_part(4)]}])
    slices = made.media[0].grid[0]
    assert slices == 2
    assert (
        (made.tokens == IDS.vision_start).sum() == (made.tokens == IDS.vision_end).sum() == slices
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", False),
        ("raw <think> text", True),
        ("raw text", False),
    ],
)
def test_thinking_is_read_off_the_last_turn(text: str, expected: bool) -> None:
    assert prompt.is_thinking(text) is expected


def test_thinking_none_is_the_templates_default() -> None:
    assert build([USER], thinking=True).thinking is True
    assert build([USER], thinking=False).thinking is False
    assert build([USER]).thinking is False  # the shipped template is off by default
    on = Template("<|im_start|>assistant\n<think>\n")
    assert build([USER], template=on).thinking is True


def test_tools_are_kept_and_rendered() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    made = build([USER], [tool])
    assert made.tools == (tool,)
    assert json.dumps(tool) in TOKENIZER.decode(made.tokens)


def test_argument_texts_are_parsed_for_the_template() -> None:
    def asked(arguments: Any) -> list[dict[str, Any]]:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]

    text = build(asked('{"b": "x", "a": [1, null]}')).tokens.tolist()
    assert text == build(asked({"b": "x", "a": [1, None]})).tokens.tolist()
    decoded = TOKENIZER.decode(text)
    assert "<parameter=b>\nx\n</parameter>\n<parameter=a>\n[1, null]\n" in decoded
    assert build(asked("")).tokens.tolist() == build(asked({})).tokens.tolist()


def test_every_way_to_name_a_picture_opens_it(tmp_path: Path) -> None:
    shape = (64, 96)
    buffer = io.BytesIO()
    picture(*shape).save(buffer, "PNG")
    data = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    ways: list[dict[str, Any]] = [
        {"type": "image", "image": picture(*shape)},
        {"type": "image", "image": data},
        {"type": "image", "image": tmp_path / "a.png"},
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image", "url": url},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"image": picture(*shape)},
    ]
    first = build([{"role": "user", "content": [ways[0]]}])
    for way in ways[1:]:
        made = build([{"role": "user", "content": [way]}])
        assert made.tokens.tolist() == first.tokens.tolist()
        np.testing.assert_array_equal(made.media[0].patches, first.media[0].patches)


def say(content: Any, role: str = "user", **more: Any) -> list[Any]:
    return [USER, {"role": role, "content": content, **more}]


def calling(call: Any) -> list[Any]:
    return say("", "assistant", tool_calls=[call])


def arguments(value: Any) -> list[Any]:
    return calling({"function": {"name": "f", "arguments": value}})


BROKEN: dict[str, tuple[Any, str]] = {
    "none": (None, r"^messages: NoneType; a list of messages was expected\."),
    "text": ("hi", r"^messages: str; a list"),
    "mapping": ({"role": "user"}, r"^messages: dict; a list"),
    "nothing": ([], r"^messages: an empty list; a list"),
    "no_message": ([USER, "hi"], r"^messages\[1\]: str; "),
    "no_role": ([{"content": "x"}], r"^messages\[0\]: role None; one of system, user, assistant"),
    "unknown_role": (say("x", "robot"), r"^messages\[1\]: role 'robot'; one of system"),
    "role_list": (say("x", ["user"]), r"^messages\[1\]: role \['user'\]"),  # type: ignore[arg-type]
    "late_system": (say("x", "system"), r"^messages\[1\] \(system\): only the first message may"),
    "system_picture": (
        [{"role": "system", "content": [image_part(32, 32)]}, USER],
        r"^messages\[0\] \(system\): a picture or clip; only text was expected",
    ),
    "only_system": ([{"role": "system", "content": "x"}], r"^messages: an empty prompt; "),
    "blank": ([{"role": "user", "content": " \n"}], r"^messages: an empty prompt; "),
    "blank_part": ([{"role": "user", "content": [{"text": " "}]}], r"an empty prompt; "),
    "no_parts": ([{"role": "user", "content": []}], r"an empty prompt; "),
    "no_content": ([{"role": "user"}], r"^messages\[0\] \(user\): content is NoneType; text or"),
    "number": (say(3), r"^messages\[1\] \(user\): content is int; text or a list of parts"),
    "bytes": (say(b"x"), r"content is bytes; text or a list of parts"),
    "part": (say(["x"]), r"^messages\[1\] \(user\) part 0: str; "),
    "part_type": (say([{"type": "audio"}]), r"part 0: type 'audio'; one of text, image, image_url"),
    "part_no_type": (say([{}]), r"part 0: type None; one of"),
    "part_text": (say([{"text": 3}]), r"part 0: text is int; a text was expected"),
    "no_image": (say([{"type": "image"}]), r"part 0: no image in it; "),
    "no_url": (say([{"type": "image_url", "image_url": {}}]), r"part 0: no image in it; "),
    "no_video": (say([{"text": "a"}, {"type": "video_url"}]), r"part 1: no video in it; "),
    "not_there": (say([{"image": "/no/such.png"}]), r"^messages\[1\] \(user\) part 0: "),
    "remote": (
        say([{"image": "http://x.y/z.png"}]),
        r"^messages\[1\] \(user\) part 0: the address",
    ),
    "silent": (say(None, "assistant"), r"\(assistant\): neither content nor tool_calls"),
    "reasoning": (say("", "assistant", reasoning_content=3), r"reasoning_content is int; a text"),
    "user_calls": (say("x", tool_calls=[{}]), r"\(user\): tool_calls; only an assistant's"),
    "calls": (say("", "assistant", tool_calls="x"), r"tool_calls is str; a list was expected"),
    "call": (calling("x"), r"^messages\[1\] \(assistant\) tool_calls\[0\]: no function name"),
    "call_name": (calling({"function": {"name": 3}}), r"tool_calls\[0\]: no function name"),
    "no_json": (arguments("{x"), r"tool_calls\[0\]: arguments are no JSON \(.*\); a JSON object"),
    "json_list": (arguments("[1]"), r"tool_calls\[0\]: arguments are list; a JSON object"),
    "json_deep": (arguments("[" * 99_999), r"tool_calls\[0\]: arguments are no JSON"),
    "json_number": (arguments("1" * 9999), r"tool_calls\[0\]: arguments are no JSON"),
    "arguments": (arguments([1]), r"tool_calls\[0\]: arguments are list; a JSON object"),
    "surrogate": (say("a\ud83d"), r"^messages\[1\] \(user\): U\+D83D at character 1, half a"),
    "pad": (say("a <|image_pad|>"), r"^messages\[1\]: its text holds <\|image_pad\|>, the place"),
    "pad_beside_picture": (
        say([image_part(32, 32), {"text": "<|image_pad|>"}]),
        r"^messages\[1\]: its text holds <\|image_pad\|>, the place of a picture\.",
    ),
    "video_pad": (
        say([video_part(4), {"text": "<|vision_start|><|video_pad|><|vision_end|>"}]),
        r"^messages\[1\]: its text holds <\|video_pad\|>, the place of a clip\.",
    ),
    "array": (np.zeros((2, 3)), r"^messages: ndarray; a list of messages was expected"),
    "role_array": (say("x", np.array(["user", "tool"])), r"^messages\[1\]: role array"),  # type: ignore[arg-type]
    "type_array": (say([{"type": np.zeros((2, 3))}]), r"part 0: type array"),
    "picture_array": (say([{"image": np.zeros((9, 7, 3))}]), r"part 0: ndarray; a path, bytes, a"),
    "clip_array": (say([{"video": np.zeros((4, 9, 7, 3))}]), r"part 0: ndarray; a path or a list"),
    "frame_arrays": (say([{"video": [np.zeros((9, 7, 3))] * 4}]), r"part 0.* ndarray; a path, b"),
    "empty_path": (say([{"image": ""}]), r"part 0: no image in it; "),
    "empty_folder": (say([{"video": ""}]), r"part 0: no video in it; "),
    "empty_url": (say([{"video_url": {"url": ""}}]), r"part 0: no video in it; "),
    "no_frames": (say([{"video": []}]), r"part 0: no video in it; "),
    "calls_array": (say("", "assistant", tool_calls=np.zeros(2)), r"tool_calls is ndarray; a list"),
    "user_calls_array": (say("x", tool_calls=np.zeros(2)), r"\(user\): tool_calls; only an assis"),
    "arguments_array": (arguments(np.zeros(2)), r"arguments are ndarray; a JSON object was exp"),
    "argument_array": (arguments({"a": np.zeros(2)}), r"tool_calls\[0\]: .*ndarray.*plain JSON"),
    "argument_deep": (arguments('{"a":' * 900 + "1" + "}" * 900), r"nest too deep"),
    "pad_in_call": (arguments({"x": "<|video_pad|>"}), r"^messages\[1\]: its text holds"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_conversation_is_one_line_that_names_it(name: str) -> None:
    messages, expected = BROKEN[name]
    with pytest.raises(InputError, match=expected) as error:
        build(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("x", r"^tools: str; a list of functions"),
        ([3], r"^tools\[0\]: no function name; "),
        ([{"type": "function", "function": {}}], r"^tools\[0\]: no function name; "),
        ([{"name": "f", "parameters": {1, 2}}], r"^tools\[0\]: .*; plain JSON was expected"),
        ([{"name": "f", "description": "<|image_pad|>"}], r"^tools\[0\]: its text holds <\|image"),
    ],
)
def test_broken_tools_are_one_line(tools: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as error:
        build([USER], tools)
    assert "\n" not in str(error.value)


def test_a_template_that_loses_a_picture_is_an_input_error() -> None:
    asked = [{"role": "user", "content": [image_part(32, 32), {"text": "?"}]}]
    with pytest.raises(InputError, match=r"^chat template: 0 places of a picture for 1 given; "):
        build(asked, template=Template("nothing"))
    clip = [{"role": "user", "content": [video_part(4)]}]
    with pytest.raises(InputError, match=r"^chat template: 0 places for 1 clips; "):
        build(clip, template=Template("<|video_pad|>"))


def test_a_model_without_a_vision_tower_takes_text_only() -> None:
    without = {"image_processor": None, "video_processor": None}
    assert build([USER], **without).media == ()
    for part in (image_part(32, 32), video_part(4)):
        with pytest.raises(InputError, match=r"part 0: this model has no vision tower; text was"):
            build([{"role": "user", "content": [part]}], **without)


def test_placeholder_ids_of_another_model_are_a_model_error() -> None:
    other = MediaTokens(IDS.image + 1, IDS.video, IDS.vision_start, IDS.vision_end)
    with pytest.raises(ModelError, match=rf"<\|image_pad\|> is {IDS.image}; config.json says"):
        build([{"role": "user", "content": [image_part(32, 32)]}], ids=other)


def test_raw_text_is_taken_as_it_is() -> None:
    made = prompt.from_text("<|im_start|>a größer <think>", TOKENIZER)
    assert made.tokens.tolist() == TOKENIZER.encode("<|im_start|>a größer <think>")
    assert made.positions.shape == (3, len(made.tokens)) and made.delta == 0
    assert made.thinking is True and made.media == ()
    for text, expected in (("", r"^prompt: no tokens"), ("<|image_pad|>", r"^text: it holds")):
        with pytest.raises(InputError, match=expected):
            prompt.from_text(text, TOKENIZER)


def test_raw_tokens_are_taken_as_they_are() -> None:
    made = prompt.from_tokens([5, 3, 9])
    assert made.tokens.tolist() == [5, 3, 9] and made.tokens.dtype == np.int32
    assert made.positions.tolist() == [[0, 1, 2]] * 3 and made.positions.flags.writeable
    with pytest.raises(InputError, match="no tokens"):
        prompt.from_tokens([])
