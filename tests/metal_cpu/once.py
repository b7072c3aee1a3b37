"""A kernel given as text, launched once: what the emulator's own tests are written with."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from .backend import emulated
from .launch import Launch

Outputs = Mapping[str, tuple[Sequence[int], mx.Dtype]]


def once(
    body: str,
    inputs: Mapping[str, Any],
    outputs: Outputs,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    header: str = "",
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    atomic: bool = False,
    **mode: Any,
) -> tuple[Launch, list[mx.array]]:
    """Launches `body` over `inputs`; `mode` goes to `emulated`. Returns launch and outputs."""
    with emulated(**mode) as launches:
        kernel: Any = mx.fast.metal_kernel(
            name="once",
            input_names=list(inputs),
            output_names=list(outputs),
            source=body,
            header=header,
            atomic_outputs=atomic,
        )
        result = kernel(
            inputs=list(inputs.values()),
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            grid=grid,
            threadgroup=threadgroup,
            template=list(template) if template else None,
            init_value=init_value,
        )
    return launches[-1], list(result)
