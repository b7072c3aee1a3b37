"""The prefill recurrence: Metal source and MLX form against float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from delta_float64 import HEADS, Given, agree, call, exactly, nbytes, recurrence
from kernel_checks import (
    EVERY_RUN,
    TYPES,
    Needed,
    equal,
    executed,
    mlx_array,
    relative_error,
    touched,
    using,
)
from qwen35_mlx.kernels import gated_delta as module
from qwen35_mlx.kernels.gated_delta import KERNEL_CHUNK as C
from qwen35_mlx.kernels.gated_delta import gated_delta, launch, reference

Pair = tuple[mx.array, mx.array]
TOLERANCE = 1e-5  # relative L2 in f32
# B, T, Hk, Hv, Dk, Dv: every axis of another size; 1, 2, 4 and 8 simdgroups per threadgroup
# (Dv 8, 16, 32 and 64 with `wide`), gates under 8 elements and of more, chunks short, whole, many.
SHAPES = [
    (1, 1, 1, 2, 16, 8),
    (3, C - 1, 1, 2, 32, 16),
    (2, C, 1, 3, 48, 96),
    (1, C + 1, 2, 4, 128, 32),
    (2, 37, 2, 6, 64, 24),
]
MORE = [
    (1, 3, 2, 2, 128, 128),
    (2, 2 * C, 1, 4, 16, 160),
    (1, 67, 3, 9, 80, 40),
    (4, 5, 1, 1, 112, 64),
    (1, 131, 1, 3, 128, 48),
]
GATES: dict[str, Callable[[Any, tuple[int, ...]], np.ndarray]] = {
    "mixed": lambda random, shape: np.log(random.uniform(0.01, 0.9999, shape)),
    "near 1": lambda random, shape: -(10 ** random.uniform(-7, -3, shape)),
    "near 0": lambda random, shape: -random.uniform(5, 100, shape),
    # One token forgets nearly all, the others nearly nothing.
    "spikes": lambda random, shape: np.where(random.random(shape) < 0.1, -1000, -1e-3),
    "zero": lambda random, shape: np.where(random.random(shape) < 0.1, -np.inf, -0.01),
}


def arguments(
    shape: tuple[int, ...], kind: str = "float32", gates: str = "mixed", magnitude: float = 1
) -> Given:
    """Arguments of the op; magnitude: of the values and of the keys' differences from unit."""
    B, T, Hk, Hv, Dk, Dv = shape
    random = np.random.default_rng(T)
    q, k = random.normal(size=(2, B, T, Hk, Dk))
    arrays = {
        "q": magnitude * q / np.linalg.norm(q, axis=-1, keepdims=True) * Dk**-0.5,
        "k": magnitude * k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": random.normal(size=(B, T, Hv, Dv)),
        "log_g": GATES[gates](random, (B, T, Hv)),
        "beta": random.uniform(0.01, 0.99, (B, T, Hv)),
        "state": random.normal(size=(B, Hv, Dk, Dv)),
    }
    types = dict.fromkeys(arrays, mx.float32) | dict.fromkeys(("q", "k", "v"), TYPES[kind])
    return {name: mlx_array(value, types[name]) for name, value in arrays.items()}


def emulate(given: Given, lengths: Any = None, **run: Any) -> Pair:
    """The kernel, launched once."""
    with executed(**run) as launches:
        found = call(launch, given, lengths)
    assert len(launches) == 1
    return found


