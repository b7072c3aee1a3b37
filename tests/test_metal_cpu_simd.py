"""Simdgroup operations, matrices and atomics against numpy, lane by lane."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import once, require_clean

LANES = 32
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
INTEGERS = [mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32]


def values(dtype: mx.Dtype, count: int = LANES) -> mx.array:
    """Small numbers whose sums and products are exact in every type."""
    small = np.random.default_rng(count).integers(1, 4, count)
    return mx.array(small.astype(np.int32)).astype(dtype)


def per_lane(expression: str, dtype: mx.Dtype, threads: int = LANES) -> np.ndarray:
    """`expression` of `v`, the lane's value, and `lane`, in one simdgroup."""
    launch, (out,) = once(
        f"uint lane = thread_index_in_simdgroup;\nT v = x[lane];\no[lane] = T({expression});",
        {"x": values(dtype, threads)},
        {"o": ((threads,), dtype)},
        (threads, 1, 1),
        (threads, 1, 1),
        template=[("T", dtype)],
    )
    require_clean([launch])
    return np.array(out.astype(mx.float32))


REDUCTIONS: dict[str, Callable[[np.ndarray], object]] = {
    "simd_sum(v)": lambda v: np.full(len(v), v.sum()),
    "simd_max(v)": lambda v: np.full(len(v), v.max()),
    "simd_min(v)": lambda v: np.full(len(v), v.min()),
    "simd_prefix_inclusive_sum(v)": lambda v: v.cumsum(),
    "simd_prefix_exclusive_sum(v)": lambda v: v.cumsum() - v,
}


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("expression", REDUCTIONS)
def test_a_reduction_or_scan_is_that_of_numpy(expression: str, dtype: mx.Dtype) -> None:
    v = np.array(values(dtype).astype(mx.float32))
    np.testing.assert_array_equal(per_lane(expression, dtype), REDUCTIONS[expression](v))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32], ids=str)
def test_products_and_their_scans(dtype: mx.Dtype) -> None:
    few = "simd_{}(lane < 7 ? v : T(1))"
    v = np.array(values(dtype).astype(mx.float32))
    v[7:] = 1
    assert set(per_lane(few.format("product"), dtype)) == {v.prod()}
    inclusive, exclusive = v.cumprod(), np.concatenate([[1.0], v.cumprod()[:-1]])
    np.testing.assert_array_equal(
        per_lane(few.format("prefix_inclusive_product"), dtype), inclusive
    )
    np.testing.assert_array_equal(
        per_lane(few.format("prefix_exclusive_product"), dtype), exclusive
    )


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_bitwise_reductions(dtype: mx.Dtype) -> None:
    v = np.array(values(dtype)).astype(np.int64)
    for name, function in [
        ("and", np.bitwise_and),
        ("or", np.bitwise_or),
        ("xor", np.bitwise_xor),
    ]:
        assert set(per_lane(f"simd_{name}(v)", dtype)) == {float(function.reduce(v))}


LANE = np.arange(LANES)
SHUFFLES = {
    "simd_shuffle(v, ushort((lane * 5 + 3) % 32))": (LANE * 5 + 3) % 32,
    "simd_shuffle_xor(v, 9)": LANE ^ 9,
    "simd_shuffle_up(v, 3)": np.where(LANE >= 3, LANE - 3, LANE),
    "simd_shuffle_down(v, 3)": np.where(LANE < 29, LANE + 3, LANE),
    "simd_shuffle_rotate_up(v, 3)": (LANE - 3) % 32,
    "simd_shuffle_rotate_down(v, 3)": (LANE + 3) % 32,
    "simd_broadcast(v, 11)": LANE * 0 + 11,
    "simd_broadcast_first(v)": LANE * 0,
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int8, mx.uint32], ids=str)
@pytest.mark.parametrize("expression", SHUFFLES)
def test_a_shuffle_takes_the_value_of_its_lane(expression: str, dtype: mx.Dtype) -> None:
    v = np.array(values(dtype).astype(mx.float32))
    np.testing.assert_array_equal(per_lane(expression, dtype), v[SHUFFLES[expression]])


@pytest.mark.parametrize("dtype", [mx.bfloat16], ids=str)
@pytest.mark.parametrize("expression", [e for e in SHUFFLES if "first" not in e])
def test_a_shuffle_of_bfloat_goes_through_mlx_own_overloads(
    expression: str, dtype: mx.Dtype
) -> None:
    v = np.array(values(dtype).astype(mx.float32))
    np.testing.assert_array_equal(per_lane(expression, dtype), v[SHUFFLES[expression]])


def test_a_filled_shuffle_takes_the_filling_beyond_the_edge() -> None:
    v = np.array(values(mx.float32))
    up = per_lane("simd_shuffle_and_fill_up(v, v * 10, 5)", mx.float32)
    np.testing.assert_array_equal(up, np.concatenate([v[-5:] * 10, v[:-5]]))
    down = per_lane("simd_shuffle_and_fill_down(v, v * 10, 5)", mx.float32)
    np.testing.assert_array_equal(down, np.concatenate([v[5:], v[:5] * 10]))


