"""The engine's findings in words, with the line of the text and the threads."""

from collections.abc import Sequence
from pathlib import Path

from . import lines
from .launch import Problem
from .runtime import CLaunch, CProblem, Memory

# In the order of the engine's `Kind`, which begins at 1.
KINDS = (
    "out of bounds",
    "out of bounds",
    "race",
    "uninitialised",
    "divergent barrier",
    "early return",
    "divergent simd",
    "absent lane",
    "misaligned",
    "shift",
    "division",
    "array bound",
    "hang",
    "crash",
    "missing return",
    "input write",
)
READ_BOUNDS, WRITE_BOUNDS, RACE, UNINITIALISED = 1, 2, 3, 4
DIVERGENT_BARRIER, EARLY_RETURN, DIVERGENT_SIMD, ABSENT = 5, 6, 7, 8
TEXTS = {
    9: "a vector at an address that is no multiple of its size",
    10: "a shift by a negative number or by all the bits or more",
    11: "a division of integers by zero",
    12: "an index outside a declared array",
    13: "stopped at the time limit",
    14: "a wild access or another fault of the processor",
    15: "a function ends without its value",
}


def problems(c: CLaunch, name: str, library: Path, memories: Sequence[Memory]) -> list[Problem]:
    """What the engine found, in the order of its finding."""
    found = []
    for p in c.problems[: c.problem_count]:
        place = lines.find(library, p.site) if p.site else lines.NOWHERE
        message = _message(c, p, name, library, memories)
        if place.file.endswith(".signature"):
            message += " (in the generated signature)"
        elif place.file not in ("", f"{name}.metal"):
            message += f" (in {place.file})"
        found.append(
            Problem(KINDS[p.kind - 1], name, p.line or place.number, message, int(p.count))
        )
    return found


def _where(p: CProblem, memories: Sequence[Memory]) -> str:
    if p.buffer == -1:
        return f"threadgroup memory, byte {p.offset} of its variable"
    if p.buffer < 0:
        return f"address {p.offset:#x}" if p.offset else "no buffer"
    m = memories[p.buffer]
    return f"{m.name}[{p.offset // m.item}] of {m.data.size // m.item} elements"


def _message(c: CLaunch, p: CProblem, name: str, library: Path, memories: Sequence[Memory]) -> str:
    thread = f"threadgroup {p.group} thread {p.thread}"
    if p.kind == READ_BOUNDS:
        return f"{thread} reads {p.size} bytes at {_where(p, memories)}"
    if p.kind == WRITE_BOUNDS:
        return f"{thread} writes {p.size} bytes at {_where(p, memories)}"
    if p.kind == UNINITIALISED:
        return f"{thread} reads {_where(p, memories)} before anything was written there"
    if p.kind == KINDS.index("input write") + 1:
        return f"{thread} writes {_where(p, memories)}, an input"
    if p.kind == RACE:
        return _race(p, name, library, memories)
    if p.kind == ABSENT:
        return f"{thread} wants the value of lane {p.other_thread}, which does not exist"
    if p.kind in (DIVERGENT_BARRIER, EARLY_RETURN, DIVERGENT_SIMD):
        there = f"is at {_line(p, name, library)}" if p.other_site else "has returned"
        return (
            f"threadgroup {p.group}: thread {p.thread} waits here, thread {p.other_thread} {there}"
        )
    return f"{TEXTS[p.kind]}; {thread}"


def _line(p: CProblem, name: str, library: Path) -> str:
    """Where the other thread was."""
    other = lines.find(library, p.other_site)
    return f"line {other.number}" + (
        f" of {other.file}" if other.file not in ("", f"{name}.metal") else ""
    )


def _race(p: CProblem, name: str, library: Path, memories: Sequence[Memory]) -> str:
    line = _line(p, name, library)
    earlier = "write" if p.other_write else "read"
    if p.other_group != p.group:
        apart = "no two threadgroups of a launch are ordered"
    elif p.other_thread // 32 != p.thread // 32:
        apart = "no threadgroup_barrier for this memory between them"
    else:
        apart = "no simdgroup_barrier for this memory between them"
    return (
        f"threadgroup {p.group} thread {p.thread} meets the {earlier} of threadgroup"
        f" {p.other_group} thread {p.other_thread} ({line}) at {_where(p, memories)};"
        f" {apart}"
    )
