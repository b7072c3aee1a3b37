"""The emulator's surface: the text it takes from MLX, what it patches and gives back."""

import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import CompileError, Launch, emulated, once, require_clean
from metal_cpu import text as metal_text
from metal_cpu.lines import find
from metal_cpu.toolchain import folder, toolchain
from metal_cpu.translate import masked, threadgroup_variables
from qwen35_mlx.kernels import library

G = "uint i = thread_position_in_grid.x;\n"
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": 12,
    "dispatch_simdgroups_per_threadgroup": 2,
    "dispatch_threads_per_threadgroup.y": 3,
    "grid_origin.x": 0,
    "grid_size.y": 5,
    "quadgroup_index_in_threadgroup": 7,
    "quadgroups_per_threadgroup": 8,
    "simdgroup_index_in_threadgroup": 0,
    "simdgroups_per_threadgroup": 1,
    "thread_execution_width": 32,
    "thread_index_in_quadgroup": 1,
    "thread_index_in_simdgroup": 29,
    "thread_index_in_threadgroup": 29,
    "thread_position_in_grid.x": 29,
    "thread_position_in_threadgroup.y": 1,
    "threadgroup_position_in_grid.y": 1,
    "threadgroups_per_grid.x": 2,
    "threads_per_grid.x": 30,
    "threads_per_simdgroup": 32,
    "threads_per_threadgroup.y": 2,
}


def test_all_twenty_attributes_arrive() -> None:
    # The thread (29, 4, 0) of a grid of 30 x 5, in the smaller threadgroup at the far corner.
    assert len(ATTRIBUTES) == 20
    stores = "\n".join(f"o[{n}] = {name};" for n, name in enumerate(ATTRIBUTES))
    body = (
        f"if (thread_position_in_grid.x == 29 && thread_position_in_grid.y == 4) {{\n{stores}\n}}"
    )
    launch, (out,) = once(
        body, {"x": mx.zeros(9)}, {"o": ((20,), mx.uint32)}, (30, 5, 1), (16, 3, 1)
    )
    require_clean([launch])
    assert launch.threads == 150
    expected = dict(ATTRIBUTES, thread_index_in_simdgroup=27, thread_index_in_threadgroup=27)
    expected |= {"thread_index_in_quadgroup": 3, "quadgroup_index_in_threadgroup": 6}
    expected |= {"quadgroups_per_threadgroup": 7}
    assert dict(zip(ATTRIBUTES, np.array(out).tolist(), strict=True)) == expected


def signature_of(inputs: dict[str, Any], body: str, **options: Any) -> str:
    launch, _ = once(body, inputs, {"o": ((8,), mx.float32)}, (8, 1, 1), (8, 1, 1), **options)
    require_clean([launch])
    return launch.text


def test_small_inputs_are_constant_and_scalars_references() -> None:
    text = signature_of(
        {"seven": mx.ones(7), "eight": mx.ones(8), "zero": mx.array(2.0), "n": 3, "f": 0.5},
        G + "o[i] = eight[i] + seven[0] + zero + float(n) + f;",
    )
    for argument in (
        "const constant float* seven",
        "const device float* eight",
        "const constant float& zero",
        "const constant int32_t& n",
        "const constant float& f",
        "device float* o",
    ):
        assert argument in text


def test_shapes_strides_and_dimensions_arrive() -> None:
    body = (
        G + "o[i] = float(x_shape[i % 3] * 100) + float(x_strides[i % 3]) + x_ndim * 0.5f + x[0];"
    )
    launch, (out,) = once(
        body, {"x": mx.zeros((3, 5, 4))}, {"o": ((3,), mx.float32)}, (3, 1, 1), (3, 1, 1)
    )
    require_clean([launch])
    assert out.tolist() == [321.5, 505.5, 402.5]


def test_templates_of_types_numbers_and_booleans() -> None:
    launch, (out,) = once(
        G + "if (YES && !NO) o[i] = T(x[i]) * T(N);",
        {"x": mx.full(8, 2.5)}, {"o": ((8,), mx.float16)}, (8, 1, 1), (8, 1, 1),
        template=[("T", mx.float16), ("N", -3), ("YES", True), ("NO", False)],
    )  # fmt: skip
    require_clean([launch])
    assert out.tolist() == [-7.5] * 8
    assert "template <typename T, int N, bool YES, bool NO>" in launch.text