def test_votes_see_every_lane_that_exists() -> None:
    assert set(per_lane("simd_any(lane == 19)", mx.float32, 20)) == {1.0}
    assert set(per_lane("simd_any(lane == 20)", mx.float32, 20)) == {0.0}
    assert set(per_lane("simd_all(lane < 20)", mx.float32, 20)) == {1.0}
    assert set(per_lane("simd_all(lane < 19)", mx.float32, 20)) == {0.0}
    ballot = per_lane("uint64_t(simd_ballot(lane % 3 == 0))", mx.float32, 8)
    assert set(ballot) == {0b01001001}


def test_a_simdgroup_that_is_not_full_reduces_what_it_has() -> None:
    v = np.array(values(mx.float32, 21))
    assert set(per_lane("simd_sum(v)", mx.float32, 21)) == {v.sum()}


def test_a_vector_is_reduced_element_by_element() -> None:
    v = np.array(values(mx.float32))
    got = per_lane("dot(simd_sum(float4(v, v * 2, lane, 1)), float4(1, 10, 100, 1000))", mx.float32)
    assert set(got) == {v.sum() + 20 * v.sum() + 100 * LANE.sum() + 32000}


PRODUCT = """
  simdgroup_matrix<T, 8, 8> a, b;
  simdgroup_matrix<float, 8, 8> c(2.0f), d;
  simdgroup_load(a, x, 11, ulong2(2, 1), FLIP);
  simdgroup_load(b, y, 9);
  simdgroup_multiply_accumulate(d, a, b, c);
  simdgroup_store(d, o, 10, ulong2(1, 0), FLIP);
"""


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_matrix_product_is_that_of_numpy_at_any_stride_and_origin(
    dtype: mx.Dtype, flip: bool
) -> None:
    x = mx.random.normal((9, 11)).astype(dtype)
    y = mx.random.normal((8, 9)).astype(dtype)
    launch, (out,) = once(
        PRODUCT, {"x": x, "y": y}, {"o": ((8, 10), mx.float32)}, (32, 1, 1), (32, 1, 1),
        template=[("T", dtype), ("FLIP", flip)], init_value=-1.0,
    )  # fmt: skip
    require_clean([launch])
    a = np.array(x.astype(mx.float32))[1:9, 2:10]
    b = np.array(y.astype(mx.float32))[:, :8]
    d = (a.T if flip else a) @ b + 2 * np.eye(8)
    expected = np.full((8, 10), -1.0)
    expected[:, 1:9] = d.T if flip else d
    np.testing.assert_allclose(np.array(out), expected, atol=2e-6 * np.abs(d).max())
    assert launch.matrix_ops == 1


def test_thread_elements_are_two_neighbours_of_a_row() -> None:
    body = """
      uint lane = thread_index_in_simdgroup;
      simdgroup_matrix<float, 8, 8> m;
      m.thread_elements()[0] = 2 * lane;
      m.thread_elements()[1] = 2 * lane + 1;
      simdgroup_store(m, o, 8);
    """
    _, (out,) = once(body, {"x": mx.zeros(9)}, {"o": ((8, 8), mx.float32)}, (32, 1, 1), (32, 1, 1))
    found = np.array(out).astype(int)
    for lane in range(LANES):
        # The map that MLX's own matrix kernels compute their coordinates with.
        quad = lane // 4
        row = (quad & 4) + lane // 2 % 4
        column = (quad & 2) * 2 + lane % 2 * 2
        assert list(found[row, column : column + 2]) == [2 * lane, 2 * lane + 1]


def test_atomics_count_without_a_race() -> None:
    body = """
      threadgroup atomic_uint seen;
      uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;
      if (t == 0) atomic_store_explicit(&seen, 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (x[i] > 1.5f) atomic_fetch_add_explicit(&seen, 1u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t == 0)
        atomic_fetch_add_explicit(o, atomic_load_explicit(&seen, memory_order_relaxed),
                                  memory_order_relaxed);
    """
    x = values(mx.float32, 160)
    launch, (out,) = once(
        body, {"x": x}, {"o": ((1,), mx.uint32)}, (160, 1, 1), (64, 1, 1), init_value=0,
        atomic=True, schedule=3,
    )  # fmt: skip
    require_clean([launch])
    assert out.item() == int((np.array(x) > 1.5).sum())


def test_an_atomic_and_a_plain_access_of_one_cell_race() -> None:
    body = """
      threadgroup atomic_uint seen;
      threadgroup uint* plain = (threadgroup uint*)&seen;
      atomic_store_explicit(&seen, 0u, memory_order_relaxed);
      o[thread_position_in_grid.x] = float(*plain) + x[0];
    """
    launch, _ = once(body, {"x": mx.zeros(9)}, {"o": ((64,), mx.float32)}, (64, 1, 1), (64, 1, 1))
    assert {p.kind for p in launch.problems} == {"race"}
    assert {p.line for p in launch.problems} <= {4, 5}
