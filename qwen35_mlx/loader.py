"""A model folder as a ready network: shapes checked against config.json, weights in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import checkpoint, choice, family, memory, shards
from .config import Config
from .errors import InputError, ModelError
from .layers import matrix
from .layers.moe import GroupedLinear
from .model import Model
from .packing import Format, Quantization, measured
from .shapes import DTYPES, shapes_of


def load(
    folder: Path,
    config: Config,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    trying: Callable[[int, int], None] | None = None,
) -> Model:
    """Read, check and evaluate every weight of `folder`; on a GPU, choose the kernels to be used.

    dtype: of matrices and activations. None: the folder's own, or f32 for a packed folder without
    a GPU. progress: bytes done, in all. trying: kernels tried, in all, if they have to be.
    Raises: InputError for another dtype; ModelError naming a missing, extra or misshapen tensor;
    OutOfMemory before reading.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise InputError(f"dtype: {dtype!r}; expected mlx.core's {', '.join(DTYPES)}, or None.")
    stored = shards.entries(folder)
    dtype = dtype or _own_dtype(config)
    _require_memory(folder, config, stored, dtype)
    arrays = checkpoint.read(folder, stored, dtype)
    model = Model(
        config,
        has_vision=any(name.startswith("model.visual.") for name in arrays),
        has_mtp=any(name.startswith("mtp.") for name in arrays),
        dtype=dtype,
    )
    _pack(model, arrays, config.quantization, folder)
    _compare(model, arrays, folder)
    model.load_weights(list(arrays.items()))
    # Before the weights fill the memory.
    choice.use(shapes_of(config, _formats(model), dtype), trying)
    arrays.clear()  # what is joined would otherwise stay in memory beside its parts
    model.join()
    if not mx.metal.is_available():
        _store_by_columns(model)
    checkpoint.evaluate(dict(tree_flatten(model.parameters())), progress)
    return model


def _own_dtype(config: Config) -> mx.Dtype:
    if config.quantization and not mx.metal.is_available():
        return mx.float32  # MLX's packed product on the CPU takes 6 to 9 times as long in bf16
    return DTYPES[config.dtype]


def _store_by_columns(model: Model) -> None:
    """Same f32 matrices, other order in memory: `x @ W.T` takes half the time in MLX's CPU BLAS."""
    for module in model.modules():
        if isinstance(module, nn.Linear | GroupedLinear) and module.weight.dtype == mx.float32:
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)


def _require_memory(
    folder: Path, config: Config, stored: Mapping[str, shards.Entry], dtype: mx.Dtype
) -> None:
    needed = sum(
        entry.nbytes // shards.ITEM_BYTES[entry.dtype] * dtype.size
        if entry.dtype in ("BF16", "F16", "F32")
        else entry.nbytes
        for entry in stored.values()
    )
    needed += memory.state_bytes(config.text)
    memory.require(needed, str(folder), family.fits_advice(memory.available()))


def _pack(
    model: Model, arrays: Mapping[str, mx.array], packing: Quantization | None, folder: Path
) -> None:
    """Replace each module whose weights are packed. Packed means: the folder has its `.scales`."""
    modules = dict(model.named_modules())
    formats = _by_our_names(packing)
    for name in arrays:
        path, dot, last = name.rpartition(".")
        if last != "scales" or not dot:
            continue
        if packing is None:
            raise ModelError(
                f"{folder}: {path} is packed; config.json declares no quantization. "
                "Download the folder again."
            )
        module = modules.get(path)
        if not isinstance(module, nn.Linear | nn.Embedding | GroupedLinear):
            raise ModelError(f"{folder}: {name} packs nothing this model has. Convert it again.")
        # The tensors decide: a module that is packed is read so, also where config.json omits it.
        declared = formats.get(path) or packing.default
        found = _measured(arrays, path, module.weight.shape[-1], declared, folder)
        _replace(model, path, module, found)


def _formats(model: Model) -> dict[str, Format | None]:
    """How the matrices are packed, by path of the module; before `Model.join`."""
    return {
        path: module.packing if isinstance(module, GroupedLinear) else matrix.packing(module)
        for path, module in model.named_modules()
    }


def _by_our_names(packing: Quantization | None) -> dict[str, Format | None]:
    """The folder's per-module exceptions under this project's module paths."""
    if packing is None:
        return {}
    named = {checkpoint.from_mlx_name(path): f for path, f in packing.overrides.items()}
    return {
        path.replace("switch_mlp.gate_proj", "experts.gate_up_proj").replace(
            "switch_mlp.down_proj", "experts.down_proj"
        ): f
        for path, f in named.items()
    }


def _measured(
    arrays: Mapping[str, mx.array], path: str, columns: int, declared: Format, folder: Path
) -> Format:
    weight, scales = arrays.get(f"{path}.weight"), arrays[f"{path}.scales"]
    if weight is None or weight.dtype != mx.uint32 or min(weight.ndim, scales.ndim) < 2:
        raise ModelError(f"{folder}: {path}.scales without packed weights. Convert it again.")
    return measured(f"{folder}: {path}.weight", weight.shape, scales.shape, columns, declared)


def _replace(model: Model, path: str, module: nn.Module, packing: Format) -> None:
    if isinstance(module, GroupedLinear):
        module.pack(packing)
        return
    packed = module.to_quantized(packing.group_size, packing.bits, packing.mode)
    parent, _, attribute = path.rpartition(".")
    owner = model
    for part in parent.split(".") if parent else []:
        owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
    setattr(owner, attribute, packed)


def _compare(model: Model, arrays: Mapping[str, mx.array], folder: Path) -> None:
    parameters = dict(tree_flatten(model.parameters()))
    expected = {name: value.shape for name, value in parameters.items()}
    for name in sorted(expected.keys() - arrays.keys()):
        raise ModelError(
            f"{folder}: {name} is missing; expected a tensor of shape {expected[name]}. "
            "Download or convert the folder again."
        )
    for name in sorted(arrays.keys() - expected.keys()):
        raise ModelError(
            f"{folder}: {name} {arrays[name].shape} belongs to no part of the model that "
            "config.json describes; expected no such tensor. Check that both are of one model."
        )
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ModelError(
                f"{folder}: {name} has shape {arrays[name].shape}; config.json expects {shape}. "
                "Check that both are of one model."
            )
        wanted, found = parameters[name].dtype, arrays[name].dtype
        packed = wanted in (mx.uint32, mx.uint8)
        if found != wanted if packed else not mx.issubdtype(found, mx.floating):
            raise ModelError(
                f"{folder}: {name} holds {found}; expected {wanted if packed else 'floats'}. "
                "Download or convert the folder again."
            )
