"""Elementwise runs as one launch on the GPU.

On the CPU MLX would call a C++ compiler while the user waits, for no gain: there they stay plain.
"""

from collections.abc import Callable

import mlx.core as mx


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` compiled for Metal; itself elsewhere. Same values, one launch instead of many."""
    return mx.compile(function, shapeless=True) if mx.metal.is_available() else function


@fused
def silu(x: mx.array) -> mx.array:
    """`x sigmoid(x)`, any shape, type of `x`."""
    return x * mx.sigmoid(x)


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) up`, both of one shape and type."""
    return gate * mx.sigmoid(gate) * up


def swiglu_of(joined: mx.array) -> mx.array:
    """`silu(gate) up` of `[..., gate | up]`, type of `joined`."""
    gate, up = mx.split(joined, 2, axis=-1)
    if joined.size == joined.shape[-1]:
        # Of one row MLX keeps the halves' strides, and the product that follows would copy it.
        return swiglu(gate.flatten(), up.flatten()).reshape(gate.shape)
    return swiglu(gate, up)


@fused
def sigmoid_gate(x: mx.array, gate: mx.array) -> mx.array:
    """`x sigmoid(gate)`, both of one shape and type."""
    return x * mx.sigmoid(gate)


@fused
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU by its tanh formula, as `gelu_pytorch_tanh`."""
    return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@fused
def gelu_erf(x: mx.array) -> mx.array:
    """GELU by the error function."""
    return 0.5 * x * (1 + mx.erf(x * 0.7071067811865476))
