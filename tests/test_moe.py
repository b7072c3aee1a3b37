"""Routing and expert products against their definitions in float64."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.kernels.moe import by_expert, grouped_matmul, route
from qwen35_mlx.kernels.packed import MAX_TOKENS
from qwen35_mlx.layers.moe import GroupedLinear
from qwen35_mlx.packing import Format

E, K, DIMS_IN, DIMS_OUT = 7, 3, 128, 40
# Relative L2. f32: sums of 128 terms; half types: one rounding of input and output.
TOLERANCE = {mx.float32: 1e-6, mx.bfloat16: 8e-3, mx.float16: 1e-3}


def test_route_picks_the_most_likely_and_renormalises() -> None:
    logits = np.random.default_rng(0).normal(size=(11, E))
    chosen, weights = (np.array(a) for a in route(mx.array(logits.astype(np.float32)), K))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row, experts, given in zip(p, chosen, weights, strict=True):
        best = np.argsort(-row)[:K]
        assert sorted(experts) == sorted(best)
        np.testing.assert_allclose(given, row[experts] / row[best].sum(), rtol=1e-5)


def test_pairs_come_back_in_their_order() -> None:
    chosen = mx.array(np.random.default_rng(1).integers(0, E, (13, K)).astype(np.uint32))
    tokens, experts, back = by_expert(chosen)
    assert np.all(np.diff(np.array(experts).astype(int)) >= 0)
    assert np.array_equal(np.array(experts[back]).reshape(13, K), np.array(chosen))
    assert np.array_equal(np.array(tokens[back]).reshape(13, K)[:, 0], np.arange(13))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("packing", [None, Format("affine", 4, 32), Format("affine", 8, 64)])
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("N", [2, MAX_TOKENS * K])
def test_each_row_meets_its_own_matrix(
    dtype: mx.Dtype, packing: Format | None, N: int, is_sorted: bool
) -> None:
    draw = np.random.default_rng(N)
    weight = mx.array(draw.normal(size=(E, DIMS_OUT, DIMS_IN)).astype(np.float32)).astype(dtype)
    layer = GroupedLinear(E, DIMS_IN, DIMS_OUT)
    if packing:
        layer.pack(packing)
        parts = mx.quantize(weight, packing.group_size, packing.bits, packing.mode)
        for name, value in zip(("weight", "scales", "biases"), parts, strict=True):
            layer[name] = value
        weight = mx.dequantize(
            *parts, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
        )
    else:
        layer.weight = weight
    # As the layers call it: sorted pairs each with a row of their own, or K experts for every row.
    rows: tuple[int, ...] = (N, 1, DIMS_IN)
    chosen = draw.integers(0, E, N)
    if is_sorted:
        chosen.sort()
    else:
        rows = (N, 1, 1, DIMS_IN)
        chosen = draw.permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K]
        assert np.any(np.diff(chosen, axis=1) < 0)
    x = mx.array(draw.normal(size=rows).astype(np.float32)).astype(dtype)
    found = grouped_matmul(x, mx.array(chosen.astype(np.uint32)), is_sorted, *layer.matrices)
    assert found.dtype == dtype and found.shape == (*chosen.shape, 1, DIMS_OUT)
    exact_x, exact_w = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, weight))
    wanted = exact_x @ exact_w[chosen].swapaxes(-1, -2)
    error = np.linalg.norm(np.array(found.astype(mx.float32)) - wanted)
    assert error < TOLERANCE[dtype] * np.linalg.norm(wanted)
