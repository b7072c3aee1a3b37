"""Tensors whose names and shapes are right and whose kind is not."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import qwen35_mlx
import tiny
from qwen35_mlx import checkpoint
from qwen35_mlx.errors import ModelError

Arrays = dict[str, mx.array]
PATH = "language_model.model.layers.3.self_attn.o_proj"
NORM = "language_model.model.norm.weight"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    block = {"group_size": 32, "bits": 4, "mode": "affine"}
    config = tiny.CONFIGS["dense"]
    return tiny.write(tmp_path, config, tiny.draw(config), layout="mlx", quantize=block)


def retype(name: str, dtype: mx.Dtype) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].view(dtype)

    return change


def flatten(arrays: Arrays) -> None:
    arrays[f"{PATH}.scales"] = arrays[f"{PATH}.scales"].reshape(-1)[0]


def halve_groups(arrays: Arrays) -> None:
    for part in ("scales", "biases"):
        arrays[f"{PATH}.{part}"] = mx.repeat(arrays[f"{PATH}.{part}"], 2, axis=-1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (retype(NORM, mx.uint32), "norm.weight holds .*uint32; expected floats"),
        (retype(f"{PATH}.scales", mx.uint32), "scales holds .*uint32; expected floats"),
        (retype(f"{PATH}.biases", mx.uint32), "biases holds .*uint32; expected floats"),
        (retype(f"{PATH}.weight", mx.float32), "scales without packed weights"),
        (flatten, "scales without packed weights"),
        (halve_groups, "no affine packing of 1024 columns"),
    ],
    ids=["norm", "scales", "biases", "weight", "one number", "groups of 16"],
)
def test_a_tensor_of_another_kind_is_refused(
    change: Callable[[Arrays], None], named: str, packed: Path
) -> None:
    arrays = checkpoint._lazy(packed / "model.safetensors")
    change(arrays)
    mx.eval(arrays)
    mx.save_safetensors(str(packed / "model.safetensors"), arrays, {"format": "mlx"})
    with pytest.raises(ModelError, match=named):
        qwen35_mlx.load(packed)
