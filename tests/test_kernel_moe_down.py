"""Down products of the chosen experts, weighted and summed, executed from their Metal text."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import emulated
from moe_kernels import (
    F32_ERROR,
    FOUR_BITS,
    KERNELS,
    RUNS,
    TRUE_WIDTHS,
    Case,
    exact,
    excess,
    executed,
    is_whole,
    part_of_name,
    streamed,
    true_width,
)
from qwen35_mlx.kernels import library
from qwen35_mlx.packing import Format

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# The reference rounds each expert's product, and MLX's CPU sums in the type of h.
REFERENCE = {F32: 1e-5, F16: 3e-3, BF16: 2e-2}


def affine(bits: int, group: int) -> Format:
    return Format("affine", bits, group)


# All of it plain, or only a part. 32 lanes load such rows in two goes, the second of one lane; in
# less than one; in two.
PLAIN_CASES = [
    Case(1, BF16, None, None, BF16, hidden=20, inner=264, shared_inner=72),
    Case(3, F16, None, affine(8, 32), F32, hidden=12, inner=40, crowded=True),
    Case(5, F32, affine(4, 32), None, F16, hidden=8, inner=96, shared_inner=512),
]
# N * K and N on both sides of 8 elements, where Metal changes the kind of memory; the widths at
# which a lane loads 1, 2 and 4 words; 4 and 8 rows at once; more matrices than simdgroups.
CASES = [
    Case(1),
    Case(2, BF16, affine(4, 64), affine(4, 128), hidden=20, inner=192, shared_inner=128),
    Case(3, F16, affine(8, 32), affine(4, 32), F16, crowded=True),
    Case(8, F32, affine(4, 32), affine(8, 32), F32, crowded=True),
    Case(1, F32, affine(4, 128), affine(8, 64), E=4, K=2, hidden=24, inner=512, shared_inner=64),
    Case(7, BF16, affine(8, 64), affine(4, 64), E=23, K=13, hidden=12, inner=512, shared_inner=64),
    *PLAIN_CASES,
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run["schedule"]))
def test_executed_agrees_with_float64(case: Case, run: dict[str, Any]) -> None:
    data = case.data
    with executed(**run) as launches:
        y = data.down_result()
    assert y.dtype == case.dtype
    assert excess(y, data.down_wanted()) <= F32_ERROR
    assert streamed(launches[0])[0] == data.streamed_bytes(data.down, data.shared_down)
    buffers = launches[0].buffers
    assert all(is_whole(buffers[name]) for name in ("h", "experts", "weights", "shared", "y"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("scales", [F32, F16, BF16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_format_and_type_for_every_number_of_tokens(
    bits: int, group: int, scales: mx.Dtype, dtype: mx.Dtype
) -> None:
    for N in range(1, 9):
        packing, other = affine(bits, group), affine(12 - bits, 160 - group if group != 64 else 64)
        sizes = {"hidden": 20, "inner": 384, "shared_inner": 128}
        case = Case(N, dtype, packing, other, scales, crowded=N % 2 == 0, **sizes)
        with executed(**RUNS[N % 3]):
            y = case.data.down_result()
        assert excess(y, case.data.down_wanted()) <= F32_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("kind", [F32, F16, BF16])
def test_every_plain_type_for_every_number_of_tokens(kind: mx.Dtype, dtype: mx.Dtype) -> None:
    for N in range(1, 9):
        routed, shared = [(None, None), (None, affine(8, 64)), (affine(4, 64), None)][N % 3]
        sizes = {"hidden": 20, "inner": 320, "shared_inner": 128}
        case = Case(N, dtype, routed, shared, kind, crowded=N % 2 == 0, **sizes)
        with executed(**RUNS[N % 3]) as launches:
            y = case.data.down_result()
        assert excess(y, case.data.down_wanted()) <= F32_ERROR
        needed = case.data.streamed_bytes(case.data.down, case.data.shared_down)
        assert streamed(launches[0])[0] == needed


# Of weights, and how many lines of h at most for each of theirs: every simdgroup reads a token's h
# for eight rows of few words, else for four.
@pytest.mark.parametrize(
    "packing, N, most",
    [(FOUR_BITS, 1, 0.45), (FOUR_BITS, 4, 2.5), (None, 1, 0.25)],
    ids=part_of_name,
)
def test_true_width_reads_each_chosen_expert_once(
    packing: Format | None, N: int, most: float
) -> None:
    case = true_width("35B-A3B", N, packing)
    with executed() as launches:
        y = case.data.down_result()
    assert excess(y, case.data.down_wanted()) <= F32_ERROR
    unique, lines = streamed(launches[0])
    assert unique == case.data.streamed_bytes(case.data.down, case.data.shared_down)
    assert lines <= 1.25 * unique
    assert launches[0].buffers["h"].read.lines <= lines * most


@pytest.mark.slow
@pytest.mark.parametrize("size, N, packing", TRUE_WIDTHS, ids=part_of_name)
def test_every_true_width_streams(size: str, N: int, packing: Format | None) -> None:
    case = true_width(size, N, packing)
    with executed() as launches:
        y = case.data.down_result()
    assert excess(y, case.data.down_wanted()) <= F32_ERROR
    unique, lines = streamed(launches[0])
    assert unique == case.data.streamed_bytes(case.data.down, case.data.shared_down)
    assert lines <= 1.25 * unique


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_agrees_with_float64(case: Case) -> None:
    wanted = case.data.down_wanted()
    error = np.linalg.norm(exact(case.data.down_result()) - wanted)
    assert error <= REFERENCE[case.dtype] * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "case",
    [
        Case(9),
        Case(2, routed=affine(3, 32)),
        Case(2, shared=Format("mxfp8", 8, 32)),
        Case(2, hidden=98),
        Case(2, routed=None, inner=68),
    ],
    ids=["nine tokens", "three bits", "float format", "odd width", "plain, of no whole loads"],
)
def test_what_the_kernel_does_not_know_takes_the_reference(case: Case) -> None:
    data = case.data
    before = data.down_result()
    with emulated() as launches:
        library.use(KERNELS)
        try:
            after = data.down_result()
        finally:
            library.use(())
    assert not launches
    assert mx.array_equal(before, after)


def test_an_expert_that_overflows_stays_with_its_tokens() -> None:
    case = Case(4, E=9, crowded=False)
    data = case.data
    lonely = np.array(data.experts)
    lonely[0] = [8, 7, 6]
    lonely[1:] %= 6
    lonely[1:] = np.stack([np.random.default_rng(n).permutation(6)[:3] for n in range(3)])
    data.experts = mx.array(lonely)
    data.h[0] = mx.array(float("inf"), dtype=mx.float32)
    with executed():
        y = data.down_result()
    assert not np.isfinite(np.array(y[0])).any()
    assert np.isfinite(np.array(y[1:])).all()
