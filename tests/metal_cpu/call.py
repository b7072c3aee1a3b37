"""One call: arrays to memory, the launch, memory to arrays, and what was found."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from . import report
from .arrays import array_of, memories
from .compiled import Compiled
from .launch import BufferTraffic, Launch, Problem, Traffic
from .runtime import SLOT, CBuffer, CLaunch, Memory, placed

if TYPE_CHECKING:
    from .backend import Mode

LARGEST_THREADGROUP = 1024
THREADGROUP_MEMORY = 32768
# After these the engine runs no further thread.
STOPPING = {
    *(
        "out of bounds",
        "divergent barrier",
        "early return",
        "divergent simd",
        "misaligned",
        "shift",
    ),
    *("division", "array bound", "hang", "crash", "missing return", "input write"),
}


def _limits(name: str, group: Sequence[int], grid: Sequence[int]) -> list[Problem]:
    threads = math.prod(group)
    if threads > LARGEST_THREADGROUP:
        what = f"a threadgroup of {threads} threads; at most {LARGEST_THREADGROUP}"
        return [Problem("threads", name, 0, what)]
    if min(*grid, *group) < 1:
        return [Problem("threads", name, 0, f"grid {tuple(grid)}, threadgroup {tuple(group)}")]
    return []


def execute(
    compiled: Compiled,
    name: str,
    names: Sequence[str],
    arrays: Sequence[mx.array],
    options: dict[str, Any],
    mode: "Mode",
) -> tuple[Launch, list[mx.array]]:
    """Runs one launch; returns what was seen and the outputs."""
    given = memories(compiled.text, names, arrays, options)
    x, y, z = options["grid"]
    grid = (x, y, z)
    group = tuple(min(a, b) for a, b in zip(options["threadgroup"], grid, strict=True))
    c = CLaunch(grid=grid, group=group)
    mode.schedule.apply(c)
    problems = _limits(name, group, grid)
    traffic: dict[str, BufferTraffic] = {}
    if not problems:
        traffic = (_run_checked if mode.checked else _run_plain)(compiled, c, given, mode)
        problems = report.problems(c, name, compiled.loaded.library, given)
        problems += _after(name, given, traffic, problems) if mode.checked else []
    if c.arena_bytes > THREADGROUP_MEMORY:
        what = f"{c.arena_bytes} bytes of threadgroup memory; at most {THREADGROUP_MEMORY}"
        problems.append(Problem("threadgroup memory", name, 0, what))
    outputs = [m for m in given if m.output]
    kinds = zip(outputs, options["output_shapes"], options["output_dtypes"], strict=True)
    result = [array_of(m.data, shape, dtype) for m, shape, dtype in kinds]
    return _launch(c, name, compiled.text.whole, problems, traffic), result


def _launch(
    c: CLaunch,
    name: str,
    text: str,
    problems: list[Problem],
    traffic: dict[str, BufferTraffic],
) -> Launch:
    return Launch(
        name=name,
        grid=(c.grid[0], c.grid[1], c.grid[2]),
        threadgroup=(c.group[0], c.group[1], c.group[2]),
        text=text,
        problems=problems,
        read=sum((b.read for b in traffic.values()), Traffic()),
        written=sum((b.written for b in traffic.values()), Traffic()),
        buffers=traffic,
        threads=c.threads,
        barriers=c.barriers,
        simdgroup_barriers=c.simd_barriers,
        reductions=c.reductions,
        shuffles=c.shuffles,
        matrix_ops=c.matrix_ops,
        threadgroup_bytes=c.arena_bytes,
    )


def _run_plain(
    compiled: Compiled, c: CLaunch, given: list[Memory], mode: "Mode"
) -> dict[str, BufferTraffic]:
    """A launch on the arrays where they lie; nothing is counted."""
    arguments = (ctypes.c_void_p * len(given))(*(m.data.ctypes.data for m in given))
    c.arguments = ctypes.addressof(arguments)
    compiled.loaded.run(c, mode.limit)
    return {}


LINE = 64


@dataclass(frozen=True, eq=False)
class _Watch:
    """What the engine counts into, per buffer."""

    touched: np.ndarray
    read_line: np.ndarray
    write_line: np.ndarray


def _run_checked(
    compiled: Compiled, c: CLaunch, given: list[Memory], mode: "Mode"
) -> dict[str, BufferTraffic]:
    """A launch in which every buffer lies in a guarded slot and every access is looked at."""
    watches = [
        _Watch(
            np.zeros(m.data.size + LINE, np.uint8),
            np.zeros(m.data.size // LINE + 2, np.uint64),
            np.zeros(m.data.size // LINE + 2, np.uint64),
        )
        for m in given
    ]
    buffers = (CBuffer * len(given))()
    with placed(given) as base:
        for i, (m, w) in enumerate(zip(given, watches, strict=True)):
            buffers[i] = CBuffer(
                base=base + i * SLOT,
                size=m.data.size,
                touched=w.touched.ctypes.data,
                read_line=w.read_line.ctypes.data,
                write_line=w.write_line.ctypes.data,
                cells=m.output,
                item=m.item,
                initialised=m.initialised,
            )
        arguments = (ctypes.c_void_p * len(given))(*(b.base for b in buffers))
        c.arguments = ctypes.addressof(arguments)
        c.buffers, c.buffer_count = ctypes.addressof(buffers), len(given)
        c.slots = base
        compiled.loaded.run(c, mode.limit)
    return {
        m.name: _traffic(m, b, w)
        for m, b, w in zip(given, buffers, watches, strict=True)
        if m.counted
    }


def _traffic(m: Memory, b: CBuffer, w: _Watch) -> BufferTraffic:
    touched = w.touched[: m.data.size]
    return BufferTraffic(
        Traffic(b.read, b.lines_read * LINE, int(np.count_nonzero(touched & 1))),
        Traffic(b.written, b.lines_written * LINE, int(np.count_nonzero(touched & 2))),
        touched,
    )


def _after(
    name: str,
    given: Sequence[Memory],
    traffic: dict[str, BufferTraffic],
    seen: Sequence[Problem],
) -> list[Problem]:
    """What the outputs show: elements left unwritten, or written from what nothing had set."""
    if any(p.kind in STOPPING for p in seen):
        return []  # the launch did not come to its end
    found = []
    for m in given:
        if not m.output or m.initialised:
            continue
        missing = np.flatnonzero((traffic[m.name].touched & 2) == 0)
        if missing.size:
            what = f"{m.name}[{missing[0] // m.item}], {missing.size // m.item} elements in all"
            found.append(Problem("unwritten", name, 0, f"{what}: never written"))
        elif m.real and not any(p.kind == "uninitialised" for p in seen):
            found += _poisoned(name, m)
    return found


def _poisoned(name: str, m: Memory) -> list[Problem]:
    """Private variables begin as a NaN of all ones, which arithmetic hands on and never makes."""
    elements = m.data.view(f"u{m.item}")
    at = np.flatnonzero(elements == np.iinfo(elements.dtype).max)
    if not at.size:
        return []
    what = f"{m.name}[{at[0]}], {at.size} elements in all: from a private variable that was not set"
    return [Problem("uninitialised", name, 0, what)]
