"""Makes a graph that is traced anywhere the one that a Mac with Metal would run.

MLX builds other graphs elsewhere: `mx.fast.rms_norm` is seven operations on a CPU and one on a GPU.
And a trace holds a compiled function's operations instead of the few kernels it becomes. Inside
`as_on_metal` such a call leaves one node, a custom kernel that is never run and says what it
stands for.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .layouts import VIEWS

# What a GPU does in one operation; or what MLX cannot export, as `contiguous`.
SINGLE = (
    (mx, "bitwise_invert", "BitwiseInvert"),
    (mx.array, "__invert__", "BitwiseInvert"),
    (mx, "contiguous", "Contiguous"),
    (mx, "dequantize", "Dequantize"),
    (mx, "quantize", "Quantize"),
    (mx.fast, "layer_norm", "LayerNorm"),
    (mx.fast, "rms_norm", "RMSNorm"),
)
# Of attention in one kernel: head dims for up to 8 queries, and for more.
FEW_QUERIES, FEW_DIMS, MANY_DIMS = 8, (64, 96, 128, 256), (64, 72, 80, 96, 128)
MOST_ROWS = 32  # of queries that share a key head, as few
NAME = re.compile(r"custom_kernel_stand_in_(\d+)_(\w+?)_zz")

_is_tracing: ContextVar[bool] = ContextVar("_is_tracing", default=False)
_is_inside: ContextVar[bool] = ContextVar("_is_inside", default=False)
_is_on_metal: ContextVar[bool] = ContextVar("_is_on_metal", default=False)


def parse(kernel: str) -> tuple[str, int | None] | None:
    """What the custom kernel called `kernel` stands for, and its launches if that is compiled.

    None: it is a custom kernel like others.
    """
    found = NAME.match(kernel)
    if found is None:
        return None
    return found[2], int(found[1]) - 1 if found[1] != "0" else None


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    """Arrays of a tree of dicts, lists and tuples, with their paths in it."""
    found: Any = tree_flatten(tree)
    return [(path, leaf) for path, leaf in found if isinstance(leaf, mx.array)]


@contextmanager
def tracing() -> Iterator[None]:
    """Calls inside leave their node; outside of it they compute, also what was compiled inside."""
    device, token = mx.default_device, _is_tracing.set(True)
    # Not for imports: some make a stream for the default device, which has to be there.
    mx.default_device = lambda: mx.Device(mx.gpu)
    try:
        with as_on_metal():
            yield
    finally:
        mx.default_device = device
        _is_tracing.reset(token)


@contextmanager
def as_on_metal() -> Iterator[None]:
    """MLX as it presents itself on a Mac.

    Modules that decide when they are imported, such as those with compiled functions, have to be
    imported inside too.
    """
    if _is_on_metal.get():
        yield
        return
    changed: list[tuple[Any, str, Any]] = [
        (mx, "compile", _compile(mx.compile)),
        (mx.metal, "is_available", lambda: True),
        (mx.fast, "rope", _rope(mx.fast.rope)),
        (mx.fast, "scaled_dot_product_attention", _attention(mx.fast.scaled_dot_product_attention)),
        *((owner, key, _single(name, getattr(owner, key))) for owner, key, name in SINGLE),
    ]
    before = [(owner, key, getattr(owner, key)) for owner, key, _ in changed]
    token = _is_on_metal.set(True)
    for owner, key, replacement in changed:
        setattr(owner, key, replacement)
    try:
        yield
    finally:
        _is_on_metal.reset(token)
        for owner, key, original in before:
            setattr(owner, key, original)


def _single(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real` as one node called `name`."""

    @wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        # Of the graph that `real` made, only shapes and types are used.
        return _node(name, None, (args, kwargs), result) if _is_tracing.get() else result

    return call


def _rope(real: Callable[..., mx.array]) -> Callable[..., mx.array]:
    whole, partial = _single("RoPE", real), _single("PartialRoPE", real)

    @wraps(real)
    def call(x: mx.array, dims: int, *args: Any, **kwargs: Any) -> mx.array:
        return (partial if dims < x.shape[-1] else whole)(x, dims, *args, **kwargs)

    return call


def _attention(real: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Several operations also on a GPU where it has no kernel, or prefers to use none.

    Source: MLX's `scaled_dot_product_attention.cpp`.
    """
    single = _single("ScaledDotProductAttention", real)

    @wraps(real)
    def call(q: mx.array, k: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        forced = kwargs.pop("force_fused", False)  # a CPU would refuse
        _, H, T, D = q.shape
        few = T <= FEW_QUERIES and T * H // k.shape[1] <= MOST_ROWS
        fused = D in FEW_DIMS if few else T > FEW_QUERIES and D in MANY_DIMS
        return (single if forced or fused else real)(q, k, *args, **kwargs)

    return call


def _compile(real: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile`, whose functions leave one node while something is traced."""

    @wraps(real)
    def compile_(function: Callable[..., Any], *options: Any, **named: Any) -> Callable[..., Any]:
        compiled = real(function, *options, **named)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not _is_tracing.get():
                return compiled(*args, **kwargs)
            if _is_inside.get():
                return function(*args, **kwargs)  # part of the outer one
            token = _is_inside.set(True)
            try:
                result = compiled(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
            finally:
                _is_inside.reset(token)
            name = re.sub(r"\W", "_", getattr(function, "__name__", "function"))
            return _node(name, _kernels(result), (args, kwargs), result)

        return call

    return compile_


def _shape_only(leaf: Any) -> Any:
    """An array of the same shape and type that is no part of the trace: it would not compile."""
    if not isinstance(leaf, mx.array):
        return leaf
    return mx.broadcast_to(mx.array(0, leaf.dtype), leaf.shape)


def _kernels(result: Any) -> int:
    """Operations of a compiled graph; what MLX fused is one, and reshapes are taken for views."""
    text = io.StringIO()
    mx.export_to_dot(text, *(array for _, array in leaves(result)))
    labels = re.findall(r'label ="([^"]*)"', text.getvalue())
    return sum(label not in VIEWS for label in labels)


def _node(name: str, launches: int | None, arguments: Any, result: Any) -> Any:
    """A node called `name` with the arrays in `arguments` as inputs, in the place of `result`."""
    inputs = [array for _, array in leaves(arguments)]
    outputs = [array for _, array in leaves(result)]
    kernel: Any = mx.fast.metal_kernel(
        name=f"stand_in_{0 if launches is None else launches + 1}_{name}_zz",
        input_names=[f"in{i}" for i in range(len(inputs))],
        output_names=[f"out{i}" for i in range(len(outputs))],
        source=";",
    )
    made = iter(
        kernel(
            inputs=inputs,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[array.shape for array in outputs],
            output_dtypes=[array.dtype for array in outputs],
        )
    )
    return tree_map(lambda _: next(made), result)
