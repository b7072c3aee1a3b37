"""What holds of `delta_prepare` and of `delta_step`: Metal source and MLX form against float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from delta_float64 import (
    HEADS,
    Given,
    call,
    prepare_arguments,
    prepared_agrees,
    step_agrees,
    step_arguments,
)
from kernel_checks import EVERY_RUN, TYPES, executed
from qwen35_mlx.kernels import delta_prepare, delta_step
from qwen35_mlx.kernels.delta_prepare import SHORT

Shape = tuple[int, ...]


class Kernel(NamedTuple):
    name: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Callable[..., Given]
    agrees: Callable[..., None]
    lengths: Callable[[int, int], list[int]]  # of each row, from B and T
    shapes: list[Shape]
    more: list[Shape]

    def __str__(self) -> str:
        return self.name

    def executes(self, given: Given, lengths: Sequence[int] | None = None, **run: Any) -> None:
        with executed(**run) as launches:
            found = call(self.launch, given, lengths)
        self.agrees(found, given, lengths)
        assert len(launches) == 1

    def refers(self, given: Given, lengths: Sequence[int] | None = None) -> None:
        self.agrees(call(self.reference, given, lengths), given, lengths)


# B, T, Hk, Hv, Dk, Dv: inputs under 8 elements (which Metal sees as constants) and of 8 and more;
# T 1, around a run of 8 tokens and odd; dims that fill a simdgroup's 32 lanes and that do not.
PREPARE = Kernel(
    "prepare",
    delta_prepare.launch,
    delta_prepare.reference,
    prepare_arguments,
    prepared_agrees,
    # All, none, and between.
    lambda B, T: [(T, 0, (T + 1) // 2, 1)[b % 4] for b in range(B)],
    shapes=[
        (1, 1, 1, 2, 16, 24),
        (2, 3, 1, 3, 32, 48),
        (1, 7, 3, 6, 40, 8),
        (8, 2, 2, 8, 32, 16),
        (1, 8, 2, 4, 128, 96),
        (2, 9, 1, 2, 64, 128),
        (1, 19, 2, 4, 32, 40),
    ],
    more=[
        (1, SHORT - 1, 1, 2, 32, 24),
        (2, SHORT, 1, 2, 16, 32),
        (1, SHORT + 1, 1, 3, 32, 16),
        (3, 31, 2, 6, 128, 128),
        (1, 17, 1, 1, 256, 192),
        (9, 5, 1, 2, 16, 24),
    ],
)
# One simdgroup and many; T 1, odd, and the most; 1 to 3 value heads a key head.
STEP = Kernel(
    "step",
    delta_step.launch,
    delta_step.reference,
    step_arguments,
    step_agrees,
    lambda B, T: [3 * b % (T + 1) for b in range(B)],
    shapes=[
        (1, 1, 1, 2, 32, 16),
        (2, 3, 1, 3, 64, 48),
        (1, 7, 3, 6, 32, 64),
        (8, 1, 2, 2, 32, 16),
        (1, 8, 4, 8, 32, 48),
        (1, 1, 1, 2, 128, 128),
    ],
    more=[
        (2, 2, 2, 6, 128, 128),
        (1, 5, 1, 4, 96, 80),
        (3, 8, 2, 4, 64, 256),
        (9, 3, 1, 1, 32, 32),
        (1, 8, 2, 8, 128, 128),
    ],
)
FEW = [(kernel, shape) for kernel in (PREPARE, STEP) for shape in kernel.shapes]
ALL = FEW + [(kernel, shape) for kernel in (PREPARE, STEP) for shape in kernel.more]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel, shape", ALL, ids=str)
def test_the_reference_agrees_with_float64(kernel: Kernel, shape: Shape, kind: str) -> None:
    given = kernel.arguments(shape, kind)
    kernel.refers(given)
    kernel.refers(given, kernel.lengths(*shape[:2]))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel, shape", FEW, ids=str)
def test_the_kernel_agrees_with_float64(kernel: Kernel, shape: Shape, kind: str) -> None:
    kernel.executes(kernel.arguments(shape, kind))


@pytest.mark.parametrize("decay", ["near 0", "near 1"])
@pytest.mark.parametrize("magnitude", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("kernel, T", [(PREPARE, 11), (STEP, 3)], ids=str)
def test_small_keys_and_extreme_decays(
    kernel: Kernel, T: int, magnitude: float, decay: str
) -> None:
    shape = (1, T, 2, 4, 64, 32)
    given = kernel.arguments(shape, "float32", magnitude=magnitude, decay=decay)
    kernel.executes(given)
    kernel.refers(given)


@pytest.mark.parametrize("kernel, T", [(PREPARE, 5), (STEP, 2)], ids=str)
def test_gates_and_weights_may_be_of_other_types(kernel: Kernel, T: int) -> None:
    kinds = {"ba": "float32", "conv_weight": "float16", "A_log": "bfloat16", "dt_bias": "float32"}
    kinds["norm_weight"] = "float16"
    given = kernel.arguments((2, T, 1, 2, 32, 48), "bfloat16", kinds)
    kernel.executes(given)
    kernel.refers(given)


@pytest.mark.parametrize("taps", [2, 3, 5])
@pytest.mark.parametrize("kernel, T", [(PREPARE, 10), (STEP, 3)], ids=str)
def test_convolutions_of_other_lengths(kernel: Kernel, T: int, taps: int) -> None:
    given = kernel.arguments((2, T, 1, 2, 32, 16), "float32", taps=taps)
    kernel.executes(given, [1, T])
    kernel.refers(given, [1, T])


@EVERY_RUN
@pytest.mark.parametrize("kernel, T, Dk", [(PREPARE, 13, 32), (STEP, 5, 64)], ids=str)
def test_no_order_of_threads_matters(kernel: Kernel, T: int, Dk: int, run: dict[str, Any]) -> None:
    kernel.executes(kernel.arguments((2, T, 1, 2, Dk, 48), "bfloat16"), [T, T // 2], **run)


@pytest.mark.slow
@EVERY_RUN
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel, shape", ALL, ids=str)
def test_every_shape_type_and_order(
    kernel: Kernel, shape: Shape, kind: str, run: dict[str, Any]
) -> None:
    given = kernel.arguments(shape, kind)
    kernel.executes(given, **run)
    kernel.executes(given, kernel.lengths(*shape[:2]), **run)


@pytest.mark.slow
@pytest.mark.parametrize("Hk, Hv", HEADS)
@pytest.mark.parametrize("kernel, T", [(PREPARE, 37), (STEP, 3)], ids=str)
def test_heads_of_every_size_and_their_parts(kernel: Kernel, T: int, Hk: int, Hv: int) -> None:
    kernel.executes(kernel.arguments((1, T, Hk, Hv, 128, 128), "bfloat16"), checked=False)
