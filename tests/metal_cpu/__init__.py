"""Executes the Metal text of custom kernels on a CPU, checked.

    with emulated() as launches:
        y = some_op(x)                # any code that calls mx.fast.metal_kernel
    require_clean(launches)
    assert launches[0].read.unique == x.nbytes

How: MLX itself prints the text that it would give to Metal (`text`). It becomes C++ line for line
(`translate`), is looked over for what C++ would take and Metal would not (`lint`), and is compiled
by clang (`toolchain`, `compiled`) against a shim of Metal's library (`msl/`). The engine
(`engine/`, `runtime`) runs every thread of a threadgroup as a fiber; all lanes of a simdgroup stop
at each simdgroup operation, all threads at each barrier. In the checked mode the compiler calls the
engine for every load and store: bounds, races, what was never written, and the bytes counted.

What it cannot show: time, occupancy, registers and spills, the exact error of Metal's math, the
order in which simd_sum and matrices add, weak memory between threadgroups, Apple's own compiler.
`device` structs copied whole, array parameters with an address space, textures, quad operations,
packed vectors of 3 and direct conversions between bfloat and half are not supported.
"""

from .backend import emulated
from .launch import BufferTraffic, CompileError, Launch, Problem, Traffic, require_clean
from .once import once

__all__ = [
    "BufferTraffic",
    "CompileError",
    "Launch",
    "Problem",
    "Traffic",
    "emulated",
    "once",
    "require_clean",
]
