"""What clang takes as C++ and Metal does not: rules on the text, and clang's warnings as errors."""

import re

from .launch import CompileError
from .text import Text
from .toolchain import MESSAGES
from .translate import body_line, masked, pieces

_SCALAR = (
    r"(?:float|half|bfloat(?:16_t)?|bool|size_t"
    r"|u?(?:char|short|int|long)|u?int(?:8|16|32|64)_t|float16_t)"
)
_VECTOR = r"(?:u?(?:char|short|int|long)|half|bfloat|float)[234]"

RULES = (
    (r"\bdouble\b", "Metal has no double"),
    (r"\blong\s+long\b", "Metal has no long long"),
    (r"\bstd::", "Metal has no std; its library is metal::"),
    (r"(?:[=(,{;?:]|\breturn)\s*\[[^\[\]]*\]\s*[({]", "Metal has no lambdas"),
    (
        r"\b(?:new|delete|try|throw|catch|goto|virtual|dynamic_cast|typeid|thread_local|asm"
        r"|noexcept|register|concept|requires|co_\w+)\b",
        "not a part of Metal's language",
    ),
    (r"\b(?:__builtin_\w+|__attribute__|emu::|emu_\w+)", "not a part of Metal"),
    (r"\b(?:printf|assert|malloc|memcpy|memset)\s*\(", "Metal has no C library"),
    (r"#\s*include\s*[<\"](?!metal)", "MLX gives the kernel no such header"),
    (rf"\(\s*(?:const\s+)?{_VECTOR}\s*\)\s*[\w(]", "a C cast of a vector: write TYPE(value)"),
    (r"\bthreadgroup\s[^;(){}&*=]*=[^=]", "a threadgroup variable cannot be initialised"),
)
IN_HEADER = (
    (
        r"(?:^|[;{}])\s*threadgroup\s+\w+\s+\w+\s*(?:\[[^;]*\])*\s*;",
        "belongs into the kernel's body",
    ),
)
IN_BODY = ((r"\bstatic\s+(?!constexpr\b)", "Metal has no static variables in a function"),)


def _unqualified(plain: str) -> list[tuple[int, str]]:
    """Pointers and references without an address space, of the types that can be told by name."""
    names = set(re.findall(r"\b(?:typename|class)\s+(\w+)", plain))
    types = "|".join([_SCALAR, _VECTOR, *sorted(re.escape(name) for name in names)])
    pattern = re.compile(
        rf"(?:[;{{}}(,]|^)\s*(?:(?:const|volatile|constexpr)\s+)*"
        rf"(?:{types})\s*(?:const\s*)?[*&]\s*(?:const\s+)?\w+\s*(?=[=;,)\[])",
        re.MULTILINE,
    )
    why = "a pointer or reference needs an address space (or `thread`)"
    return [(m.end(), why) for m in pattern.finditer(plain)]


Rules = tuple[tuple[str, str], ...]


def _faults(text: str, name: str, line: int, rules: Rules) -> list[tuple[str, int, str]]:
    """File, line and what is wrong there. name, line: where `text` begins."""
    faults = []
    for file, first, part in pieces(text, name, line):
        plain = masked(part)
        found = [
            (m.end() - 1, f"{m[0].strip()!r}: {why}")
            for rule, why in rules
            for m in re.finditer(rule, plain, re.MULTILINE)
        ]
        found += _unqualified(plain)
        faults += [(file, first + plain.count("\n", 0, at), why) for at, why in found]
    return faults


def textual(text: Text, name: str) -> None:
    """The rules on header and body; raises CompileError with the lines."""
    faults = _faults(text.header, name, 1, RULES + IN_HEADER) + _faults(
        text.body, name, body_line(text), RULES + IN_BODY
    )
    if faults:
        shown = [f"{file}.metal:{line}: {why}" for file, line, why in sorted(set(faults))]
        raise CompileError("\n".join(shown[:MESSAGES]))


WARNINGS = (
    *("-Wno-everything", "-Wuninitialized", "-Wsometimes-uninitialized", "-Wreturn-type"),
    *(
        "-Wdouble-promotion",
        "-Wimplicit-float-conversion",
        "-Wno-implicit-int-float-conversion",
        "-Warray-bounds",
        "-Wvla-extension",
    ),
    *(
        "-Wshift-count-overflow",
        "-Wshift-count-negative",
        "-Wdivision-by-zero",
        "-Winfinite-recursion",
    ),
    *("-Wpre-c++17-compat", "-Wc++20-extensions", "-Wc++23-extensions", "-Wgnu"),
)
# Of these two kinds only some matter: float becomes half by itself in Metal too, bfloat wants to
# be asked for; and a bfloat may become a float, but nothing a double.
_GRADED = re.compile(r"\[-W(?:implicit-float-conversion|double-promotion)\]$")
_GRAVE = re.compile(r"to '[^']*(?:bf16|bfloat|double)[^']*'")


def _matters(line: str) -> bool:
    return ": warning:" in line and (not _GRADED.search(line) or bool(_GRAVE.search(line)))


def judge(messages: str) -> None:
    """Raises CompileError if clang warned of something that matters."""
    faults = [line for line in messages.splitlines() if _matters(line)]
    if faults:
        raise CompileError("\n".join(faults[:MESSAGES]))
