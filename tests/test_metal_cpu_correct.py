"""Right kernels of the kinds that models use: nothing is reported, and the numbers are right.

Every axis has a size of its own, and every kernel runs under three schedules, with contraction on
and off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import Launch, once, require_clean

SCHEDULES = [("forward", True), ("reverse", False), (11, True)]
# Of the float types: a rounding of the result, and for float32 of its sums of about 100 terms.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
TYPES = list(TOLERANCE)

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Case:
    """A kernel, a launch of it and what it computes, in float64."""

    name: str
    body: str
    inputs: Callable[[], dict[str, np.ndarray]]
    outputs: dict[str, Sequence[int]]
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    reference: Callable[..., Arrays]
    template: list[tuple[str, Any]] = field(default_factory=list)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


SAXPY = """
  uint i = thread_position_in_grid.x;
  if (i >= uint(x_shape[0])) return;
  o[i] = T(2.5f * float(x[i]) + float(y[i]));
"""

TRANSPOSE = """
  threadgroup T tile[16][17];
  uint2 t = thread_position_in_threadgroup.xy;
  uint2 g = threadgroup_position_in_grid.xy * 16;
  if (g.y + t.y < R && g.x + t.x < C) tile[t.y][t.x] = x[(g.y + t.y) * C + g.x + t.x];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (g.x + t.y < C && g.y + t.x < R) o[(g.x + t.y) * R + g.y + t.x] = tile[t.x][t.y];
"""

ROW_SUM = """
  threadgroup float part[4];
  uint t = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.y;
  float s = 0;
  for (uint c = t; c < C; c += 128) s += float(x[row * C + c]);
  s = simd_sum(s);
  if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = s;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t == 0) o[row] = T(part[0] + part[1] + part[2] + part[3]);
"""

SCAN = """
  threadgroup float part[32];
  uint t = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;
  uint sg = simdgroup_index_in_threadgroup;
  float inside = simd_prefix_inclusive_sum(float(x[t]));
  if (lane == 31) part[sg] = inside;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    float before = simd_prefix_exclusive_sum(lane < simdgroups_per_threadgroup ? part[lane] : 0.0f);
    if (lane < simdgroups_per_threadgroup) part[lane] = before;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = T(inside + part[sg]);
"""

SOFTMAX = """
  threadgroup float best[3], total[3];
  uint t = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.y;
  uint sg = simdgroup_index_in_threadgroup;
  float m = -INFINITY;
  for (uint c = t; c < C; c += 96) m = max(m, float(x[row * C + c]));
  m = simd_max(m);
  if (thread_index_in_simdgroup == 0) best[sg] = m;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  m = max3(best[0], best[1], best[2]);
  float s = 0;
  for (uint c = t; c < C; c += 96) s += metal::exp(float(x[row * C + c]) - m);
  s = simd_sum(s);
  if (thread_index_in_simdgroup == 0) total[sg] = s;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s = total[0] + total[1] + total[2];
  for (uint c = t; c < C; c += 96) o[row * C + c] = T(metal::exp(float(x[row * C + c]) - m) / s);
