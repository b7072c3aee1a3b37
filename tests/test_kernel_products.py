"""`delta_project` and `gate_up`, few rows times a layer's matrices, executed from their text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

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
    nbytes,
    part_of_name,
    streamed,
    unpacked,
)
from metal_cpu import Launch
from qwen35_mlx.kernels.delta_project import delta_project
from qwen35_mlx.kernels.gate_up import gate_up
from qwen35_mlx.packing import Format

F32, F16, BF16 = TYPES.values()
# Of the sizes: hidden width, that of the dense feed-forward block, value heads.
SIZES = {
    "0.8B": (1024, 3584, 16),
    "2B": (2048, 6144, 16),
    "4B": (2560, 9216, 32),
    "9B": (4096, 12288, 32),
    "27B": (5120, 17408, 48),
    "122B-A10B": (3072, 0, 64),
}


def affine(bits: int, group: int) -> Format:
    return Format("affine", bits, group)


@dataclass(frozen=True)
class Case:
    """x `[*lead, hidden]` and matrices `[width, hidden]`; every axis of another size."""

    lead: tuple[int, ...]
    widths: tuple[int, ...]
    packings: tuple[Format | None, ...]
    dtype: mx.Dtype = F32
    kind: mx.Dtype = BF16  # of scales, biases and plain matrices
    hidden: int = 96

    def __str__(self) -> str:
        dtype, kind = (str(t).rpartition(".")[2] for t in (self.dtype, self.kind))
        lead, widths = ("x".join(map(str, sizes)) for sizes in (self.lead, self.widths))
        return f"{lead}-{dtype}-{'+'.join(map(label, self.packings))}-{kind}-{self.hidden}-{widths}"

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """x and the matrices."""
        draw = np.random.default_rng(self.hidden + len(self.lead))
        x = mlx_array(draw.normal(size=(*self.lead, self.hidden)), self.dtype)
        each = zip(self.widths, self.packings, strict=True)
        return x, *(draw_packed(draw, (width, self.hidden), p, self.kind) for width, p in each)

    def products(self) -> list[np.ndarray]:
        """Of x with each matrix, in float64."""
        x, *matrices = self.arguments
        return [as_float64(x) @ unpacked(matrix).T for matrix in matrices]


class Kernel(NamedTuple):
    name: str
    op: Callable[..., mx.array | tuple[mx.array, ...]]
    wanted: Callable[[Case], list[np.ndarray]]
    outputs: tuple[str, ...]
    widths: tuple[int, ...]  # of the layers that are tried in every format
    cases: list[Case]
    unknown: list[Case]

    def __str__(self) -> str:
        return self.name

    def result(self, case: Case) -> list[mx.array]:
        found = self.op(*case.arguments)
        return list(found) if isinstance(found, tuple) else [found]

    def executes(self, case: Case, **run: Any) -> Launch:
        """Its launch, which computes what it must and reads x and every matrix whole."""
        with executed(**run) as launches, using(self.name):
            result = self.result(case)
        (launch,) = launches
        for found, wanted in zip(result, self.wanted(case), strict=True):
            assert (found.dtype, found.shape) == (case.dtype, wanted.shape)
            assert excess(found, wanted) <= F32_ERROR
        assert streamed(launch)[0] == sum(map(nbytes, case.arguments[1:]))
        assert all(is_whole(launch.buffers[name]) for name in ("x", *self.outputs))
        return launch


def halves(case: Case) -> list[np.ndarray]:
    """`silu(gate) up` of a matrix with the rows of gate before those of up."""
    gate, up = np.split(case.products()[0], 2, axis=-1)
    return [silu(gate) * up]


# Rows of x in several axes; the widths at which a lane loads 1, 2 and 4 words, once and in two goes
# of which the second has one lane; outputs that end within a threadgroup and after one; for
# delta_project formats of which the second is another, and the other way round.
PROJECT = Kernel(
    "delta_project",
    delta_project,
    Case.products,
    ("qkvz", "ba"),
    (20, 12),
    cases=[
        Case((1, 1), (20, 8), (affine(4, 32), affine(8, 32))),
        Case((3,), (12, 4), (affine(8, 32), affine(4, 32)), F16, F16),
        Case((2, 2), (32, 16), (affine(4, 64), None), BF16, hidden=512),
        Case((8,), (16, 12), (affine(4, 128), affine(4, 64)), F32, F32, hidden=1024),
        Case((1, 5), (4, 4), (affine(8, 128), affine(8, 64)), BF16, F32, hidden=256),
        Case((7,), (28, 8), (affine(8, 64), affine(4, 64)), F16, hidden=640),
        Case((1,), (24, 16), (None, None), BF16, hidden=264),
        Case((4,), (36, 4), (None, affine(4, 64)), F32, F16, hidden=320),
        Case((1, 2), (12, 20), (None, None), F16, F32, hidden=8),
    ],
    # Nine rows of x, three bits, a float format, in either matrix; rows that are no multiple of 4;
    # a plain width of no whole loads.
    unknown=[
        Case((9,), (20, 8), (affine(4, 32), None)),
        Case((3, 3), (20, 8), (affine(4, 32), None)),
        Case((1,), (20, 8), (affine(3, 32), None)),
        Case((1,), (20, 8), (affine(4, 32), Format("mxfp8", 8, 32))),
        Case((1,), (22, 8), (affine(4, 32), None)),
        Case((1,), (20, 6), (affine(4, 32), None)),
        Case((1,), (20, 8), (None, None), hidden=100),
    ],
)
GATE_UP = Kernel(
    "gate_up",
    gate_up,
    halves,
    ("h",),
    (40,),
    cases=[
        Case((1, 1), (20,), (affine(4, 32),)),
        Case((3,), (20,), (affine(8, 32),), F16, F16),
        Case((2, 2), (32,), (affine(4, 64),), BF16, hidden=512),
        Case((8,), (12,), (affine(4, 128),), F32, F32, hidden=1024),
        Case((1, 5), (4,), (affine(8, 128),), BF16, F32, hidden=256),
        Case((7,), (28,), (affine(8, 64),), F16, hidden=640),
        Case((1,), (12,), (None,), BF16, hidden=264),
        Case((4,), (36,), (None,), F32, F16, hidden=320),
        Case((1, 2), (24,), (None,), F16, F32, hidden=8),
    ],
    unknown=[
        Case((9,), (20,), (affine(4, 32),)),
        Case((3, 3), (20,), (affine(4, 32),)),
        Case((1,), (20,), (affine(3, 32),)),
        Case((1,), (20,), (Format("mxfp8", 8, 32),)),
        Case((1,), (130,), (affine(4, 32),)),
        Case((1,), (20,), (None,), hidden=100),
    ],
)
BOTH = pytest.mark.parametrize("kernel", [PROJECT, GATE_UP], ids=str)
CASES = pytest.mark.parametrize(
    "kernel, case", [(k, case) for k in (PROJECT, GATE_UP) for case in k.cases], ids=str
)


@CASES
@pytest.mark.parametrize("run", FEW_RUNS, ids=lambda run: str(run["schedule"]))
def test_executed_agrees_with_float64(kernel: Kernel, case: Case, run: dict[str, Any]) -> None:
    kernel.executes(case, **run)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("kind", [F32, F16, BF16])
@pytest.mark.parametrize(
    "packing",
    [None, *(affine(bits, group) for bits in (4, 8) for group in (32, 64, 128))],
    ids=part_of_name,
)
def test_every_format_and_type_for_every_number_of_tokens(
    packing: Format | None, kind: mx.Dtype, dtype: mx.Dtype, kernel: Kernel
) -> None:
    for N in range(1, 9):
        packings = (packing, [None, affine(8, 32), affine(4, 128)][N % 3])[: len(kernel.widths)]
        case = Case((N,), kernel.widths, packings, dtype, kind, hidden=384)
        kernel.executes(case, **FEW_RUNS[N % 3])


def layer(kernel: Kernel, size: str, N: int, *packings: Format | None, part: int = 1) -> Case:
    """Of a size, bf16; `part`: with that fraction of the rows of the large matrix."""
    hidden, inner, v_heads = SIZES[size]
    qkvz = 2 * 128 * (16 + v_heads)
    widths = (qkvz // part, 2 * v_heads) if kernel is PROJECT else (2 * inner // part,)
    return Case((N,), widths, packings, BF16, hidden=hidden)


def default(kernel: Kernel) -> tuple[Format | None, ...]:
    """As the converter packs it in 4 bits."""
    return (FOUR_BITS, None)[: len(kernel.widths)]


@pytest.mark.parametrize("N", [1, 4])
@pytest.mark.parametrize(
    "kernel, size",
    [(k, size) for k in (PROJECT, GATE_UP) for size in SIZES if k is PROJECT or SIZES[size][1]],
    ids=str,
)
def test_true_widths_are_read_once(kernel: Kernel, size: str, N: int) -> None:
    """And a token's x for every four rows: two bytes beside four times four bits and a scale."""
    launch = kernel.executes(layer(kernel, size, N, *default(kernel), part=32))
    unique, lines = streamed(launch)
    assert lines <= 1.25 * unique
    assert launch.buffers["x"].read.lines <= lines * N * 0.9


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "packing", [None, FOUR_BITS, affine(4, 128), affine(8, 32)], ids=part_of_name
)
@pytest.mark.parametrize("size", ["0.8B", "2B"])
def test_whole_layers_are_read_once(size: str, packing: Format | None, kernel: Kernel) -> None:
    launch = kernel.executes(layer(kernel, size, 1, packing, *default(kernel)[1:]))
    unique, lines = streamed(launch)
    assert lines <= 1.25 * unique


