"""Which kernels are used, and the reader of `metal/NAME.metal`."""

import re
import threading
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

BODY = "\n// body\n"
# In a kernel's header: the files of metal/ whose helpers it uses, in this order.
WITH = re.compile(r"^// with: +(.+)$", re.MULTILINE)

# Nothing until it was proven on this machine: every op then runs its `reference`.
_used: frozenset[str] = frozenset()
# By the models that were loaded so far.
_allowed: frozenset[str] = frozenset()
_refused: frozenset[str] = frozenset()
_changing = threading.Lock()


def use(names: Iterable[str]) -> None:
    """Run these kernels from now on, and of all others the reference."""
    global _used
    _used = frozenset(names)


def allow(chosen: Iterable[str], refused: Iterable[str]) -> None:
    """Use those that were chosen for one more model; of several in a process, none is refused.

    What is in neither does not fit the model's shapes, so that it cannot launch it.
    """
    global _allowed, _refused
    with _changing:
        _allowed |= frozenset(chosen)
        _refused |= frozenset(refused)
        use(_allowed - _refused)


def forget() -> None:
    """As if no model had been loaded: no kernel is used."""
    global _allowed, _refused
    _allowed = _refused = frozenset()
    use(())


def uses(name: str) -> bool:
    """Whether the op of `metal/NAME.metal` launches it."""
    return name in _used


def names() -> list[str]:
    """All kernels: the files of metal/ that have a body. The others hold what several share."""
    held = (file.name for file in files("qwen35_mlx.metal").iterdir())
    found = (name.removesuffix(".metal") for name in held if name.endswith(".metal"))
    return sorted(name for name in found if BODY in _text(name))


@cache
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """The kernel of `metal/NAME.metal`, as `mx.fast.metal_kernel` makes it.

    Above the line `// body` are the comment and the helpers, below it the body of the function
    that MLX generates around `inputs` and `outputs`. A line `// with: a b` puts the text of
    `metal/a.metal` and `metal/b.metal` before it. Compilers name the files and their lines.
    Made at first use: importing costs nothing.
    """
    header, _, body = _text(name).partition(BODY)
    shared = WITH.search(header)
    parts = [_placed(other, _text(other)) for other in (shared[1].split() if shared else ())]
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=_placed(name, body, header.count("\n") + 1 + BODY.count("\n")),
        header="".join([*parts, _placed(name, header)]),
    )


def _text(name: str) -> str:
    return files("qwen35_mlx.metal").joinpath(f"{name}.metal").read_text(encoding="utf-8")


def _placed(name: str, text: str, line: int = 1) -> str:
    """`text`, which begins in that line of `metal/NAME.metal`."""
    return f'#line {line} "{name}.metal"\n{text}'
