"""`gate_up`, the first half of the dense feed-forward block, executed from its Metal text."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import (
    FEW_RUNS,
    TYPES,
    Needed,
    as_float64,
    executed,
    mlx_array,
    relative_error,
    silu,
    takes_the_reference,
    using,
)
from matrices import (
    F32_ERROR,
    FOUR_BITS,
    draw_packed,
    excess,
    is_whole,
    label,
    part_of_name,
    streamed,
    unpacked,
)
from metal_cpu import Launch
from qwen35_mlx.kernels.gate_up import gate_up
from qwen35_mlx.kernels.packed import Packed
from qwen35_mlx.packing import Format

F32, F16, BF16 = TYPES.values()
# Hidden and inner widths of the five dense sizes.
SIZES = {
    "0.8B": (1024, 3584),
    "2B": (2048, 6144),
    "4B": (2560, 9216),
    "9B": (4096, 12288),
    "27B": (5120, 17408),
}


def affine(bits: int, group: int) -> Format:
    return Format("affine", bits, group)


@dataclass(frozen=True)
class Case:
    """Tokens of rows and columns `lead`, and one matrix; every axis of another size."""

    lead: tuple[int, ...]
    dtype: mx.Dtype = F32
    packing: Format | None = affine(4, 32)
    kind: mx.Dtype = BF16  # of scales, biases and plain matrices
    hidden: int = 96
    inner: int = 10

    def __str__(self) -> str:
        dtype, kind = (str(t).rpartition(".")[2] for t in (self.dtype, self.kind))
        lead = "x".join(map(str, self.lead))
        return f"{lead}-{dtype}-{label(self.packing)}-{kind}-{self.hidden}x{self.inner}"

    @cached_property
    def arguments(self) -> tuple[mx.array, Packed]:
        draw = np.random.default_rng(self.hidden + len(self.lead))
        x = mlx_array(draw.normal(size=(*self.lead, self.hidden)), self.dtype)
        return x, draw_packed(draw, (2 * self.inner, self.hidden), self.packing, self.kind)

    def wanted(self) -> np.ndarray:
        x, matrix = self.arguments
        gate, up = np.split(unpacked(matrix), 2)
        rows = as_float64(x)
        return silu(rows @ gate.T) * (rows @ up.T)

    def executes(self, **run: Any) -> Launch:
        """Its launch, which computes what it must and reads the whole matrix, and all of x."""
        x, matrix = self.arguments
        with executed(**run) as launches, using("gate_up"):
            found = gate_up(x, matrix)
        (launch,) = launches
        assert (found.dtype, found.shape) == (self.dtype, (*self.lead, self.inner))
        assert excess(found, self.wanted()) <= F32_ERROR
        assert streamed(launch)[0] == nbytes(matrix)
        assert is_whole(launch.buffers["x"]) and is_whole(launch.buffers["h"])
        return launch


def nbytes(matrix: Packed) -> int:
    return sum(array.nbytes for array in matrix[:3] if array is not None)


# Tokens of several rows; the widths at which a lane loads 1, 2 and 4 words, once and in two goes of
# which the second has one lane; inner widths that end within a threadgroup and after one.
CASES = [
    Case((1, 1)),
    Case((3,), F16, affine(8, 32), F16),
    Case((2, 2), BF16, affine(4, 64), hidden=512, inner=16),
    Case((8,), F32, affine(4, 128), F32, hidden=1024, inner=6),
    Case((1, 5), BF16, affine(8, 128), F32, hidden=256, inner=2),
    Case((7,), F16, affine(8, 64), hidden=640, inner=14),
    Case((1,), BF16, None, BF16, hidden=264, inner=6),
    Case((4,), F32, None, F16, hidden=320, inner=18),
    Case((1, 2), F16, None, F32, hidden=8, inner=12),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", FEW_RUNS, ids=lambda run: str(run["schedule"]))
def test_executed_agrees_with_float64(case: Case, run: dict[str, Any]) -> None:
    case.executes(**run)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("kind", [F32, F16, BF16])
@pytest.mark.parametrize(
    "packing",
    [None, *(affine(bits, group) for bits in (4, 8) for group in (32, 64, 128))],
    ids=part_of_name,
)
def test_every_format_and_type_for_every_number_of_tokens(
    packing: Format | None, kind: mx.Dtype, dtype: mx.Dtype
) -> None:
    for N in range(1, 9):
        Case((N,), dtype, packing, kind, hidden=384, inner=20).executes(**FEW_RUNS[N % 3])


@pytest.mark.parametrize("N", [1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_true_widths_are_read_once(size: str, N: int) -> None:
    """And a token's x for every four rows: two bytes beside four times four bits and a scale."""
    launch = Case((N,), BF16, FOUR_BITS, hidden=SIZES[size][0], inner=128).executes()
    unique, lines = streamed(launch)
    assert lines <= 1.25 * unique
    assert launch.buffers["x"].read.lines <= lines * N * 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "packing", [None, FOUR_BITS, affine(4, 128), affine(8, 32)], ids=part_of_name
)
@pytest.mark.parametrize("size", ["0.8B", "2B"])
def test_whole_layers_are_read_once(size: str, packing: Format | None) -> None:
    hidden, inner = SIZES[size]
    unique, lines = streamed(Case((1,), BF16, packing, hidden=hidden, inner=inner).executes())
    assert lines <= 1.25 * unique


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_agrees_with_float64(case: Case) -> None:
    """In f32: of 16 bits MLX's CPU makes sums that are as wrong as the bits allow."""
    exact = replace(case, dtype=F32, kind=F32)
    assert relative_error(gate_up(*exact.arguments), exact.wanted()) <= 2e-5


# Nine tokens, three bits, a float format, an odd width; plain, of no whole loads.
UNKNOWN = [
    Case((9,)),
    Case((3, 3)),
    Case((1,), packing=affine(3, 32)),
    Case((1,), packing=Format("mxfp8", 8, 32)),
    Case((1,), inner=65),
    Case((1,), packing=None, hidden=100),
]


@pytest.mark.parametrize("case", UNKNOWN, ids=str)
def test_what_the_kernel_does_not_know_takes_the_reference(case: Case) -> None:
    takes_the_reference(lambda: [gate_up(*case.arguments)])


def cases() -> list[Needed]:
    """A layer of 0.8B."""
    shown = []
    for N, packing in ((1, FOUR_BITS), (4, FOUR_BITS), (1, None)):
        hidden, inner = SIZES["0.8B"]
        x, matrix = Case((N,), BF16, packing, hidden=hidden, inner=inner).arguments
        title = f"gate_up: 0.8B layer, {N} token{'s' if N > 1 else ''}, {label(packing)}"
        read, written = nbytes(matrix) + x.nbytes, 2 * N * inner
        shown.append(Needed(title, partial(gate_up, x, matrix), read, written))
    return shown
