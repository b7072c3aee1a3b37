"""The router, its reference and its Metal text, against the definition in float64."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import as_float64, takes_the_reference
from matrices import is_whole
from moe_kernels import WAYS, launched, route_data, way
from qwen35_mlx.kernels.moe_route import moe_route

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# Of weights and gates, which are f32 whatever x is: exp, a sum of K, a sum of `hidden`.
ERROR = 1e-5

# N, E, K, hidden: a lane holds 1 to 16 logits; E is no multiple of 32; N * K on both sides of 8.
CASES = [
    (1, 256, 8, 2048, BF16),
    (1, 512, 10, 3072, BF16),
    (3, 512, 10, 96, F32),
    (2, 4, 2, 8, F16),
    (5, 37, 3, 36, BF16),
    (1, 8, 8, 132, F32),
    (17, 33, 32, 20, F16),
]


@WAYS
@pytest.mark.parametrize("N, E, K, hidden, dtype", CASES)
def test_chosen_and_their_weights(
    N: int, E: int, K: int, hidden: int, dtype: mx.Dtype, run: dict[str, Any] | None
) -> None:
    data = logits, _, x, gate = route_data(N, E, K, hidden, dtype)
    with way(run) as launches:
        experts, weights, shared = moe_route(*data)
    exact_logits = as_float64(logits)
    best = np.argsort(-exact_logits, axis=-1, kind="stable")[:, :K]
    assert np.array_equal(np.array(experts), best)
    p = np.exp(exact_logits)
    chosen = np.take_along_axis(p, best, -1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=ERROR)
    dot = as_float64(x) @ as_float64(gate)
    np.testing.assert_allclose(shared, 1 / (1 + np.exp(-dot)), rtol=ERROR)
    if launches:
        assert all(is_whole(buffer) for buffer in launches[0].buffers.values())
        if hidden >= 2048:
            assert launches[0].read.lines == logits.nbytes + x.nbytes + gate.nbytes


@WAYS
def test_of_equal_ones_the_lowest_come_first(run: dict[str, Any] | None) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[0, 3::2] = -0.0
    logits[1, [66, 5, 40]] = 2.5
    logits[2] = -np.inf
    logits[2, 69] = -7e4
    _, K, x, gate = route_data(3, 70, 5, 12, F32)
    with way(run):
        experts, weights, _ = moe_route(mx.array(logits), K, x, gate)
    assert np.array(experts).tolist() == [[0, 1, 2, 3, 4], [5, 40, 66, 0, 1], [69, 0, 1, 2, 3]]
    np.testing.assert_allclose(weights[0], 0.2, rtol=ERROR)
    np.testing.assert_allclose(weights[2], [1, 0, 0, 0, 0])


@WAYS
def test_large_scores_do_not_overflow(run: dict[str, Any] | None) -> None:
    logits, K, x, gate = route_data(4, 64, 6, 16, F32)
    with way(run):
        _, weights, shared = moe_route(1e4 * logits, K, 1e4 * x, gate)
    np.testing.assert_allclose(np.array(weights).sum(-1), 1, rtol=ERROR)
    assert np.isin(np.round(np.array(shared), 3), [0, 1]).all()


def test_broken_scores_are_seen_and_name_existing_experts() -> None:
    logits, K, x, gate = route_data(3, 40, 4, 16, F32)
    logits[1, 11] = float("nan")
    logits[2] = -mx.array(float("nan"))
    with launched():
        experts, weights, _ = moe_route(logits, K, x, gate)
    assert np.isfinite(np.array(weights[0])).all() and np.isnan(np.array(weights[1:])).all()
    for row in np.array(experts):
        assert len(set(row)) == K and row.max() < 40


@pytest.mark.parametrize(
    "N, E, K, hidden", [(2, 1056, 3, 8), (2, 64, 33, 8), (2, 64, 3, 10)], ids=["E", "K", "hidden"]
)
def test_what_the_kernel_does_not_know_takes_the_reference(
    N: int, E: int, K: int, hidden: int
) -> None:
    data = route_data(N, E, K, hidden, F32)
    takes_the_reference(lambda: moe_route(*data))
