"""`emulated`: while it is open, `mx.fast.metal_kernel` makes kernels that run on the CPU."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from . import text as metal_text
from .call import execute
from .compiled import Compiled, compile_text
from .launch import Launch
from .runtime import Schedule

LIMIT = 120.0  # seconds of one launch
# MLX prints its text to the process's standard output, and the engine has one state.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Mode:
    """How the kernels of one `emulated` block are compiled and run."""

    schedule: Schedule
    contract: bool
    checked: bool
    limit: float


@dataclass(eq=False)
class Kernel:
    """What `mx.fast.metal_kernel` returns inside `emulated`."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    header: str
    source: str
    real: Callable[..., Any]  # MLX's own object, asked for its text
    mode: Mode
    launches: list[Launch]
    compiled: dict[Any, Compiled] = field(default_factory=dict)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """As MLX's call; evaluates the inputs and runs at once. `stream` has no meaning here."""
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        options = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": grid,
            "threadgroup": threadgroup,
            "template": list(template) if template else None,
            "init_value": init_value,
        }
        mx.eval(arrays)  # may launch other kernels
        with _one_at_a_time:
            compiled = self._compiled(arrays, options)
            launch, outputs = execute(
                compiled, self.name, self.input_names, arrays, options, self.mode
            )
        self.launches.append(launch)
        return outputs

    def _compiled(self, arrays: Sequence[mx.array], options: dict[str, Any]) -> Compiled:
        # What MLX's text depends on: the types, and of a shape whether it is a scalar or tiny.
        kinds = tuple((x.dtype, x.ndim == 0, x.size < 8) for x in arrays)
        template = tuple((name, type(x), x) for name, x in options["template"] or ())
        key = (kinds, template, tuple(options["output_dtypes"]))
        if key not in self.compiled:
            whole = metal_text.capture(self.real, arrays, options)
            text = metal_text.split(whole, self.header, self.source)
            self.compiled[key] = compile_text(
                text, self.name, self.mode.contract, self.mode.checked
            )
        return self.compiled[key]


def _forget_kernels() -> None:
    """The package keeps the kernels it made; those of another backend must go."""
    try:
        from qwen35_mlx.kernels import library
    except ImportError:
        return
    library.kernel.cache_clear()


def _compiling() -> bool:
    """Whether mx.compile is on: a compiled function runs its Python once."""
    calls = 0

    def count(x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        return x

    function = mx.compile(count)
    function(mx.array(0.0))
    function(mx.array(0.0))
    return calls == 1


@contextmanager
def emulated(
    schedule: str | int = "forward",
    contract: bool = True,
    reduce: str = "butterfly",
    checked: bool = True,
    simd_orders: bool = False,
    limit: float = LIMIT,
) -> Iterator[list[Launch]]:
    """Runs custom kernels on the CPU; yields the list to which every launch is added.

    `schedule` is "forward", "reverse" or the seed of a random order of threads. `contract` lets
    the compiler fuse a multiplication and an addition. `reduce` is the order in which simd_sum
    adds: "ascending", "butterfly" or "random". `checked` watches every access; without it the
    same text runs 3 to 10 times faster, counts no bytes and reports only what it cannot miss.
    `simd_orders` takes simdgroup operations as memory barriers, which Metal does not promise.
    `limit` is the seconds a launch may take before it is stopped and reported as a hang.

    Inputs that are not row-contiguous are copied, whatever `ensure_row_contiguous` says. Inside
    mx.compile a kernel could not run at once, so compilation is off while the block is open.
    Raises CompileError (from the call of a kernel) for text that Metal would not take.
    """
    mode = Mode(Schedule(schedule, reduce, simd_orders), contract, checked, limit)
    launches: list[Launch] = []
    real: Callable[..., Any] = mx.fast.metal_kernel

    def metal_kernel(
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        **options: Any,
    ) -> Kernel:
        mlx_kernel = real(
            name=name,
            input_names=list(input_names),
            output_names=list(output_names),
            source=source,
            header=header,
            **options,
        )
        return Kernel(name, input_names, output_names, header, source, mlx_kernel, mode, launches)

    compiling = _compiling()
    _forget_kernels()
    cast(Any, mx.fast).metal_kernel = metal_kernel
    mx.disable_compile()
    try:
        yield launches
    finally:
        cast(Any, mx.fast).metal_kernel = real
        if compiling:
            mx.enable_compile()
        _forget_kernels()
