"""Values that packing would hide or turn into others."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert.layout import Piece, Target

import converting
import tiny
from converting import Raw, raw
from qwen35_mlx.errors import ModelError
from qwen35_mlx.packing import MODES, Format

# Type, its bytes of a NaN, an infinity of each sign, and its largest finite value of each sign.
FLOATS = {
    "BF16": (np.uint16, (0x7FC0, 0xFF81, 0x7F80, 0xFF80), (0x7F7F, 0xFF7F)),
    "F16": (np.uint16, (0x7E00, 0xFC01, 0x7C00, 0xFC00), (0x7BFF, 0xFBFF)),
    "F32": (np.uint32, (0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000), (0x7F7FFFFF, 0xFF7FFFFF)),
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_that_is_no_number_is_refused_wherever_it_stands(
    dtype: str, tmp_path: Path
) -> None:
    kind, strange, finite = FLOATS[dtype]
    rows, columns = 3, 1237
    values = np.tile(np.array([*finite, 0, 1, 5], kind), rows * columns)[: rows * columns]
    for place in (0, 1, rows * columns // 2, rows * columns - 1):
        for value in strange:
            changed = values.copy()
            changed[place] = value
            stored = Raw(dtype, (rows, columns), changed.tobytes())
            source, view = converting.one_matrix(tmp_path / "a", stored)
            with pytest.raises(ModelError, match="a: .* holds NaN or infinity in rows 0 to 2"):
                source.rows(view, 0, rows)
            source.close()
    source, view = converting.one_matrix(
        tmp_path / "a", Raw(dtype, (rows, columns), values.tobytes())
    )
    assert source.rows(view, 0, rows).shape == (rows, columns)
    source.close()


def test_a_source_with_nan_is_named_and_no_folder_is_made(tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", "dense")
    tensors = converting.read_file(source / "model.safetensors")
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    values = tensors[name].floats.copy()
    values[5, 7] = np.nan
    tensors[name] = raw(values, "BF16")
    converting.write_file(source / "model.safetensors", tensors)
    with pytest.raises(ModelError, match=f"model.safetensors: {name} holds NaN"):
        converting.converted(source, tmp_path / "out", bits=4, group_size=32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "affine"])
@pytest.mark.parametrize("exponent", range(-133, -95, 2))
def test_groups_of_the_smallest_weights_stay_small(
    mode: str, exponent: int, tmp_path: Path
) -> None:
    """mx.quantize makes infinities of some: the exponent of their scale wraps around."""
    bits, group = MODES[mode] or (0, 0)
    values = np.full((3, 64), 2.0**exponent, np.float32)
    values[1] *= -1
    values[2] = tiny.round_bf16(tiny.normal("a row", (64,)).astype(np.float32))
    _, view = converting.one_matrix(tmp_path / "a", raw(values, "BF16"))
    target = Target(
        "x.weight", "x", (3, 64), 3, 64, (Piece(view, 0, 3, 0),), Format(mode, bits, group)
    )
    given = mx.array(values).astype(mx.bfloat16)
    parts = target.convert(given)
    back = mx.dequantize(
        parts["weight"], parts["scales"], None, group_size=group, bits=bits, mode=mode
    )
    found = np.array(back.astype(mx.float32))
    assert (np.abs(found[:2]) <= 2.0 ** (exponent + 1)).all()
    whole = mx.quantize(given[2:], group_size=group, bits=bits, mode=mode)
    assert mx.array_equal(parts["weight"][2:], whole[0]).item()
