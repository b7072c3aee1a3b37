"""The matrix of a linear or embedding layer, as kernels take it."""

import mlx.core as mx
import mlx.nn as nn

from ..kernels.packed import Packed
from ..packing import Format


def matrix(layer: nn.Module) -> Packed:
    """The layer's matrix `[out, in]`, packed or plain."""
    return Packed(layer.weight, layer.get("scales"), layer.get("biases"), packing(layer))


def packing(layer: nn.Module) -> Format | None:
    """How the layer's matrix is packed; None if it is plain."""
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return Format(layer.mode, layer.bits, layer.group_size)
    return None


def plain(layer: nn.Module) -> mx.array:
    """The layer's matrix `[out, in]` in f32."""
    weight, scales, biases, how = matrix(layer)
    if scales is None or how is None:
        return weight.astype(mx.float32)
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    found = mx.dequantize(weight, scales, biases, how.group_size, how.bits, how.mode)
    return found.astype(mx.float32)
