"""Convolution, norms and gates before the recurrence: lengths, cuts and bytes.

What holds of `delta_step`, too, is in `test_kernel_delta_alike`.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from delta_float64 import call, nbytes, prepare_arguments, prepared_agrees
from kernel_checks import Needed, equal, executed, touched, using
from metal_cpu import emulated
from qwen35_mlx.kernels.delta_prepare import SHORT, Prepared, delta_prepare, launch, reference


@pytest.mark.parametrize("op", [reference, launch])
def test_what_lies_beyond_the_lengths_does_not_matter(op: Callable[..., Prepared]) -> None:
    """Padding may be anything; what counts is bit for bit what the tokens alone would give."""
    given = prepare_arguments((2, 12, 1, 2, 32, 16), "bfloat16")
    for n in (0, 1, 2, 7, 8, 9):
        padded = given | {"qkvz": mx.array(given["qkvz"]), "ba": mx.array(given["ba"])}
        padded["qkvz"][:, n:] = np.nan
        padded["ba"][:, n:] = np.nan
        with emulated():
            found = call(op, padded, [n, n])
            prepared_agrees(found, given, [n, n])
            if n > 0:
                kept = {name: given[name][:, :n] for name in ("qkvz", "ba")}
                wanted = call(op, given | kept)
                assert equal([x[:, :n] for x in found[:5]], wanted[:5])


@pytest.mark.parametrize("cut", [1, 2, 3, 8, 11])
def test_two_calls_equal_one(cut: int) -> None:
    given = prepare_arguments((2, 14, 1, 2, 32, 16), "float16")
    with executed():
        whole = call(launch, given)
        first = call(launch, given | {k: given[k][:, :cut] for k in ("qkvz", "ba")})
        rest = {k: given[k][:, cut:] for k in ("qkvz", "ba")} | {"conv": first[5]}
        second = call(launch, given | rest)
    joined = [mx.concatenate([a, b], axis=1) for a, b in zip(first[:5], second[:5], strict=True)]
    assert equal([*joined, second[5]], whole)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    with executed() as launches, using("delta_prepare"):
        call(delta_prepare, prepare_arguments((1, 2, 1, 2, 16, 24), "bfloat16"))
        assert [seen.name for seen in launches] == ["delta_prepare"]
        for shape in [(1, 2, 1, 2, 264, 16), (1, 2, 1, 1, 32, 272)]:
            given = prepare_arguments(shape, "bfloat16")
            prepared_agrees(call(delta_prepare, given), given)
        assert len(launches) == 1


def cases() -> list[Needed]:
    """A few heads of the family's size."""
    result: list[Needed] = []
    for T, Hk, Hv in [(64, 1, 2), (SHORT, 1, 1), (SHORT + 64, 1, 1)]:
        given = prepare_arguments((1, T, Hk, Hv, 128, 128), "bfloat16")
        read = nbytes(given) - 2 * T * Hv * 128 + 4  # z is not, the length is
        written = given["conv"].nbytes + 4 * T * ((2 * Hk + Hv) * 128 + 2 * Hv)
        label = f"delta_prepare T {T}, {Hk} and {Hv} heads, bf16"
        result.append(Needed(label, partial(call, launch, given), read, written))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_bytes_are_those_the_operation_must_touch(case: Needed) -> None:
    # Each run of 8 or 32 tokens fetches the 3 before it and the weights again, from the cache.
    most = 1.75 if "T 64" in case.label else 1.25
    assert touched(case).read.lines <= most * case.read
