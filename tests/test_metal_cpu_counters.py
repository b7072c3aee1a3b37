"""Bytes, barriers and operations, exact on kernels whose counts are known; orders of execution."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import Launch, Traffic, once, require_clean

SCHEDULES = ["forward", "reverse", 5]


def launch(
    body: str, x: mx.array, out: int, threads: int, group: int, *, schedule: str | int = "forward"
) -> Launch:
    found, _ = once(
        body, {"x": x}, {"o": ((out,), mx.float32)}, (threads, 1, 1), (group, 1, 1),
        schedule=schedule,
    )  # fmt: skip
    require_clean([found])
    return found


G = "uint i = thread_position_in_grid.x;\n"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_copy_moves_every_byte_once(schedule: str | int) -> None:
    seen = launch(G + "o[i] = x[i];", mx.zeros(320), 320, 320, 96, schedule=schedule)
    assert seen.read == seen.written == Traffic(1280, 1280, 1280)
    assert (seen.threads, seen.barriers, seen.reductions, seen.threadgroup_bytes) == (320, 0, 0, 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_value_that_all_lanes_read_is_one_line_for_each_simdgroup(schedule: str | int) -> None:
    seen = launch(G + "o[i] = x[3];", mx.zeros(9), 256, 256, 128, schedule=schedule)
    assert seen.read == Traffic(4 * 256, 64 * 8, 4)


def test_a_stride_of_a_line_fetches_a_line_for_each_lane() -> None:
    seen = launch(G + "o[i] = x[i * 16];", mx.zeros(64 * 16), 64, 64, 32)
    assert seen.read == Traffic(4 * 64, 64 * 64, 4 * 64)


def test_a_line_is_fetched_again_after_a_synchronisation() -> None:
    body = G + "float a = x[i];\no[i] = simd_sum(a) + x[i ^ 1];"
    seen = launch(body, mx.zeros(128), 128, 128, 64)
    # The neighbour of each lane lies in the same two lines, on the other side of the simd_sum.
    assert seen.read == Traffic(2 * 512, 2 * 512, 512)
    assert seen.reductions == 4


def test_loads_that_metal_may_keep_across_a_simd_sum_count_once() -> None:
    seen = launch(G + "o[i] = simd_sum(x[i]) + x[i];", mx.zeros(64), 64, 64, 32)
    assert seen.read == Traffic(256, 256, 256)


def test_a_vector_counts_its_bytes() -> None:
    body = G + "((device float4*)o)[i] = ((const device float4*)x)[i];"
    seen = launch(body, mx.zeros(256), 256, 64, 64)
    assert seen.read == seen.written == Traffic(1024, 1024, 1024)


def test_half_and_byte_loads_count_their_bytes() -> None:
    seen = launch(G + "o[i] = float(x[i]);", mx.zeros(96, mx.float16), 96, 96, 32)
    assert seen.read == Traffic(192, 192, 192)
    seen = launch(G + "o[i] = float(x[i]);", mx.zeros(96, mx.uint8), 96, 96, 32)
    assert seen.read == Traffic(96, 3 * 64, 96)


def test_operations_and_barriers_are_counted_by_simdgroup_and_threadgroup() -> None:
    body = """
      threadgroup float part[4];
      threadgroup half other[3];
      uint i = thread_position_in_grid.x, sg = simdgroup_index_in_threadgroup;
      float s = simd_sum(x[i]) + simd_max(x[i]);
      s += simd_shuffle_xor(s, 1) + simd_shuffle_xor(s, 2) + simd_shuffle_xor(s, 4);
      if (thread_index_in_simdgroup == 0) { part[sg] = s; other[sg % 3] = half(s); }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      o[i] = part[3 - sg];
      simdgroup_barrier(mem_flags::mem_none);
    """
    # 2 threadgroups of 4 simdgroups. Of `other`, cell 0 has two writers: 3 parts for 4 simdgroups.
    seen, _ = once(body, {"x": mx.ones(256)}, {"o": ((256,), mx.float32)}, (256, 1, 1), (128, 1, 1))
    assert [p.kind for p in seen.problems] == ["race"]
    assert (seen.reductions, seen.shuffles) == (8 * 2, 8 * 3)
    assert (seen.barriers, seen.simdgroup_barriers) == (2, 8)
    assert seen.threadgroup_bytes == 4 * 4 + 3 * 2


def test_of_all_experts_only_the_chosen_ones_are_read() -> None:
    body = """
      uint c = thread_position_in_grid.x, k = thread_position_in_grid.y;
      float s = 0;
      for (int r = 0; r < 6; ++r) s += v[r] * w[(chosen[k] * 6 + r) * 40 + c];
      o[k * 40 + c] = s;
    """
    experts, chosen = 11, [7, 2, 9]
    given = {
        "v": mx.random.normal((6,)),
        "w": mx.random.normal((experts, 6, 40)),
        "chosen": mx.array(chosen),
    }
    seen, (out,) = once(body, given, {"o": ((3, 40), mx.float32)}, (40, 3, 1), (40, 1, 1))
    require_clean([seen])
    weights = seen.buffers["w"]
    assert weights.read.unique == len(chosen) * 6 * 40 * 4
    touched = weights.touched.reshape(experts, -1)
    assert [e for e in range(experts) if touched[e].any()] == sorted(chosen)
    assert bool((touched[chosen] == 1).all())
    assert seen.buffers["v"].read.unique == 24
    assert seen.written == seen.buffers["o"].written
    expected = mx.einsum("r,krc->kc", given["v"], given["w"][mx.array(chosen)])
    np.testing.assert_allclose(np.array(out), np.array(expected), rtol=1e-5, atol=1e-5)


def test_shapes_and_strides_are_no_traffic() -> None:
    seen = launch(G + "o[i] = x[i] + float(x_strides[0] + x_shape[0]);", mx.zeros(32), 32, 32, 32)
    assert set(seen.buffers) == {"x", "o"}
    assert seen.read.requested == 128


def order_of(schedule: str | int) -> list[int]:
    """The turn at which each of 3 threadgroups of 2 simdgroups got its ticket."""
    body = G + "o[i + 1] = atomic_fetch_add_explicit(o_ticket, 1u, memory_order_relaxed);"
    body = body.replace("o_ticket", "(device atomic_uint*)o")
    _, (out,) = once(
        body, {"x": mx.zeros(9)}, {"o": ((193,), mx.uint32)}, (192, 1, 1), (64, 1, 1),
        init_value=0, schedule=schedule,
    )  # fmt: skip
    assert out[0].item() == 192
    turns: Sequence[int] = np.array(out[1:]).tolist()
    return list(turns)


def test_schedules_run_threads_in_different_orders() -> None:
    assert order_of("forward") == list(range(192))
    assert order_of("reverse") == list(range(191, -1, -1))
    one, other = order_of(1), order_of(2)
    assert sorted(one) == sorted(other) == list(range(192))
    assert one != other
    assert order_of(1) == one
    assert one[:64] != sorted(one[:64])


@pytest.mark.parametrize("checked", [True, False])
def test_simd_sum_adds_in_the_order_that_was_asked_for(checked: bool) -> None:
    x = (np.random.default_rng(3).standard_normal(32) * 10.0 ** np.arange(-4, 4, 0.25)).astype("f4")
    body = "o[thread_position_in_grid.x] = simd_sum(x[thread_position_in_grid.x]);"

    def total(reduce: str, seed: int = 1) -> np.float32:
        _, (out,) = once(
            body, {"x": mx.array(x)}, {"o": ((32,), mx.float32)}, (32, 1, 1), (32, 1, 1),
            reduce=reduce, schedule=seed, checked=checked,
        )  # fmt: skip
        assert len(set(np.array(out).tolist())) == 1
        return np.float32(np.array(out)[0])

    ascending = np.float32(0)
    for value in x:
        ascending = np.float32(ascending + value)
    tree = x.copy()
    while len(tree) > 1:
        tree = tree[0::2] + tree[1::2]
    assert total("ascending") == ascending
    assert total("butterfly") == tree[0]
    assert len({total("random", seed) for seed in range(6)}) > 1


def test_simd_operations_order_memory_only_when_asked_to() -> None:
    body = """
      threadgroup float t[32];
      uint lane = thread_index_in_simdgroup;
      t[lane] = x[lane];
      float s = simd_sum(x[lane]);
      o[lane] = t[31 - lane] + s;
    """
    given, out = {"x": mx.zeros(32)}, {"o": ((32,), mx.float32)}
    strict, _ = once(body, given, out, (32, 1, 1), (32, 1, 1))
    loose, _ = once(body, given, out, (32, 1, 1), (32, 1, 1), simd_orders=True)
    assert [p.kind for p in strict.problems] == ["race"]
    require_clean([loose])
