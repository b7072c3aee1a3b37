"""What the output parser makes of an output, and that it does not matter where it is cut."""

import json
import random
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pytest

from qwen35_mlx import arguments
from qwen35_mlx.errors import InputError
from qwen35_mlx.parse import Event, OutputParser, Reasoning, StopStrings, Text, ToolCall

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "content": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "deep": {"type": "boolean"},
        "nothing": {"type": "null"},
        "names": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object"},
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "one": {"oneOf": [{"type": "boolean"}, {"type": "array"}]},
        "both": {"allOf": [{"description": "d"}, {"type": "integer"}]},
        "mode": {"enum": ["1", "fast"]},
        "level": {"enum": [1, 2]},
        "fixed": {"const": True},
        "point": {"$ref": "#/$defs/Point"},
        "points": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
        "loop": {"$ref": "#/$defs/Loop"},
        "lost": {"$ref": "#/$defs/Nowhere"},
        "foreign": {"$ref": "http://example.org/schema"},
        "shape": {"properties": {"x": {}}},
        "list": {"items": {}},
        "old": {"type": "integer", "nullable": True},
        "wide": {"type": ["integer", "number", "string"]},
        "any": {},
        "true": True,
    },
    "$defs": {
        "Point": {"type": "object", "properties": {"x": {"type": "integer"}}},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "boolean"}]},
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "write", "parameters": PARAMETERS}},
    {"name": "bare", "parameters": {"properties": {"n": {"type": "string"}}}},
    {"type": "function", "function": {"name": "now"}},
]


def call(name: str, *values: tuple[str, str]) -> str:
    """A call as the chat template writes it."""
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def merged(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    """Neighbours of one kind joined; without ids, which are random."""
    joined: list[tuple[Any, ...]] = []
    for kind, group in groupby(events, type):
        if kind is ToolCall:
            calls = (event for event in group if isinstance(event, ToolCall))
            joined += [("call", event.name, event.arguments) for event in calls]
        else:
            texts = (event.text for event in group if not isinstance(event, ToolCall))
            joined.append((kind.__name__, "".join(texts)))
    return joined


def parsed(pieces: Iterable[str], thinking: bool = False) -> list[tuple[Any, ...]]:
    parser = OutputParser(thinking, TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged([*events, *parser.finish()])


def value(raw: str, key: str, tool: str = "write") -> Any:
    """What `raw` becomes as the parameter `key`."""
    (event,) = parsed([call(tool, (key, raw))])
    assert event[:2] == ("call", tool)
    return event[2][key]


QUOTED = f"Write this:\n{call('write', ('path', 'a'), ('content', 'b'))}\nand stop."
CODE = 'x = "<parameter=a>"\n</parameter>\nif y:\n    z("</function></tool_call>", "<function=f>")'
OUTPUTS = {
    "plain": "Hello, world.\n",
    "less than": "1 < 2 <t <tool <tool_cal </thin x<<<think",
    "line breaks": "\n\na\n\n\nb\n\n",
    "reasoning": "let me see\n\n</think>\n\n\nIt is 4.\n",
    "empty reasoning": "<think>\n\n</think>\n\nIt is 4.",
    "explicit think": "<think>\nhm\n</think>\n\nIt is 4.",
    "never closed": "thinking <think> about </thinking>\n",
    "call": "I look.\n\n" + call("write", ("path", "a b"), ("count", "3")) + "\n",
    "two calls": call("now") + "\n" + call("bare", ("n", "1")) + "\n\nDone.",
    "thought and called": "hm\n</think>\n\n" + call("write", ("path", "a\n\nb\n")),
    "called in thought": "hm\n\n" + call("write", ("deep", "true")) + "\n</think>\n\nok",
    "mused in thought": "use <tool_call>\n<function=write>\n<parameter=path>\n</think>\n\nok",
    "strange name in thought": "use " + call("f", ("a", "1")) + "\n</think>\nok",
    "code": call("write", ("content", CODE), ("path", "p")),
    "quoted call": call("write", ("content", QUOTED), ("path", "p")) + "\n\nDone.",
    "unfinished": "a\n\n" + call("write", ("path", "a"))[:-3],
    "unfinished name": "a <tool_call>\n<function=wri",
    "no call": "a\n\n<tool_call>\n\nnot a call <tool_call>" + call("now") + "b",
    "bad name": "<tool_call>\n<function=a\nb>\n</function>\n</tool_call>",
    "bad key": call("write", ("path", "1\n</parameter>\n<parameter=\n>"), ("count", "2")),
    "tag in name": "<tool_call>\n<function=<think>f>\n</function>\n</tool_call>",
    "less in name": "<tool_call>\n<function=a<b>\n</function>\n</tool_call>",
    "long name": f"<tool_call>\n<function={'f' * 600}>\n</function>\n</tool_call>",
    "no name": "<tool_call>\n<function= >\n</function>\n</tool_call>",
    "no parameter": "<tool_call><function=now>text</function></tool_call>",
    "on one line": "<tool_call><function=bare><parameter=n>5</parameter></function></tool_call>x",
    "stray tags": "</think>a</tool_call>\n<parameter=b>\n</parameter></function>",
}


def two_splits(text: str) -> Iterator[list[str]]:
    for at in range(len(text) + 1):
        yield [text[:at], text[at:]]


def random_splits(text: str, seed: int, count: int) -> Iterator[list[str]]:
    rng = random.Random(seed)
    for _ in range(count):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(2, 30)))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_cutting_the_output_elsewhere_changes_no_event(name: str, thinking: bool) -> None:
    text = OUTPUTS[name]
    whole = parsed([text], thinking)
    for pieces in (*two_splits(text), *random_splits(text, len(text), 40), list(text)):
        assert parsed(pieces, thinking) == whole, pieces


