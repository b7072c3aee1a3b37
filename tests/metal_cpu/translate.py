"""Turns MLX's Metal text into a C++ unit that clang compiles, line for line.

Only what C++ cannot say is rewritten, and no line moves: threadgroup variables become references
into the engine's arena, `h` and `bf` suffixes become conversions, vector casts become calls.
`#line` makes clang speak of the lines of `metal/NAME.metal`; where the text has such directives
itself, of what they say.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .launch import CompileError
from .text import Text
from .toolchain import folder

HERE = Path(__file__).parent
# MLX's headers that the shim replaces: a type with address spaces on its members, and logging.
REPLACED = ("complex.h", "logging.h")
# Lines of metal/NAME.metal between header and body.
DIVIDER = 1


def masked(text: str) -> str:
    """`text` with comments and strings blanked out, every other character in its place."""
    pattern = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
    return pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


@cache
def preamble() -> str:
    """What MLX puts before every kernel, assembled from its own headers."""
    spec = find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        raise CompileError("mlx is not installed")
    include = Path(next(iter(spec.submodule_search_locations))) / "include"
    seen: set[str] = set()

    def inline(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        if Path(name).name in REPLACED:
            return "#include <complex.h>\n" if name.endswith("complex.h") else ""
        text = (include / name).read_text(encoding="utf-8")
        text = re.sub(r"#include <metal[^>]*>|#pragma once", "", text)
        # C++ takes no address space on an array parameter, which is a pointer anyway.
        text = re.sub(r"(constant const int64_t) (\w+)\[\d\]", r"\1* \2", text)
        return re.sub(r'#include "([^"]+)"', lambda m: inline(m[1]), text)

    return inline("mlx/backend/metal/kernels/utils.h")


@cache
def includes() -> tuple[str, str]:
    """The folder that holds the preamble, and a hash-worthy text of all that a unit includes."""
    own = "".join(path.read_text() for path in sorted((HERE / "msl").glob("*.h")))
    path = folder() / "preamble.h"
    text = preamble()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        scratch = folder() / f"preamble.{id(text)}.tmp"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    return str(folder()), own + text


_VARIABLE = re.compile(
    r"(?m:(?<=[;{}])|^)(?P<space>\s*)"
    r"threadgroup\s+(?:alignas\s*\(\s*\d+\s*\)\s*)?"
    r"(?P<type>(?:unsigned\s+)?[A-Za-z_][\w:]*(?:\s*<[^;=(){}]*>)?)\s+"
    r"(?P<names>[A-Za-z_]\w*(?:\s*\[[^;={}]*\]|\s*,\s*[A-Za-z_]\w*)*)\s*;"
)
_NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*((?:\[[^;]*\]\s*)*)$")


def threadgroup_variables(body: str) -> str:
    """`threadgroup T a[N];` as a reference into the arena; the same number of lines."""
    plain = masked(body)
    result: list[str] = []
    done = index = 0
    for found in _VARIABLE.finditer(plain):
        made = []
        for part in _split_names(found["names"]):
            name = _NAME.match(part)
            if name is None:
                raise CompileError(f"cannot read the threadgroup variable {part.strip()!r}")
            variable = f"::emu::variable<{found['type']} {name[2].strip()}, {index}>()"
            made.append(f"auto& {name[1]} = {variable};")
            index += 1
        inside = found[0].count("\n") - found["space"].count("\n")
        result += [body[done : found.end("space")], " ".join(made), "\n" * inside]
        done = found.end()
    return "".join(result) + body[done:]


def _split_names(names: str) -> list[str]:
    """`a[N<1, 2>], b` at its outer commas."""
    parts, depth, current = [], 0, ""
    for char in names:
        depth += char in "[<("
        depth -= char in "]>)"
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current]


_LITERAL = re.compile(
    r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(h|H|bf|BF|)(?![\w.])"
)
_VECTOR_CALL = re.compile(r"\b(?:metal::)?vec\s*<([^<>;(){}]*)>\s*\(")
_STATIC_CAST = re.compile(r"\bstatic_cast\s*<")
_SUFFIXES = {"": "{}f", "h": "half({}f)", "bf": "bfloat({}f)"}


def _expressions(text: str) -> str:
    """What is the same in header and body: literals (plain ones are float) and vector casts."""
    text = _LITERAL.sub(lambda m: _SUFFIXES[m[2].lower()].format(m[1]), text)
    text = _VECTOR_CALL.sub(r"::emu::make<::metal::vec<\1>>(", text)
    return _STATIC_CAST.sub("::emu::cast<", text)


_PLACED = re.compile(r'^#line (\d+) "(\w+)\.metal"\n', re.MULTILINE)


def pieces(text: str, name: str, line: int) -> list[tuple[str, int, str]]:
    """Kernel or helper, first line and text of each file that `text` was put together from.

    name, line: of what comes before the first `#line`.
    """
    cuts = list(_PLACED.finditer(text))
    starts = [(name, line, 0), *((cut[2], int(cut[1]), cut.end()) for cut in cuts)]
    ends = [*(cut.start() for cut in cuts), len(text)]
    found = zip(starts, ends, strict=True)
    return [(file, first, text[start:end]) for (file, first, start), end in found if start < end]


def body_line(text: Text) -> int:
    """The line of `metal/NAME.metal` on which the body begins; 1 for a kernel without a header.

    Where it begins with a `#line` of its own, the line that this would be.
    """
    placed = _PLACED.match(text.body)
    if placed:
        return int(placed[1]) - 1
    return text.header.count("\n") + 2 + DIVIDER if text.header else 1


def unit(text: Text, name: str) -> str:
    """What follows PREFIX: the kernel, and the entry that calls it."""
    body = threadgroup_variables(text.body)
    return "\n".join(
        [
            f'#line 1 "{name}.metal"',
            _expressions(text.header),
            f'#line 1 "{name}.signature"',
            text.signature.rstrip(),
            f'#line {body_line(text)} "{name}.metal"',
            _expressions(body),
            f'#line 1 "{name}.entry"',
            "}",
            entry(text),
        ]
    )


PARTS = (
    "types",
    "limits",
    "math",
    "common",
    "simd",
    "matrix",
    "atomic",
    "entry",
    "preamble",
    "text",
)
# What every unit begins with: the shim and MLX's preamble.
PREFIX = "".join(f"#include <{part}.h>\n" for part in PARTS)


def entry(text: Text) -> str:
    """The function that the engine calls for every thread."""
    passed = []
    for argument in text.arguments:
        if argument.attribute.startswith("buffer("):
            place = f"b[{argument.attribute[7:-1]}]"
            if argument.type.endswith("&"):
                passed.append(f"*({argument.type[:-1]}*){place}")
            else:
                passed.append(f"({argument.type}){place}")
        else:
            passed.append(f"::emu::attribute(t->{argument.attribute})")
    return (
        'extern "C" __attribute__((no_sanitize("thread", "undefined"), nodebug))\n'
        "void emu_entry(void** b, const Attributes* t) {\n"
        f"  {text.function}({', '.join(passed)});\n}}\n"
    )
