"""A jinja2 environment in which any template ends soon, stays small and reaches nothing.

A chat template comes with the weights, so it is as trustworthy as whoever uploaded them. jinja2's
sandbox keeps a template from Python's internals, but not from a machine's time and memory: two
nested `range` loops or one `'a' * 10**10` suffice. Here every template is a closed world: a fixed
list of tags, filters and methods, each of which draws on a budget of steps before it works.
"""

import json
import re
from collections.abc import Callable, Iterator, Sized
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context

from .budget import Budget, Meter, MeteredContext

INTEGER_BITS = 512
MAX_WIDTH = 64  # of an indentation or a separator
CALL_STEPS = 6

TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace
    rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(TEXT_METHODS.split()),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
# What a filter or test costs before it runs: a step (ONE), reading its arguments once for each item
# of its value (ITEMS), reading all of its value and arguments (ALL), or the last two (BOTH).
ONE, ITEMS, ALL, BOTH = "one", "items", "all", "both"
FILTER_COSTS = {
    ONE: "default d length count first last",
    ITEMS: "items list map reject rejectattr reverse select selectattr",
    ALL: "abs capitalize e escape float lower string title trim truncate upper wordcount",
    BOTH: "dictsort max min sort unique",
}
TEST_COSTS = {
    ONE: """boolean callable defined divisibleby even false float integer iterable mapping none
        number odd sameas sequence string true undefined""",
    ALL: "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper",
}


class Refused(TemplateRuntimeError):
    """The template called `raise_exception`: the message is for whoever wrote the messages."""


class _Names(Namespace):
    """`namespace()` for templates: no underscored names, and no repr that walks what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"it stores {name!r} on a namespace")


class _Generation(Extension):
    """`{% generation %}` marks what a training loss counts; for rendering it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _text(context: MeteredContext, value: Any) -> str:
    context.budget.walk(value)
    return value if type(value) is str else str(value)


@pass_context
def _walked(context: MeteredContext, value: Any) -> Any:
    context.budget.walk(value)
    return value


@pass_context
def _tick(context: MeteredContext, steps: int) -> bool:
    context.budget.spend(max(steps, 0))  # `map` reaches filters by name, so this one too
    return True


@pass_context
def _at_message(context: MeteredContext, message: Any, steps: int) -> None:
    context.budget.message = message
    context.budget.spend(max(steps, 0))


@pass_context
def _sliced(context: MeteredContext, value: Any) -> Any:
    context.budget.shallow(value)
    return value


