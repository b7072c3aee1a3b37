"""`add_norm` made wrong, slow or uncompilable on purpose; and a worker that tries kernels so.

python -m broken_kernels HOW [KERNEL ...]  answers as `qwen35_mlx.trials` for these kernels or all,
with the emulator as its GPU and a clock of its own, on which a launch takes 1 s and a reference 2.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from metal_cpu import emulated
from qwen35_mlx import apart, proof, shapes, trials
from qwen35_mlx.kernels import library
from qwen35_mlx.proof import Op, Plan, Trial

KERNEL = "add_norm"
TEXTS = {
    "wrong": ("float(x[row + first + i]) + float(y[row + first + i])", "float(x[row + first + i])"),
    "nan": ("squares / Hidden + eps", "-1.0f"),
    "uncompilable": ("threadgroup float partial", "threadgroup double partial"),
}
CALLS: dict[str, Callable[[], object]] = {
    "hanging": lambda: time.sleep(600),
    "ending the process": lambda: os._exit(11),
}
SLOW = "slow"
SECONDS = 6.0  # of the hanging one, and more than the others of a few take on a busy machine


@contextmanager
def broken(how: str | None) -> Iterator[None]:
    """Inside `emulated`: `add_norm` has that fault."""
    real: Any = mx.fast.metal_kernel

    def metal_kernel(name: str, source: str, **given: Any) -> Any:
        if name == KERNEL and how in CALLS:
            CALLS[how]()
        if name == KERNEL and how in TEXTS:
            sound, faulty = TEXTS[how]
            assert source.count(sound) == 1
            source = source.replace(sound, faulty)
        return real(name=name, source=source, **given)

    library.kernel.cache_clear()
    vars(mx.fast)["metal_kernel"] = metal_kernel
    try:
        yield
    finally:
        vars(mx.fast)["metal_kernel"] = real
        library.kernel.cache_clear()


class Clock:
    """Seconds that only calls of an op take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def timed(self, plan: Plan, launch_seconds: float) -> Plan:
        """That trial, with a launch that takes so long and a reference of 2 s."""

        def make() -> Trial | None:
            trial = plan.make()
            return None if trial is None else self._timed(trial, launch_seconds)

        return replace(plan, make=make)

    def _timed(self, trial: Trial, launch_seconds: float) -> Trial:
        def taking(op: Op, seconds: float) -> Op:
            def call(n: int) -> Sequence[mx.array]:
                self.now += seconds
                return op(n)

            return call

        return replace(
            trial,
            launch=taking(trial.launch, launch_seconds),
            reference=taking(trial.reference, 2.0),
        )


def main() -> None:
    (how, *only), request, clock = sys.argv[1:], json.load(sys.stdin), Clock()
    proof.ROUNDS = proof.AT_ONCE = 1
    trials.PROMPT = 40  # the emulator takes its time
    trials.SHORT_PROMPT = 20
    timed = [
        clock.timed(plan, 3.0 if (plan.kernel, how) == (KERNEL, SLOW) else 1.0)
        for plan in trials.plans(shapes.from_plain(request["shapes"]))
        if not only or plan.kernel in only
    ]
    with emulated(checked=False), broken(how):
        for line in apart.serve(timed, request["skip"], clock):
            print(line, flush=True)


if __name__ == "__main__":
    main()
