"""Which kernels are used, and the reader of `metal/NAME.metal`."""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

BODY = "\n// body\n"

# Nothing until it was proven on this machine: every op then runs its `reference`.
_used: frozenset[str] = frozenset()
_allowed: frozenset[str] | None = None  # by every model that was loaded so far


def use(names: Iterable[str]) -> None:
    """Run these kernels from now on, and of all others the reference."""
    global _used
    _used = frozenset(names)


def allow(names: Iterable[str]) -> None:
    """Use these for one more model; of several in a process, those that all of them may use."""
    global _allowed
    _allowed = frozenset(names) if _allowed is None else _allowed & frozenset(names)
    use(_allowed)


def uses(name: str) -> bool:
    """Whether the op of `metal/NAME.metal` launches it."""
    return name in _used


@cache
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """The kernel of `metal/NAME.metal`, as `mx.fast.metal_kernel` makes it.

    Above the line `// body` are the comment and the helpers, below it the body of the function
    that MLX generates around `inputs` and `outputs`. Made at first use: importing costs nothing.
    """
    text = files("qwen35_mlx.metal").joinpath(f"{name}.metal").read_text(encoding="utf-8")
    header, _, body = text.partition(BODY)
    return mx.fast.metal_kernel(
        name=name, input_names=list(inputs), output_names=list(outputs), source=body, header=header
    )