def test_random_mixtures_of_tags_parse_alike_however_they_are_cut() -> None:
    rng = random.Random(5)
    words = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>"]
    words += ["<parameter=", "</parameter>", "\n", "\n\n", " ", ">", "<", "write", "path", "x"]
    words += ["<tool_call>\n<function=write>\n<parameter=path>\n", "</parameter>\n</function>\n"]
    for _ in range(400):
        text = "".join(rng.choices(words, k=rng.randint(1, 40)))
        thinking = rng.random() < 0.5
        whole = parsed([text], thinking)
        assert parsed(text, thinking) == whole, text
        for pieces in random_splits(text, rng.randint(0, 9), 3):
            assert parsed(pieces, thinking) == whole, pieces


def test_reasoning_and_answer_are_split_and_lose_only_the_protocols_line_breaks() -> None:
    assert parsed([OUTPUTS["reasoning"]], thinking=True) == [
        ("Reasoning", "let me see\n"),
        ("Text", "It is 4.\n"),
    ]
    expected = [("Reasoning", "hm"), ("Text", "It is 4.")]
    assert parsed([OUTPUTS["explicit think"]], thinking=False) == expected
    assert parsed([OUTPUTS["explicit think"]], thinking=True) == expected
    assert parsed([OUTPUTS["empty reasoning"]], thinking=False) == [("Text", "It is 4.")]
    assert parsed([OUTPUTS["never closed"]], thinking=True) == [
        ("Reasoning", OUTPUTS["never closed"])
    ]


@pytest.mark.parametrize("name", ["plain", "less than", "line breaks", "reasoning", "stray tags"])
def test_an_answer_without_protocol_comes_through_unchanged(name: str) -> None:
    assert parsed([OUTPUTS[name]], thinking=False) == [("Text", OUTPUTS[name])]


def test_think_opens_reasoning_only_at_the_very_start() -> None:
    assert parsed(["a <think>b</think>c"]) == [("Text", "a <think>b</think>c")]


