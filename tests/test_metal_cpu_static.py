"""Seeded faults of the text: each is refused, with the line; the like that is right is accepted."""

from dataclasses import dataclass

import mlx.core as mx
import pytest

from metal_cpu import CompileError, once


@dataclass(frozen=True)
class Fault:
    """A body (and a header) over float32 `x` and `o` that Metal would not compile."""

    name: str
    body: str
    says: str
    header: str = ""
    line: int = 2
    size: int = 256
    out: mx.Dtype = mx.float32


G = "uint i = thread_position_in_grid.x;\n"

FAULTS = [
    Fault("double", G + "double y = x[i]; o[i] = float(y);", "double"),
    Fault("standard library", G + "o[i] = std::max(x[i], 0.0f);", "std"),
    Fault("lambda", G + "auto f = [](float v) { return v; }; o[i] = f(x[i]);", "lambda"),
    Fault("lambda that captures", G + "auto f = [&] { return x[i]; };\no[i] = f();", "lambda"),
    Fault("goto", G + "o[i] = x[i]; if (i == 999) goto end;\nend: return;", "not a part"),
    Fault("new", G + "float* p = new float[2]; o[i] = p[0] + x[i];", "not a part"),
    Fault("compiler builtin", G + "o[i] = __builtin_expf(x[i]);", "not a part"),
    Fault("C library", G + "o[i] = x[i]; printf(\"%f\", o[i]);", "C library"),
    Fault("C header", G + "o[i] = x[i];", "no such header", header="#include <math.h>\n", line=1),
    Fault("address space left out", G + "float* p = x; o[i] = p[i];", "address space"),
    Fault("address space left out, auto", G + "const float& v = x[i]; o[i] = v;", "address space"),
    Fault("wrong address space", G + "const threadgroup float* p = x; o[i] = p[i];", "cannot init"),
    Fault("device pointer for a thread one", G + "thread float* p = o + i; *p = x[i];",
          "cannot init"),
    Fault("helper wants device, a small input is constant", G + "o[i] = first(x);", "no matching",
          header="inline float first(const device float* p) { return p[0]; }\n", line=5, size=7),
    Fault("write to an input", G + "x[i] = 1.0f; o[i] = x[i];", "read-only"),
    Fault("write to a small input", G + "x[0] = 1.0f; o[i] = x[0];", "read-only", size=5),
    Fault("unknown function", G + "o[i] = erf(x[i]);", "erf"),
    Fault("min of two types", G + "o[i] = min(x[i], 1);", "ambiguous"),
    Fault("max of int and uint", G + "o[i] = x[i] + max(int(i), 3u);", "ambiguous"),
    Fault("simd_sum of 64 bits", G + "o[i] = x[i] + float(simd_sum(long(i)));", "ambiguous"),
    Fault("simd_and of floats", G + "o[i] = simd_and(x[i]);", "ambiguous"),
    Fault("16x16 matrix", G + "simdgroup_matrix<float, 16, 16> m; o[i] = x[i];", "8x8"),
    Fault("matrix of integers", G + "simdgroup_matrix<int, 8, 8> m; o[i] = x[i];", "float, half"),
    Fault("matrix loaded from another type", G + "simdgroup_matrix<half, 8, 8> m;\n"
          "simdgroup_load(m, x);\no[i] = m.thread_elements()[0];", "no matching", line=3),
    Fault("float into bfloat", G + "o[i] = x[i];", "bf", out=mx.bfloat16),
    Fault("float sum into bfloat", G + "o[i] = bfloat(x[i]);\no[i] += x[i] * 2.0f;", "bf", line=3,
          out=mx.bfloat16),
    Fault("local not set", G + "float y; o[i] = y + x[i];", "uninitialized"),
    Fault("local not set on a path", G + "float y; if (i < 9) y = x[i];\no[i] = y;",
          "uninitialized"),
    Fault("helper without a value", G + "o[i] = f(x[i]);", "return",
          header="inline float f(float v) { if (v > 0.0f) return v; }\n", line=1),
    Fault("too few vector elements", G + "float4 v = float4(x[i], 1.0f); o[i] = v.w;", "as many"),
    Fault("vector of another length", G + "float4 v = float4(float2(x[i])); o[i] = v.w;",
          "lengths"),
    Fault("C cast of a vector", G + "int4 n = (int4)float4(x[i]); o[i] = n.x;", "write TYPE"),
    Fault("threadgroup initialised", G + "threadgroup float t[2] = {0, 1}; o[i] = t[0] + x[i];",
          "initialised"),
    Fault("threadgroup variable in a helper", G + "o[i] = f(x[i]);", "kernel's body",
          header="inline float f(float v) {\n  threadgroup float t[2];\n  t[0] = v;\n"
          "  return t[0];\n"
          "}\n"),
    Fault("variable length", G + "float t[i]; t[0] = x[i]; o[i] = t[0];", "variable length"),
    Fault("static local", G + "static int n = 0; o[i] = x[i] + float(n);", "static"),
    Fault("C++17", G + "if constexpr (true) o[i] = x[i];", "C++17"),
    Fault("structured binding", G + "int a[2] = {1, 2}; auto [p, q] = a; o[i] = x[p] + x[q];",
          "C++17"),
    Fault("array index past its end", G + "float a[2] = {0, 1}; o[i] = a[2] + x[i];",
          "past the end"),
    Fault("shift by 40", G + "o[i] = x[i] + float(1 << 40);", "shift"),
    Fault("missing semicolon", G + "o[i] = x[i]", "expected"),
    Fault("attribute of an unknown name", G + "o[i] = x[i] + float(thread_id);", "thread_id"),
]  # fmt: skip