"""

# 2 simdgroups, each with a 8x16 strip of a 16x16 tile; K in steps of 8 through threadgroup memory.
GEMM = """
  threadgroup T as[16 * 8], bs[8 * 16];
  uint t = thread_position_in_threadgroup.x, sg = simdgroup_index_in_threadgroup;
  uint row = threadgroup_position_in_grid.y * 16, col = threadgroup_position_in_grid.x * 16;
  simdgroup_matrix<T, 8, 8> a, b0, b1;
  simdgroup_matrix<float, 8, 8> c0 = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), c1 = c0;
  for (uint k = 0; k < K; k += 8) {
    for (uint e = t; e < 128; e += 64) {
      as[e] = x[(row + e / 8) * K + k + e % 8];
      bs[e] = y[(k + e / 16) * N + col + e % 16];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(a, as + sg * 64, 8);
    simdgroup_load(b0, bs, 16);
    simdgroup_load(b1, bs + 8, 16);
    simdgroup_multiply_accumulate(c0, a, b0, c0);
    simdgroup_multiply_accumulate(c1, a, b1, c1);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  threadgroup float cs[16 * 16];
  simdgroup_store(c0, cs + sg * 128, 16);
  simdgroup_store(c1, cs + sg * 128 + 8, 16);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = thread_index_in_simdgroup; e < 128; e += 32) {
    uint at = sg * 128 + e;
    o[(row + at / 16) * N + col + at % 16] = T(cs[at]);
  }
"""

# S <- g S + b (v - g S k) k^T, y = S q: a row of S in each simdgroup, D / 32 of it in each lane.
RECURRENCE = """
  constexpr int PER = D / 32;
  uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.y;
  float s[PER];
  for (int i = 0; i < PER; ++i) s[i] = state[row * D + lane * PER + i];
  for (int t = 0; t < STEPS; ++t) {
    float seen = 0;
    for (int i = 0; i < PER; ++i) {
      s[i] *= g[t];
      seen += s[i] * float(k[t * D + lane * PER + i]);
    }
    float delta = (float(v[t * ROWS + row]) - simd_sum(seen)) * float(b[t]);
    float out = 0;
    for (int i = 0; i < PER; ++i) {
      s[i] += float(k[t * D + lane * PER + i]) * delta;
      out += s[i] * float(q[t * D + lane * PER + i]);
    }
    out = simd_sum(out);
    if (lane == 0) o[t * ROWS + row] = T(out);
  }
  for (int i = 0; i < PER; ++i) last[row * D + lane * PER + i] = s[i];
"""

RMS_NORM = """
  uint row = thread_position_in_grid.y, lane = thread_index_in_simdgroup;
  const device vec<T, 4>* from = (const device vec<T, 4>*)(x + row * C);
  float s = 0;
  for (uint c = lane; c < C / 4; c += 32) {
    float4 v = float4(from[c]);
    s += dot(v, v);
  }
  float scale = metal::rsqrt(simd_sum(s) / C + 1e-6f);
  device vec<T, 4>* to = (device vec<T, 4>*)(o + row * C);
  for (uint c = lane; c < C / 4; c += 32) to[c] = vec<T, 4>(float4(from[c]) * scale);
"""

BUTTERFLY_MAX = """
  uint i = thread_position_in_grid.x;
  float best = float(x[i]);
  int at = int(thread_index_in_simdgroup);
  for (ushort step = 1; step < 32; step <<= 1) {
    float other = simd_shuffle_xor(best, step);
    int there = simd_shuffle_xor(at, step);
    if (other > best || (other == best && there < at)) { best = other; at = there; }
  }
  o[i] = T(float(at));
"""


def recurrence(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, b: np.ndarray,
               state: np.ndarray) -> Arrays:  # fmt: skip
    s, out = state.copy(), []
    for t in range(len(q)):
        s = s * g[t]
        s = s + np.outer((v[t] - s @ k[t]) * b[t], k[t])
        out.append(s @ q[t])
    return [np.stack(out), s]


def softmax(x: np.ndarray) -> Arrays:
    e = np.exp(x - x.max(1, keepdims=True))
    return [e / e.sum(1, keepdims=True)]


CASES = [
    Case("elementwise with an early return at the end", SAXPY,
         lambda: {"x": noise(203), "y": noise(203)}, {"o": (203,)}, (224, 1, 1), (32, 1, 1),
         lambda x, y: [2.5 * x + y]),
    Case("transposition through threadgroup memory", TRANSPOSE, lambda: {"x": noise(23, 37)},
         {"o": (37, 23)}, (48, 32, 1), (16, 16, 1), lambda x: [x.T], [("R", 23), ("C", 37)]),
    Case("sum of rows in two stages", ROW_SUM, lambda: {"x": noise(5, 301) / 16}, {"o": (5,)},
         (128, 5, 1), (128, 1, 1), lambda x: [x.sum(1)], [("C", 301)]),
    Case("scan of a threadgroup", SCAN, lambda: {"x": noise(160) / 8}, {"o": (160,)},
         (160, 1, 1), (160, 1, 1), lambda x: [x.cumsum()]),
    Case("softmax", SOFTMAX, lambda: {"x": noise(7, 211)}, {"o": (7, 211)}, (96, 7, 1), (96, 1, 1),
         softmax, [("C", 211)]),
    Case("tiled product with matrices", GEMM, lambda: {"x": noise(32, 40) / 8, "y": noise(40, 48)},
         {"o": (32, 48)}, (192, 2, 1), (64, 1, 1), lambda x, y: [x @ y], [("K", 40), ("N", 48)]),
    Case("gated delta recurrence", RECURRENCE,
         lambda: {"q": noise(9, 64) / 8, "k": noise(9, 64) / 8, "v": noise(9, 6),
                  "g": np.linspace(0.5, 0.999, 9), "b": np.linspace(0.1, 0.9, 9),
                  "state": noise(6, 64)},
         {"o": (9, 6), "last": (6, 64)}, (32, 6, 1), (32, 2, 1), recurrence,
         [("D", 64), ("STEPS", 9), ("ROWS", 6)]),
    Case("norm with vectors", RMS_NORM, lambda: {"x": noise(3, 260)}, {"o": (3, 260)},
         (32, 3, 1), (32, 1, 1), lambda x: [x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)],
         [("C", 260)]),
    Case("arg max by shuffles", BUTTERFLY_MAX, lambda: {"x": noise(96)}, {"o": (96,)},
         (96, 1, 1), (96, 1, 1), lambda x: [np.repeat(x.reshape(3, 32).argmax(1), 32)]),
]  # fmt: skip

KEPT_IN_FLOAT = {"g", "b", "state", "last"}


def run(case: Case, dtype: mx.Dtype, **mode: Any) -> tuple[Launch, Arrays, Arrays]:
    """Launch, outputs and the reference on the rounded inputs."""
    given = {
        name: mx.array(x.astype(np.float32)).astype(mx.float32 if name in KEPT_IN_FLOAT else dtype)
        for name, x in case.inputs().items()
    }
    outputs = {
        name: (shape, mx.float32 if name in KEPT_IN_FLOAT else dtype)
        for name, shape in case.outputs.items()
    }
    template = [("T", dtype), *case.template]
    launch, result = once(
        case.body, given, outputs, case.grid, case.group, template=template, **mode
    )
    exact = [np.array(x.astype(mx.float32)).astype(np.float64) for x in given.values()]
    got = [np.array(x.astype(mx.float32)).astype(np.float64) for x in result]
    return launch, got, case.reference(*exact)


@pytest.mark.parametrize("schedule, contract", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_right_kernel_is_clean_and_right(
    case: Case, dtype: mx.Dtype, schedule: str | int, contract: bool
) -> None:
    launch, got, expected = run(case, dtype, schedule=schedule, contract=contract)
    require_clean([launch])
    for out, reference in zip(got, expected, strict=True):
        assert np.abs(out - reference).max() <= TOLERANCE[dtype] * np.abs(reference).max()


@pytest.mark.parametrize("reduce", ["ascending", "butterfly", "random"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_unchecked_mode_gives_the_same_numbers(case: Case, reduce: str) -> None:
    checked = run(case, mx.float32, reduce=reduce, contract=False)
    fast = run(case, mx.float32, reduce=reduce, contract=False, checked=False)
    for one, other in zip(checked[1], fast[1], strict=True):
        np.testing.assert_array_equal(one, other)
    assert fast[0].problems == []
    assert fast[0].barriers == checked[0].barriers