def test_calls_stand_between_texts_without_the_line_breaks_around_them() -> None:
    assert parsed([OUTPUTS["call"]]) == [
        ("Text", "I look."),
        ("call", "write", {"path": "a b", "count": 3}),
    ]
    assert parsed([OUTPUTS["two calls"]]) == [
        ("call", "now", {}),
        ("call", "bare", {"n": "1"}),
        ("Text", "Done."),
    ]
    assert parsed(["x\n\n\n" + call("now")])[0] == ("Text", "x\n")


def test_text_leaves_as_soon_as_it_is_certain() -> None:
    parser = OutputParser(False, TOOLS)
    assert parser.feed("Hello") == [Text("Hello")]
    assert parser.feed(" a<") == [Text(" a")]
    assert parser.feed("b <tool") == [Text("<b ")]
    assert parser.feed("s>") == [Text("<tools>")]
    assert parser.feed("\n\n\n") == [Text("\n")]
    assert parser.feed("<tool_call> <function") == []
    assert parser.feed("al>") == [Text("\n\n<tool_call> <functional>")]
    parser = OutputParser(True)
    assert parser.feed("one\n") == [Reasoning("one")]
    assert parser.feed("two\n</think>\n") == [Reasoning("\ntwo")]
    assert parser.feed("\nthree") == [Text("three")]
    assert parser.finish() == []


def test_neighbours_within_one_piece_are_one_event() -> None:
    parser = OutputParser(False)
    assert parser.feed("a<think>b</think>c<think>") == [Text("a<think>b</think>c<think>")]


def test_a_call_in_reasoning_counts_only_for_a_tool_of_the_list() -> None:
    assert parsed([OUTPUTS["called in thought"]], thinking=True) == [
        ("Reasoning", "hm"),
        ("call", "write", {"deep": True}),
        ("Text", "ok"),
    ]
    after = parsed(["hm\n" + call("now") + "\n\nok"], thinking=True)
    assert after == [("Reasoning", "hm"), ("call", "now", {}), ("Text", "ok")]
    reasoning, answer = parsed([OUTPUTS["strange name in thought"]], thinking=True)
    assert reasoning == ("Reasoning", "use " + call("f", ("a", "1")))
    assert answer == ("Text", "ok")


def test_a_call_begun_in_reasoning_does_not_swallow_the_answer() -> None:
    reasoning, answer = parsed([OUTPUTS["mused in thought"]], thinking=True)
    assert reasoning == ("Reasoning", "use <tool_call>\n<function=write>\n<parameter=path>")
    assert answer == ("Text", "ok")


def test_an_unknown_tool_is_called_with_untyped_values() -> None:
    text = call("mystery", ("a", "1"), ("b", "one"), ("c", "[1, 2]"))
    assert parsed([text]) == [("call", "mystery", {"a": 1, "b": "one", "c": [1, 2]})]
    parser = OutputParser(False)  # not even a list of tools
    assert merged(parser.feed(text))[0][1] == "mystery"


def test_ids_differ_from_call_to_call() -> None:
    parser = OutputParser(False)
    events = parser.feed(call("f") * 50)
    ids = {event.id for event in events if isinstance(event, ToolCall)}
    assert len(ids) == 50 and all(i.startswith("call_") and len(i) == 29 for i in ids)


@pytest.mark.parametrize("end", range(len("a\n\n<tool_call>"), len(OUTPUTS["unfinished"]) + 3))
def test_an_unfinished_call_comes_back_as_text(end: int) -> None:
    text = ("a\n\n" + call("write", ("path", "a")))[:end]
    finished = text.endswith("</tool_call>")
    expected = [("Text", "a"), ("call", "write", {"path": "a"})] if finished else [("Text", text)]
    assert parsed([text]) == expected
    assert parsed(text) == expected