@CASES
def test_reference_agrees_with_float64(kernel: Kernel, case: Case) -> None:
    """In f32: of 16 bits MLX's CPU makes sums that are as wrong as the bits allow."""
    exact = replace(case, dtype=F32, kind=F32)
    for found, wanted in zip(kernel.result(exact), kernel.wanted(exact), strict=True):
        assert relative_error(found, wanted) <= 2e-5


@pytest.mark.parametrize(
    "kernel, case", [(k, case) for k in (PROJECT, GATE_UP) for case in k.unknown], ids=str
)
def test_what_the_kernel_does_not_know_takes_the_reference(kernel: Kernel, case: Case) -> None:
    takes_the_reference(lambda: kernel.result(case))


def cases() -> list[Needed]:
    """A layer of 0.8B."""
    shown = []
    for kernel in (PROJECT, GATE_UP):
        for N, packing in ((1, FOUR_BITS), (4, FOUR_BITS), (1, None)):
            case = layer(kernel, "0.8B", N, packing, *default(kernel)[1:])
            x, *matrices = case.arguments
            tokens = f"{N} token{'s' if N > 1 else ''}"
            title = f"{kernel.name}: 0.8B layer, {tokens}, {label(packing)}"
            written = sum(found.nbytes for found in kernel.result(case))
            read = sum(map(nbytes, matrices)) + x.nbytes
            shown.append(Needed(title, partial(kernel.op, *case.arguments), read, written))
    return shown
