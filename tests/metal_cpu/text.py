"""The Metal text that MLX generates for a kernel, taken from MLX itself."""

import ctypes
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .launch import CompileError


@dataclass(frozen=True)
class Argument:
    """One parameter of the generated function."""

    type: str  # "const device float*"
    name: str
    attribute: str  # "buffer(0)" or a thread's attribute


@dataclass(frozen=True)
class Text:
    """The generated text in its three parts, and what to call."""

    header: str
    signature: str  # from `template` or `[[kernel]]` to the opening brace
    body: str
    function: str  # with its template arguments
    arguments: tuple[Argument, ...]
    whole: str


def _printed(run: Callable[[], object]) -> str:
    """What C++ writes to standard output during `run`: the file descriptor is diverted."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            run()
        finally:
            libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode("utf-8")


def capture(kernel: Callable[..., Any], inputs: Sequence[mx.array], options: dict[str, Any]) -> str:
    """The text of one call. Tracing needs no GPU: `kernel` is recorded, not run."""

    def call(*arrays: mx.array) -> Any:
        return kernel(inputs=list(arrays), verbose=True, **options)[0]

    empty = [mx.zeros(x.shape, x.dtype) for x in inputs]  # lazy: never allocated
    printed = _printed(lambda: mx.export_function(lambda _: None, call, *empty))
    found = re.search(r"```\n(.*)\n```", printed, re.DOTALL)
    if found is None:
        raise CompileError(f"MLX printed no kernel text: {printed[:200]!r}")
    return found[1]


_ARGUMENT = re.compile(r"^\s*([\w <>]+?[*&]?) (\w+) \[\[([\w()]+)\]\](,|\) \{)?$")


def split(text: str, header: str, body: str) -> Text:
    """Cuts MLX's text where the author's header and body lie in it."""
    at = text.rindex(body)
    if not text.startswith(header):
        raise CompileError("MLX's text does not begin with the kernel's header")
    signature = text[len(header) : at]
    opening = signature.index("(\n")
    arguments = []
    lines = [line for line in signature[opening + 2 :].splitlines() if line.strip()]
    for number, line in enumerate(lines):
        found = _ARGUMENT.match(line)
        last = number == len(lines) - 1
        if not found or (found[4] == ") {") != last:
            # MLX closes the list too early for some sets of outputs and attributes.
            raise CompileError(f"malformed signature in MLX's text at {line.strip()!r}")
        arguments.append(Argument(found[1], found[2], found[3]))
    instance = re.search(r"decltype\((.*)\) ", text[at + len(body) :])
    name = re.search(r"void (\w+)\($", signature[: opening + 1])
    if name is None:
        raise CompileError("no function in MLX's text")
    function = instance[1] if instance else name[1]
    return Text(header, signature, body, function, tuple(arguments), text)