def test_what_is_no_call_is_text_and_a_call_behind_it_still_counts() -> None:
    assert parsed([OUTPUTS["no call"]]) == [
        ("Text", "a\n\n<tool_call>\n\nnot a call <tool_call>"),
        ("call", "now", {}),
        ("Text", "b"),
    ]
    for name in ("bad name", "tag in name", "less in name", "long name", "no name", "no parameter"):
        assert parsed([OUTPUTS[name]]) == [("Text", OUTPUTS[name])]


def test_what_is_no_key_belongs_to_the_value_before_it() -> None:
    values = {"path": "1\n</parameter>\n<parameter=\n>", "count": 2}
    assert parsed([OUTPUTS["bad key"]]) == [("call", "write", values)]


@pytest.mark.parametrize(
    "content",
    [
        CODE,
        QUOTED,
        QUOTED + "\n" + QUOTED,
        "</parameter>",
        "</parameter>\n</parameter>",
        "a\n</parameter>\nb",
        "</function>\n</tool_call>",
        "</parameter>\n</function>\nmore",
        "</parameter></function></tool_call> on one line",
        "</parameter> </function> </tool_call>",
        "<parameter=x>\n<parameter=y>",
        "<tool_call>\n<function",
        "</think>\n<think>",
        "  indented\n\n\tand tabbed  ",
        "\nlines around\n",
        "\n",
        "",
        " ",
        "a > b < c",
    ],
)
def test_a_string_is_taken_as_written_whatever_tags_it_holds(content: str) -> None:
    values = (("content", content), ("path", "p"))
    expected = ("call", "write", dict(values))
    assert parsed([call("write", *values) + "\nz"]) == [expected, ("Text", "z")]
    last = call("write", *reversed(values))
    assert parsed([last]) == [expected]


def test_a_value_on_one_line_keeps_its_line() -> None:
    assert parsed([OUTPUTS["on one line"]]) == [("call", "bare", {"n": "5"}), ("Text", "x")]
    text = "<tool_call><function=bare><parameter=n></parameter></function></tool_call>"
    assert parsed([text]) == [("call", "bare", {"n": ""})]
    text = "<tool_call>\n<function=bare>\n<parameter=n>\n5</parameter>\n</function>\n</tool_call>"
    assert parsed([text]) == [("call", "bare", {"n": "5"})]


@pytest.mark.parametrize("raw", ["null", "None", "123", "true", "[1]", '{"a": 1}', '"q"', " x "])
def test_a_string_parameter_stays_the_text(raw: str) -> None:
    assert value(raw, "path") == raw
    assert value(raw, "n", "bare") == raw


