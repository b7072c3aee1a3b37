"""Convolution, norms and gates before the recurrence: Metal source and MLX form against float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from delta_float64 import KINDS, agree, as_float64, as_mlx, draw, prepare
from metal_cpu import emulated, require_clean
from qwen35_mlx.kernels import library
from qwen35_mlx.kernels.delta_prepare import SHORT, Prepared, delta_prepare, launch, reference

# Orders of the threads (a number seeds a random one) and of the terms of a simdgroup's sum.
SCHEDULES = [("forward", "ascending"), ("reverse", "butterfly"), (3, "random")]
# B, T, Hk, Hv, Dk, Dv: inputs under 8 elements (which Metal sees as constants) and of 8 and more;
# T 1, around a run of 8 tokens and odd; dims that fill a simdgroup's 32 lanes and that do not.
SHAPES = [
    (1, 1, 1, 2, 16, 24),
    (2, 3, 1, 3, 32, 48),
    (1, 7, 3, 6, 40, 8),
    (8, 2, 2, 8, 32, 16),
    (1, 8, 2, 4, 128, 96),
    (2, 9, 1, 2, 64, 128),
    (1, 19, 2, 4, 32, 40),
]
MORE = [
    (1, SHORT - 1, 1, 2, 32, 24),
    (2, SHORT, 1, 2, 16, 32),
    (1, SHORT + 1, 1, 3, 32, 16),
    (3, 31, 2, 6, 128, 128),
    (1, 17, 1, 1, 256, 192),
    (9, 5, 1, 2, 16, 24),
]
# Key and value heads of the eight sizes, whole, halved and quartered.
HEADS = [(16 // n, Hv // n) for Hv in (16, 32, 48, 64) for n in (1, 2, 4)]


def arguments(shape: tuple[int, ...], kind: str, kinds: Any = None, **how: Any) -> dict[str, Any]:
    """Arguments of the op without its numbers."""
    given = as_mlx(draw(*shape, **how), kind, **(kinds or {}))
    del given["memory"], given["norm_weight"]
    return given


def ragged(B: int, T: int) -> np.ndarray:
    """A length for each row: all, none, and between."""
    return np.array([(T, 0, (T + 1) // 2, 1)[b % 4] for b in range(B)])


def numbers(given: dict[str, mx.array], Dk: int) -> dict[str, Any]:
    values = given["qkvz"].shape[2] - given["conv"].shape[2]
    return {"k_heads": (given["conv"].shape[2] - values) // 2 // Dk, "k_dim": Dk}


def run(
    op: Callable[..., Prepared], given: dict[str, mx.array], Dk: int, lengths: Any = None
) -> Prepared:
    counted = None if lengths is None else mx.array(lengths, dtype=mx.int32)
    found = op(**given, **numbers(given, Dk), lengths=counted)
    mx.eval(found)
    return found


def check(found: Prepared, given: dict[str, mx.array], Dk: int, lengths: Any = None) -> None:
    exact: dict[str, Any] = {name: as_float64(value) for name, value in given.items()}
    *streams, conv = prepare(**exact, **numbers(given, Dk), lengths=lengths)
    for name, value, wanted in zip(["q", "k", "v", "log_g", "beta"], found, streams, strict=False):
        assert value.dtype == mx.float32, name
        # Gates of a token differ by orders of magnitude: each is compared with itself.
        is_gate = wanted.ndim == 3
        agree(value[..., None] if is_gate else value, wanted[..., None] if is_gate else wanted)
        if lengths is not None:
            assert all(not value[b, n:].any() for b, n in enumerate(lengths)), name
    assert found[5].dtype == given["conv"].dtype
    assert np.array_equal(as_float64(found[5]), conv)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + MORE)
def test_the_reference_agrees_with_float64(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind)
    check(run(reference, given, shape[4]), given, shape[4])
    lengths = ragged(*shape[:2])
    check(run(reference, given, shape[4], lengths), given, shape[4], lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_float64(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind)
    with emulated() as launches:
        found = run(launch, given, shape[4])
    check(found, given, shape[4])
    require_clean(launches)
    assert len(launches) == 1


@pytest.mark.parametrize("decay", ["near 0", "near 1"])
@pytest.mark.parametrize("magnitude", [1e-2, 1e-4, 1e-6])
def test_small_keys_and_extreme_decays(magnitude: float, decay: str) -> None:
    given = arguments((1, 11, 2, 4, 64, 32), "float32", magnitude=magnitude, decay=decay)
    with emulated() as launches:
        found = run(launch, given, 64)
    check(found, given, 64)
    check(run(reference, given, 64), given, 64)
    require_clean(launches)


def test_gates_and_weights_may_be_of_other_types() -> None:
    kinds = {"ba": "float32", "conv_weight": "float16", "A_log": "bfloat16", "dt_bias": "float32"}
    given = arguments((2, 5, 1, 2, 32, 48), "bfloat16", kinds)
    with emulated() as launches:
        found = run(launch, given, 32)
    check(found, given, 32)
    check(run(reference, given, 32), given, 32)
    require_clean(launches)


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_convolutions_of_other_lengths(taps: int) -> None:
    given = arguments((2, 10, 1, 2, 32, 16), "float32", taps=taps)
    with emulated() as launches:
        found = run(launch, given, 32, [1, 10])
    check(found, given, 32, [1, 10])
    check(run(reference, given, 32, [1, 10]), given, 32, [1, 10])
    require_clean(launches)


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize(("schedule", "reduce"), SCHEDULES)
def test_no_order_of_threads_matters(schedule: str | int, reduce: str, contract: bool) -> None:
    given = arguments((2, 13, 1, 2, 32, 48), "bfloat16")
    with emulated(schedule, contract, reduce) as launches:
        found = run(launch, given, 32, [13, 6])
    check(found, given, 32, [13, 6])
    require_clean(launches)


@pytest.mark.parametrize("op", [reference, launch])
def test_what_lies_beyond_the_lengths_does_not_matter(op: Callable[..., Prepared]) -> None:
    """Padding may be anything; what counts is bit for bit what the tokens alone would give."""
    given = arguments((2, 12, 1, 2, 32, 16), "bfloat16")
    for n in (0, 1, 2, 7, 8, 9):
        padded = given | {"qkvz": mx.array(given["qkvz"]), "ba": mx.array(given["ba"])}
        padded["qkvz"][:, n:] = np.nan
        padded["ba"][:, n:] = np.nan
        with emulated():
            found = run(op, padded, 32, [n, n])
            check(found, given, 32, [n, n])
            if n > 0:
                kept = {name: given[name][:, :n] for name in ("qkvz", "ba")}
                wanted = run(op, given | kept, 32)
                for a, b in zip(found[:5], wanted[:5], strict=True):
                    assert mx.array_equal(a[:, :n], b)


@pytest.mark.parametrize("cut", [1, 2, 3, 8, 11])
def test_two_calls_equal_one(cut: int) -> None:
    given = arguments((2, 14, 1, 2, 32, 16), "float16")
    with emulated() as launches:
        whole = run(launch, given, 32)
        first = run(launch, given | {k: given[k][:, :cut] for k in ("qkvz", "ba")}, 32)
        rest = {k: given[k][:, cut:] for k in ("qkvz", "ba")} | {"conv": first[5]}
        second = run(launch, given | rest, 32)
    require_clean(launches)
    for a, b, both in zip(first[:5], second[:5], whole[:5], strict=True):
        assert mx.array_equal(mx.concatenate([a, b], axis=1), both)
    assert mx.array_equal(second[5], whole[5])


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    used = library._used
    with emulated() as launches:
        library.use({"delta_prepare"})
        try:
            run(delta_prepare, arguments((1, 2, 1, 2, 16, 24), "bfloat16"), 16)
            assert [seen.name for seen in launches] == ["delta_prepare"]
            for shape in [(1, 2, 1, 2, 264, 16), (1, 2, 1, 1, 32, 272)]:
                given = arguments(shape, "bfloat16")
                check(run(delta_prepare, given, shape[4]), given, shape[4])
            assert len(launches) == 1
        finally:
            library.use(used)


@pytest.mark.slow
@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize(("schedule", "reduce"), SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + MORE)
def test_every_shape_type_and_order(
    shape: tuple[int, ...], kind: str, schedule: str | int, reduce: str, contract: bool
) -> None:
    given = arguments(shape, kind)
    lengths = ragged(*shape[:2])
    with emulated(schedule, contract, reduce) as launches:
        whole = run(launch, given, shape[4])
        part = run(launch, given, shape[4], lengths)
    check(whole, given, shape[4])
    check(part, given, shape[4], lengths)
    require_clean(launches)


@pytest.mark.slow
@pytest.mark.parametrize(("Hk", "Hv"), HEADS)
def test_heads_of_every_size_and_their_parts(Hk: int, Hv: int) -> None:
    given = arguments((1, 37, Hk, Hv, 128, 128), "bfloat16")
    with emulated(checked=False):
        found = run(launch, given, 128)
    check(found, given, 128)


def cases() -> list[tuple[str, Callable[[], object], int, int]]:
    """Label, launch, and the bytes it must read and write: a few heads of the family's size."""
    result: list[tuple[str, Callable[[], object], int, int]] = []
    for T, Hk, Hv in [(64, 1, 2), (SHORT, 1, 1), (SHORT + 64, 1, 1)]:
        given = arguments((1, T, Hk, Hv, 128, 128), "bfloat16")
        z = 2 * T * Hv * 128
        read = sum(value.nbytes for value in given.values()) - z + 4  # and the length
        written = given["conv"].nbytes + 4 * T * ((2 * Hk + Hv) * 128 + 2 * Hv)
        label = f"delta_prepare T {T}, {Hk} and {Hv} heads, bf16"
        result.append((label, partial(run, launch, given, 128), read, written))
    return result


@pytest.mark.parametrize(("label", "op", "read", "written"), cases(), ids=lambda v: str(v)[:30])
def test_bytes_are_those_the_operation_must_touch(
    label: str, op: Callable[[], object], read: int, written: int
) -> None:
    with emulated() as launches:
        op()
    require_clean(launches)
    seen = launches[0]
    assert (seen.read.unique, seen.written.unique) == (read, written)
    # Each run of 8 or 32 tokens fetches the 3 before it and the weights again, from the cache.
    assert seen.read.lines <= (1.75 if "T 64" in label else 1.25) * read
    assert seen.written.lines == written
