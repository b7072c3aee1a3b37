"""What a launch was and what was found: the types that tests look at."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


class CompileError(Exception):
    """The Metal text is not one that Metal would take, or clang could not compile it."""


@dataclass(frozen=True)
class Problem:
    """One kind of fault at one place.

    `kind` is one of: "out of bounds", "race", "uninitialised", "unwritten", "divergent barrier",
    "early return", "divergent simd", "absent lane", "misaligned", "shift", "division",
    "array bound", "missing return", "input write", "hang", "crash", "threadgroup memory",
    "threads".
    """

    kind: str
    kernel: str
    # Of `metal/NAME.metal`, or of the other file that the message ends with; of the body alone when
    # the kernel has no header; 0 unknown.
    line: int
    message: str  # what, where in which buffer, which threads
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kernel}:{self.line}: {self.kind}: {self.message}"


@dataclass(frozen=True)
class Traffic:
    """Bytes of device memory, counted in three ways (0 in the unchecked mode).

    `requested` is the sum over all lanes. `lines` counts each line of 64 bytes once for every
    simdgroup between two of its synchronisations. `unique` counts each byte once.
    """

    requested: int = 0
    lines: int = 0
    unique: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.requested + other.requested, self.lines + other.lines, self.unique + other.unique
        )


@dataclass(frozen=True, eq=False)
class BufferTraffic:
    """The traffic of one input or output, and which of its bytes were touched."""

    read: Traffic
    written: Traffic
    touched: np.ndarray = field(repr=False)  # `[bytes]` uint8: 1 read, 2 written, 3 both


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of a kernel. The counts of operations are per simdgroup, not per lane."""

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    text: str = field(repr=False)
    problems: list[Problem] = field(default_factory=list)
    read: Traffic = Traffic()
    written: Traffic = Traffic()
    buffers: dict[str, BufferTraffic] = field(default_factory=dict)
    threads: int = 0
    barriers: int = 0  # per threadgroup
    simdgroup_barriers: int = 0
    reductions: int = 0  # simd_sum and its like, scans and votes
    shuffles: int = 0
    matrix_ops: int = 0  # 8x8x8 products
    threadgroup_bytes: int = 0


def require_clean(launches: Iterable[Launch]) -> None:
    """Raises AssertionError with every problem of `launches`; also when there was no launch."""
    seen = list(launches)
    if not seen:
        raise AssertionError("no kernel was launched")
    problems = [str(problem) for launch in seen for problem in launch.problems]
    if problems:
        raise AssertionError("\n".join(problems))