BIG = "9" * 400
TYPED: list[tuple[str, str, Any]] = [
    ("count", "42", 42),
    ("count", "-0", 0),
    ("count", " 42 ", 42),
    ("count", BIG, int(BIG)),
    ("count", "9007199254740993.0", 9007199254740993),
    ("count", "4.5", "4.5"),
    ("count", "abc", "abc"),
    ("count", "007", "007"),
    ("count", "1_000", "1_000"),
    ("count", "9" * 5000, "9" * 5000),
    ("count", "", ""),
    ("ratio", "0.25", 0.25),
    ("ratio", "3", 3),
    ("ratio", "1e-3", 0.001),
    ("ratio", "nan", "nan"),
    ("ratio", "Infinity", "Infinity"),
    ("ratio", "1e999", "1e999"),
    ("ratio", "True", "True"),
    ("deep", "true", True),
    ("deep", "True", True),
    ("deep", "False", False),
    ("deep", "false", False),
    ("deep", "1", "1"),
    ("deep", "yes", "yes"),
    ("nothing", "null", None),
    ("nothing", "None", None),
    ("nothing", "nil", "nil"),
    ("names", '["a", "b"]', ["a", "b"]),
    ("names", "['a', 'b', None, True]", ["a", "b", None, True]),
    ("names", "[1, (2, 3)]", [1, [2, 3]]),
    ("names", "[{1, 2}]", "[{1, 2}]"),
    ("names", "[NaN]", "[NaN]"),
    ("names", "[1e999]", "[1e999]"),
    ("names", "[f()]", "[f()]"),
    ("names", "[1], (2,)", "[1], (2,)"),
    ("names", "[" * 100_000, "[" * 100_000),
    ("names", "[" * 5_000, "[" * 5_000),
    ("names", "a, b", "a, b"),
    ("names", '{"a": 1}', '{"a": 1}'),
    ("options", '{"a": [1, null]}', {"a": [1, None]}),
    ("options", "{'a': False}", {"a": False}),
    ("options", "{\n  'it': \"it's\"\n}", {"it": "it's"}),
    ("options", r"{'a': '\d'}", {"a": "\\d"}),
    ("options", f'{{"n": {BIG}}}', {"n": int(BIG)}),
    ("options", "[1]", "[1]"),
    ("options", "{1, 2}", "{1, 2}"),
    ("maybe", "null", None),
    ("maybe", "None", None),
    ("maybe", "123", "123"),
    ("maybe", "text", "text"),
    ("either", "12", 12),
    ("either", "twelve", "twelve"),
    ("either", "1.5", "1.5"),
    ("one", "true", True),
    ("one", "[true]", [True]),
    ("one", "5", "5"),
    ("both", "7", 7),
    ("mode", "1", "1"),
    ("mode", "fast", "fast"),
    ("level", "1", 1),
    ("level", "high", "high"),
    ("fixed", "True", True),
    ("point", '{"x": 1}', {"x": 1}),
    ("point", "1", "1"),
    ("points", "null", None),
    ("points", '{"x": 2}', {"x": 2}),
    ("loop", "true", True),
    ("loop", "1", "1"),
    ("lost", "1", 1),
    ("foreign", "one", "one"),
    ("shape", '{"x": 1}', {"x": 1}),
    ("shape", "1", "1"),
    ("list", "[1]", [1]),
    ("old", "null", None),
    ("old", "8", 8),
    ("wide", "5.0", 5.0),
    ("wide", "5", 5),
    ("any", "5.0", 5.0),
    ("any", "null", None),
    ("any", '"quoted"', '"quoted"'),
    ("any", "0123", "0123"),
    ("true", "[1]", [1]),
    ("not in the schema", "false", False),
    ("not in the schema", "words", "words"),
]


@pytest.mark.parametrize(("key", "raw", "expected"), TYPED, ids=lambda v: str(v)[:24])
def test_the_schema_types_a_value(key: str, raw: str, expected: Any) -> None:
    found = value(raw, key)
    assert found == expected
    assert type(found) is type(expected)
    json.dumps(found, allow_nan=False)


def _nested(kind: str, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {kind: [schema]}
    return schema


@pytest.mark.parametrize("kind", ["allOf", "anyOf", "oneOf"])
@pytest.mark.parametrize("branches", [3, "text", {"a": {}}, True, "900 deep", "5000 deep"], ids=str)
def test_branches_that_say_nothing_usable_allow_every_type(kind: str, branches: Any) -> None:
    deep = str(branches).endswith("deep")
    schema = _nested(kind, int(branches.split()[0])) if deep else {kind: branches}
    parameters = {"properties": {"a": schema}}
    assert arguments.typed("7", "a", parameters) == 7
    assert arguments.typed("words", "a", parameters) == "words"


def test_many_references_to_one_another_cost_no_time() -> None:
    definitions = {
        f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}, {"$ref": f"#/$defs/D{i + 1}"}]}
        for i in range(60)
    }
    schema = {"properties": {"a": {"$ref": "#/$defs/D0"}}, "$defs": definitions}
    tools = [{"name": "f", "parameters": {**schema, "$defs": {**definitions, "D60": {}}}}]
    parser = OutputParser(False, tools)
    assert merged(parser.feed(call("f", ("a", "1")))) == [("call", "f", {"a": 1})]


