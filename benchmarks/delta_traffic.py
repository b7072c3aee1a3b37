"""What the prefill recurrence asks of a GPU, beside the same of mlx-lm and MLX:

python benchmarks/delta_traffic.py [--tokens 128] [--type bfloat16] [--heads 16,32]

Executes three Metal kernels on the CPU, checked: ours, mlx-lm's packed one and MLX's
`gated_delta_fused_chunk`. Prints what was counted, and the error of o and of the state against
float64. For up to 8 tokens also our `delta_step`, which does the convolution, the norms, the gates
and the gated norm in the same launch. These are counts, not times: no GPU is involved.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from delta_float64 import call, exactly, recurrence, step, step_arguments  # noqa: E402
from kernel_checks import TYPES, as_float64, executed, mlx_array, relative_error  # noqa: E402
from metal_cpu import Launch  # noqa: E402
from qwen35_mlx.kernels import delta_step  # noqa: E402
from qwen35_mlx.kernels.gated_delta import launch  # noqa: E402

D = 128  # both dims, in all sizes of the family
ROW = "{:<24} {:>13} {:>13} {:>12} {:>10} {:>9} {:>7} {:>7} {:>9} {:>9}"
COLUMNS = (
    *("lines read", "lines written", "unique", "products", "barriers", "groups", "threads"),
    *("error o", "state"),
)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call in MLX's types, and the exact result for them."""

    q: mx.array
    k: mx.array
    v: mx.array
    log_g: mx.array
    beta: mx.array
    state: mx.array
    o: np.ndarray
    last: np.ndarray

    @property
    def needed(self) -> int:
        """Bytes to read and to write when nothing is touched twice, gates in f32."""
        inputs = (self.q, self.k, self.v, self.log_g, self.beta, self.state)
        return sum(x.nbytes for x in inputs) + self.v.nbytes + self.state.nbytes


def sample(T: int, Hk: int, Hv: int, kind: str) -> Sample:
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 1, T, Hk, D))
    streams = (
        mlx_array(q / np.linalg.norm(q, axis=-1, keepdims=True) * D**-0.5, TYPES[kind]),
        mlx_array(k / np.linalg.norm(k, axis=-1, keepdims=True), TYPES[kind]),
        mlx_array(random.normal(size=(1, T, Hv, D)), TYPES[kind]),
        mlx_array(np.log(random.uniform(0.9, 0.9999, (1, T, Hv)))),
        mlx_array(random.uniform(0, 1, (1, T, Hv))),
        mlx_array(random.normal(size=(1, Hv, D, D))),
    )
    q, k, v, log_g, beta, state = (as_float64(x) for x in streams)
    return Sample(*streams, *recurrence(q, k, v, log_g, beta, state))


def ours(x: Sample) -> tuple[mx.array, mx.array]:
    return launch(x.q, x.k, x.v, x.log_g, x.beta, x.state)


def mlx_lm_packed(x: Sample) -> tuple[mx.array, mx.array]:
    """Two simdgroups of 8 value rows each; the gates may stay f32 here."""
    with mock.patch.object(mx.metal, "is_available", lambda: True):
        from mlx_lm.models import gated_delta

        kernel = gated_delta._make_gated_delta_packed_kernel()
    return _theirs(kernel, x, x.log_g.dtype, 2, [("StT", mx.float32)])


def mlx_fused_chunk(x: Sample) -> tuple[mx.array, mx.array]:
    """Chunks of 8, a simdgroup for 8 value columns; the gates come in the type of q."""
    folder = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
    # The harness takes C++14, and both dims of a matrix; neither changes what is computed.
    text = (folder / "gated_delta_update.h").read_text(encoding="utf-8")
    text = text.replace("if constexpr", "if").replace("matrix<float, 8>(", "matrix<float, 8, 8>(")
    helpers = text[text.index("#define AT(") : text.index("template <typename InT")]
    function = text[text.index("void gated_delta_fused_chunk(") :]
    body = function[function.index("{") + 1 : function.index("\n}\n") + 1]
    kernel = mx.fast.metal_kernel(
        name="gated_delta_fused_chunk",
        input_names=["q", "k", "v", "state_in", "g", "beta", "T"],
        output_names=["y", "state_out"],
        source=body,
        header=helpers,
    )
    order = ("q", "k", "v", "state_in", "g", "beta", "T")
    return _theirs(kernel, x, x.q.dtype, 4, [("C", 8)], order)


