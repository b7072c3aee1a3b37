"""Matrices that share an input, as one."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from kernel_checks import executed, takes_the_reference, using
from qwen35_mlx import config
from qwen35_mlx.cache import DeltaState
from qwen35_mlx.kernels import library
from qwen35_mlx.layers.deltanet import GatedDeltaNet
from qwen35_mlx.layers.joined import SideBySide, joined
from qwen35_mlx.layers.mlp import MLP
from tiny_shapes import CONFIGS

IN = 64
OUTS = {"a": 7, "b": 12, "c": 3}  # rows


def owner(**packing: tuple[int, int]) -> nn.Module:
    """A module with one layer for each of OUTS; packing: (group, bits) of those that are packed."""
    made = nn.Module()
    for number, (name, out) in enumerate(OUTS.items()):
        layer = nn.Linear(IN, out, bias=False)
        layer.weight = mx.random.normal((out, IN), key=mx.random.key(number))
        made[name] = (
            nn.QuantizedLinear.from_linear(layer, *packing[name]) if packing.get(name) else layer
        )
    return made


ALIKE = [{}, dict.fromkeys(OUTS, (64, 4)), dict.fromkeys(OUTS, (32, 8))]


@pytest.mark.parametrize("packing", ALIKE, ids=["plain", "4 bits", "8 bits"])
def test_layers_stored_alike_become_one_whose_outputs_lie_in_order(
    packing: dict[str, tuple[int, int]],
) -> None:
    made = owner(**packing)
    x = mx.random.normal((2, 5, IN), key=mx.random.key(9))
    wanted = mx.concatenate([made[name](x) for name in OUTS], axis=-1)
    one = joined(made, *OUTS)
    assert not isinstance(one, SideBySide)
    assert one.weight.shape[0] == sum(OUTS.values())
    assert not OUTS.keys() & made.keys()
    assert mx.allclose(one(x), wanted, rtol=0, atol=1e-5)  # BLAS sums in another order


DIFFERENT = [
    {"a": (64, 4), "b": (64, 8), "c": (64, 4)},
    {"a": (64, 4), "b": (32, 4), "c": (64, 4)},
    {"b": (64, 4)},
]


@pytest.mark.parametrize("packing", DIFFERENT, ids=["bits", "groups", "packed and plain"])
def test_layers_stored_differently_stay_apart_with_the_same_outputs(
    packing: dict[str, tuple[int, int]],
) -> None:
    made = owner(**packing)
    x = mx.random.normal((5, IN), key=mx.random.key(9))
    wanted = mx.concatenate([made[name](x) for name in OUTS], axis=-1)
    assert mx.array_equal(joined(made, *OUTS)(x), wanted)


def packed(block: nn.Module, *names: str) -> None:
    """Random weights in a block, these layers of it at 8 bits and the others at 4."""
    for number, (path, layer) in enumerate(block.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = 0.1 * mx.random.normal(layer.weight.shape, key=mx.random.key(number))
            layer.weight = weight
            bits = 8 if path in names else 4
            block[path] = nn.QuantizedLinear.from_linear(layer, 32, bits)


def test_gate_and_up_that_stay_apart_launch_no_kernel_for_both() -> None:
    mlp = MLP(96, 64)
    packed(mlp, "up_proj")
    x = mx.random.normal((1, 2, 96), key=mx.random.key(9))
    wanted = mlp.down_proj(nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    mlp.join()
    takes_the_reference(lambda: [mlp(x)])
    assert mx.allclose(mlp(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["in_proj_z", "in_proj_a"])
def test_projections_that_stay_apart_launch_no_kernel_for_all(name: str) -> None:
    text = config.parse(CONFIGS["dense"], "dense").text
    x = mx.random.normal((1, 2, text.hidden_size), key=mx.random.key(9))
    found = {}
    for apart in ((), (name,)):
        block = GatedDeltaNet(text)
        packed(block, *apart)
        block.join()
        wanted = block(x, DeltaState(text))
        with executed() as launches, using(*library.names()):
            y = block(x, DeltaState(text))
        assert mx.allclose(y, wanted, rtol=0, atol=1e-5)
        found[apart] = [launch.name for launch in launches]
    assert found == {(): ["delta_project", "delta_step"], (name,): ["delta_step"]}
