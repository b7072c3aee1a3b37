"""Rows of an embedding: the Metal source and the MLX form against float64."""

from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kernel_checks import (
    EVERY_RUN,
    FEW_RUNS,
    ROUNDING,
    TYPES,
    Needed,
    as_float64,
    clean,
    executed,
    touched,
    using,
)
from matrices import draw_packed
from metal_cpu import Launch
from qwen35_mlx.kernels.embed import embed, launch, reference
from qwen35_mlx.kernels.packed import Packed
from qwen35_mlx.packing import AFFINE_BITS, AFFINE_GROUPS, Format

ROUNDED = ROUNDING | {mx.float32: 2.0**-23}  # f32 rounds scale * q + bias once or twice
SMALLEST = 2.0**-24  # of float16; a sum of that size has lost as much to f32
# Rows, hidden, batch and tokens: one row and one id; fewer than 8 elements of every input but the
# matrix; ids below and above 8; widths that end within a threadgroup.
SHAPES = [(1, 128, 1, 1), (5, 384, 2, 1), (13, 640, 1, 7), (9, 256, 3, 5)]
PACKINGS = [*product(AFFINE_BITS, AFFINE_GROUPS)]


def matrix(V: int, hidden: int, bits: int, group: int, kind: str = "bfloat16") -> Packed:
    packing = Format("affine", bits, group)
    return draw_packed(np.random.default_rng(bits * V), (V, hidden), packing, TYPES[kind])


def tokens(V: int, B: int, T: int, kind: mx.Dtype = mx.uint32) -> mx.array:
    """The first and the last row are among them where there are two ids or more."""
    ids = np.random.default_rng(V + T).integers(0, V, B * T)
    ids[0], ids[-1] = V - 1, 0
    return mx.array(ids.reshape(B, T)).astype(kind)


def values(packed: mx.array, bits: int) -> np.ndarray:
    """Each row as one stream of bits, low bits first."""
    stream = np.unpackbits(np.array(packed).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))


def definition(ids: mx.array, packed: Packed) -> np.ndarray:
    """In float64."""
    packing = packed.packing
    assert packing and packed.scales is not None and packed.biases is not None
    parts = packed.scales, packed.biases
    scale, bias = (np.repeat(as_float64(part), packing.group_size, axis=-1) for part in parts)
    return (values(packed.weight, packing.bits) * scale + bias)[np.array(ids)]


def check(found: mx.array, ids: mx.array, packed: Packed, dtype: mx.Dtype) -> None:
    wanted = definition(ids, packed)
    assert found.dtype == dtype and found.shape == (*ids.shape, packed.columns)
    # In f32 the product may be as large as the bias that takes most of it away.
    largest = np.abs(wanted).max() * 2.0**-23
    error = np.abs(as_float64(found) - wanted)
    assert (error <= ROUNDED[dtype] * np.abs(wanted) + largest + SMALLEST).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_mlx_packs_a_row_as_one_stream_of_bits(bits: int, kind: str) -> None:
    x = np.random.default_rng(bits).normal(size=(3, 256)).astype(np.float32)
    for group in AFFINE_GROUPS:
        parts = mx.quantize(mx.array(x).astype(TYPES[kind]), group, bits)
        scales, biases = (np.repeat(as_float64(part), group, axis=-1) for part in parts[1:])
        wanted = values(parts[0], bits) * scales + biases
        scale, bias = (part.astype(mx.float32) for part in parts[1:])
        found = as_float64(mx.dequantize(parts[0], scale, bias, group, bits))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("bits", "group"), PACKINGS)
def test_the_reference_agrees_with_float64(
    bits: int, group: int, kind: str, dtype: mx.Dtype
) -> None:
    for V, hidden, B, T in SHAPES:
        packed, ids = matrix(V, hidden, bits, group, kind), tokens(V, B, T)
        check(reference(ids, packed, dtype), ids, packed, dtype)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_the_reference_is_mlxs_embedding_but_for_its_rounding(dtype: mx.Dtype, kind: str) -> None:
    for bits in AFFINE_BITS:
        plain = nn.Embedding(11, 256)
        plain.weight = plain.weight.astype(TYPES[kind])
        theirs = plain.to_quantized(64, bits)
        ours = Packed(theirs.weight, theirs.scales, theirs.biases, Format("affine", bits, 64))
        ids = tokens(11, 2, 3)
        found = as_float64(reference(ids, ours, dtype))
        # Theirs rounds the product and the sum to the type of the scales.
        products = 2**bits * np.abs(as_float64(theirs.scales)).max()
        error = np.abs(found - as_float64(theirs(ids).astype(dtype)))
        rounding = ROUNDED[TYPES[kind]] + ROUNDED[dtype]
        assert (error <= rounding * (products + np.abs(found)) + SMALLEST).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_the_kernel_agrees_with_float64_and_the_reference(
    bits: int, kind: str, metal_backend: list[Launch] | None
) -> None:
    # Every shape, group and output type comes with every packing once or more.
    for i, (V, hidden, B, T) in enumerate(SHAPES):
        dtype = list(TYPES.values())[i % 3]
        packed, ids = matrix(V, hidden, bits, AFFINE_GROUPS[i % 3], kind), tokens(V, B, T)
        found = launch(ids, packed, dtype)
        check(found, ids, packed, dtype)
        if kind != "float32":  # then the product of scale and q is exact
            assert mx.array_equal(found, reference(ids, packed, dtype))
        clean(metal_backend)


