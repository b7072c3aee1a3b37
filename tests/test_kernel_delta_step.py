"""Decode and verification steps of Gated DeltaNet: rolling back, one by one, rows and bytes.

What holds of `delta_prepare`, too, is in `test_kernel_delta_alike`.
"""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from delta_float64 import call, nbytes, step_agrees, step_arguments
from kernel_checks import Needed, equal, executed, touched, using
from qwen35_mlx.kernels.delta_step import delta_step, launch


@pytest.mark.parametrize("contract", [False, True])
def test_rolling_back_to_n_tokens_is_running_n_tokens(contract: bool) -> None:
    """Bit for bit: the tokens that do not count are not even looked at."""
    given = step_arguments((2, 8, 1, 2, 32, 48), "bfloat16")
    for n in range(9):
        drafted = given | {"qkvz": mx.array(given["qkvz"]), "ba": mx.array(given["ba"])}
        drafted["qkvz"][:, n:] = np.nan
        drafted["ba"][:, n:] = np.nan
        with executed(contract=contract):
            y, conv, memory = call(launch, drafted, [n, n])
            if n == 0:
                wanted = (mx.zeros_like(y[:, :0]), given["conv"], given["memory"])
            else:
                kept = {name: given[name][:, :n] for name in ("qkvz", "ba")}
                wanted = call(launch, given | kept)
        assert equal((y[:, :n], conv, memory), wanted)
        assert not y[:, n:].any()


def test_tokens_at_once_are_tokens_one_by_one() -> None:
    given = step_arguments((1, 5, 2, 4, 32, 48), "float16")
    with executed():
        whole = call(launch, given)
        outs, states = [], dict(given)
        for t in range(5):
            states |= {name: given[name][:, t : t + 1] for name in ("qkvz", "ba")}
            y, states["conv"], states["memory"] = call(launch, states)
            outs.append(y)
    assert equal(whole, (mx.concatenate(outs, axis=1), states["conv"], states["memory"]))


def test_rows_of_a_batch_are_those_alone() -> None:
    given = step_arguments((3, 4, 1, 2, 32, 16), "bfloat16")
    with executed():
        together = call(launch, given, [4, 0, 2])
        for b, n in enumerate([4, 0, 2]):
            row = {k: given[k][b : b + 1] for k in ("qkvz", "ba", "conv", "memory")}
            assert equal(call(launch, given | row, [n]), tuple(x[b : b + 1] for x in together))


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    with executed() as launches, using("delta_step"):
        call(delta_step, step_arguments((1, 2, 1, 2, 32, 16), "bfloat16"))
        assert [seen.name for seen in launches] == ["delta_step"]
        others = [(1, 9, 1, 2, 32, 16), (1, 2, 1, 2, 16, 16), (1, 2, 1, 2, 32, 24)]
        for shape in [*others, (1, 2, 1, 2, 160, 16), (1, 1, 1, 1, 32, 272)]:
            given = step_arguments(shape, "bfloat16")
            step_agrees(call(delta_step, given), given)
        assert len(launches) == 1


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.999, 0.99999])
def test_thousands_of_tokens_keep_the_state(decay: float) -> None:
    """4,096 tokens of constant slow decay and weak writes: where g in f32 alone costs 5e-5."""
    given = step_arguments((1, 4096, 1, 1, 128, 64), "float32")
    given["dt_bias"], given["A_log"] = mx.zeros((1,)), mx.zeros((1,))
    logit = np.log(np.expm1(-np.log(decay)))
    given["ba"] = mx.broadcast_to(mx.array([-4.0, logit], dtype=mx.float32), (1, 4096, 2))
    part, outs = dict(given), []
    with executed(checked=False):
        for t in range(0, 4096, 8):
            part |= {name: given[name][:, t : t + 8] for name in ("qkvz", "ba")}
            y, part["conv"], part["memory"] = call(launch, part)
            outs.append(y)
    step_agrees((mx.concatenate(outs, axis=1), part["conv"], part["memory"]), given)


def cases() -> list[Needed]:
    """A few heads of the family's size."""
    result: list[Needed] = []
    for T, Hk, Hv in [(1, 1, 1), (1, 1, 2), (4, 1, 3), (8, 1, 4)]:
        given = step_arguments((1, T, Hk, Hv, 128, 128), "bfloat16")
        read = nbytes(given) + 4 + 4  # eps and the length
        written = given["conv"].nbytes + given["memory"].nbytes + 2 * T * Hv * 128
        label = f"delta_step T {T}, {Hk} and {Hv} heads, bf16"
        result.append(Needed(label, partial(call, launch, given), read, written))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_bytes_are_those_the_operation_must_touch(case: Needed) -> None:
    seen = touched(case)
    memory, following = seen.buffers["memory"].read, seen.buffers["next_memory"].written
    assert memory.lines == memory.unique == following.lines == following.unique
    # q, k and their weights once per value head and half of the tokens, from the cache.
    assert seen.read.lines + seen.written.lines <= 1.25 * (case.read + case.written)
