"""Norm, rotation and layout before attention: the Metal source and the MLX form against float64."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    relative_error,
    rounding,
    touched,
    using,
)
from metal_cpu import Launch
from qwen35_mlx.kernels.attention_prepare import attention_prepare, launch, reference

ARITHMETIC = 1e-6  # of the two products of a rotation, whose difference may cancel; f32
EPS = 1e-6


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    Hk: int
    D: int
    pairs: int


# A head narrower than a simdgroup, one or two or eight dims per lane, lanes left over; weights,
# cosines and the whole input on both sides of 8 elements; no dims that pass.
SHAPES = [
    Shape(1, 1, 1, 1, 2, 1),
    Shape(1, 7, 2, 1, 4, 1),
    Shape(2, 4, 3, 1, 8, 2),
    Shape(2, 3, 5, 4, 16, 6),
    Shape(1, 2, 3, 2, 31, 5),
    Shape(2, 1, 6, 3, 32, 16),
    Shape(1, 3, 4, 2, 48, 8),
    Shape(2, 3, 4, 1, 64, 10),
    Shape(1, 1, 8, 2, 256, 32),
]
FAMILY = [Shape(1, 1, 16, 4, 256, 32), Shape(2, 5, 24, 4, 256, 32), Shape(1, 3, 32, 2, 256, 32)]


class Inputs(NamedTuple):
    qkv: mx.array
    q_weight: mx.array
    k_weight: mx.array
    cos: mx.array
    sin: mx.array


def inputs(s: Shape, kind: str, scale: float = 1.0) -> Inputs:
    draw = np.random.default_rng(s.D + s.T)
    qkv = draw.normal(size=(s.B, s.T, 2 * s.D * (s.H + s.Hk))) * scale
    weights = draw.normal(size=(2, s.D)) + 1
    angle = draw.uniform(-4, 4, size=(s.B, 1, s.T, s.pairs))
    rest = (mlx_array(a) for a in (*weights, np.cos(angle), np.sin(angle)))
    return Inputs(mlx_array(qkv, TYPES[kind]), *rest)


def call(
    function: Callable[..., tuple[mx.array, mx.array, mx.array]], s: Shape, a: Inputs
) -> tuple[mx.array, mx.array, mx.array]:
    return function(*a, heads=s.H, kv_heads=s.Hk, eps=EPS)


def rounded(x: np.ndarray, kind: mx.Dtype) -> np.ndarray:
    """In f32 nothing is rounded on purpose."""
    return x if kind == mx.float32 else as_float64(mlx_array(x, kind))


def turned(x: np.ndarray, weight: np.ndarray, a: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """`[B, T, H, D]` normalised, rounded and rotated as `[B, H, T, D]`, and what it may be off.

    That is the error of f32, and where a normalised value is a tie between two of its type, either.
    """
    kind = a.qkv.dtype
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    x = x.transpose(0, 2, 1, 3)
    tied = np.abs(rounded(x * (1 + ARITHMETIC), kind) - rounded(x * (1 - ARITHMETIC), kind))
    x = rounded(x, kind)
    cos, sin = as_float64(a.cos), as_float64(a.sin)
    pairs = cos.shape[-1]
    out, slack = x.copy(), 2 * ARITHMETIC * np.abs(x) + (tied if kind != mx.float32 else 0)
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    out[..., :pairs] = first * cos - second * sin
    out[..., pairs : 2 * pairs] = second * cos + first * sin
    both = slack[..., :pairs] + slack[..., pairs : 2 * pairs]
    slack[..., :pairs] = slack[..., pairs : 2 * pairs] = both
    return out, slack


def check(found: tuple[mx.array, mx.array, mx.array], s: Shape, a: Inputs) -> None:
    kind = a.qkv.dtype
    qkv = as_float64(a.qkv)
    rows = qkv[..., : 2 * s.H * s.D].reshape(s.B, s.T, s.H, 2, s.D)
    keys, values = np.split(qkv[..., 2 * s.H * s.D :].reshape(s.B, s.T, 2 * s.Hk, s.D), 2, axis=2)
    q, gate, kv = found
    assert q.dtype == gate.dtype == kv.dtype == a.qkv.dtype
    assert q.shape == (s.B, s.H, s.T, s.D) and kv.shape == (2, s.B, s.Hk, s.T, s.D)
    assert np.array_equal(as_float64(gate), rows[..., 1, :].reshape(s.B, s.T, -1))
    assert np.array_equal(as_float64(kv[1]), values.transpose(0, 2, 1, 3))
    for got, rows_of, weight in [(q, rows[..., 0, :], a.q_weight), (kv[0], keys, a.k_weight)]:
        wanted, slack = turned(rows_of, as_float64(weight), a)
        error = np.abs(as_float64(got) - wanted)
        assert (error <= rounding(wanted, kind) + slack).all()
        assert kind != mx.float32 or relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES + FAMILY)
def test_the_reference_agrees_with_float64(shape: Shape, kind: str) -> None:
    arrays = inputs(shape, kind)
    check(call(reference, shape, arrays), shape, arrays)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_float64(
    shape: Shape, kind: str, metal_backend: list[Launch] | None
) -> None:
    arrays = inputs(shape, kind)
    check(call(launch, shape, arrays), shape, arrays)
    clean(metal_backend)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 0.0])
def test_small_heads_are_held_by_eps(scale: float, metal_backend: list[Launch] | None) -> None:
    shape = Shape(1, 3, 4, 2, 64, 8)
    arrays = inputs(shape, "float32", scale)
    check(call(launch, shape, arrays), shape, arrays)
    clean(metal_backend)


@EVERY_RUN
def test_no_order_of_threads_matters(run: dict[str, Any]) -> None:
    shape = Shape(2, 3, 5, 4, 64, 6)
    arrays = inputs(shape, "bfloat16")
    with executed(**run):
        check(call(launch, shape, arrays), shape, arrays)


@pytest.mark.slow
@EVERY_RUN
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES + FAMILY)
def test_every_shape_type_and_order(shape: Shape, kind: str, run: dict[str, Any]) -> None:
    arrays = inputs(shape, kind)
    with executed(**run):
        check(call(launch, shape, arrays), shape, arrays)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    with executed() as launches, using("attention_prepare"):
        for shape in [
            Shape(1, 1, 2, 1, 40, 4),
            Shape(1, 1, 2, 1, 33, 4),
            Shape(1, 1, 2, 1, 40, 5),
        ]:
            arrays = inputs(shape, "bfloat16")
            check(call(attention_prepare, shape, arrays), shape, arrays)
        assert len(launches) == 1


def cases() -> list[Needed]:
    """Heads of the family."""
    result: list[Needed] = []
    for H, Hk, T in [(8, 2, 1), (16, 4, 1), (24, 4, 1), (32, 2, 1), (32, 2, 5)]:
        shape = Shape(1, T, H, Hk, 256, 32)
        arrays = inputs(shape, "bfloat16")
        read = sum(a.nbytes for a in arrays) + 4
        label = f"attention_prepare H {H} Hk {Hk} D 256 T {T} bf16"
        result.append(Needed(label, partial(call, launch, shape, arrays), read, arrays.qkv.nbytes))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_bytes_are_those_the_operation_must_touch(case: Needed) -> None:
    found = touched(case)
    assert found.buffers["qkv"].read.lines == found.buffers["qkv"].read.unique
    # Every head of q and k asks for its weight and its token's angles, which are cached.
    heads = found.reductions
    rest = [found.buffers[name].read.lines for name in ("q_weight", "k_weight", "cos", "sin")]
    assert sum(rest) == heads * (4 * 256 + 2 * 4 * 32)
    assert (found.shuffles, found.barriers) == (8 * heads, 0)