@pytest.mark.parametrize("kind", [mx.uint32, mx.int32], ids=str)
def test_an_id_outside_is_the_last(kind: mx.Dtype, metal_backend: list[Launch] | None) -> None:
    packed = matrix(6, 128, 5, 32)
    outside = [6, 7, 2**31 - 1, *((-1, -6, -(2**31)) if kind == mx.int32 else (2**32 - 1,))]
    ids, last = mx.array([[0, *outside]], dtype=kind), mx.array([[0] + [5] * len(outside)])
    for op in (launch, reference):
        check(op(ids, packed, mx.float32), last, packed, mx.float32)
    clean(metal_backend)
    plain = Packed(mx.arange(12.0).reshape(6, 2))
    assert embed(ids, plain, mx.float16)[0, 1:].tolist() == [[10, 11]] * len(outside)


@EVERY_RUN
def test_no_order_of_threads_matters(run: dict[str, Any]) -> None:
    packed, ids = matrix(7, 640, 6, 128, "float32"), tokens(7, 1, 3)
    with executed(**run):
        check(launch(ids, packed, mx.bfloat16), ids, packed, mx.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("bits", "group"), PACKINGS)
def test_every_packing_shape_type_and_order(
    bits: int, group: int, kind: str, dtype: mx.Dtype
) -> None:
    for V, hidden, B, T in [*SHAPES, (3, 5120, 2, 1)]:
        packed, ids = matrix(V, hidden, bits, group, kind), tokens(V, B, T, mx.int32)
        for run in FEW_RUNS:
            with executed(**run):
                check(launch(ids, packed, dtype), ids, packed, dtype)


def test_the_op_uses_the_kernel_only_where_it_fits() -> None:
    packed, ids = matrix(9, 128, 4, 32), tokens(9, 1, 3)
    plain = Packed(mx.random.normal((9, 128)))
    parts = mx.quantize(plain.weight, 32, 4, "mxfp4")
    weight, scales = parts[0], parts[1]
    floats = Packed(weight, scales, None, Format("mxfp4", 4, 32))
    with executed() as launches, using("embed"):
        check(embed(ids, packed, mx.float16), ids, packed, mx.float16)
        assert len(launches) == 1
        assert mx.array_equal(embed(ids, plain, mx.float32), plain.weight[ids])
        rows = mx.dequantize(weight, scales, None, 32, 4, "mxfp4")
        assert mx.array_equal(embed(ids, floats, mx.bfloat16), rows[ids].astype(mx.bfloat16))
        assert len(launches) == 1


def cases() -> list[Needed]:
    """Hidden sizes of the family."""
    result: list[Needed] = []
    for hidden, bits, B, T in [
        *((2048, bits, 1, 1) for bits in AFFINE_BITS if bits > 2),
        (5120, 6, 1, 1),
        (4096, 4, 1, 5),
    ]:
        packed = matrix(300, hidden, bits, 64)
        ids = mx.arange(T, dtype=mx.uint32)[None] * 50
        row = sum(part.nbytes // 300 for part in packed[:3] if part is not None)
        op = partial(launch, ids, packed, mx.bfloat16)
        label = f"embed {B * T} x {hidden}, {bits} bits"
        result.append(Needed(label, op, B * T * row + ids.nbytes, 2 * hidden * B * T))
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_bytes_are_those_of_the_rows_that_are_named(case: Needed) -> None:
    found = touched(case)
    # A simdgroup reads 256 values, 32 Bits bytes: with odd Bits the line in the middle of which one
    # ends and the next begins comes twice.
    weight = found.buffers["weight"].read
    assert weight.lines <= 1.25 * weight.unique + 64 * found.grid[1]
