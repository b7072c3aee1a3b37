"""The arguments of a tool call: raw text between two tags -> JSON values, by the tool's schema.

The protocol writes strings raw, lists and objects as JSON, and every other scalar as Python's
`str` does (`True`, `None`), so `123` is a string for one parameter and a number for another: only
the schema tells. What the schema allows is tried in one order (null, boolean, number, integer,
object, array) and the text itself is what remains, so a value of the wrong type stays a string
and nothing is lost. Without a schema everything is allowed, by the same order.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
_WORDS = {"true": True, "True": True, "false": False, "False": False}
# What Python's literals may cost: its parser needs far more memory than the text.
_LITERAL_LIMIT = 65_536
_TYPES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}

# None is a value here, so "this text is not of that type" needs an object of its own.
_OTHER = object()


def schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The parameter schema of each tool by its name; `tools` in OpenAI's shape or the bare one.

    A tool without a usable schema is there with an empty one: its values are untyped.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            schema = function.get("parameters")
            found[function["name"]] = schema if isinstance(schema, Mapping) else {}
    return found


def typed(raw: str, key: str, schema: Mapping[str, Any]) -> Any:
    """The value of parameter `key` written as `raw`.

    raw: the text between the tags, its one line break at each end already taken off.
    schema: the whole parameter schema of the tool (`$ref` points into it); empty = unknown.

    Returns: a JSON value. In a union the most special type that fits wins, so `null` is None
    for `["string", "null"]` and `12` an integer for `["string", "integer"]`. Integers keep all
    their digits; `5.0` is an integer where one is asked for; NaN and infinities are no numbers.
    Lists and objects are JSON, or else a Python literal (`{'a': None}`), which models write too.
    """
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    try:
        allowed = _types(own, schema, set()) or set(_READERS)
    except RecursionError:  # a schema nested this deep must not end a stream
        allowed = set(_READERS)
    text = raw.strip()
    for name, read in _READERS.items():
        if name in allowed:
            value = read(text)
            if value is not _OTHER:
                return value
    return raw


def _types(schema: Any, root: Mapping[str, Any], followed: set[str]) -> set[str] | None:
    """Names of the JSON types that `schema` allows; None where it does not say.

    `followed` holds the references already taken: a second visit adds nothing to a union, which
    also ends cycles and keeps the work linear in the schema.
    """
    if not isinstance(schema, Mapping):
        return None
    found: set[str] | None = None
    reference, declared = schema.get("$ref"), schema.get("type")
    if isinstance(reference, str):
        if reference in followed:
            return set()
        followed.add(reference)
        found = _types(_pointed(root, reference), root, followed)
    elif isinstance(declared, str):
        found = {declared}
    elif isinstance(declared, list):
        found = {name for name in declared if isinstance(name, str)}
    elif "const" in schema:
        found = {_type_of(schema["const"])}
    elif isinstance(schema.get("enum"), list):
        found = {_type_of(value) for value in schema["enum"]}
    elif branches := schema.get("anyOf") or schema.get("oneOf"):
        found = _union(branches, root, followed)
    elif branches := schema.get("allOf"):
        listed = branches if isinstance(branches, list) else ()
        known = (_types(branch, root, followed) for branch in listed)
        found = next((names for names in known if names), None)
    elif "properties" in schema or "items" in schema:
        found = {"object" if "properties" in schema else "array"}
    if found is not None and schema.get("nullable") is True:
        found = found | {"null"}
    return found


def _union(branches: Any, root: Mapping[str, Any], followed: set[str]) -> set[str] | None:
    found: set[str] = set()
    for branch in branches if isinstance(branches, list) else ():
        names = _types(branch, root, followed)
        if names is None:
            return None
        found |= names
    return found


def _pointed(root: Mapping[str, Any], reference: str) -> Any:
    """What `#/$defs/Name` (a JSON pointer into `root`) points at; None if nothing is there."""
    at: Any = root
    head, *steps = reference.split("/")
    if head != "#":
        return None
    for step in steps:
        at = at.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(at, Mapping) else None
    return at


def _type_of(value: Any) -> str:
    return _TYPES.get(type(value), "string")


def _null(text: str) -> Any:
    return None if text in ("null", "None") else _OTHER


def _boolean(text: str) -> Any:
    return _WORDS.get(text, _OTHER)


def _number(text: str) -> Any:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return _OTHER
    if match[1] is None and match[2] is None:
        return _integer(text)
    value = float(text)
    return value if math.isfinite(value) else _OTHER


def _integer(text: str) -> Any:
    match = _INTEGER.fullmatch(text)
    try:
        return int(match[1]) if match else _OTHER
    except ValueError:  # more digits than Python converts (its guard against quadratic work)
        return _OTHER


def _object(text: str) -> Any:
    return _container(text) if text.startswith("{") else _OTHER


def _array(text: str) -> Any:
    return _container(text) if text.startswith("[") else _OTHER


def _container(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError):
        if len(text) > _LITERAL_LIMIT:
            return _OTHER
    try:
        with warnings.catch_warnings():  # '\d' in a literal is the model's business
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
        if not isinstance(value, dict | list):  # a set, or several lists with commas between
            return _OTHER
        # Back through JSON: tuples become lists, keys strings; sets and bytes are refused.
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _OTHER


def _refused(word: str) -> Any:
    raise ValueError(word)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_READERS: dict[str, Callable[[str], Any]] = {
    "null": _null,
    "boolean": _boolean,
    # Before integer: where both are allowed 5.0 is a float and 5 an integer.
    "number": _number,
    "integer": _integer,
    "object": _object,
    "array": _array,
}
