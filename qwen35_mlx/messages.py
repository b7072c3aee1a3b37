"""Messages and tools in OpenAI's shape, checked, and as plain data for a chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError, one_line

ROLES = ("system", "user", "assistant", "tool")
PARTS = {
    "text": "text",
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}


@dataclass(frozen=True)
class Source:
    """A picture or clip that a message names, not opened yet."""

    is_video: bool
    value: Any  # what `image.open_image` or `video.open_video` takes
    where: str  # begins the messages of errors about it
    fps: float | None = None


def checked_messages(messages: Any) -> tuple[list[dict[str, Any]], list[Source]]:
    """`messages` as a template reads them (media parts hold their kind only, tool arguments are
    mappings), and the pictures and clips in them, in order.

    Raises: InputError naming the message and what was expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        found = "an empty list" if isinstance(messages, list | tuple) else type(messages).__name__
        raise InputError(f"messages: {found}; a list of messages was expected. Give at least one.")
    plain: list[dict[str, Any]] = []
    sources: list[Source] = []
    for index, message in enumerate(messages):
        checked, found_here = _message(message, index)
        plain.append(checked)
        sources += found_here
    if not any(message["role"] == "user" and _says_something(message) for message in plain):
        raise InputError(
            "messages: an empty prompt; a user message with text, a picture or a clip was "
            "expected. Write one."
        )
    return plain, sources


def checked_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """`tools` as given. Raises: InputError unless each is a JSON object that names a function."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise InputError(f"tools: {type(tools).__name__}; a list of functions was expected.")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(
                f"tools[{index}]: no function name; "
                '{"type": "function", "function": {"name": ..., "parameters": ...}} was expected.'
            )
        _require_json(tool, f"tools[{index}]")
    return tuple(tools)


def holder_of(
    text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> str | None:
    """The name of the first message or tool that holds `text`."""
    for name, items in (("messages", messages), ("tools", tools)):
        for index, item in enumerate(items):
            if text in json.dumps(item, ensure_ascii=False):
                return f"{name}[{index}]"
    return None


def _message(message: Any, index: int) -> tuple[dict[str, Any], list[Source]]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InputError(
            f'{where}: {type(message).__name__}; {{"role": ..., "content": ...}} was expected.'
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(
            f"{where}: role {one_line(repr(role))}; one of {', '.join(ROLES)} was expected. "
            "Correct it."
        )
    where = f"{where} ({role})"
    if role == "system" and index:
        raise InputError(f"{where}: only the first message may be the system's. Move or remove it.")
    content, sources = _content(message.get("content"), role, where)
    if sources and role == "system":
        raise InputError(
            f"{where}: a picture or clip; only text was expected. Put it in a user message."
        )
    plain: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        plain |= _assistant(message, where)
        if message.get("content") is None and len(plain) == 2:
            raise InputError(f"{where}: neither content nor tool_calls; one of them was expected.")
    elif _is_given(message.get("tool_calls")):
        raise InputError(f"{where}: tool_calls; only an assistant's message has them. Remove them.")
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            plain[key] = message[key]
    return plain, sources


def _content(content: Any, role: str, where: str) -> tuple[Any, list[Source]]:
    if content is None and role == "assistant":
        return "", []
    if isinstance(content, str):
        return _encodable(content, where), []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(
            f"{where}: content is {type(content).__name__}; text or a list of parts was expected."
        )
    plain: list[dict[str, str]] = []
    sources: list[Source] = []
    for index, part in enumerate(content):
        checked, source = _part(part, f"{where} part {index}")
        plain.append(checked)
        sources += [source] if source else []
    return plain, sources


def _part(part: Any, where: str) -> tuple[dict[str, str], Source | None]:
    if not isinstance(part, Mapping):
        raise InputError(
            f'{where}: {type(part).__name__}; {{"type": "text", "text": ...}} was expected.'
        )
    name = part.get("type", next((name for name in PARTS if name in part), None))
    kind = PARTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(
            f"{where}: type {one_line(repr(name))}; one of {', '.join(PARTS)} was expected. "
            "Correct it."
        )
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where}: text is {type(text).__name__}; a text was expected.")
        return {"type": "text", "text": _encodable(text, where)}, None
    keys = (kind, f"{kind}_url", "url", "path")
    value = next((part[key] for key in keys if _is_given(part.get(key))), None)
    if isinstance(value, Mapping):
        value = value.get("url")
    if not _is_given(value):
        raise InputError(
            f'{where}: no {kind} in it; {{"type": "{kind}", "{kind}": path}} was expected.'
        )
    return {"type": kind}, Source(kind == "video", value, where, part.get("fps"))


def _assistant(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            kind = type(reasoning).__name__
            raise InputError(f"{where}: reasoning_content is {kind}; a text was expected.")
        plain["reasoning_content"] = _encodable(reasoning, where)
    calls = message.get("tool_calls")
    if _is_given(calls):
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise InputError(f"{where}: tool_calls is {type(calls).__name__}; a list was expected.")
        plain["tool_calls"] = [
            _call(call, f"{where} tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    return plain


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: no function name; an OpenAI tool call was expected.")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: arguments are no JSON ({one_line(error)}); a JSON object was expected."
            ) from None
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise InputError(f"{where}: arguments are {kind}; a JSON object was expected.")
    arguments = dict(arguments)
    _require_json(arguments, where)
    plain = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        plain["id"] = call["id"]
    return plain


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] != "text" or part["text"].strip() for part in content)


def _is_given(value: Any) -> bool:
    """Whether `value` is there and not empty; an array has no truth value to ask."""
    return value is not None and not (isinstance(value, Sequence) and not len(value))


def _require_json(value: Any, where: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: {one_line(error)}; plain JSON was expected. Remove what is not."
        ) from None


def _encodable(text: str, where: str) -> str:
    """`text`, unless it holds half a surrogate pair: JSON can write it, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: U+{ord(text[error.start]):04X} at character {error.start}, half a surrogate "
            "pair, is no character. Remove it."
        ) from None
    return text