@pass_context
def _concat(context: MeteredContext, parts: list[Any]) -> str:
    texts = [_text(context, part) for part in parts]
    context.budget.text(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _join(context: MeteredContext, value: Any, d: Any = "", attribute: str | None = None) -> str:
    if attribute is not None:
        named = {"attribute": attribute}
        value = context.environment.call_filter("map", value, kwargs=named, context=context)
    between = _text(context, d)
    texts = [_text(context, part) for part in value]
    context.budget.text(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


@pass_context
def _replace(context: MeteredContext, value: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = _text(context, value), _text(context, old), _text(context, new)
    found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    context.budget.text(len(text) + found * len(new))
    return text.replace(old, new, found)


@pass_context
def _indent(
    context: MeteredContext, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    text = _text(context, value)
    if (len(width) if isinstance(width, str) else int(width)) > MAX_WIDTH:
        raise TemplateRuntimeError(f"it indents by more than {MAX_WIDTH} characters")
    context.budget.text((1 + len(text.splitlines())) * MAX_WIDTH)
    return str(FILTERS["indent"](text, width, first, blank))


@pass_context
def _tojson(
    context: MeteredContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it for templates: no HTML escapes, Python's order and spaces."""
    context.budget.walk(value)
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_WIDTH):
        raise TemplateRuntimeError(f"it indents JSON by more than {MAX_WIDTH} characters")
    if separators is not None and max(map(len, separators)) > MAX_WIDTH:
        raise TemplateRuntimeError(f"it separates JSON by more than {MAX_WIDTH} characters")
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=separators,
        sort_keys=bool(sort_keys),
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    chunks = []
    for chunk in encoder.iterencode(value):  # indentation grows with the depth: pay as it comes
        context.budget.text(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


@pass_context
def _format(context: MeteredContext, value: Any, *args: Any, **kwargs: Any) -> str:
    return _percent(context, _text(context, value), kwargs or args)


def _percent(context: MeteredContext, pattern: str, values: Any) -> str:
    if "*" in pattern or re.search(r"[0-9]{3}", pattern):
        raise TemplateRuntimeError("it formats to a width of 100 or more")
    context.budget.text(len(pattern))
    before = context.budget.left
    context.budget.walk(values)
    # each of the pattern's fields can at most repeat all values
    context.budget.spend(pattern.count("%") * (before - context.budget.left + 100))
    return pattern % values


@pass_context
def _int(context: MeteredContext, value: Any, default: int = 0) -> int:
    context.budget.walk(value)
    return int(FILTERS["int"](value, default))


@pass_context
def _safe(context: MeteredContext, value: Any) -> str:
    # nothing is escaped here, so marking a text as safe changes nothing
    return _text(context, value)


OWN_FILTERS = {
    "format": _format,
    "indent": _indent,
    "int": _int,
    "join": _join,
    "replace": _replace,
    "safe": _safe,
    "tojson": _tojson,
    # written into the template by `Meter`
    "@concat": _concat,
    "@message": _at_message,
    "@sliced": _sliced,
    "@tick": _tick,
    "@walked": _walked,
}


def _paid(function: Callable[..., Any], cost: str) -> Callable[..., Any]:
    """jinja2's filter or test `function`, paid before it runs, never lazy."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @pass_context
    def paid(context: MeteredContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context.budget
        budget.spend(1)
        if cost != ONE:
            before = budget.left
            budget.walk((args, kwargs))
            if cost != ALL and isinstance(value, Sized):
                budget.spend(len(value) * (before - budget.left))
        if cost in (ALL, BOTH):
            budget.walk(value)
        lead = {
            "context": context,
            "environment": context.environment,
            "eval_context": context.eval_ctx,
        }.get(passed)
        result = function(*([] if lead is None else [lead]), value, *args, **kwargs)
        if isinstance(result, Iterator):
            return list(result)
        return str(result) if isinstance(result, str) else result

    return paid


def _paid_all(functions: dict[str, Any], costs: dict[str, str]) -> dict[str, Any]:
    return {n: _paid(functions[n], cost) for cost, names in costs.items() for n in names.split()}


def _strftime_now(pattern: str) -> str:
    # a width ("%9999999d") is a glibc extension that allocates as much
    if len(pattern) > MAX_WIDTH or not re.fullmatch(r"(%[a-zA-Z%]|[^%])*", pattern):
        raise TemplateRuntimeError(f"it formats the time as {pattern!r}")
    return datetime.now().strftime(pattern)


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates run in: transformers', metered, with fewer filters.

    Source: transformers `utils/chat_template_utils.py`: trimmed blocks, `tojson`, loop controls.
    """

    context_class = MeteredContext
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # Not optimized: jinja2 would compute constants while compiling, before there is a budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_walked,
            extensions=[loopcontrols, _Generation],
        )
        self.filters = {**_paid_all(FILTERS, FILTER_COSTS), **OWN_FILTERS}
        self.tests = _paid_all(TESTS, TEST_COSTS)
        self.globals = {
            "range": self.globals["range"],
            "dict": _dict,
            "namespace": _Names,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        metered: nodes.Template = Meter().visit(super()._parse(source, name, filename))
        metered.set_environment(self)
        return metered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only the listed methods, what a namespace holds, and what `loop` tells."""
        for kind, methods in METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        known = isinstance(obj, Namespace | LoopContext)
        return known and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """A key called like a refused method is still a key; all else ends the rendering.

        jinja2 would print nothing for it, so a template's attempt would go unseen.
        """
        if isinstance(obj, dict) and attribute in obj and not attribute.startswith("_"):
            return obj[attribute]
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is not among the methods, so it is refused like any other."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`; no data has tuples as keys, and hashing a nested one may never end."""
        if isinstance(argument, tuple):
            return self.undefined(obj=obj, name=str(type(argument)))
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a macro, a global or a listed method, paid before it runs."""
        budget, owner = __context.budget, getattr(__obj, "__self__", None)
        budget.spend(CALL_STEPS)
        if not isinstance(__obj, Macro):
            budget.walk(args)
            budget.walk([v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")])
        if isinstance(owner, str):
            if __obj.__name__ == "replace":
                return _replace(__context, owner, *args)
            if __obj.__name__ == "join":
                return _join(__context, args[0] if args else (), owner)
            budget.text(len(owner))
            if "split" in __obj.__name__:
                separator = args[0] if args and isinstance(args[0], str) else ""
                budget.spend(owner.count(separator) if separator else len(owner) // 2)
        elif isinstance(owner, list | tuple):
            budget.walk(owner)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, once the result is known to be small."""
        budget = context.budget
        if operator == "%" and isinstance(left, str):
            return _percent(context, left, right)
        budget.shallow(left)
        budget.shallow(right)
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        return self.binop_table[operator](left, right)


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        return _check_bits(left.bit_length() + right.bit_length())
    sized, times = (left, right) if isinstance(left, Sized) else (right, left)
    if isinstance(sized, Sized) and isinstance(times, int):
        budget.spend(max(times, 0) * max(len(sized), 1))
    return None


def _check_bits(bits: int) -> None:
    if bits > INTEGER_BITS:
        raise TemplateRuntimeError(f"it computes an integer of more than {INTEGER_BITS} bits")
