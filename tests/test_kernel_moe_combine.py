"""Sorted rows back to their tokens, weighted and summed, executed from the Metal text."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import as_float64, takes_the_reference
from matrices import F32_ERROR, excess, is_whole
from moe_kernels import WAYS, combine_data, way
from qwen35_mlx.kernels.moe_combine import moe_combine

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# N, E, K, hidden: as few tokens as are served; widths on both sides of a threadgroup's 1,024.
CASES = [
    (8, 5, 3, 12, F32),
    (11, 5, 2, 1028, F16),
    (64, 12, 8, 96, BF16),
    (13, 7, 4, 2048, F32),
    (9, 16, 10, 1024, BF16),
]


def wanted(data: tuple[mx.array, ...]) -> np.ndarray:
    y, _, weights, shared, shared_out = (as_float64(a) for a in data)
    rows = y[np.array(data[1])].reshape(*weights.shape, -1)
    return np.einsum("nk,nkh->nh", weights, rows) + shared[:, None] * shared_out


@WAYS
@pytest.mark.parametrize("N, E, K, hidden, dtype", CASES)
def test_agrees_with_float64(
    N: int, E: int, K: int, hidden: int, dtype: mx.Dtype, run: dict[str, Any] | None
) -> None:
    data = combine_data(N, E, K, hidden, dtype)
    with way(run) as launches:
        found = moe_combine(*data)
    assert found.dtype == dtype
    assert excess(found, wanted(data)) <= F32_ERROR
    if not launches:
        return
    buffers = launches[0].buffers
    assert all(is_whole(buffer) for buffer in buffers.values())
    for name in ("y_sorted", "shared_out"):
        # A simdgroup reads at least 256 bytes side by side; rows may straddle lines.
        assert buffers[name].read.lines <= 1.25 * buffers[name].read.unique + 64 * (N * K + N)


@pytest.mark.parametrize("N, hidden", [(8, 4), (8, 14), (7, 12), (1, 12)])
def test_what_the_kernel_does_not_know_takes_the_reference(N: int, hidden: int) -> None:
    data = combine_data(N, 5, 2, hidden, F32)
    takes_the_reference(lambda: [moe_combine(*data)])
