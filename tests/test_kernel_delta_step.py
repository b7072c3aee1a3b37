"""Decode and verification steps of Gated DeltaNet: Metal source and MLX form against float64."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from delta_float64 import KINDS, agree, as_float64, as_mlx, draw, step
from metal_cpu import emulated, require_clean
from qwen35_mlx.kernels import library
from qwen35_mlx.kernels.delta_step import Stepped, delta_step, launch, reference

EPS = 1e-6
# Orders of the threads (a number seeds a random one) and of the terms of a simdgroup's sum.
SCHEDULES = [("forward", "ascending"), ("reverse", "butterfly"), (3, "random")]
# B, T, Hk, Hv, Dk, Dv: inputs under 8 elements (which Metal sees as constants) and of 8 and more;
# one simdgroup and many; T 1, odd, and the most; 1 to 3 value heads a key head.
SHAPES = [
    (1, 1, 1, 2, 32, 16),
    (2, 3, 1, 3, 64, 48),
    (1, 7, 3, 6, 32, 64),
    (8, 1, 2, 2, 32, 16),
    (1, 8, 4, 8, 32, 48),
    (1, 1, 1, 2, 128, 128),
]
MORE = [
    (2, 2, 2, 6, 128, 128),
    (1, 5, 1, 4, 96, 80),
    (3, 8, 2, 4, 64, 256),
    (9, 3, 1, 1, 32, 32),
    (1, 8, 2, 8, 128, 128),
]
# Key and value heads of the eight sizes, whole, halved and quartered.
HEADS = [(16 // n, Hv // n) for Hv in (16, 32, 48, 64) for n in (1, 2, 4)]


def arguments(shape: tuple[int, ...], kind: str, kinds: Any = None, **how: Any) -> dict[str, Any]:
    """Arguments of the op without its numbers."""
    return as_mlx(draw(*shape, **how), kind, **(kinds or {}))


def numbers(given: dict[str, mx.array]) -> dict[str, Any]:
    Hv, Dk, Dv = given["memory"].shape[1:]
    keys = (given["conv"].shape[2] - Hv * Dv) // 2
    return {"k_heads": keys // Dk, "k_dim": Dk, "eps": EPS}


def run(op: Callable[..., Stepped], given: dict[str, mx.array], lengths: Any = None) -> Stepped:
    counted = None if lengths is None else mx.array(lengths, dtype=mx.int32)
    found = op(**given, **numbers(given), lengths=counted)
    mx.eval(found)
    return found


def check(found: Stepped, given: dict[str, mx.array], lengths: Any = None) -> None:
    exact: dict[str, Any] = {name: as_float64(value) for name, value in given.items()}
    y, conv, memory = step(**exact, **numbers(given), lengths=lengths)
    assert found[0].dtype == found[1].dtype == given["qkvz"].dtype
    # By token, not by head: of a head whose q and k happen to be orthogonal the norm shows the
    # rounding of q . k at its full size.
    agree(found[0], y)
    assert np.array_equal(as_float64(found[1]), conv)
    agree(found[2].flatten(-2), memory.reshape(*memory.shape[:2], -1))


def equal(found: Sequence[mx.array], wanted: Sequence[mx.array]) -> bool:
    return all(bool(mx.array_equal(a, b)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + MORE)
def test_the_reference_agrees_with_float64(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind)
    check(run(reference, given), given)
    lengths = np.arange(shape[0]) * 3 % (shape[1] + 1)
    check(run(reference, given, lengths), given, lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_float64(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind)
    with emulated() as launches:
        found = run(launch, given)
    check(found, given)
    require_clean(launches)
    assert len(launches) == 1


@pytest.mark.parametrize("decay", ["near 0", "near 1"])
@pytest.mark.parametrize("magnitude", [1e-2, 1e-4, 1e-6])
def test_small_keys_and_extreme_decays(magnitude: float, decay: str) -> None:
    given = arguments((1, 3, 2, 4, 64, 32), "float32", magnitude=magnitude, decay=decay)
    with emulated() as launches:
        found = run(launch, given)
    check(found, given)
    require_clean(launches)


def test_gates_and_weights_may_be_of_other_types() -> None:
    kinds = {"ba": "float32", "conv_weight": "float16", "A_log": "bfloat16", "dt_bias": "float32"}
    given = arguments((2, 2, 1, 2, 32, 48), "bfloat16", kinds | {"norm_weight": "float16"})
    with emulated() as launches:
        found = run(launch, given)
    check(found, given)
    check(run(reference, given), given)
    require_clean(launches)


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_convolutions_of_other_lengths(taps: int) -> None:
    given = arguments((2, 3, 1, 2, 32, 16), "float32", taps=taps)
    with emulated() as launches:
        found = run(launch, given, [1, 3])
    check(found, given, [1, 3])
    check(run(reference, given, [1, 3]), given, [1, 3])
    require_clean(launches)


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize(("schedule", "reduce"), SCHEDULES)
def test_no_order_of_threads_matters(schedule: str | int, reduce: str, contract: bool) -> None:
    given = arguments((2, 5, 1, 2, 64, 48), "bfloat16")
    with emulated(schedule, contract, reduce) as launches:
        found = run(launch, given, [5, 2])
    check(found, given, [5, 2])
    require_clean(launches)


@pytest.mark.parametrize("contract", [False, True])
def test_rolling_back_to_n_tokens_is_running_n_tokens(contract: bool) -> None:
    """Bit for bit: the tokens that do not count are not even looked at."""
    given = arguments((2, 8, 1, 2, 32, 48), "bfloat16")
    for n in range(9):
        drafted = given | {"qkvz": mx.array(given["qkvz"]), "ba": mx.array(given["ba"])}
        drafted["qkvz"][:, n:] = np.nan
        drafted["ba"][:, n:] = np.nan
        with emulated(contract=contract) as launches:
            y, conv, memory = run(launch, drafted, [n, n])
            if n == 0:
                wanted = (mx.zeros_like(y[:, :0]), given["conv"], given["memory"])
            else:
                kept = {name: given[name][:, :n] for name in ("qkvz", "ba")}
                wanted = run(launch, given | kept)
        require_clean(launches)
        assert equal((y[:, :n], conv, memory), wanted)
        assert not y[:, n:].any()


def test_tokens_at_once_are_tokens_one_by_one() -> None:
    given = arguments((1, 5, 2, 4, 32, 48), "float16")
    with emulated() as launches:
        whole = run(launch, given)
        outs, states = [], dict(given)
        for t in range(5):
            states |= {name: given[name][:, t : t + 1] for name in ("qkvz", "ba")}
            y, states["conv"], states["memory"] = run(launch, states)
            outs.append(y)
    require_clean(launches)
    assert equal(whole, (mx.concatenate(outs, axis=1), states["conv"], states["memory"]))


def test_rows_of_a_batch_are_those_alone() -> None:
    given = arguments((3, 4, 1, 2, 32, 16), "bfloat16")
    shared = ("conv_weight", "A_log", "dt_bias", "norm_weight")
    with emulated() as launches:
        together = run(launch, given, [4, 0, 2])
        for b, n in enumerate([4, 0, 2]):
            row = {k: v if k in shared else v[b : b + 1] for k, v in given.items()}
            assert equal(run(launch, row, [n]), tuple(x[b : b + 1] for x in together))
    require_clean(launches)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    used = library._used
    with emulated() as launches:
        library.use({"delta_step"})
        try:
            run(delta_step, arguments((1, 2, 1, 2, 32, 16), "bfloat16"))
            assert [seen.name for seen in launches] == ["delta_step"]
            others = [(1, 9, 1, 2, 32, 16), (1, 2, 1, 2, 16, 16), (1, 2, 1, 2, 32, 24)]
            for shape in [*others, (1, 2, 1, 2, 160, 16), (1, 1, 1, 1, 32, 272)]:
                given = arguments(shape, "bfloat16")
                check(run(delta_step, given), given)
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
    lengths = np.arange(shape[0]) * 3 % (shape[1] + 1)
    with emulated(schedule, contract, reduce) as launches:
        whole, part = run(launch, given), run(launch, given, lengths)
    check(whole, given)
    check(part, given, lengths)
    require_clean(launches)


@pytest.mark.slow
@pytest.mark.parametrize(("Hk", "Hv"), HEADS)
def test_heads_of_every_size_and_their_parts(Hk: int, Hv: int) -> None:
    given = arguments((1, 3, Hk, Hv, 128, 128), "bfloat16")
    with emulated(checked=False):
        found = run(launch, given)
    check(found, given)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.999, 0.99999])
def test_thousands_of_tokens_keep_the_state(decay: float) -> None:
    """4,096 tokens of constant slow decay and weak writes: where g in f32 alone costs 5e-5."""
    given = arguments((1, 4096, 1, 1, 128, 64), "float32")
    given["dt_bias"], given["A_log"] = mx.zeros((1,)), mx.zeros((1,))
    logit = np.log(np.expm1(-np.log(decay)))
    given["ba"] = mx.broadcast_to(mx.array([-4.0, logit], dtype=mx.float32), (1, 4096, 2))
    part, outs = dict(given), []
    with emulated(checked=False):
        for t in range(0, 4096, 8):
            part |= {name: given[name][:, t : t + 8] for name in ("qkvz", "ba")}
            y, part["conv"], part["memory"] = run(launch, part)
            outs.append(y)
    check((mx.concatenate(outs, axis=1), part["conv"], part["memory"]), given)


def cases() -> list[tuple[str, Callable[[], object], int, int]]:
    """Label, launch, and the bytes it must read and write: a few heads of the family's size."""
    result: list[tuple[str, Callable[[], object], int, int]] = []
    for T, Hk, Hv in [(1, 1, 1), (1, 1, 2), (4, 1, 3), (8, 1, 4)]:
        given = arguments((1, T, Hk, Hv, 128, 128), "bfloat16")
        states = given["conv"].nbytes + given["memory"].nbytes
        read = sum(value.nbytes for value in given.values()) + 4 + 4  # eps and the length
        label = f"delta_step T {T}, {Hk} and {Hv} heads, bf16"
        written = states + 2 * T * Hv * 128
        result.append((label, partial(run, launch, given), read, written))
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
    memory, following = seen.buffers["memory"].read, seen.buffers["next_memory"].written
    assert memory.lines == memory.unique == following.lines == following.unique
    # q, k and their weights once per value head and half of the tokens, from the cache.
    assert seen.read.lines + seen.written.lines <= 1.25 * (read + written)
