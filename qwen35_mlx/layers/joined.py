"""Matrices that share an input, stored as one: one launch instead of several."""

import mlx.core as mx
import mlx.nn as nn


class SideBySide(nn.Module):
    """Linear layers that are stored differently; their outputs `[..., out]` one after the other."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


def joined(owner: nn.Module, *names: str) -> nn.Module:
    """Take the linear layers `names` out of `owner`: one layer with the rows of all, in order.

    Returns: a linear layer where all are stored alike, else `SideBySide`; none has a bias.
    """
    parts = [owner.pop(name) for name in names]
    first = parts[0]
    if len({_storage(part) for part in parts}) > 1:
        return SideBySide(parts)
    rows = {key: mx.concatenate([part[key] for part in parts]) for key in first.parameters()}
    first.update(rows)
    return first


def _storage(part: nn.Module) -> tuple[object, ...]:
    if isinstance(part, nn.QuantizedLinear):
        return part.mode, part.bits, part.group_size, part.scales.dtype
    return (part.weight.dtype,)
