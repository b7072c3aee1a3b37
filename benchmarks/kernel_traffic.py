"""Bytes, lines and synchronisation of every kernel, executed on the CPU: make bench-kernels, or

python benchmarks/kernel_traffic.py

must: what the operation has to read and write at least. unique: bytes touched once counted once.
lines: what simdgroups fetch in lines of 64 bytes between points of synchronisation, so what stays
in a cache is counted again. None of it is time.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import moe_kernels  # noqa: E402
import test_kernel_add_norm  # noqa: E402
import test_kernel_attention_prepare  # noqa: E402
import test_kernel_delta_prepare  # noqa: E402
import test_kernel_delta_step  # noqa: E402
import test_kernel_embed  # noqa: E402
import test_kernel_gated_delta  # noqa: E402
import test_kernel_products  # noqa: E402
import test_kernel_top_k  # noqa: E402
from kernel_checks import Needed, executed  # noqa: E402
from metal_cpu import Launch  # noqa: E402
from qwen35_mlx.kernels import library  # noqa: E402

MODULES = (
    test_kernel_embed,
    test_kernel_add_norm,
    test_kernel_delta_step,
    test_kernel_delta_prepare,
    test_kernel_gated_delta,
    test_kernel_attention_prepare,
    test_kernel_products,
    moe_kernels,
    test_kernel_top_k,
)
COLUMNS = ("must read", "unique", "lines", "must write", "unique", "lines", "barriers", "matrix")


def main() -> None:
    cases = [case for module in MODULES for case in module.cases()]
    library.use(library.names())
    print(f"{'':58}" + "".join(f"{name:>12}" for name in COLUMNS))
    for case in cases:
        with executed() as launches:
            case.op()
        for launch in launches:
            _row(launch, case)


def _row(launch: Launch, case: Needed) -> None:
    figures = (
        case.read,
        launch.read.unique,
        launch.read.lines,
        case.written,
        launch.written.unique,
        launch.written.lines,
        launch.barriers,
        launch.matrix_ops,
    )
    prefix = "" if case.label.startswith(launch.name) else f"{launch.name}: "
    print(f"{(prefix + case.label)[:57]:58}" + "".join(f"{figure:>12,}" for figure in figures))


if __name__ == "__main__":
    main()
