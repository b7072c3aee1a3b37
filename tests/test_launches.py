"""Launches are counted as MLX's Metal back end would make them, from graphs alone."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen35_mlx import graph, launches, stand_ins

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo-model"


def zeros(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


def packed(*shape: int) -> tuple[mx.array, mx.array, mx.array]:
    """A matrix at 4 bits in groups of 64, by its unpacked shape."""
    *rows, columns = shape
    scales = mx.zeros((*rows, columns // 64), mx.bfloat16)
    return mx.zeros((*rows, columns // 8), mx.uint32), scales, scales


with stand_ins.as_on_metal():

    @mx.compile
    def inner(x: mx.array) -> mx.array:
        return x * mx.sigmoid(x)

    @mx.compile
    def outer(x: mx.array, y: mx.array) -> mx.array:
        return inner(x) * y + 1

    @mx.compile
    def with_a_sum(x: mx.array) -> mx.array:
        return mx.exp(x - 1).sum(axis=-1, keepdims=True) * x


def custom(x: mx.array) -> mx.array:
    kernel: Any = mx.fast.metal_kernel(
        name="twice", input_names=["x"], output_names=["y"], source="y[0] = 2 * x[0];"
    )
    grid = (x.size, 1, 1)
    (y,) = kernel(
        inputs=[x],
        template=[("T", x.dtype), ("N", 8)],
        grid=grid,
        threadgroup=grid,
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y


def written(old: mx.array, new: mx.array) -> mx.array:
    old[:, 3:4] = new
    return old


def written_and_read(old: mx.array, new: mx.array) -> list[mx.array]:
    before = old[:, 4:6]
    old[:, 3:4] = new
    return [old, mx.exp(before + old[:, 4:6])]


def embedded(tokens: mx.array, w: mx.array, s: mx.array, b: mx.array) -> mx.array:
    return mx.dequantize(w[tokens], s[tokens], b[tokens], 64, 4)


def turned(x: mx.array, dims: int) -> mx.array:
    return mx.fast.rope(x, dims, traditional=False, base=1e4, scale=1.0, offset=3)


def attended(q: mx.array, k: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.5)


def product(x: mx.array, w: mx.array, s: mx.array, b: mx.array) -> mx.array:
    return mx.quantized_matmul(x, w, s, b, transpose=True, group_size=64, bits=4)


def chosen_products(x: mx.array, at: mx.array, w: mx.array, s: mx.array, b: mx.array) -> mx.array:
    return mx.gather_qmm(x, w, s, b, rhs_indices=at, transpose=True, group_size=64, bits=4)


Graph = tuple[str, Callable[..., Any], tuple[mx.array, ...], dict[str, int]]
ONE_TOKEN = zeros(1, 1, 5, 16)
HALF = zeros(1, 1, 128, dtype=mx.bfloat16)
GRAPHS: list[Graph] = [
    ("two sums", lambda x, y: x + y + 2, (zeros(3, 5), zeros(5)), {"Add": 2}),
    ("views", lambda x: mx.split(x[None, 1:].reshape(2, 15).T, 3)[1], (zeros(3, 15),), {}),
    ("same type", lambda x: x.astype(mx.float32), (zeros(3),), {}),
    ("other type", lambda x: x.astype(mx.float16), (zeros(3),), {"AsType": 1}),
    (
        "equal operations on equal inputs",
        lambda x: mx.exp(x) + mx.exp(x),
        (zeros(3),),
        {"Exp": 2, "Add": 1},
    ),
    (
        "implicit casts, each by itself",
        lambda x, y: x * y + x / y,
        (zeros(3, dtype=mx.bfloat16), zeros(3)),
        {"AsType": 2, "Multiply": 1, "Divide": 1, "Add": 1},
    ),
    ("columns as rows", lambda x: x.T.reshape(15), (zeros(3, 5),), {"Reshape": 1}),
    ("heads of one token", lambda x: x.swapaxes(1, 2).reshape(80), (ONE_TOKEN,), {}),
    ("half of each head", lambda x: x[..., 8:].reshape(40), (ONE_TOKEN,), {"Reshape": 1}),
    (
        "three in one",
        lambda x: mx.concatenate([x, x, x + 1]),
        (zeros(3),),
        {"Concatenate": 3, "Add": 1},
    ),
    ("small rest", lambda x: mx.contiguous(x[1:]), (zeros(4, 7),), {}),
    ("rest of much", lambda x: mx.contiguous(x[9000:]), (zeros(9004),), {"Contiguous": 1}),
    ("constant", lambda x: x + mx.full((3,), 2.0), (zeros(3),), {"Full": 1, "Add": 1}),
    ("order only", lambda x, y: mx.depends([x], [y])[0], (zeros(3), zeros(5)), {}),
    ("padding", lambda x: mx.pad(x, (1, 2)), (zeros(3),), {"Pad": 2}),
    ("matrix and vector", lambda x, w: x @ w.T, (zeros(1, 64), zeros(96, 64)), {"Matmul": 1}),
    ("dot product", lambda x, w: x @ w.T, (zeros(1, 64), zeros(1, 64)), {"Matmul": 3}),
    ("packed", product, (HALF[..., :64], *packed(96, 64)), {"QuantizedMatmul": 1}),
    (
        "packed, of half a row",
        lambda x, *w: product(mx.split(x, 2, axis=-1)[1] + 1, *w),
        (HALF, *packed(96, 64)),
        {"Add": 1, "QuantizedMatmul": 2},
    ),
    (
        "experts",
        chosen_products,
        (HALF[..., :64], zeros(1, 3, dtype=mx.uint32), *packed(7, 96, 64)),
        {"Arange": 1, "GatherQMM": 1},
    ),
    (
        "packed rows",
        embedded,
        (zeros(1, 1, dtype=mx.uint32), *packed(96, 64)),
        {"Gather": 3, "Dequantize": 1},
    ),
    ("norm", lambda x: mx.fast.rms_norm(x, None, 1e-6), (zeros(3, 16),), {"RMSNorm": 1}),
    (
        "norm of parts",
        lambda x: mx.fast.rms_norm(x[..., :8], None, 1e-6),
        (ONE_TOKEN,),
        {"RMSNorm": 2},
    ),
    ("softmax", lambda x: mx.softmax(x, axis=-1), (zeros(3, 5),), {"Softmax": 1}),
    ("softmax of columns", lambda x: mx.softmax(x.T, axis=-1), (zeros(3, 5),), {"Softmax": 2}),
    ("sort of a block", mx.sort, (zeros(3, 2048),), {"Sort": 1}),
    ("sort of two blocks", mx.argsort, (zeros(3, 2049),), {"ArgSort": 4}),
    ("the vocabulary", lambda x: mx.argpartition(x, 20), (zeros(248320),), {"ArgPartition": 16}),
    ("greedy", lambda x: mx.argmax(x, axis=-1), (zeros(1, 248320),), {"ArgReduce": 1}),
    ("sum of all", mx.sum, (zeros(3, 1365),), {"Reduce": 1}),
    ("sum of more", mx.sum, (zeros(3, 1366),), {"Reduce": 2}),
    ("sum of rows", lambda x: x.sum(axis=-1), (zeros(3, 9000),), {"Reduce": 1}),
    ("sum of few rows", lambda x: x.sum(axis=0), (zeros(10, 9000),), {"Reduce": 1}),
    ("sum of many rows", lambda x: x.sum(axis=0), (zeros(257, 900),), {"Reduce": 2}),
    ("in place", written, (zeros(2, 7), zeros(2, 1)), {"SliceUpdate": 1}),
    (
        "into a copy",
        written_and_read,
        (zeros(2, 7), zeros(2, 1)),
        {"SliceUpdate": 2, "Add": 1, "Exp": 1},
    ),
    ("of what is returned", lambda x: (x, x.at[2:3].add(1)), (zeros(7),), {"SliceUpdate": 2}),
    (
        "constants, and x itself",
        lambda x: [mx.stop_gradient(x), mx.zeros(()) + 1],
        (zeros(3),),
        {"Full": 1, "Add": 1},
    ),
    ("rotary", lambda x: turned(x, 16), (ONE_TOKEN,), {"RoPE": 1}),
    ("rotary, in part", lambda x: turned(x + 1, 8), (ONE_TOKEN,), {"Add": 1, "PartialRoPE": 1}),
    (
        "rotary, in part, of what is read again",
        lambda x: (y := x + 1, turned(y, 8), y * 2),
        (ONE_TOKEN,),
        {"Add": 1, "PartialRoPE": 2, "Multiply": 1},
    ),
    (
        "one query",
        attended,
        (zeros(1, 6, 1, 64), zeros(1, 2, 4095, 64)),
        {"ScaledDotProductAttention": 1},
    ),
    (
        "one query and many keys",
        attended,
        (zeros(1, 6, 1, 64), zeros(1, 2, 4096, 64)),
        {"ScaledDotProductAttention": 2},
    ),
    ("compiled", inner, (zeros(3),), {"compiled inner": 1}),
    ("compiled in compiled", outer, (zeros(3), zeros(3)), {"compiled outer": 1}),
    ("compiled around a sum", with_a_sum, (zeros(3, 5),), {"compiled with_a_sum": 3}),
    ("kernel", custom, (zeros(3, 5),), {"twice": 1}),
    ("kernel on columns", lambda x: custom(x.T), (zeros(3, 5),), {"twice": 2}),
]


@pytest.mark.parametrize(
    ("function", "arguments", "expected"), [g[1:] for g in GRAPHS], ids=[g[0] for g in GRAPHS]
)
def test_a_graph_takes_as_many_launches_as_counted_by_hand(
    function: Callable[..., Any], arguments: tuple[mx.array, ...], expected: dict[str, int]
) -> None:
    assert launches.count(function, *arguments) == expected


LAID_OUT: dict[str, Callable[[mx.array], mx.array]] = {
    "part": lambda x: x[:, 1:4, ::2],
    "part of a sum": lambda x: x[:, 1:] + x[:, 1:],
    "part of a product": lambda x: mx.exp(x[:, :2]),
    "axes": lambda x: x.transpose(2, 0, 1),
    "function of other axes": lambda x: mx.exp(x.transpose(2, 0, 1)),
    "sum of two orders": lambda x: x.transpose(0, 2, 1) + x.reshape(2, 7, 5),
    "one more axis": lambda x: mx.expand_dims(x, (1, 3)),
    "fewer axes": lambda x: x[:1].squeeze(0),
    "another shape": lambda x: x.reshape(5, 14),
    "another shape of other axes": lambda x: x.transpose(2, 0, 1).reshape(7, 5, 2),
    "axes in two": lambda x: x.transpose(1, 0, 2).reshape(5, 2, 7, 1),
    "split": lambda x: mx.split(x, [2, 3], axis=1)[2],
    "repeated": lambda x: mx.broadcast_to(x[:, :1], (3, 2, 5, 7)),
    "other type": lambda x: x.transpose(1, 0, 2).astype(mx.float16),
    "norm": lambda x: mx.softmax(x.transpose(1, 0, 2), axis=-1),
    "sum": lambda x: x.transpose(1, 0, 2).sum(axis=0),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_arrays_lie_as_mlx_lays_them(name: str) -> None:
    function, x = LAID_OUT[name], mx.arange(70.0).reshape(2, 5, 7)
    traced = graph.traced(function, x)
    places = {array.name: launches._fresh(array) for array in traced.inputs}
    for node in traced.nodes:
        launches._operation(node, places)
    (result,) = traced.results
    real: Any = function(x)
    mx.eval(real)
    # A buffer's view of one element per axis shows MLX's own strides.
    strides = memoryview(real).strides or ()
    assert places[result].strides == tuple(stride // real.itemsize for stride in strides)


def test_an_operation_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no rule says how often FFT launches"):
        launches.count(mx.fft.fft, zeros(8))


def test_mlx_is_as_before_once_all_is_counted() -> None:
    names = ("compile", "contiguous", "default_device", "quantize")
    before = [getattr(mx, name) for name in names], mx.fast.rms_norm, mx.metal.is_available
    launches.count(outer, zeros(3), zeros(3))
    with pytest.raises(RuntimeError), stand_ins.as_on_metal(), stand_ins.tracing():
        raise RuntimeError
    assert before == ([getattr(mx, n) for n in names], mx.fast.rms_norm, mx.metal.is_available)


def test_what_was_compiled_inside_computes_outside() -> None:
    mx.disable_compile()  # or a C++ compiler would be called
    try:
        values = outer(mx.array([0.0, 2.0]), mx.array([3.0, 5.0])).tolist()
    finally:
        mx.enable_compile()
    assert values == pytest.approx([1.0, 1 + 10 / (1 + math.exp(-2.0))])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as it has to be: kernels decide at import."""
    command = [sys.executable, "-m", "qwen35_mlx", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def counted(*arguments: str) -> dict[str, Any]:
    done = run("--launches", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


LAYERS = {
    "0.8b": {"gated delta net": 18, "feed-forward": 24, "attention": 6},
    "35b": {"gated delta net": 30, "experts": 40, "attention": 10},
}


@pytest.mark.parametrize("size", LAYERS)
def test_every_launch_of_a_token_is_in_a_layer_or_at_an_end(size: str) -> None:
    ours, reference = counted(size), counted(size, "--reference")
    for found in (ours, reference):
        *layers, ends = found["parts"]
        assert {part["kind"]: part["layers"] for part in layers} == LAYERS[size]
        assert sum(part["launches"] for part in found["parts"]) == found["launches_per_token"]
        # Every layer has its norm and two products at least; the ends an embedding, the last norm,
        # a head and the choice.
        assert all(part["launches"] > 2 * part["layers"] for part in layers)
        assert 4 <= ends["launches"] <= 20
        assert ends["operations_of_the_last"]["ArgReduce"] == 1
    assert ours["launches_per_token"] < reference["launches_per_token"]


def test_drawing_a_token_takes_more_launches_than_the_likeliest() -> None:
    likeliest, drawn = counted("0.8b"), counted("0.8b", "--sampled")
    more = drawn["launches_per_token"] - likeliest["launches_per_token"]
    assert 5 < more < 20
    assert drawn["parts"][-1]["launches"] - likeliest["parts"][-1]["launches"] == more


def test_the_largest_size_is_counted_in_next_to_no_memory() -> None:
    code = """
import re, resource, sys, mlx.core as mx
from qwen35_mlx import bench
_, parts = bench.measured("397b")
print(sum(part.layers for part in parts), mx.get_peak_memory())
if sys.platform == "darwin":
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:  # where that counts the parent at the time of the fork
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    layers, mlx_peak, rss = map(int, done.stdout.split())
    assert layers == 45 + 15 + 60 + 1
    assert mlx_peak < 1 << 20  # its weights are 220 GB
    assert rss < 600 << 20


def test_a_model_imported_before_is_refused() -> None:
    code = "import qwen35_mlx.model\nfrom qwen35_mlx import bench\nbench.measured('0.8b')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.splitlines()[-1].endswith("count launches in a process of its own")


def test_a_folder_is_counted_as_it_is_stored() -> None:
    done = run("--launches", str(DEMO), "--verbose", "--order")
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert first.startswith("GPU launches per decoded token: demo-model (local folder)")
    assert any(line.startswith("per token ") for line in rest)
    # The demonstration model is not packed.
    assert "Matmul" in done.stdout and "QuantizedMatmul" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--launches", "5b"], "5b: no such folder; expected a model folder, a Hub id such as"),
        (["--launches", "tests"], "tests"),
        (["--launches", "4b", "--bits", "7"], "--bits: 7; expected one of 3, 4, 5, 6, 8, 16."),
        (["--launches", str(DEMO), "--bits", "4"], "--bits or --recipe beside a folder;"),
        (["--launches", "4b", "--context", "0"], "Invalid value for '--context'"),
        (["--launches"], "Missing argument 'MODEL'."),
        (["4b"], "nothing to measure; expected --launches."),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