def test_a_signature_that_mlx_cuts_short_is_refused() -> None:
    # Two outputs, a shape and no attribute: MLX closes the list after the first output.
    with pytest.raises(CompileError, match="malformed signature"):
        once("o[0] = p[0] = float(x_shape[0]);", {"x": mx.zeros(9)},
             {"o": ((1,), mx.float32), "p": ((1,), mx.float32)}, (1, 1, 1), (1, 1, 1))  # fmt: skip


def test_a_kernel_of_several_outputs_and_types() -> None:
    body = G + "a[i] = int(x[i]) / 2; b[i] = x[i] > 3.0f; c[i] = bfloat(x[i] * 0.5f);"
    _, (a, b, c) = once(
        body, {"x": mx.arange(9).astype(mx.float32)},
        {"a": ((3, 3), mx.int32), "b": ((9,), mx.bool_), "c": ((9, 1), mx.bfloat16)},
        (9, 1, 1), (9, 1, 1),
    )  # fmt: skip
    assert a.tolist() == [[0, 0, 1], [1, 2, 2], [3, 3, 4]]
    assert b.tolist() == [False] * 4 + [True] * 5
    assert c.reshape(-1).tolist() == [n / 2 for n in range(9)]


def test_clean_is_required_of_launches_that_happened() -> None:
    with pytest.raises(AssertionError, match="no kernel"):
        require_clean([])
    with emulated() as launches:
        run_copy(past_the_end=True)
    with pytest.raises(AssertionError, match=r"copy:1: out of bounds: .*x\[8\] of 8 elements"):
        require_clean(launches)


def run_copy(x: mx.array | None = None, past_the_end: bool = False) -> mx.array:
    x = mx.arange(8).astype(mx.float32) if x is None else x
    index = "thread_position_in_grid.x + 1" if past_the_end else "thread_position_in_grid.x"
    kernel: Any = mx.fast.metal_kernel(
        name="copy", input_names=["x"], output_names=["o"],
        source=f"o[thread_position_in_grid.x] = x[{index}];",
    )  # fmt: skip
    result: mx.array = kernel(
        inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], grid=(x.size, 1, 1),
        threadgroup=(8, 1, 1),
    )[0]  # fmt: skip
    return result


def test_mlx_own_function_is_back_afterwards_also_after_an_error() -> None:
    real = mx.fast.metal_kernel
    with pytest.raises(ZeroDivisionError), emulated():
        assert mx.fast.metal_kernel is not real
        raise ZeroDivisionError
    assert mx.fast.metal_kernel is real


