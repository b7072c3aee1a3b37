"""Between MLX's arrays and the memory that a kernel's arguments point to."""

import math
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from .runtime import Memory
from .text import Text


def _bytes_of(x: mx.array) -> np.ndarray:
    """The memory of an evaluated row-contiguous array, not copied."""
    x = mx.contiguous(x)
    if x.dtype == mx.bfloat16:
        x = x.view(mx.uint16)
    mx.eval(x)
    if x.size == 0:
        return np.zeros(0, np.uint8)
    return np.frombuffer(memoryview(cast(Any, x)).cast("B"), np.uint8)


def array_of(data: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(data.view(np.uint16).reshape(shape)).view(mx.bfloat16)
    return mx.array(data.view(_numpy_type(dtype)).reshape(shape))


def _numpy_type(dtype: mx.Dtype) -> np.dtype:
    return np.dtype({"bool": "bool_"}.get(name := str(dtype).rpartition(".")[2], name))


def _fresh_output(shape: Sequence[int], dtype: mx.Dtype, init: float | None) -> np.ndarray:
    """An output before the launch: every bit set (a NaN in the float types), or `init`."""
    count = math.prod(shape)
    if init is None:
        return np.full(count * dtype.size, 0xFF, np.uint8)
    return _bytes_of(mx.full(shape, init, dtype)).copy()


def memories(
    text: Text,
    names: Sequence[str],
    arrays: Sequence[mx.array],
    options: dict[str, Any],
) -> list[Memory]:
    """The kernel's arguments in the order of its signature."""
    known = dict(zip(names, arrays, strict=True))
    outputs = iter(zip(options["output_shapes"], options["output_dtypes"], strict=True))
    result = []
    for argument in text.arguments:
        if not argument.attribute.startswith("buffer("):
            continue
        name = argument.name
        base, _, part = name.rpartition("_")
        if name in known:
            result.append(Memory(name, _bytes_of(known[name]), known[name].dtype.size))
        elif base in known and part in ("shape", "strides", "ndim"):
            data = _geometry(known[base], part)
            result.append(Memory(name, data.view(np.uint8), data.itemsize, counted=False))
        else:
            shape, dtype = next(outputs)
            init = options["init_value"]
            data = _fresh_output(shape, dtype, init)
            real = dtype in (mx.float32, mx.float16, mx.bfloat16)
            result.append(Memory(name, data, dtype.size, True, init is not None, real=real))
    return result


def _geometry(x: mx.array, part: str) -> np.ndarray:
    if part == "ndim":
        return np.array([x.ndim], np.int32)
    if part == "shape":
        return np.array(x.shape, np.int32)
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    return np.array(strides, np.int64)