def _theirs(
    kernel: Any,
    x: Sample,
    gates: mx.Dtype,
    simdgroups: int,
    template: list[tuple[str, Any]],
    order: tuple[str, ...] = ("q", "k", "v", "g", "beta", "state_in", "T"),
) -> tuple[mx.array, mx.array]:
    """Their grid, and the state with the key dim last."""
    _, T, Hv, _ = x.v.shape
    named = {"q": x.q, "k": x.k, "v": x.v, "T": T}
    named |= {"g": mx.exp(x.log_g).astype(gates), "beta": x.beta.astype(gates)}
    named |= {"state_in": mx.contiguous(x.state.swapaxes(2, 3))}
    y, state = kernel(
        inputs=[named[name] for name in order],
        template=[("InT", x.q.dtype), *template]
        + [("Dk", D), ("Dv", D), ("Hk", x.k.shape[2]), ("Hv", Hv)],
        grid=(32, D // 8, Hv),
        threadgroup=(32, simdgroups, 1),
        output_shapes=[x.v.shape, x.state.shape],
        output_dtypes=[x.q.dtype, mx.float32],
    )
    return y, state.swapaxes(2, 3)


def measured(
    op: Callable[[Sample], tuple[mx.array, mx.array]], x: Sample, simd_orders: bool
) -> tuple[Launch, float, float]:
    with executed(simd_orders=simd_orders) as launches:
        o, last = op(x)
        mx.eval(o, last)
    return launches[0], relative_error(o, x.o), relative_error(last, x.last)


def whole_step(T: int, Hk: int, Hv: int, kind: str) -> tuple[Launch, float, float]:
    """`delta_step` on random inputs of its own."""
    given = step_arguments((1, T, Hk, Hv, D, D), kind)
    with executed() as launches:
        y, _, memory = call(delta_step.launch, given)
    wanted = step(**exactly(given))
    return launches[0], relative_error(y, wanted[0]), relative_error(memory, wanted[2])


def _row(name: str, seen: Launch, *errors: float) -> str:
    group = seen.threadgroup[0] * seen.threadgroup[1]
    groups = seen.threads // group
    counts = [seen.read.lines, seen.written.lines, seen.read.unique + seen.written.unique]
    counts += [seen.matrix_ops, seen.barriers // groups, groups, group]
    return ROW.format(name, *(f"{n:,}" for n in counts), *(f"{error:.1e}" for error in errors))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--type", choices=list(TYPES), action="append")
    options.add_argument("--heads", default="4,8", help="key and value heads")
    given = options.parse_args()
    Hk, Hv = (int(n) for n in given.heads.split(","))
    for kind in given.type or ("float32", "bfloat16"):
        x = sample(given.tokens, Hk, Hv, kind)
        print(f"T {given.tokens}, {Hk} key and {Hv} value heads of {D}, {kind}")
        print(f"needed once: {x.needed:,} bytes")
        print(ROW.format("", *COLUMNS))
        # Theirs rewrites shared memory with no barrier after its last reads; matrix operations in
        # between order it in practice.
        for op in (ours, mlx_lm_packed, mlx_fused_chunk):
            print(_row(op.__name__, *measured(op, x, simd_orders=op is mlx_fused_chunk)))
        if given.tokens <= delta_step.MAX_TOKENS:
            print(_row("ours, the whole step", *whole_step(given.tokens, Hk, Hv, kind)))
        print()


if __name__ == "__main__":
    main()
