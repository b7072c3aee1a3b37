"""Data, float64 definitions and cases of the kernels of the mixture of experts."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import FEW_RUNS, Needed, as_float64, executed, mlx_array, silu, using
from matrices import FOUR_BITS, draw_packed, label, nbytes, unpacked
from metal_cpu import Launch
from qwen35_mlx.kernels.moe import by_expert
from qwen35_mlx.kernels.moe_combine import moe_combine
from qwen35_mlx.kernels.moe_down import moe_down
from qwen35_mlx.kernels.moe_gate_up import moe_gate_up
from qwen35_mlx.kernels.moe_route import moe_route
from qwen35_mlx.kernels.packed import Packed
from qwen35_mlx.packing import Format

KERNELS = ("moe_route", "moe_gate_up", "moe_down", "moe_combine")


@contextmanager
def launched(**run: Any) -> Iterator[list[Launch]]:
    """An op launches its kernel, once."""
    with executed(**run) as launches, using(*KERNELS):
        yield launches
    assert len(launches) == 1


# The reference, or the kernel run in one of the ways.
WAYS = pytest.mark.parametrize(
    "run", [None, *FEW_RUNS], ids=["reference", "forward", "reverse", "random"]
)


def way(run: dict[str, Any] | None) -> AbstractContextManager[list[Launch] | None]:
    return nullcontext() if run is None else launched(**run)


@dataclass(frozen=True)
class Case:
    """One mixture of experts with its tokens; small by default, every axis of another size."""

    N: int
    dtype: mx.Dtype = mx.float32
    routed: Format | None = Format("affine", 4, 32)
    shared: Format | None = Format("affine", 8, 32)
    scales: mx.Dtype = mx.bfloat16  # also the type of plain matrices
    E: int = 7
    K: int = 3
    hidden: int = 96
    inner: int = 64
    shared_inner: int = 160
    crowded: bool = False  # all tokens choose among as few experts as they can

    def __str__(self) -> str:
        kind, scales = (str(t).rpartition(".")[2] for t in (self.dtype, self.scales))
        formats = "+".join(map(label, (self.routed, self.shared)))
        return f"N{self.N}-{kind}-{formats}-{scales}-{self.hidden}x{self.inner}-K{self.K}"

    @cached_property
    def data(self) -> "Data":
        return Data(self)


class Data:
    """The arrays of a case."""

    def __init__(self, case: Case) -> None:
        self.case, self.draw = case, np.random.default_rng(case.N + 8 * case.K)
        draw, N, K = self.draw, case.N, case.K
        most = K + 1 if case.crowded else case.E
        rows = [draw.permutation(most)[:K] for _ in range(N)]
        self.experts = mx.array(np.stack(rows).astype(np.uint32))
        self.x = self.normal((N, case.hidden))
        self.h = self.normal((N, K * case.inner + case.shared_inner))
        self.weights = mlx_array(draw.dirichlet(np.ones(K), N))
        self.shared = mlx_array(draw.uniform(0, 1, N))
        self.gate_up = self.matrices((case.E, 2 * case.inner, case.hidden), case.routed)
        self.shared_gate_up = self.matrices((2 * case.shared_inner, case.hidden), case.shared)
        self.down = self.matrices((case.E, case.hidden, case.inner), case.routed)
        self.shared_down = self.matrices((case.hidden, case.shared_inner), case.shared)

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        return mlx_array(self.draw.normal(size=shape), self.case.dtype)

    def matrices(self, shape: tuple[int, ...], packing: Format | None) -> Packed:
        return draw_packed(self.draw, shape, packing, self.case.scales)

    def chosen(self) -> np.ndarray:
        """The experts that some token chose, each once."""
        return np.unique(np.array(self.experts))

    def gate_up_result(self) -> mx.array:
        return moe_gate_up(self.x, self.experts, self.gate_up, self.shared_gate_up)

    def gate_up_wanted(self) -> np.ndarray:
        """`h` in float64."""
        case, x = self.case, as_float64(self.x)
        h = np.zeros(self.h.shape)
        for expert in self.chosen():
            gate, up = np.split(unpacked(self.gate_up, int(expert)), 2)
            for n, k in zip(*np.nonzero(np.array(self.experts) == expert), strict=True):
                at = slice(k * case.inner, (k + 1) * case.inner)
                h[n, at] = silu(gate @ x[n]) * (up @ x[n])
        gate, up = np.split(unpacked(self.shared_gate_up), 2)
        h[:, case.K * case.inner :] = silu(x @ gate.T) * (x @ up.T)
        return h

    def down_result(self) -> mx.array:
        return moe_down(
            self.h, self.experts, self.weights, self.shared, self.down, self.shared_down
        )

    def down_wanted(self) -> np.ndarray:
        """`y` in float64."""
        case, h, weights = self.case, as_float64(self.h), as_float64(self.weights)
        y = as_float64(self.shared)[:, None] * (
            h[:, case.K * case.inner :] @ unpacked(self.shared_down).T
        )
        for expert in self.chosen():
            down = unpacked(self.down, int(expert))
            for n, k in zip(*np.nonzero(np.array(self.experts) == expert), strict=True):
                y[n] += weights[n, k] * (down @ h[n, k * case.inner : (k + 1) * case.inner])
        return y

    def streamed_bytes(self, matrix: Packed, shared: Packed) -> int:
        """Bytes of the matrices that the tokens need, each once."""
        experts = len(self.chosen())
        return experts * nbytes(matrix) // matrix.weight.shape[0] + nbytes(shared)


def route_data(
    N: int, E: int, K: int, hidden: int, dtype: mx.Dtype
) -> tuple[mx.array, int, mx.array, mx.array]:
    """Arguments of `moe_route`; with 16-bit types many logits are equal."""
    draw = np.random.default_rng(N + E)
    logits, x = (mlx_array(draw.normal(size=shape), dtype) for shape in ((N, E), (N, hidden)))
    gate = mx.array(draw.normal(size=hidden).astype(np.float32) / np.sqrt(np.float32(hidden)))
    return logits, K, x, gate


def combine_data(
    N: int, E: int, K: int, hidden: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Arguments of `moe_combine`."""
    draw = np.random.default_rng(N + K)
    chosen = mx.array(np.stack([draw.permutation(E)[:K] for _ in range(N)]).astype(np.uint32))
    y, shared_out = (mlx_array(draw.normal(size=(rows, hidden)), dtype) for rows in (N * K, N))
    weights = mlx_array(draw.dirichlet(np.ones(K), N))
    shared = mlx_array(draw.uniform(0, 1, N))
    return y, by_expert(chosen)[2], weights, shared, shared_out


