"""Matrices that share an input, as one."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen35_mlx.layers.joined import SideBySide, joined

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
