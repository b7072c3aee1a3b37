"""Seeded faults that show only when a kernel runs: each is found, and named for what it is."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from metal_cpu import once

WIDE = 16  # threads in the smallest of the launches here


@dataclass(frozen=True)
class Bug:
    """A kernel over `x` (float32, `size`) and `o`, and the fault that it has."""

    name: str
    kind: str
    body: str
    line: int = 0  # of the body, where the report must point; 0 when it has no line
    size: int = 256
    out: int = 256
    grid: int = 256
    group: int = 64
    dtype: mx.Dtype = mx.float32
    more: dict[str, Any] = field(default_factory=dict)


G = "uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;\n"
S = "uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
TILE = "threadgroup float tile[64];\n"

BUGS = [
    # Bounds
    Bug("reads one past the end", "out of bounds", G + "o[i] = x[i + 1];", 2),
    Bug("writes one past the end", "out of bounds", G + "o[i + 1] = x[i];", 2),
    Bug("reads before the beginning", "out of bounds", G + "o[i] = x[int(i) - 1];", 2),
    Bug("index wraps at 32 bits", "out of bounds", G + "o[i] = x[i - 1u];", 2),
    Bug("far past the end", "out of bounds", G + "o[i] = x[i * 1000000u];", 2),
    Bug("grid larger than the output", "out of bounds", G + "o[i] = x[0];", 2, grid=288),
    Bug("vector reaches past the end", "out of bounds",
        G + "const device float4* p = (const device float4*)x; o[i] = p[i % 64].w;", 2, size=254),
    Bug("half the input behind a wrong type", "out of bounds",
        G + "const device float2* p = (const device float2*)x; o[i] = p[i].x;", 2),
    Bug("threadgroup array overrun by a pointer", "out of bounds",
        G + TILE + "threadgroup float* p = tile;\np[t + 1] = x[i];\n" + BARRIER
        + "o[i] = tile[t];", 4),
    Bug("threadgroup array overrun by an index", "array bound",
        G + TILE + "tile[t + 1] = x[i];\n" + BARRIER + "o[i] = tile[t];", 3),
    Bug("private array overrun", "array bound",
        G + "float a[4] = {0, 1, 2, 3};\no[i] = a[i % 5] + x[i];", 3),
    Bug("matrix stored past the end", "out of bounds",
        "simdgroup_matrix<float, 8, 8> m;\nsimdgroup_load(m, x, 8);\n"
        "simdgroup_store(m, o + 200, 8);",
        3, grid=32, group=32),
    # Races
    Bug("barrier left out", "race",
        G + TILE + "tile[t] = x[i];\no[i] = tile[63 - t];", 4),
    Bug("simdgroup barrier for a threadgroup", "race",
        G + TILE + "tile[t] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "o[i] = tile[63 - t];", 5),
    Bug("barrier without memory", "race",
        G + TILE + "tile[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_none);\n"
        "o[i] = tile[63 - t];", 5),
    Bug("barrier for the other memory", "race",
        G + TILE + "tile[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\n"
        "o[i] = tile[63 - t];", 5),
    Bug("device memory behind a threadgroup barrier", "race",
        G + "o[i] = x[i];\n" + BARRIER + "o[i] += o[i ^ 1] > 9.0f ? 1.0f : 0.0f;", 4),
    Bug("lanes taken to run in step", "race",
        G + TILE + "tile[t] = x[i];\no[i] = tile[t ^ 1];", 4),
    Bug("simd_sum taken for a barrier", "race",
        G + TILE + "tile[t] = x[i];\nfloat s = simd_sum(x[i]);\no[i] = tile[t ^ 1] + s;", 5),
    Bug("tile rewritten while others read", "race",
        G + TILE + "float s = 0;\nfor (int k = 0; k < 2; ++k) {\ntile[t] = x[i] + k;\n" + BARRIER
        + "s += tile[63 - t];\n}\no[i] = s;", 5),
    Bug("many writers of one cell", "race", G + "o[i] = x[i];\nif (i < 3) o[0] = x[i];", 3),
    Bug("all lanes write the sum", "race", G + "o[i / 32] = simd_sum(x[i]);", 2, out=8),
    Bug("threadgroups that meet in an output", "race",
        G + "o[i] = x[i];\no[(i + 64) % 256] = 1.0f;", 3),
    Bug("a threadgroup waits for another's output", "race",
        G + "o[i] = x[i] + (i >= 64 ? o[i - 64] : 0.0f);", 2),
    Bug("scratch in an output read across threadgroups", "race",
        G + "float before = o[(i + 64) % 256]; o[i] = x[i] + before;", 2,
        more={"init_value": 0.0}),
    Bug("counter without an atomic", "race", G + "o[i % 4] += x[i];", 2, out=4,
        more={"init_value": 0.0}),
    # What nothing has set
    Bug("threadgroup array read before a write", "uninitialised",
        G + TILE + "if (t < 32) tile[t] = x[i];\n" + BARRIER + "o[i] = tile[t];", 5),
    Bug("sum over more parts than there are", "uninitialised",
        G + S + "threadgroup float part[32];\nfloat s = simd_sum(x[i]);\n"
        "if (lane == 0) part[sg] = s;\n" + BARRIER + "o[i] = simd_sum(part[lane]);", 7),
    Bug("output read before it is written", "uninitialised", G + "o[i] += x[i];", 2),
    Bug("private array not set", "uninitialised",
        G + "float a[4];\nfor (uint k = 0; k < i % 4; ++k) a[k] = x[k];\no[i] = a[2] + a[i % 3];"),
    Bug("accumulator of a matrix not set", "uninitialised",
        "simdgroup_matrix<float, 8, 8> a, b, c;\nsimdgroup_load(a, x, 8);\n"
        "simdgroup_load(b, x, 8);\n"
        "simdgroup_multiply_accumulate(c, a, b, c);\nsimdgroup_store(c, o, 8);",
        grid=32, group=32, out=64),
    Bug("odd elements left out", "unwritten", G + "if (i % 2 == 0) o[i] = x[i];"),
    Bug("grid too small", "unwritten", G + "o[i] = x[i];", grid=192),
    Bug("tail of a vector write left out", "unwritten",
        G + "((device float4*)o)[i] = ((const device float4*)x)[i];", grid=60, out=243, size=243),
    # Divergence
    Bug("barrier in a branch", "divergent barrier",
        G + TILE + "tile[t] = x[i];\nif (t < 40) {\n" + BARRIER + "}\n" + BARRIER
        + "o[i] = tile[63 - t];", 5),
    Bug("barrier in one simdgroup", "divergent barrier",
        G + S + TILE + "tile[t] = x[i];\nif (sg == 0) {\n" + BARRIER + "} else {\n" + BARRIER
        + "}\no[i] = tile[63 - t];", 6),
    Bug("loops of different length around a barrier", "early return",
        G + TILE + "for (uint k = 0; k <= t / 32; ++k) {\ntile[t] = x[i] + k;\n" + BARRIER
        + "}\no[i] = tile[t];", 5),
    Bug("return before a barrier", "early return",
        G + TILE + "if (i >= 250) { o[i] = 0; return; }\ntile[t] = x[i];\n" + BARRIER
        + "o[i] = tile[t];", 5),
    Bug("simd_sum in a branch of lanes", "divergent simd",
        G + S + "float s = 0;\nif (lane < 16) s = simd_sum(x[i]);\no[i] = s;", 4),
    Bug("return before a simd_sum", "divergent simd",
        G + "if (i >= 250) { o[i] = 0; return; }\no[i] = simd_sum(x[i]);", 3),
    Bug("two simd operations at once", "divergent simd",
        G + S + "o[i] = lane < 9 ? simd_max(x[i]) : simd_min(x[i]);", 3),
    Bug("matrix loaded by half the lanes", "divergent simd",
        S + "simdgroup_matrix<float, 8, 8> m;\nif (lane < 16) simdgroup_load(m, x, 8);\n"
        "simdgroup_store(m, o, 8);", 3, grid=32, group=32, out=64),
    # Lanes
    Bug("shuffle from a lane past the last", "absent lane",
        G + S + "o[i] = simd_shuffle(x[i], ushort(lane + 1));", 3),
    Bug("shuffle in a simdgroup that is not full", "absent lane",
        G + "o[i] = simd_shuffle_xor(x[i], ushort(16));", 2, grid=24, group=24, out=24),
    Bug("matrix in a simdgroup that is not full", "absent lane",
        "simdgroup_matrix<float, 8, 8> m = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), n;\n"
        "simdgroup_multiply(n, m, m);\nsimdgroup_store(n, o, 8);", 2,
        grid=WIDE, group=WIDE, out=64),
    # Arithmetic and addresses
    Bug("vector at an odd element", "misaligned",
        G + "o[i] = (*(const device float4*)(x + i % 200 + 1)).x;", 2),
    Bug("half vector at an odd element", "misaligned",
        G + "half2 v = *(const device half2*)(x + i % 200 + 1);\no[i] = v.x + v.y;", 2,
        dtype=mx.float16),
    Bug("shift by 32", "shift", G + "o[i] = float(1u << (i % 33));", 2),
    Bug("shift by a negative number", "shift", G + "o[i] = float(8 >> (int(i) - 1));", 2),
    Bug("division by zero", "division", G + "o[i] = float(7 / int(i % 3));", 2),
    Bug("remainder by zero", "division", G + "o[i] = float(i % uint(x_shape[0] - 256));", 2),
    # Sizes
    Bug("threadgroup memory over 32 KiB", "threadgroup memory",
        G + "threadgroup float big[8193];\nbig[t] = x[i];\no[i] = big[t];"),
    Bug("several arrays over 32 KiB", "threadgroup memory",
        G + "threadgroup float a[4096], b[4096];\nthreadgroup half c[2];\n"
        "a[t] = b[t] = x[i]; c[t % 2] = half(0);\no[i] = a[t] + b[t];"),
    Bug("threadgroup of 1,056 threads", "threads", G + "o[i] = x[0];", grid=1056, group=1056,
        out=1056),
    # Time
    Bug("loop without an end", "hang",
        G + "uint n = i;\nwhile (n < 300) { n = n * 3 % 299; o[i] = n; }",
        more={"limit": 0.3}),
    Bug("lanes that wait for each other", "hang",
        G + "while (true) { if (simd_any(o[i] > 1.0f)) break; }",
        more={"limit": 0.3, "init_value": 0.0}),
]  # fmt: skip


def test_the_matrix_has_at_least_forty_bugs_of_every_kind() -> None:
    assert len(BUGS) >= 40
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {bug.kind for bug in BUGS} >= {
        "out of bounds", "race", "uninitialised", "unwritten", "divergent barrier", "early return",
        "divergent simd", "absent lane", "misaligned", "shift", "division", "array bound", "hang",
        "threadgroup memory", "threads",
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["forward", "reverse", 7], ids=str)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_seeded_bug_is_reported_as_what_it_is(bug: Bug, schedule: str | int) -> None:
    launch, _ = once(
        bug.body,
        {"x": mx.random.uniform(shape=(bug.size,)).astype(bug.dtype)},
        {"o": ((bug.out,), bug.dtype)},
        (bug.grid, 1, 1),
        (bug.group, 1, 1),
        schedule=schedule,
        **bug.more,
    )
    found = {(problem.kind, problem.line) for problem in launch.problems}
    assert bug.kind in {kind for kind, _ in found}, launch.problems
    if bug.line:
        assert (bug.kind, bug.line) in found, launch.problems