# K, hidden and both inner widths.
SIZES = {
    "35B-A3B": (8, 2048, 512),
    "122B-A10B": (8, 3072, 1024),
    "397B-A17B": (10, 4096, 1024),
}


def true_width(name: str, N: int, packing: Format | None = FOUR_BITS) -> Case:
    """A layer of one of the sizes, bf16, all matrices in one format, with 12 of its experts."""
    K, hidden, inner = SIZES[name]
    return Case(
        N, mx.bfloat16, packing, packing, E=12, K=K, hidden=hidden, inner=inner, shared_inner=inner
    )


# Every size in every format, every number of tokens, and both extremes; minutes, hence slow tests.
TRUE_WIDTHS: list[tuple[str, int, Format | None]] = [
    *(
        (size, 1, Format("affine", bits, group))
        for size in SIZES
        for bits in (4, 8)
        for group in (32, 64, 128)
    ),
    *((size, 1, None) for size in SIZES),
    *(("35B-A3B", N, packing) for N in range(2, 9) for packing in (FOUR_BITS, None)),
    ("35B-A3B", 8, Format("affine", 4, 128)),
    ("397B-A17B", 8, Format("affine", 4, 128)),
]


def cases() -> list[Needed]:
    """A layer of 35B-A3B."""
    shown: list[Needed] = []
    for N, packing in ((1, FOUR_BITS), (4, FOUR_BITS), (1, None)):
        data = true_width("35B-A3B", N, packing).data
        ids = data.experts.nbytes
        read = data.streamed_bytes(data.gate_up, data.shared_gate_up) + data.x.nbytes + ids
        tokens = f"{N} token{'s' if N > 1 else ''}"
        layer = f"35B-A3B layer, {tokens}, {len(data.chosen())} experts, {label(packing)}"
        shown.append(Needed(f"moe_gate_up: {layer}", data.gate_up_result, read, data.h.nbytes))
        read = data.streamed_bytes(data.down, data.shared_down) + data.h.nbytes + ids
        read += data.weights.nbytes + data.shared.nbytes
        shown.append(Needed(f"moe_down: {layer}", data.down_result, read, data.x.nbytes))
    logits, K, x, gate = route_data(1, 256, 8, 2048, mx.bfloat16)
    read = logits.nbytes + x.nbytes + gate.nbytes
    route = partial(moe_route, logits, K, x, gate)
    shown.append(Needed("moe_route: 35B-A3B layer, 1 token", route, read, 8 * K + 4))
    rows = combine_data(64, 256, 8, 2048, mx.bfloat16)
    combine = partial(moe_combine, *rows)
    read = sum(a.nbytes for a in rows)
    shown.append(Needed("moe_combine: 35B-A3B layer, 64 tokens", combine, read, rows[4].nbytes))
    return shown
