"""`moe_gate_up` and `moe_down`, products of the chosen experts, executed from their Metal text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import FEW_RUNS, TYPES, relative_error, takes_the_reference
from matrices import (
    F32_ERROR,
    FOUR_BITS,
    draw_packed,
    excess,
    is_whole,
    part_of_name,
    streamed,
    unpacked,
)
from metal_cpu import Launch
from moe_kernels import TRUE_WIDTHS, Case, Data, launched, true_width
from qwen35_mlx.packing import Format

F32, F16, BF16 = TYPES.values()


def affine(bits: int, group: int) -> Format:
    return Format("affine", bits, group)


class Kernel(NamedTuple):
    name: str
    result: Callable[[Data], mx.array]
    wanted: Callable[[Data], np.ndarray]
    needed: Callable[[Data], int]  # bytes of the matrices that the tokens need, each once
    rows: str  # the input with a row for each token
    whole: tuple[str, ...]  # buffers of which every byte is touched
    reference: dict[mx.Dtype, float]  # what the reference may be off
    sizes: dict[str, int]  # of the layers that are tried in every format
    plain_sizes: dict[str, int]
    # N * K and N on both sides of 8 elements, where Metal changes the kind of memory; the widths
    # at which a lane loads 1, 2 and 4 words. Then all of it plain, or only a part: 32 lanes load
    # such rows in two goes, the second of one lane; in less than one; in two.
    cases: list[Case]
    unknown: list[Case]  # an odd width; plain, of no whole loads

    def __str__(self) -> str:
        return self.name

    def executes(self, case: Case, **run: Any) -> Launch:
        """Its launch, which computes what it must and streams the chosen experts, no other."""
        data = case.data
        with launched(**run) as launches:
            found = self.result(data)
        assert found.dtype == case.dtype
        assert excess(found, self.wanted(data)) <= F32_ERROR
        assert streamed(launches[0])[0] == self.needed(data)
        return launches[0]


GATE_UP = Kernel(
    "gate_up",
    Data.gate_up_result,
    Data.gate_up_wanted,
    lambda data: data.streamed_bytes(data.gate_up, data.shared_gate_up),
    rows="x",
    whole=("x", "experts", "h"),
    # It rounds gate and up before their product, and MLX's CPU sums in the type of x.
    reference={F32: 2e-5, F16: 3e-3, BF16: 2e-2},
    sizes={"hidden": 384, "inner": 20, "shared_inner": 12},
    plain_sizes={"hidden": 320, "inner": 20, "shared_inner": 12},
    # Gate rows that end within a threadgroup, too.
    cases=[
        Case(1),
        Case(2, BF16, affine(4, 64), affine(4, 128), hidden=384, inner=192, shared_inner=128),
        Case(3, F16, affine(8, 32), affine(4, 32), F16, crowded=True),
        Case(8, F32, affine(4, 32), affine(8, 32), F32, crowded=True),
        Case(
            2, F32, affine(4, 128), affine(8, 64), E=4, K=2, hidden=1024, inner=6, shared_inner=10
        ),
        Case(7, BF16, affine(8, 64), affine(4, 64), E=9, hidden=512, inner=14, shared_inner=4),
        Case(1, BF16, None, None, BF16, hidden=264, inner=6, shared_inner=10),
        Case(3, F16, None, affine(8, 32), F32, inner=10, crowded=True),
        Case(5, F32, affine(4, 32), None, F16, hidden=512, inner=6, shared_inner=14),
    ],
    unknown=[Case(2, inner=65, shared_inner=32), Case(2, routed=None, shared=None, hidden=100)],
)
DOWN = Kernel(
    "down",
    Data.down_result,
    Data.down_wanted,
    lambda data: data.streamed_bytes(data.down, data.shared_down),
    rows="h",
    whole=("h", "experts", "weights", "shared", "y"),
    # It rounds each expert's product, and MLX's CPU sums in the type of h.
    reference={F32: 1e-5, F16: 3e-3, BF16: 2e-2},
    sizes={"hidden": 20, "inner": 384, "shared_inner": 128},
    plain_sizes={"hidden": 20, "inner": 320, "shared_inner": 128},
    # 4 and 8 rows at once, and more matrices than simdgroups, too.
    cases=[
        Case(1),
        Case(2, BF16, affine(4, 64), affine(4, 128), hidden=20, inner=192, shared_inner=128),
        Case(3, F16, affine(8, 32), affine(4, 32), F16, crowded=True),
        Case(8, F32, affine(4, 32), affine(8, 32), F32, crowded=True),
        Case(
            1, F32, affine(4, 128), affine(8, 64), E=4, K=2, hidden=24, inner=512, shared_inner=64
        ),
        Case(
            7, BF16, affine(8, 64), affine(4, 64), E=23, K=13, hidden=12, inner=512, shared_inner=64
        ),
        Case(1, BF16, None, None, BF16, hidden=20, inner=264, shared_inner=72),
        Case(3, F16, None, affine(8, 32), F32, hidden=12, inner=40, crowded=True),
        Case(5, F32, affine(4, 32), None, F16, hidden=8, inner=96, shared_inner=512),
    ],
    unknown=[Case(2, hidden=98), Case(2, routed=None, inner=68)],
)
BOTH = pytest.mark.parametrize("kernel", [GATE_UP, DOWN], ids=str)
CASES = [(kernel, case) for kernel in (GATE_UP, DOWN) for case in kernel.cases]
# Nine tokens, three bits, a float format.
UNKNOWN = [Case(9), Case(2, routed=affine(3, 32)), Case(2, shared=Format("mxfp8", 8, 32))]


@pytest.mark.parametrize("kernel, case", CASES, ids=str)
@pytest.mark.parametrize("run", FEW_RUNS, ids=lambda run: str(run["schedule"]))
def test_executed_agrees_with_float64(kernel: Kernel, case: Case, run: dict[str, Any]) -> None:
    launch = kernel.executes(case, **run)
    assert all(is_whole(launch.buffers[name]) for name in kernel.whole)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("scales", [F32, F16, BF16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_format_and_type_for_every_number_of_tokens(
    bits: int, group: int, scales: mx.Dtype, dtype: mx.Dtype, kernel: Kernel
) -> None:
    packing, other = affine(bits, group), affine(12 - bits, 160 - group if group != 64 else 64)
    for N in range(1, 9):
        case = Case(N, dtype, packing, other, scales, crowded=N % 2 == 0, **kernel.sizes)
        kernel.executes(case, **FEW_RUNS[N % 3])


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("kind", [F32, F16, BF16])
def test_every_plain_type_for_every_number_of_tokens(
    kind: mx.Dtype, dtype: mx.Dtype, kernel: Kernel
) -> None:
    for N in range(1, 9):
        routed, shared = [(None, None), (None, affine(8, 64)), (affine(4, 64), None)][N % 3]
        case = Case(N, dtype, routed, shared, kind, crowded=N % 2 == 0, **kernel.plain_sizes)
        kernel.executes(case, **FEW_RUNS[N % 3])


# How many lines of x or h at most for each of the weights': every simdgroup of gate_up reads a
# token's x for four rows, one of down its h for eight rows of few words, else for four.
@pytest.mark.parametrize(
    "kernel, packing, N, most",
    [
        (GATE_UP, FOUR_BITS, 1, 0.9),
        (GATE_UP, FOUR_BITS, 4, 2.5),
        (GATE_UP, None, 1, 0.25),
        (DOWN, FOUR_BITS, 1, 0.45),
        (DOWN, FOUR_BITS, 4, 2.5),
        (DOWN, None, 1, 0.25),
    ],
    ids=part_of_name,
)
def test_true_width_reads_each_chosen_expert_once(
    kernel: Kernel, packing: Format | None, N: int, most: float
) -> None:
    launch = kernel.executes(true_width("35B-A3B", N, packing))
    unique, lines = streamed(launch)
    assert lines <= 1.25 * unique
    assert launch.buffers[kernel.rows].read.lines <= lines * most


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("size, N, packing", TRUE_WIDTHS, ids=part_of_name)
def test_every_true_width_streams(
    size: str, N: int, packing: Format | None, kernel: Kernel
) -> None:
    unique, lines = streamed(kernel.executes(true_width(size, N, packing)))
    assert lines <= 1.25 * unique


@pytest.mark.parametrize("kernel, case", CASES, ids=str)
def test_reference_agrees_with_float64(kernel: Kernel, case: Case) -> None:
    error = relative_error(kernel.result(case.data), kernel.wanted(case.data))
    assert error <= kernel.reference[case.dtype]


@pytest.mark.parametrize(
    "kernel, case", [(k, case) for k in (GATE_UP, DOWN) for case in UNKNOWN + k.unknown], ids=str
)
def test_what_the_kernel_does_not_know_takes_the_reference(kernel: Kernel, case: Case) -> None:
    takes_the_reference(lambda: [kernel.result(case.data)])


def test_an_expert_that_overflows_stays_with_its_tokens() -> None:
    data = Case(4, E=9).data
    lonely = np.array(data.experts)
    lonely[0] = [8, 7, 6]
    lonely[1:] = np.stack([np.random.default_rng(n).permutation(6)[:3] for n in range(3)])
    data.experts = mx.array(lonely)
    data.h[0] = mx.array(float("inf"), dtype=mx.float32)
    with launched():
        y = data.down_result()
    assert not np.isfinite(np.array(y[0])).any()
    assert np.isfinite(np.array(y[1:])).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_definition_unpacks_as_mlx_does(bits: int) -> None:
    matrix = draw_packed(np.random.default_rng(3), (6, 192), affine(bits, 64), F32)
    assert matrix.scales is not None
    theirs = mx.dequantize(matrix.weight, matrix.scales, matrix.biases, group_size=64, bits=bits)
    np.testing.assert_allclose(unpacked(matrix), np.array(theirs), rtol=1e-6, atol=1e-6)
