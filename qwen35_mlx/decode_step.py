"""A decode step of a model that has shapes and no weights, ready to be traced.

To be imported where the step is traced: what kernels decide at import is part of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from . import graph, launches
from .cache import Cache, KVState
from .checkpoint import KEPT_F32, ZERO_CENTRED
from .config import Config
from .kernels import library
from .kernels.fused import swiglu
from .layers.moe import GroupedLinear
from .model import Model
from .packing import Format
from .sampling import Sampler, Sampling
from .shapes import DTYPES

Tree = dict[str, Any]


def decode(
    config: Config,
    formats: Mapping[str, Format | None],
    context: int,
    sampling: Sampling,
    kernels: bool = True,
) -> tuple[Callable[[Tree], Any], Tree]:
    """One turn of the loop in `engine.generate`, and its argument: weights, states and a token.

    formats: how the matrices are packed, by module path. context: tokens read before. kernels:
    whether this project's own are used, all of them. All arrays are lazy: none has memory.
    """
    library.use(library.names() if kernels else ())
    model = _model(config, formats, DTYPES[config.dtype])
    cache, sampler = Cache(config.text, capacity=context + 1), Sampler(sampling)
    holders = [*cache.states, sampler]

    def step(given: Tree) -> Any:
        model.update(given["weights"])
        states = given.get("states", [])  # the first token finds none
        for holder, arrays in zip(holders, states, strict=False):
            vars(holder).update(arrays)
        cache.length = context if states else 0
        for state in cache.states:
            if isinstance(state, KVState):
                state.length = cache.length
        position = np.full((3, 1, 1), cache.length, np.int32)
        hidden = model(model.embed(given["token"][:, None]), position, cache)
        following = sampler(model.logits(hidden[:, -1]))
        return [following, *cache.arrays(), *sampler.arrays()]

    given = {"weights": model.parameters(), "token": mx.zeros((1,), mx.uint32)}
    graph.traced(step, given)  # leaves in the holders what there will be
    return step, given | {"states": [_arrays(holder) for holder in holders]}


def is_on_metal() -> bool:
    """Whether what decides at import decided as on a Mac: elsewhere this is several operations."""
    x = mx.zeros((2, 3))
    return launches.count(swiglu, x, x).total() == 1


def _model(config: Config, formats: Mapping[str, Format | None], dtype: mx.Dtype) -> Model:
    """The language model as `loader.load` leaves it, of arrays that are never evaluated."""
    model = Model(config, has_vision=False, has_mtp=False, dtype=dtype)

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        found = formats.get(path)
        return vars(found) if found and hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=packing)
    for path, module in model.named_modules():
        found = formats.get(path)
        if isinstance(module, GroupedLinear) and found:
            module.pack(found)

    def typed(path: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        whole = ZERO_CENTRED.search(path) or KEPT_F32.search(path)
        return array.astype(mx.float32 if whole else dtype)

    model.update(tree_map_with_path(typed, model.parameters()))
    model.join()
    return model


def _arrays(holder: object) -> dict[str, mx.array]:
    return {
        name: mx.zeros(value.shape, value.dtype)
        for name, value in vars(holder).items()
        if isinstance(value, mx.array)
    }