def check(found: Pair, given: Given, lengths: Any = None) -> None:
    o, last = recurrence(**exactly(given), lengths=lengths)
    assert found[0].dtype == given["v"].dtype
    assert found[1].dtype == mx.float32
    if found[0].dtype == mx.float32:
        assert relative_error(found[0], o) <= TOLERANCE
    # Against the largest of a head's tokens: where q meets little of what was written, o is a small
    # difference of large numbers.
    by_head = (*o.shape[:1], o.shape[2], -1)
    agree(found[0].swapaxes(1, 2).reshape(by_head), o.swapaxes(1, 2).reshape(by_head))
    assert relative_error(found[1], last) <= TOLERANCE


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threadgroups of 64 columns, however few heads there are."""
    monkeypatch.setattr(module, "ENOUGH_THREADGROUPS", 1)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE)
def test_the_reference_agrees_with_float64(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind)
    check(call(reference, given), given)
    lengths = [(7 * b + 5) % (shape[1] + 1) for b in range(shape[0])]
    check(call(reference, given, lengths), given, lengths)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_float64(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind)
    check(emulate(given), given)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_eight_simdgroups_share_a_chunk(wide: None, kind: str) -> None:
    given = arguments((1, C + 3, 1, 2, 48, 128), kind)
    check(emulate(given, [C + 1]), given, [C + 1])


@pytest.mark.parametrize("op", [launch, reference])
@pytest.mark.parametrize("gates", list(GATES))
def test_gates_of_all_sizes(op: Callable[..., Pair], gates: str) -> None:
    given = arguments((1, 3 * C + 2, 1, 3, 32, 16), gates=gates)
    check(emulate(given) if op is launch else call(op, given), given)


@pytest.mark.parametrize("magnitude", [1e-2, 1e-4, 1e-6])
def test_small_keys_and_queries(magnitude: float) -> None:
    given = arguments((1, C + 5, 1, 2, 32, 8), magnitude=magnitude)
    check(emulate(given), given)


def test_repeated_keys_with_full_strength_do_not_cancel() -> None:
    """Equal keys, beta 1 and no decay: powers of a whole chunk's matrix would grow without end."""
    given = arguments((1, 4 * C, 1, 2, 32, 16))
    given["k"] = mx.broadcast_to(given["k"][:, :1], given["k"].shape)
    given |= {"log_g": mx.zeros_like(given["log_g"]), "beta": mx.ones_like(given["beta"])}
    check(emulate(given), given)


def test_no_state_is_a_state_of_zeros() -> None:
    given = arguments((2, 3, 1, 2, 16, 8))
    zeros = given | {"state": mx.zeros_like(given.pop("state"))}
    with executed():
        assert equal(launch(**given, state=None), call(launch, zeros))


def test_four_thousand_steps_keep_the_state() -> None:
    """A rounding that every chunk repeats would show: gates are equal and near 1, writes weak."""
    for log_g, strength in [(-1e-4, 1), (-1e-6, 1e-3)]:
        given = arguments((1, 4096, 1, 1, 128, 8))
        given |= {"log_g": mx.full(given["log_g"].shape, log_g), "beta": strength * given["beta"]}
        check(emulate(given, checked=False), given)


def test_ragged_rows_end_where_they_say() -> None:
    """What lies beyond may be anything; o is 0 there and the state is that of the row alone."""
    T = 2 * C + 3
    given = arguments((6, T, 1, 2, 16, 8), "bfloat16")
    lengths = [0, 1, C, C + 1, 2 * C, T]
    spoiled = {name: mx.array(x) for name, x in given.items()}
    for b, n in enumerate(lengths):
        for name in ("q", "k", "v", "log_g", "beta"):
            spoiled[name][b, n:] = np.nan
    found = emulate(spoiled, lengths)
    check(found, given, lengths)
    assert equal((found[1][:1], found[1][5:]), (given["state"][:1], run_rows(given, 5)[1]))
    assert not any(bool(found[0][b, n:].any()) for b, n in enumerate(lengths))
    check(call(reference, spoiled, lengths), given, lengths)


def run_rows(given: Given, b: int) -> Pair:
    return emulate({name: x[b : b + 1] for name, x in given.items()})


@pytest.mark.parametrize("cut", [1, C, C + 3])
def test_two_calls_equal_one(cut: int) -> None:
    given = arguments((1, 2 * C + 5, 1, 2, 32, 16))
    state = given.pop("state")
    first = emulate({name: x[:, :cut] for name, x in given.items()} | {"state": state})
    second = emulate({name: x[:, cut:] for name, x in given.items()} | {"state": first[1]})
    given["state"] = state
    check((mx.concatenate([first[0], second[0]], axis=1), second[1]), given)
    if cut % C == 0:
        assert equal((second[1], second[0]), (emulate(given)[1], emulate(given)[0][:, cut:]))


