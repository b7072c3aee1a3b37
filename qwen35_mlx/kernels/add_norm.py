"""Residual add and RMS norm in one launch."""

import mlx.core as mx

from . import library

# Elements that a thread reads side by side, and how many threads at most share a row: one step for
# the widths up to 2,560, two up to 5,120, and few registers at that.
_WIDTH = 4
_THREADS = 640
_STEPS = 8


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """`x + y` and its RMS norm.

    x, y: `[..., hidden]`, one type; weight: `[hidden]` f32, the whole factor.

    Returns: `x + y` in x's type, and `s / sqrt(mean(s^2) + eps) * weight` of that rounded sum s,
    in f32 and rounded once to x's type; both `[..., hidden]`.
    Source: `layers/norm.py` RMSNorm after the addition of `layers/decoder.py`.
    """
    if library.uses("add_norm") and fits(x, y):
        return launch(x, y, weight, eps)
    return reference(x, y, weight, eps)


def fits(x: mx.array, y: mx.array) -> bool:
    """Whether the kernel serves this width."""
    return x.shape == y.shape and x.dtype == y.dtype and _plan(x.shape[-1])[2] <= _STEPS


def reference(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The same in MLX operations."""
    total = x + y
    # With an f32 weight MLX returns f32 for bf16 input.
    return total, mx.fast.rms_norm(total, weight, eps).astype(total.dtype)


def launch(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The same by `metal/add_norm.metal`."""
    hidden = x.shape[-1]
    threads, width, steps = _plan(hidden)
    template = [
        ("T", x.dtype),
        ("Hidden", hidden),
        ("Threads", threads),
        ("Width", width),
        ("Steps", steps),
    ]
    run = library.kernel("add_norm", ("x", "y", "weight", "eps"), ("sum", "normed"))
    total, normed = run(
        inputs=[x, y, weight, eps],
        template=template,
        grid=(threads, x.size // hidden, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed


def _plan(hidden: int) -> tuple[int, int, int]:
    """Threads per row, elements side by side per thread, and steps."""
    width = _WIDTH if hidden % _WIDTH == 0 else 1
    reads = hidden // width
    steps = -(-reads // _THREADS)
    return 32 * -(-reads // (32 * steps)), width, steps