RIGHT = [
    ("auto helper takes device and constant", G + "o[i] = first(x);",
     "template <typename P>\ninline float first(P p) { return p[0]; }\n", mx.float32),
    ("float into half", G + "o[i] = x[i];", "", mx.float16),
    ("bfloat asked for", G + "o[i] = bfloat(x[i]);", "", mx.bfloat16),
    ("pointers with their spaces", G + "const device float* p = x + i;\nfloat y = *p;\n"
     "thread float* q = &y;\nthread float& r = *q;\no[i] = r;", "", mx.float32),
    ("comments may say anything", G + "// double std::vector new float* p\no[i] = x[i]; /* goto */",
     "", mx.float32),
    ("array subscripts are no lambdas", G + "float a[2] = {x[i], x[i]};\nif (a[0] > 0) "
     "{ o[i] = a[1]; }"
     " else { o[i] = (a[0]); }", "", mx.float32),
    ("constant tables", G + "o[i] = x[i] + table[i % 3];",
     "constant float table[3] = {1.0f, 2.0f, 3.0f};\n", mx.float32),
    ("unrolled loops", G + "float s = 0;\n#pragma unroll\nfor (int k = 0; k < 4; ++k) s += x[k];\n"
     "#pragma clang loop unroll(full)\nfor (int k = 0; k < 4; ++k) s += x[k];\no[i] = s;", "",
     mx.float32),
    ("products in a call", G + "float a = x[i];\no[i] = metal::fma(a * a, a, a);", "", mx.float32),
    ("half and bfloat literals", G + "half h = 1.5h; bfloat b = 0.5bf;"
     " o[i] = x[i] + float(h) + float(b);",
     "", mx.float32),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_text_that_metal_would_not_take_is_refused_with_its_line(fault: Fault) -> None:
    with pytest.raises(CompileError) as caught:
        once(
            fault.body,
            {"x": mx.zeros((fault.size,))},
            {"o": ((256,), fault.out)},
            (fault.size, 1, 1),
            (fault.size, 1, 1),
            header=fault.header,
            checked=False,
        )
    message = str(caught.value)
    assert fault.says in message, message
    assert f"once.metal:{fault.line}:" in message or "msl/" in message, message


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("size", [7, 8])
def test_a_text_like_those_that_is_right_is_accepted(
    case: tuple[str, str, str, mx.Dtype], size: int
) -> None:
    _, body, header, dtype = case
    body = body.replace("const device float* p = x + i", "auto p = x + i")
    launch, (out,) = once(
        body, {"x": mx.ones((size,))}, {"o": ((size,), dtype)}, (size, 1, 1), (size, 1, 1),
        header=header,
    )  # fmt: skip
    assert launch.problems == []
    assert bool((out > 0).all())