def calls_of_a_compiled_function() -> int:
    calls = 0

    def count(x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        return x

    function = mx.compile(count)
    function(mx.array(1.0))
    function(mx.array(2.0))
    return calls


def test_compilation_is_off_inside_and_as_it_was_afterwards() -> None:
    before = calls_of_a_compiled_function()
    with emulated() as launches:
        function = mx.compile(run_copy)
        assert function(mx.ones(8)).tolist() == [1.0] * 8
        assert function(mx.zeros(8)).tolist() == [0.0] * 8
        assert len(launches) == 2
    assert calls_of_a_compiled_function() == before


def test_the_package_makes_its_kernels_anew() -> None:
    with emulated():
        pass
    assert library.kernel.cache_info().currsize == 0


def test_strided_and_lazy_inputs_are_made_contiguous() -> None:
    base = mx.arange(48).reshape(6, 8).astype(mx.float32)
    with emulated(checked=False) as launches:
        assert run_copy(base.T[3]).tolist() == base[:, 3].tolist()
        assert (
            run_copy((base * 2)[1:4, ::2].reshape(-1)).tolist()
            == (base[1:4, ::2] * 2).reshape(-1).tolist()
        )
    require_clean(launches)


@pytest.mark.parametrize("checked", [True, False])
def test_what_is_left_unwritten_comes_back_as_nan(checked: bool) -> None:
    _, (out,) = once(
        G + "if (i != 5) o[i] = bfloat(x[i]);", {"x": mx.zeros(9)}, {"o": ((9,), mx.bfloat16)},
        (9, 1, 1), (9, 1, 1), checked=checked,
    )  # fmt: skip
    assert mx.isnan(out).tolist() == [i == 5 for i in range(9)]


def test_an_initial_value_fills_the_outputs() -> None:
    launch, (out,) = once(
        G + "if (i != 5) o[i] = x[i];", {"x": mx.ones(9)}, {"o": ((9,), mx.float32)}, (9, 1, 1),
        (9, 1, 1), init_value=-2.0,
    )  # fmt: skip
    require_clean([launch])
    assert out.tolist() == [-2.0 if i == 5 else 1.0 for i in range(9)]


@pytest.mark.parametrize("checked", [True, False])
def test_a_launch_without_an_end_is_stopped(checked: bool) -> None:
    began = time.monotonic()
    launch, _ = once(
        G + "uint n = i; while (n < 300) { n = n * 3 % 299; o[i] = float(n); }", {"x": mx.zeros(9)},
        {"o": ((9,), mx.float32)}, (9, 1, 1), (9, 1, 1), limit=0.2, checked=checked,
    )  # fmt: skip
    assert [p.kind for p in launch.problems] == ["hang"]
    assert time.monotonic() - began < 10
    assert once(G + "o[i] = x[i];", {"x": mx.ones(9)}, {"o": ((9,), mx.float32)}, (9, 1, 1),
                (9, 1, 1), checked=checked)[1][0].tolist() == [1.0] * 9  # fmt: skip


def test_a_wild_access_of_the_unchecked_mode_ends_the_launch_and_not_the_process() -> None:
    launch, _ = once(
        G + "o[i] = x[i * 4000000000ul];", {"x": mx.zeros(9)}, {"o": ((9,), mx.float32)},
        (9, 1, 1), (9, 1, 1), checked=False,
    )  # fmt: skip
    assert [p.kind for p in launch.problems] == ["crash"]


def test_launches_of_two_threads_do_not_meet() -> None:
    results: list[list[float]] = []

    def work(value: float) -> None:
        out = run_copy(mx.full(64, value))
        results.append([value, *set(np.array(out).tolist())])

    with emulated(checked=False):
        run_copy(mx.zeros(64))
        threads = [threading.Thread(target=work, args=(float(n),)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [[float(n), float(n)] for n in range(6)]


def test_the_text_is_captured_once_for_each_set_of_types(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    real = metal_text.capture

    def counting(*args: Any) -> str:
        captured.append(1)
        return real(*args)

    monkeypatch.setattr(metal_text, "capture", counting)
    with emulated(checked=False):
        kernel: Any = mx.fast.metal_kernel(
            name="copy", input_names=["x"], output_names=["o"],
            source="o[thread_position_in_grid.x] = x[thread_position_in_grid.x];",
        )  # fmt: skip
        for size, dtype in [(8, mx.float32), (9, mx.float32), (7, mx.float32), (9, mx.int32)]:
            kernel(inputs=[mx.zeros(size, dtype)], output_shapes=[(size,)], output_dtypes=[dtype],
                   grid=(size, 1, 1), threadgroup=(size, 1, 1))  # fmt: skip
    assert len(captured) == 3  # 8 and 9 elements are alike, 7 are `constant`


def test_threadgroup_variables_are_rewritten_line_for_line() -> None:
    body = """
      threadgroup float a[4], b[2][N + 1];  // threadgroup float c[2];
      threadgroup metal::array<half, 3>
        d[2];
      threadgroup float* p = a;
      threadgroup const float* q = a;
#line 9 "a.metal"
      threadgroup float e[5];
    """
    made = threadgroup_variables(body)
    assert made.count("\n") == body.count("\n")
    assert made.count("emu::variable<") == 4
    assert "variable<float [2][N + 1], 1>" in made
    assert "threadgroup float* p = a;" in made
    assert "threadgroup const float* q = a;" in made
    assert "// threadgroup float c[2];" in made


def test_comments_and_strings_are_masked_in_place() -> None:
    text = 'int a; // double\n/* std::\n x */ int b = f("goto");\n'
    plain = masked(text)
    assert len(plain) == len(text)
    assert plain.count("\n") == text.count("\n")
    assert "double" not in plain and "std" not in plain and "goto" not in plain
    assert "int a;" in plain and "int b = f(" in plain


def test_the_cache_is_closed_to_other_users() -> None:
    state = os.stat(folder())
    assert stat.S_IMODE(state.st_mode) == 0o700
    assert state.st_uid == os.getuid()
    assert toolchain().version


def test_a_library_without_a_line_table_has_no_lines(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"\xcf\xfa\xed\xfe" + bytes(64))
    assert find(other, 16).number == 0


def test_the_fixture_runs_kernels(metal_backend: list[Launch] | None) -> None:
    assert run_copy().tolist() == list(range(8))
    if metal_backend is not None:
        require_clean(metal_backend)