@EVERY_RUN
def test_no_order_of_threads_matters(run: dict[str, Any]) -> None:
    given = arguments((2, 2 * C + 1, 1, 2, 32, 32), "bfloat16")
    check(emulate(given, [C + 2, C], **run), given, [C + 2, C])


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    with executed() as launches, using("gated_delta"):
        call(gated_delta, arguments((1, 2, 1, 2, 16, 8)))
        assert [seen.name for seen in launches] == ["gated_delta"]
        unfit = [arguments((1, 2, 1, 2, *dims)) for dims in ((24, 16), (144, 8), (32, 12))]
        mixed = arguments((1, 2, 1, 2, 16, 8))
        for given in [*unfit, mixed | {"v": mixed["v"].astype(mx.bfloat16)}]:
            check(call(gated_delta, given), given)
        assert len(launches) == 1


@pytest.mark.parametrize(("heads", "columns"), [(4, 32), (8, 32), (16, 64), (64, 64)])
def test_few_heads_take_narrow_threadgroups(heads: int, columns: int) -> None:
    assert module._columns(heads, 128) == columns


def cases() -> list[Needed]:
    """A few heads of the family's size."""
    result: list[Needed] = []
    for kind, T, Hk, Hv in [("float32", 64, 1, 2), ("bfloat16", 64, 1, 2), ("float32", 8, 1, 16)]:
        given = arguments((1, T, Hk, Hv, 128, 128), kind)
        written = given["v"].nbytes + given["state"].nbytes
        label = f"gated_delta T {T}, {Hk} and {Hv} heads, {kind}"
        result.append(Needed(label, partial(call, launch, given), nbytes(given), written))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_bytes_are_those_the_operation_must_touch(case: Needed) -> None:
    seen = touched(case)
    for name in ("v", "state"):
        assert seen.buffers[name].read.lines == seen.buffers[name].read.unique
    # q and k are shared by the columns of a threadgroup, and come from the cache for the others.
    columns = seen.threadgroup[0] // 4
    again = 128 // columns * seen.grid[1]
    for name in ("q", "k"):
        assert seen.buffers[name].read.lines == again * seen.buffers[name].read.unique


@pytest.mark.parametrize("T", [C, 3 * C - 1])
def test_matrix_products_barriers_and_memory(wide: None, T: int) -> None:
    """The numbers that the header of the source states."""
    with executed() as launches:
        call(launch, arguments((1, T, 1, 1, 128, 64)))
        call(launch, arguments((1, T, 1, 1, 128, 32), "bfloat16"))
    chunks, tiles = -(-T // C), 128 // 8
    for seen, SG, memory in zip(launches, (8, 4), (24.5, 16), strict=True):
        assert seen.matrix_ops == chunks * (SG * (6 * tiles + 6) + 6 * tiles + 8)
        assert seen.barriers == 3 * chunks + 2 * 2 * (128 // 16)
        assert seen.threadgroup_bytes <= memory * 1024


@pytest.mark.slow
@EVERY_RUN
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE)
def test_every_shape_type_and_order(
    wide: None, shape: tuple[int, ...], kind: str, run: dict[str, Any]
) -> None:
    given = arguments(shape, kind)
    lengths = [(7 * b + 5) % (shape[1] + 1) for b in range(shape[0])]
    check(emulate(given, **run), given)
    check(emulate(given, lengths, **run), given, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_of_all_sizes(heads: tuple[int, int], kind: str) -> None:
    given = arguments((1, C + 1, *heads, 128, 128), kind)
    check(emulate(given, checked=False), given)


@pytest.mark.slow
@pytest.mark.parametrize("gates", list(GATES))
@pytest.mark.parametrize("kind", TYPES)
def test_long_prompts_with_all_gates(kind: str, gates: str) -> None:
    given = arguments((1, 4099, 1, 2, 128, 32), kind, gates)
    check(emulate(given, checked=False), given)
    check(call(reference, given), given)
