"""Numbers: the math library, the rounding of half and bfloat, vectors, integers."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import once, require_clean

COUNT = 257


def each(expression: str, *inputs: mx.array, dtype: mx.Dtype = mx.float32, **mode: Any) -> mx.array:
    """`expression` of `a`, `b`, `c`: the elements of `inputs`."""
    given = dict(zip("abc", inputs, strict=False))
    reads = "\n".join(f"auto {n} = {n}_[i];" for n in given)
    launch, (out,) = once(
        f"uint i = thread_position_in_grid.x;\n{reads}\no[i] = T({expression});",
        {f"{n}_": x for n, x in given.items()},
        {"o": (inputs[0].shape, dtype)},
        (inputs[0].size, 1, 1),
        (64, 1, 1),
        template=[("T", dtype)],
        **mode,
    )
    require_clean([launch])
    return out


Function = Callable[..., Any]

ONE: dict[str, Function] = {
    "exp": np.exp, "exp2": np.exp2, "exp10": lambda x: 10.0**x, "log": np.log, "log2": np.log2,
    "log10": np.log10, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin,
    "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh,
    "atan": np.arctan, "asinh": np.arcsinh, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc,
    "rint": np.rint, "fabs": np.abs, "abs": np.abs, "sign": np.sign,
    "saturate": lambda x: np.clip(x, 0, 1), "fract": lambda x: x - np.floor(x),
    "sinpi": lambda x: np.sin(np.pi * x), "cospi": lambda x: np.cos(np.pi * x),
}  # fmt: skip
# asin, acos, atanh and acosh have a domain of their own.
ODD: dict[str, Function] = {"asin": np.arcsin, "acos": np.arccos, "atanh": np.arctanh}


@pytest.mark.parametrize("space", ["metal", "metal::fast", "metal::precise"])
@pytest.mark.parametrize("name", [name for name in ONE if name != "abs"])
def test_a_function_of_float_is_that_of_numpy(name: str, space: str) -> None:
    x = mx.random.uniform(0.05, 3.0, (COUNT,))
    got = np.array(each(f"{space}::{name}(a)", x))
    expected = ONE[name](np.array(x).astype(np.float64))
    tolerance = 5e-6 if "fast" in space else 1e-6
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ODD)
def test_a_function_with_a_narrow_domain(name: str) -> None:
    x = mx.random.uniform(-0.95, 0.95, (COUNT,))
    got = np.array(each(f"{name}(a)", x))
    np.testing.assert_allclose(got, ODD[name](np.array(x).astype(np.float64)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 1e-3), (mx.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("name", [n for n in ONE if n not in ("sign", "saturate")])
def test_a_function_of_half_and_bfloat_rounds_once(
    name: str, dtype: mx.Dtype, tolerance: float
) -> None:
    x = mx.random.uniform(0.25, 2.5, (COUNT,)).astype(dtype)
    got = np.array(each(f"{name}(a)", x, dtype=dtype).astype(mx.float32))
    expected = ONE[name](np.array(x.astype(mx.float32)).astype(np.float64))
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_fast_functions_are_coarser_than_precise_ones() -> None:
    x = mx.random.uniform(0.05, 3.0, (COUNT,))
    fast, precise = each("fast::exp(a)", x), each("precise::exp(a)", x)
    assert bool((fast != precise).any())
    np.testing.assert_array_equal(np.array(each("exp(a)", x)), np.array(precise))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
def test_every_operation_of_half_and_bfloat_rounds_as_in_mlx(
    operator: str, dtype: mx.Dtype
) -> None:
    a = mx.random.normal((COUNT,)).astype(dtype)
    b = (mx.random.uniform(0.5, 2.0, (COUNT,))).astype(dtype)
    got = each(f"(a {operator} b) {operator} b", a, b, dtype=dtype, contract=False)
    step = {"+": mx.add, "-": mx.subtract, "*": mx.multiply, "/": mx.divide}[operator]
    np.testing.assert_array_equal(
        np.array(got.astype(mx.float32)), np.array(step(step(a, b), b).astype(mx.float32))
    )


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_float_becomes_half_and_bfloat_as_in_mlx(dtype: mx.Dtype, checked: bool) -> None:
    special = [0.0, -0.0, 1e-8, 6e-8, 65504.0, 65520.0, 1e30, float("inf"), -float("inf"), 3e-5]
    ties = np.arange(0x3F800000, 0x3F840000, 0x400, dtype=np.uint32).view(np.float32)
    x = mx.concatenate([mx.array(special), mx.random.normal((99,)) * 1e-6, mx.array(ties)])
    got = each("a", x, dtype=dtype, checked=checked)
    np.testing.assert_array_equal(
        np.array(got.view(mx.uint16)), np.array(x.astype(dtype).view(mx.uint16))
    )


def test_contraction_fuses_and_its_absence_does_not() -> None:
    b = mx.full((8,), 1 + 2.0**-12)
    minus = mx.full((8,), -1.0)
    fused = each("a * a + b", b, minus, contract=True)
    plain = each("a * a + b", b, minus, contract=False)
    exact = (1 + 2.0**-12) ** 2 - 1
    assert fused[0].item() == np.float32(exact)
    assert plain[0].item() == np.float32(np.float32((1 + 2.0**-12) ** 2) - np.float32(1))
    assert fused[0].item() != plain[0].item()


TWO: dict[str, Function] = {
    "max(a, b)": np.maximum, "min(a, b)": np.minimum,
    "pow(fabs(a), b)": lambda a, b: np.abs(a) ** b,
    "fmod(a, b)": np.fmod, "atan2(a, b)": np.arctan2, "copysign(a, b)": np.copysign,
    "step(a, b)": lambda a, b: (b >= a) * 1.0, "clamp(a, -b, b)": lambda a, b: np.clip(a, -b, b),
    "fma(a, b, a)": lambda a, b: a * b + a, "mix(a, b, 0.25f)": lambda a, b: a + (b - a) * 0.25,
    "select(a, b, a < b)": np.maximum, "a < b ? 1 : 2": lambda a, b: np.where(a < b, 1, 2),
    "max3(a, b, 0.5f)": lambda a, b: np.maximum(np.maximum(a, b), 0.5),
    "float(as_type<int>(a) & 0x7fffffff)": lambda a, b: (
        a.astype(np.float32).view(np.int32) & 0x7FFFFFFF).astype(np.float32),
}  # fmt: skip


@pytest.mark.parametrize("expression", TWO)
def test_a_function_of_two_floats(expression: str) -> None:
    a, b = mx.random.normal((COUNT,)), mx.random.uniform(0.5, 2.0, (COUNT,))
    expected = TWO[expression](np.array(a).astype(np.float64), np.array(b).astype(np.float64))
    np.testing.assert_allclose(np.array(each(expression, a, b)), expected, rtol=2e-6, atol=1e-6)


VECTOR: dict[str, Function] = {
    "dot(float4(a, b, 1, 2), float4(2, 3, a, b))": lambda a, b: 2 * a + 3 * b + a + 2 * b,
    "float4(float2(a, b), 3, 4).zwxy.z": lambda a, b: a,
    "float3(a, float2(b, 5)).y": lambda a, b: b,
    "float4(half4(half(1), half(2), half(3), half(4))).w * a": lambda a, b: 4 * a,
    "float4(int4(1, 2, 3, 4)).z + a": lambda a, b: a + 3,
    "vec<T, 4>(a, b, a, b).w": lambda a, b: b,
    "vec<T, 2>(b).y + a": lambda a, b: a + b,
    "static_cast<float4>(uint4(7)).x * a": lambda a, b: 7 * a,
    "max(float2(a, b), float2(0.5f)).x": lambda a, b: np.maximum(a, 0.5),
    "any(float2(a, b) > float2(0.0f)) ? 1.0f : 0.0f": lambda a, b: 1.0 * ((a > 0) | (b > 0)),
    "all(float2(a, b) > float2(0.0f)) ? 1.0f : 0.0f": lambda a, b: 1.0 * ((a > 0) & (b > 0)),
    "select(float2(a), float2(b), float2(a) < float2(b)).x": lambda a, b: np.maximum(a, b),
    "exp(float4(a)).w": lambda a, b: np.exp(a),
    "float4(bfloat4(bfloat(1.5f))).y + a": lambda a, b: a + 1.5,
    "float(as_type<uint2>(ulong(5) << 32).y) + a": lambda a, b: a + 5,
    "float(uchar4(1, 2, 3, 250).w + ushort(7)) + a": lambda a, b: a + 257,
    "popcount(255u) + clz(1u) + ctz(8u) + a": lambda a, b: 8 + 31 + 3 + a,
    "float(mulhi(0x80000000u, 6u)) + a": lambda a, b: 3 + a,
    "1.0 / 3 + a": lambda a, b: 1 / 3 + a,  # a literal without f is a float too
}  # fmt: skip


@pytest.mark.parametrize("expression", VECTOR)
def test_vectors_integers_and_casts(expression: str) -> None:
    a, b = mx.random.normal((COUNT,)), mx.random.uniform(0.5, 2.0, (COUNT,))
    expected = VECTOR[expression](np.array(a).astype(np.float64), np.array(b).astype(np.float64))
    np.testing.assert_allclose(np.array(each(expression, a, b)), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "dtype",
    [mx.bool_, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64,
     mx.float16, mx.bfloat16, mx.float32],
    ids=str,
)  # fmt: skip
def test_every_type_goes_in_and_comes_out(dtype: mx.Dtype) -> None:
    x = mx.random.randint(0, 2 if dtype == mx.bool_ else 100, (COUNT,)).astype(dtype)
    out = each("a", x, dtype=dtype)
    assert out.dtype == dtype
    assert bool((out == x).all())


def test_vector_loads_and_stores_of_small_types() -> None:
    body = """
      uint i = thread_position_in_grid.x;
      uchar4 packed = ((const device uchar4*)x)[i];
      ((device bfloat4*)o)[i] = bfloat4(float4(packed) * 0.5f);
    """
    x = mx.arange(64).astype(mx.uint8)
    launch, (out,) = once(body, {"x": x}, {"o": ((64,), mx.bfloat16)}, (16, 1, 1), (16, 1, 1))
    require_clean([launch])
    np.testing.assert_array_equal(np.array(out.astype(mx.float32)), np.arange(64) * 0.5)
    assert (launch.read.requested, launch.written.requested) == (64, 128)
