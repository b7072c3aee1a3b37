"""Residual add and RMS norm: the Metal source and the MLX form against float64."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import Launch, emulated, require_clean
from qwen35_mlx.kernels import library
from qwen35_mlx.kernels.add_norm import _plan, add_norm, launch, reference

TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Half a unit in the last place of the output, and 1e-5 for f32 sums of up to 5,120 squares.
TOLERANCE = {"float32": 1e-5, "float16": 2**-11 + 1e-5, "bfloat16": 2**-8 + 1e-5}
SMALLEST = {"float32": 0.0, "float16": 2**-25, "bfloat16": 0.0}  # half of the subnormals' step
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
SCHEDULES = ["forward", "reverse", 7]  # the seed of a random one
# In which order simd_sum adds is not known, so each comes with another.
REDUCE = dict(zip(SCHEDULES, ["butterfly", "ascending", "random"], strict=True))


def inputs(
    rows: tuple[int, ...], hidden: int, kind: str, scale: float = 1.0
) -> tuple[mx.array, mx.array, mx.array]:
    draw = np.random.default_rng(hidden)
    x, y = draw.normal(size=(2, *rows, hidden)) * scale
    weight = draw.normal(size=hidden) + 1
    as_array = [mx.array(a.astype(np.float32)).astype(TYPES[kind]) for a in (x, y)]
    return as_array[0], as_array[1], mx.array(weight.astype(np.float32))


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def definition(x: mx.array, y: mx.array, weight: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """The sum, rounded as one addition in f32 is, and its norm in float64."""
    exact = np.array(x.astype(mx.float32)) + np.array(y.astype(mx.float32))
    total = float64(mx.array(exact).astype(x.dtype))
    scale = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + EPS)
    return total, total * scale * float64(weight)


def clean(launches: list[Launch] | None) -> None:
    """Of the launches on a CPU, that nothing was reported; a GPU reports nothing."""
    if launches is not None:
        require_clean(launches)


def check(found: tuple[mx.array, mx.array], x: mx.array, y: mx.array, weight: mx.array) -> None:
    kind = str(x.dtype).rpartition(".")[2]
    total, normed = definition(x, y, weight)
    assert found[0].dtype == found[1].dtype == x.dtype
    assert found[0].shape == found[1].shape == x.shape
    assert np.array_equal(float64(found[0]), total)
    error = np.abs(float64(found[1]) - normed)
    assert (error <= TOLERANCE[kind] * np.abs(normed) + SMALLEST[kind]).all()


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


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_order_of_threads_matters(schedule: str | int, contract: bool) -> None:
    arrays = inputs((2,), 644, "bfloat16")
    with emulated(schedule=schedule, contract=contract, reduce=REDUCE[schedule]) as launches:
        check(launch(*arrays, EPS), *arrays)
    require_clean(launches)


@pytest.mark.slow
@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES + WIDE)
def test_every_shape_type_and_order(
    rows: tuple[int, ...], hidden: int, kind: str, schedule: str | int, contract: bool
) -> None:
    arrays = inputs(rows, hidden, kind)
    with emulated(schedule=schedule, contract=contract, reduce=REDUCE[schedule]) as launches:
        check(launch(*arrays, EPS), *arrays)
    require_clean(launches)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    x, y, weight = inputs((1,), 36, "bfloat16")
    used = library._used
    with emulated() as launches:
        library.use({"add_norm"})
        try:
            add_norm(x, y, weight, EPS)
            assert len(launches) == 1
            add_norm(x, y.astype(mx.float32), weight, EPS)
            add_norm(*inputs((1,), 8 * 640 + 1, "bfloat16"), EPS)
            assert len(launches) == 1
        finally:
            library.use(used)


def test_threads_cover_the_row_once() -> None:
    for hidden in [*range(1, 200), *range(1024, 5124, 4), 5119, 20480]:
        threads, width, steps = _plan(hidden)
        assert threads % 32 == 0 and threads <= 640 and hidden % width == 0
        assert threads * width * steps >= hidden > threads * width * (steps - 1)


def cases() -> list[tuple[str, Callable[[], object], int, int]]:
    """Label, launch, and the bytes it must read and write: hidden sizes of the family."""
    result: list[tuple[str, Callable[[], object], int, int]] = []
    for hidden, rows in [(1024, 1), (2560, 1), (4096, 1), (5120, 1), (5120, 5)]:
        arrays = inputs((rows,), hidden, "bfloat16")
        read = sum(a.nbytes for a in arrays) + 4
        run = partial(launch, *arrays, EPS)
        result.append((f"add_norm {rows} x {hidden} bf16", run, read, 2 * arrays[0].nbytes))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_bytes_are_those_the_operation_must_touch(
    case: tuple[str, Callable[[], object], int, int],
) -> None:
    _, run, read, written = case
    with emulated() as launches:
        run()
    require_clean(launches)
    found = launches[0]
    assert (found.read.unique, found.written.unique) == (read, written)
    assert found.written.lines == written
    for name in ("x", "y"):
        assert found.buffers[name].read.lines == found.buffers[name].read.unique
    # Each row asks for the weight.
    weight = found.buffers["weight"].read
    assert weight.lines == found.grid[1] * weight.unique
