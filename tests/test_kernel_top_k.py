"""The k largest logits: the Metal source and the MLX form against a stable sort in float64."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_checks import EVERY_RUN, TYPES, Needed, as_float64, clean, executed, mlx_array, using
from metal_cpu import Launch
from qwen35_mlx.kernels.top_k import BLOCK, _plan, launch, reference, top_k

# Batch, vocabulary, k: under 8 logits; a block more or less; a simdgroup of the first launch more
# or less; fewer blocks than k and more; 8 and 16 logits per thread of the second launch.
SHAPES = [
    (1, 1, 1),
    (1, 7, 7),
    (2, 4, 3),
    (3, 127, 2),
    (1, 128, 1),
    (2, 129, 20),
    (1, 1023, 5),
    (1, 1024, 8),
    (2, 1027, 9),
    (1, 4101, 32),
    (1, 4300, 33),
]
LARGE = [(1, 8321, 64), (2, 8191, 64), (1, 33_000, 20), (3, 5000, 1), (1, 40_001, 47)]
FAMILY = [(248_320, 20), (248_077, 20), (248_320, 64), (248_320, 1)]


def logits(B: int, V: int, kind: str, step: float = 0.0) -> mx.array:
    """Normal values; with `step` on a grid of that distance, so that many are equal."""
    x = np.random.default_rng(V).normal(size=(B, V)) * 4
    if step:
        x = np.round(x / step) * step
    return mlx_array(x, TYPES[kind])


def check(found: tuple[mx.array, mx.array], x: mx.array, k: int) -> None:
    values, indices = found
    exact = as_float64(x)
    exact = np.where(np.isnan(exact), -np.inf, exact)
    wanted = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
    assert values.dtype == mx.float32 and indices.dtype == mx.uint32
    assert np.array_equal(np.array(indices), wanted)
    assert np.array_equal(np.array(values), np.take_along_axis(exact, wanted, axis=-1))


def rows_of_trouble(V: int) -> np.ndarray:
    """All equal, all NaN, mostly NaN, infinities, zeros of both signs, tiny, negative."""
    draw = np.random.default_rng(V)
    x = draw.normal(size=(10, V))
    x[0] = -3.5
    x[1] = np.nan
    x[2, draw.permutation(V)[2:]] = np.nan
    x[3] = np.where(draw.random(V) < 0.5, -np.inf, np.nan)
    x[4, ::3] = np.inf
    x[5] = np.where(draw.random(V) < 0.5, 0.0, -0.0)
    x[6] = draw.integers(-3, 4, size=V) * 1e-37
    x[7] = -np.arange(V)
    x[8] = -np.inf
    x[9] = np.arange(V) - V
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize(("B", "V", "k"), SHAPES + LARGE)
def test_the_reference_is_a_stable_sort(B: int, V: int, k: int, step: float, kind: str) -> None:
    x = logits(B, V, kind, step)
    check(reference(x, k, x.shape[1]), x, k)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("B", "V", "k"), SHAPES)
def test_the_kernel_is_a_stable_sort(
    B: int, V: int, k: int, kind: str, metal_backend: list[Launch] | None
) -> None:
    for step in (0.0, 0.5):
        x = logits(B, V, kind, step)
        check(launch(x, k, x.shape[1]), x, k)
        clean(metal_backend)


@pytest.mark.parametrize(("V", "k"), [(300, 3), (301, 1), (1500, 20)])
def test_ties_infinities_and_nan_are_ordered(
    V: int, k: int, metal_backend: list[Launch] | None
) -> None:
    x = mx.array(rows_of_trouble(V))
    check(launch(x, k, x.shape[1]), x, k)
    clean(metal_backend)
    check(reference(x, k, x.shape[1]), x, k)


@pytest.mark.parametrize(("V", "k"), FAMILY)
def test_the_vocabulary_of_the_family(V: int, k: int) -> None:
    x = logits(1, V, "bfloat16")
    with executed(checked=False):
        check(launch(x, k, x.shape[1]), x, k)
    check(reference(x, k, x.shape[1]), x, k)


@pytest.mark.parametrize(
    ("V", "among", "k"),
    [(9, 8, 8), (300, 1, 1), (257, 256, 3), (256, 255, 3), (1500, 1290, 20), (2600, 1400, 33)],
)
def test_only_the_first_of_each_row_count(
    V: int, among: int, k: int, metal_backend: list[Launch] | None
) -> None:
    x = logits(3, V, "float32", 0.5)
    x[:, among:] = 1e6
    check(launch(x, k, among), x[:, :among], k)
    if metal_backend is not None:  # rows as they are, not a copy of their beginnings
        first = metal_backend[0].buffers["logits"]
        assert (len(first.touched), first.read.unique) == (x.nbytes, 4 * 3 * among)
    clean(metal_backend)
    check(reference(x, k, among), x[:, :among], k)


@EVERY_RUN
def test_no_order_of_threads_matters(run: dict[str, Any]) -> None:
    x = logits(2, 1100, "float16", 0.25)
    with executed(**run):
        check(launch(x, 6, 1100), x, 6)


@pytest.mark.slow
@EVERY_RUN
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("B", "V", "k"), [*SHAPES, *LARGE, (1, 248_077, 20), (1, 248_320, 64)])
def test_every_shape_type_and_order(B: int, V: int, k: int, kind: str, run: dict[str, Any]) -> None:
    for step in (0.0, 0.5):
        x = logits(B, V, kind, step)
        with executed(**run):
            check(launch(x, k, x.shape[1]), x, k)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    x = logits(1, 700, "bfloat16")
    with executed() as launches, using("top_k"):
        check(top_k(x, 5), x, 5)
        assert len(launches) == 2
        check(top_k(x, 65), x, 65)
        assert len(launches) == 2
        check(top_k(x, 5, 600), x[:, :600], 5)
        assert len(launches) == 4
    for k, among in [(701, None), (0, None), (5, 4), (5, 701)]:
        with pytest.raises(ValueError, match=rf"k is {k} among .* <= 700"):
            top_k(x, k, among)
    with pytest.raises(ValueError, match=r"expected \[B, V\]"):
        top_k(x[0], 5)


def test_the_second_launch_covers_its_blocks_with_threads_that_stay_inside_one() -> None:
    for chosen in range(1, 65):
        threads, each = _plan(chosen)
        assert threads % 32 == 0 and chosen <= threads <= 512 and BLOCK % each == 0
        assert threads * each >= chosen * BLOCK


def cases() -> list[Needed]:
    """Both launches, which may touch more."""
    result: list[Needed] = []
    for V, k, kind in [
        (248_320, 20, "bfloat16"),
        (248_320, 64, "float32"),
        (248_077, 20, "float32"),
    ]:
        x = logits(1, V, kind)
        needed = x.nbytes + 4  # and how many count
        op = partial(launch, x, k, V)
        result.append(Needed(f"top_k {k} of {V} {kind}", op, needed, 8 * k))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_logits_are_read_once(case: Needed) -> None:
    with executed() as launches:
        case.op()
    first, second = launches
    maxima, k = first.buffers["maxima"].written.unique, case.written // 8
    assert (first.read.unique, second.written.unique) == (case.read, case.written)
    assert maxima <= 4 * 1940
    # The second launch reads the maxima, k blocks of the logits, and both numbers.
    assert second.read.unique - maxima - 8 <= k * BLOCK * 4
    assert first.read.lines + second.read.lines <= 1.06 * case.read
    assert second.barriers <= 2 * (32 + 2)
