"""Residual add and RMS norm: the Metal source and the MLX form against float64."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import (
    EVERY_RUN,
    TYPES,
    Needed,
    as_float64,
    clean,
    executed,
    mlx_array,
    rounding,
    touched,
    using,
)
from metal_cpu import Launch
from qwen35_mlx.kernels.add_norm import _plan, add_norm, launch, reference

ARITHMETIC = 1e-5  # f32 sums of up to 5,120 squares
EPS = 1e-6
# Rows and width: under 8 elements in all or in the weight; reads of 1 and of 4 elements; one
# simdgroup and two; one step and two, each at its edge.
SHAPES = [
    ((1,), 1),
    ((1, 1), 7),
    ((3,), 8),
    ((2, 3), 33),
    ((5,), 128),
    ((1, 3), 132),
    ((2,), 641),
    ((2, 1), 1024),
]
WIDE = [
    ((3,), 639),
    ((2,), 640),
    ((1, 1), 1000),
    ((3, 1, 2), 1283),
    ((1, 1), 2560),
    ((2,), 2564),
    ((3,), 4096),
    ((1, 2), 5120),
    ((4,), 31),
    ((4,), 32),
]


def inputs(
    rows: tuple[int, ...], hidden: int, kind: str, scale: float = 1.0
) -> tuple[mx.array, mx.array, mx.array]:
    draw = np.random.default_rng(hidden)
    x, y = draw.normal(size=(2, *rows, hidden)) * scale
    weight = draw.normal(size=hidden) + 1
    return mlx_array(x, TYPES[kind]), mlx_array(y, TYPES[kind]), mlx_array(weight)


def definition(x: mx.array, y: mx.array, weight: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """The sum, rounded as one addition in f32 is, and its norm in float64."""
    exact = np.array(x.astype(mx.float32)) + np.array(y.astype(mx.float32))
    total = as_float64(mx.array(exact).astype(x.dtype))
    scale = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + EPS)
    return total, total * scale * as_float64(weight)


def check(found: tuple[mx.array, mx.array], x: mx.array, y: mx.array, weight: mx.array) -> None:
    total, normed = definition(x, y, weight)
    assert found[0].dtype == found[1].dtype == x.dtype
    assert found[0].shape == found[1].shape == x.shape
    assert np.array_equal(as_float64(found[0]), total)
    error = np.abs(as_float64(found[1]) - normed)
    assert (error <= rounding(normed, x.dtype) + ARITHMETIC * np.abs(normed)).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES + WIDE)
def test_the_reference_agrees_with_float64(rows: tuple[int, ...], hidden: int, kind: str) -> None:
    arrays = inputs(rows, hidden, kind)
    check(reference(*arrays, EPS), *arrays)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_the_kernel_agrees_with_float64(
    rows: tuple[int, ...], hidden: int, kind: str, metal_backend: list[Launch] | None
) -> None:
    arrays = inputs(rows, hidden, kind)
    found = launch(*arrays, EPS)
    check(found, *arrays)
    clean(metal_backend)


@pytest.mark.parametrize("scale", [1e-3, 1e-8, 0.0, 100.0])
def test_small_rows_are_held_by_eps_and_large_ones_do_not_overflow(
    scale: float, metal_backend: list[Launch] | None
) -> None:
    arrays = inputs((3,), 132, "float16" if scale == 100 else "float32", scale)
    check(launch(*arrays, EPS), *arrays)
    clean(metal_backend)


@EVERY_RUN
def test_no_order_of_threads_matters(run: dict[str, Any]) -> None:
    arrays = inputs((2,), 644, "bfloat16")
    with executed(**run):
        check(launch(*arrays, EPS), *arrays)


@pytest.mark.slow
@EVERY_RUN
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES + WIDE)
def test_every_shape_type_and_order(
    rows: tuple[int, ...], hidden: int, kind: str, run: dict[str, Any]
) -> None:
    arrays = inputs(rows, hidden, kind)
    with executed(**run):
        check(launch(*arrays, EPS), *arrays)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    x, y, weight = inputs((1,), 36, "bfloat16")
    with executed() as launches, using("add_norm"):
        add_norm(x, y, weight, EPS)
        assert len(launches) == 1
        add_norm(x, y.astype(mx.float32), weight, EPS)
        add_norm(*inputs((1,), 8 * 640 + 1, "bfloat16"), EPS)
        assert len(launches) == 1


def test_threads_cover_the_row_once() -> None:
    for hidden in [*range(1, 200), *range(1024, 5124, 4), 5119, 20480]:
        threads, width, steps = _plan(hidden)
        assert threads % 32 == 0 and threads <= 640 and hidden % width == 0
        assert threads * width * steps >= hidden > threads * width * (steps - 1)


def cases() -> list[Needed]:
    """Hidden sizes of the family."""
    result: list[Needed] = []
    for hidden, rows in [(1024, 1), (2560, 1), (4096, 1), (5120, 1), (5120, 5)]:
        arrays = inputs((rows,), hidden, "bfloat16")
        read = sum(a.nbytes for a in arrays) + 4
        label, op = f"add_norm {rows} x {hidden} bf16", partial(launch, *arrays, EPS)
        result.append(Needed(label, op, read, 2 * arrays[0].nbytes))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_bytes_are_those_the_operation_must_touch(case: Needed) -> None:
    found = touched(case)
    for name in ("x", "y"):
        assert found.buffers[name].read.lines == found.buffers[name].read.unique
    # Each row asks for the weight.
    weight = found.buffers["weight"].read
    assert weight.lines == found.grid[1] * weight.unique
