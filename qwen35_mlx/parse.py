"""The model's output as events: reasoning, answer, tool calls; and the search for stop strings.

The protocol, as the family's chat template writes it:

    <think>\nREASONING\n</think>\n\nANSWER\n\n<tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Text arrives in pieces of any length and leaves as soon as it is certain: what is held back is a
tag that has only begun, up to two line breaks (they belong to a tag that may follow), and a tool
call until it is complete. Where the pieces are cut changes nothing. Work is linear in the text.
"""

import re
import secrets
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from . import arguments
from .errors import InputError


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One complete call; `arguments` are JSON values, `id` is new and random for each call.

    Random, because ids must also differ between the turns of a conversation.
    """

    name: str
    arguments: dict[str, Any]
    id: str


Event = Text | Reasoning | ToolCall

_TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
)
_TAG = re.compile("|".join(_TAGS))
_LONGEST_TAG = max(map(len, _TAGS))
# Names of functions and parameters; what is longer or has a line break or `<` in it is none.
_LONGEST_NAME = 512
# The template writes at most two line breaks before a tag.
_LINE_BREAKS = 2


class OutputParser:
    """Splits one output into events, piece by piece.

    thinking: the prompt ends inside an open `<think>`, so the output starts with reasoning. A
        `<think>` at the very start of the output is dropped or opens reasoning itself.
    tools: the tools of the prompt, as given there; their schemas type the arguments.

    Line breaks: one before `</think>`, all after it, up to two before a `<tool_call>` and all
    after a call are the protocol's and in no event.

    Calls: `<tool_call>` opens one only with `<function=NAME>` right behind it; otherwise it is
    text at once. A call of a tool that is not in the list is a call all the same. A call inside
    reasoning ends the reasoning if the list has a tool of that name: the models at times forget
    `</think>`. A call that is not complete when the output ends comes back as the text it was.

    Values: `</parameter>` ends one only if a `<parameter=KEY>`, or `</function>` and
    `</tool_call>`, stands on a following line with nothing but white space between (on the same
    line too if the value itself began there). A whole call quoted in a value, from
    `<tool_call>` `<function=` to `</function>` `</tool_call>`, belongs to the value. Every other
    tag inside a value is text. One line break at each end is the protocol's.
    """

    def __init__(self, thinking: bool, tools: Sequence[dict[str, Any]] = ()) -> None:
        self._schemas = arguments.schemas(tools)
        self._inside: type[Text] | type[Reasoning] = Reasoning if thinking else Text
        self._thinking = thinking  # a `<think>` is open, also if a call has ended the reasoning
        self._at_start = True
        self._skip_breaks = 0  # line breaks to drop before the next text; -1 = all
        self._breaks = ""  # line breaks at the end of the text, to drop if a tag follows
        self._held = ""  # the beginning of what may become a tag
        self._call: _Call | None = None
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """The events that `text`, the next piece of the output, makes certain."""
        data = self._held + text
        if data and "<" not in data:
            self._token(data)
            return self._taken()
        # Only the last `<` can begin an unfinished tag: no tag has a second one inside.
        begin = data.rfind("<", max(0, len(data) - _LONGEST_TAG + 1))
        tail = data[begin:] if begin >= 0 else ""
        if not tail or tail in _TAGS or not any(tag.startswith(tail) for tag in _TAGS):
            begin = len(data)
        self._held = data[begin:]
        at = 0
        for tag in _TAG.finditer(data, 0, begin):
            if at < tag.start():
                self._token(data[at : tag.start()])
            self._token(tag[0])
            at = tag.end()
        if at < begin:
            self._token(data[at:begin])
        return self._taken()

    def finish(self) -> list[Event]:
        """The events of what was held back; call it once, when the output has ended."""
        held, self._held = self._held, ""
        if held:
            self._token(held)
        if self._call is not None:
            self._give_back(self._call)
        self._say("", last=True)
        return self._taken()

    def _taken(self) -> list[Event]:
        """The collected events, neighbours of one kind joined."""
        events, self._events = self._events, []
        if len(events) < 2:
            return events
        joined: list[Event] = []
        for kind, group in groupby(events, type):
            if kind is ToolCall:
                joined.extend(group)
            else:
                joined.append(kind("".join(e.text for e in group if not isinstance(e, ToolCall))))
        return joined

    def _token(self, token: str) -> None:
        """Takes one whole tag, or text between two tags."""
        if self._call is not None:
            self._continue(self._call, token)
            return
        at_start, self._at_start = self._at_start, False
        if token == "<think>" and at_start:
            self._inside, self._thinking = Reasoning, True
            self._skip_breaks = 1
        elif token == "</think>" and self._thinking:
            self._breaks = self._breaks[1:] if self._inside is Reasoning else ""
            self._say("", last=True)
            self._inside, self._thinking = Text, False
            self._skip_breaks = -1
        elif token == "<tool_call>":
            known = self._schemas if self._inside is Reasoning else None
            self._call = _Call(self._breaks + token, known)
            self._breaks = ""
        else:
            self._say(token)

    def _continue(self, call: "_Call", token: str) -> None:
        call.take(token)
        if call.state == "complete":
            self._call = None
            schema = self._schemas.get(call.name, {})
            values = {key: arguments.typed(raw, key, schema) for key, raw in call.values.items()}
            self._events.append(ToolCall(call.name, values, f"call_{secrets.token_hex(12)}"))
            self._inside = Text
            self._skip_breaks = -1
        elif call.state == "no call" or (token == "</think>" and self._inside is Reasoning):
            # The last token may itself open something, so it is looked at again.
            del call.tokens[-1]
            self._give_back(call)
            self._token(token)

    def _give_back(self, call: "_Call") -> None:
        self._call = None
        for token in call.tokens:
            self._say(token)

    def _say(self, text: str, last: bool = False) -> None:
        """Emits `text`, but holds its last line breaks unless nothing can follow them."""
        if self._skip_breaks and text:
            text = text.lstrip("\n") if self._skip_breaks < 0 else text.removeprefix("\n")
            self._skip_breaks = 0 if text or self._skip_breaks > 0 else -1
        text, self._breaks = self._breaks + text, ""
        end = len(text)
        if text.endswith("\n") and not last:
            end -= min(_LINE_BREAKS, end - len(text.rstrip("\n")))
            self._breaks = text[end:]
        if end:
            self._events.append(self._inside(text[:end]))


class _Call:
    """A tool call that is being read, token by token.

    tokens: everything taken, for the case that it is no call after all.
    known: the names it may have; None = any.
    state: what is expected next: "function", "name", "parameter", "key", "value" (its text or
        its end), "next" (after `</parameter>`), "end" (after `</function>`); or the outcome,
        "complete" or "no call".
    """

    def __init__(self, opening: str, known: Container[str] | None) -> None:
        self.tokens = [opening]
        self.state = "function"
        self.name = ""
        self.values: dict[str, str] = {}
        self._known = known
        self._label = ""  # of a name or key that is not closed yet
        self._key: str | None = None  # of the value being read
        self._value: list[str] = []  # its tokens, and those that may turn out to follow it
        self._length = 0  # how many of them are the value if it ends here
        self._same_line = False  # since `</parameter>`
        self._before = ""  # the token before this one, white space not counted
        self._quoted = 0  # calls opened inside the value

    def take(self, token: str) -> None:
        self.tokens.append(token)
        self._step(token)

    def _step(self, token: str) -> None:
        if self._key is not None:
            self._value.append(token)
        blank = token.isspace()
        if self.state in ("name", "key"):
            self._read_label(token)
        elif self.state == "value":
            self._read_value(token)
        elif blank:
            self._same_line = self._same_line and "\n" not in token
        elif self.state == "function" and token == "<function=":
            self.state = "name"
        elif token == "<parameter=" and self._may_follow():
            self.state = "key"
        elif token == "</function>" and self._may_follow():
            self.state = "end"
        elif self.state == "end" and token == "</tool_call>":
            self._keep_value()
            self.state = "complete"
        else:
            self._no_end(token)
        if not blank:
            self._before = token

    def _may_follow(self) -> bool:
        return self.state == "parameter" or (self.state == "next" and not self._same_line)

    def _read_label(self, token: str) -> None:
        head, closed, rest = token.partition(">")
        self._label += head
        label = self._label.strip()
        bad = "<" in head or "\n" in self._label
        if bad or len(self._label) > _LONGEST_NAME or (closed and not label):
            self._no_end(token)
            return
        if not closed:
            return
        self._label = ""
        if self.state == "key":
            self._keep_value()
            self._key, self._value = label, []
            self.state = "value"
        elif self._known is not None and label not in self._known:
            self.state = "no call"
            return
        else:
            self.name = label
            self.state = "parameter"
        if rest:
            self._step(rest)

    def _read_value(self, token: str) -> None:
        if token == "<function=" and self._before == "<tool_call>":
            self._quoted += 1
        elif token == "</tool_call>" and self._before == "</function>" and self._quoted:
            self._quoted -= 1
        elif token == "</parameter>" and not self._quoted:
            self.state = "next"
            self._length = len(self._value) - 1
            self._same_line = self._value[0].startswith("\n")

    def _no_end(self, token: str) -> None:
        """What looked like the end of a value goes on; without a value this is no call."""
        self._label = ""
        if self._key is None:
            self.state = "no call"
        else:
            self.state = "value"
            self._read_value(token)

    def _keep_value(self) -> None:
        if self._key is not None:
            raw = "".join(self._value[: self._length])
            self.values[self._key] = raw.removeprefix("\n").removesuffix("\n")


class StopStrings:
    """Finds the first stop string in an output that arrives in pieces.

    stops: strings that end the output; none of them empty.

    The stop that is complete first wins (of two that end together, the longer one): that is
    known at once, while "begins first" would wait for text that may never come.

    Raises: InputError for an empty stop string, or a string in place of the list.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise InputError(
                f"stop: found the string {stops!r}; expected a list. Write [{stops!r}]."
            )
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InputError(
                    f"stop: found {stop!r}; expected strings of one character or more. Remove it."
                )
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is certain to stand before any stop, and whether one was found.

        After a stop nothing more comes out.
        """
        if self._stopped:
            return "", True
        data, self._held = self._held + text, ""
        found = [(at + len(s), at) for s in self._stops if (at := data.find(s)) >= 0]
        if found:
            self._stopped = True
            return data[: min(found)[1]], True
        for at in range(max(0, len(data) - self._longest + 1), len(data)):
            tail = data[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                self._held = tail
                return data[:at], False
        return data, False

    def finish(self) -> str:
        """What was held back as the possible beginning of a stop; the output has ended."""
        held, self._held = self._held, ""
        return held