SIZE = 1 << 18
LONG = {
    "text": "word " * (SIZE // 5),
    "less than": "<" * SIZE,
    "line breaks": "\n" * SIZE,
    "openers": "<tool_call>" * (SIZE // 11),
    "space in a call": "<tool_call>" + " " * SIZE,
    "one value": "<tool_call>\n<function=f>\n<parameter=a>\n" + "x" * SIZE,
    "one name": "<tool_call>\n<function=" + "x" * SIZE,
    "closers": "<tool_call>\n<function=f>\n<parameter=a>\n" + "</parameter>\n" * (SIZE // 13),
    "almost ended": "<tool_call>\n<function=f>\n<parameter=a>\n"
    + "</parameter>\n</function>\n" * (SIZE // 24),
    "keys": "<tool_call>\n<function=f>\n<parameter=a>\n"
    + "</parameter>\n<parameter=b\n" * (SIZE // 26),
    "calls": call("f", ("a", "1")) * (SIZE // 75),
}
# Measured 0.2 to 1 s on one core of a small virtual machine; work that grows with the square of
# the length takes 5 s at the least (only copying what is held for every character).
SECONDS = 4


@pytest.mark.parametrize("name", LONG)
def test_a_quarter_of_a_megabyte_takes_seconds_in_characters_and_in_one_piece(name: str) -> None:
    start = time.process_time()
    whole = parsed([LONG[name]])
    assert parsed(LONG[name]) == whole
    assert time.process_time() - start < SECONDS


def stopped(pieces: Iterable[str], stops: list[str]) -> tuple[str, bool]:
    search = StopStrings(stops)
    out, found = [], False
    for piece in pieces:
        text, found = search.feed(piece)
        out.append(text)
    return "".join([*out, search.finish()]), found


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one STOP two", ["STOP"], ("one ", True)),
        ("one STO two ST", ["STOP"], ("one STO two ST", False)),
        ("aaab", ["aab"], ("a", True)),
        ("ababac", ["abac"], ("ab", True)),
        ("x\n\nUser:", ["\n\nUser:", "\nUser"], ("x\n", True)),
        ("xabcd", ["abcd", "bc"], ("xa", True)),
        ("xabc", ["c", "abc", "bc"], ("x", True)),
        ("ab", ["b", "a"], ("", True)),
        ("nothing", [], ("nothing", False)),
        ("grüße 🙂!", ["🙂"], ("grüße ", True)),
    ],
)
def test_the_stop_that_is_complete_first_ends_the_text_however_it_is_cut(
    text: str, stops: list[str], expected: tuple[str, bool]
) -> None:
    for pieces in ([text], list(text), *two_splits(text), *random_splits(text, 3, 20)):
        assert stopped(pieces, stops) == expected, pieces


def test_stops_hold_back_only_what_may_become_one() -> None:
    search = StopStrings(["<end>", "nd of"])
    assert search.feed("the e") == ("the e", False)
    assert search.feed("nd") == ("", False)
    assert search.feed("s <en") == ("nds ", False)
    assert search.feed("t> n") == ("<ent> ", False)
    assert search.finish() == "n"
    search = StopStrings(["<end>"])
    assert search.feed("a<end>b") == ("a", True)
    assert search.feed("more") == ("", True)
    assert search.finish() == ""


def test_a_quarter_of_a_megabyte_with_stops_takes_seconds() -> None:
    start = time.process_time()
    text = "aab" * (SIZE // 3)
    assert stopped(text, ["aac", "a" * 50, "stop"]) == (text, False)
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("stops", [[""], ["a", ""], [5], "stop"])
def test_an_unusable_stop_is_one_line(stops: Any) -> None:
    with pytest.raises(InputError, match=r"^stop: found .*; expected .*\. (Remove|Write) .*\.$"):
        StopStrings(stops)
