"""The engine in this process: its structures as ctypes sees them, and one launch."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .launch import CompileError
from .toolchain import build

HERE = Path(__file__).parent
SLOT = 1 << 36  # the engine's SLOT_BITS
SLOTS = 64
MAX_PROBLEMS = 64
MAX_THREADS = 1024
ORDERS = {"forward": 0, "reverse": 1}
REDUCES = {"ascending": 0, "butterfly": 1, "random": 2}

_u32, _u64, _i64 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64


class CProblem(ctypes.Structure):
    _fields_ = [
        *((name, _u32) for name in ("kind", "count")),
        *((name, _i64) for name in ("buffer", "offset")),
        *((name, _u64) for name in ("size", "site", "other_site")),
        *((name, _u32) for name in ("group", "thread", "other_group", "other_thread")),
        *((name, _u32) for name in ("line", "other_write")),
    ]


class CBuffer(ctypes.Structure):
    _fields_ = [
        ("base", _u64),
        ("size", _u64),
        ("touched", _u64),
        ("read_line", _u64),
        ("write_line", _u64),
        ("cells", _u64),
        ("item", _u64),
        ("initialised", _u64),
        *((name, _u64) for name in ("read", "written", "lines_read", "lines_written", "shift")),
    ]


class CLaunch(ctypes.Structure):
    _fields_ = [
        ("entry", _u64),
        ("arguments", _u64),
        ("buffers", _u64),
        ("buffer_count", _u64),
        ("slots", _u64),
        ("grid", _u32 * 3),
        ("group", _u32 * 3),
        *((name, _u32) for name in ("order", "seed", "reduce", "simd_orders")),
        ("image", _u64),
        *((name, _u64) for name in ("barriers", "simd_barriers", "reductions", "shuffles")),
        *((name, _u64) for name in ("matrix_ops", "arena_bytes", "threads", "problem_count")),
        ("problems", CProblem * MAX_PROBLEMS),
    ]


@dataclass(frozen=True)
class Schedule:
    """In which order threads run, and in which simd_sum adds."""

    order: str | int = "forward"  # or "reverse", or the seed of a random one
    reduce: str = "butterfly"  # or "ascending", "random"
    simd_orders: bool = False  # simdgroup operations order memory, as barriers do

    def apply(self, launch: CLaunch) -> None:
        seeded = not isinstance(self.order, str)
        launch.order = 2 if seeded else ORDERS[str(self.order)]
        launch.seed = int(self.order) & 0xFFFFFFFF if seeded else 1
        launch.reduce = REDUCES[self.reduce]
        launch.simd_orders = self.simd_orders


@dataclass(eq=False)
class Memory:
    """One argument of the kernel in host memory."""

    name: str
    data: np.ndarray  # `[bytes]` uint8; outputs are written in place
    item: int  # bytes of an element
    output: bool = False
    initialised: bool = True
    real: bool = False  # of a float type
    counted: bool = True  # not the shapes and strides that MLX passes beside the arrays


@cache
def _engine() -> ctypes.CDLL:
    parts = sorted((HERE / "engine").glob("*.h")) + [HERE / "msl" / "attributes.h"]
    salt = "".join(part.read_text(encoding="utf-8") for part in parts)
    source = (HERE / "engine" / "engine.cpp").read_text(encoding="utf-8")
    flags = ("-std=c++17", "-O2", "-I", str(HERE / "engine"))
    # Global, because the kernels' libraries find the engine's functions by name.
    return ctypes.CDLL(str(build(source, flags, salt=salt)), mode=ctypes.RTLD_GLOBAL)


@cache
def _slots_base() -> int:
    """Address space for every buffer's slot; pages are opened where a buffer lies."""
    # Python's own mmap gives out the address of a writable mapping only.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    base = libc.mmap(None, SLOT * SLOTS, 0, flags, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "no address space for the emulated buffers")
    return int(base)


def _protect(address: int, size: int, access: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access):
        raise OSError(ctypes.get_errno(), "mprotect failed for an emulated buffer")


@contextmanager
def placed(memories: list[Memory]) -> Iterator[int]:
    """Copies every argument into a slot of its own, and the outputs back at the end."""
    if len(memories) > SLOTS:
        raise CompileError(f"a kernel with {len(memories)} buffers; at most {SLOTS} are emulated")
    base, page = _slots_base(), mmap.PAGESIZE
    sizes = [-(-max(m.data.size, 1) // page) * page for m in memories]
    for i, (m, size) in enumerate(zip(memories, sizes, strict=True)):
        _protect(base + i * SLOT, size, mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memmove(base + i * SLOT, m.data.ctypes.data, m.data.size)
    try:
        yield base
    finally:
        for i, (m, size) in enumerate(zip(memories, sizes, strict=True)):
            if m.output:
                ctypes.memmove(m.data.ctypes.data, base + i * SLOT, m.data.size)
            _protect(base + i * SLOT, size, 0)


_running = threading.Lock()  # the engine has one state, and one launch at a time


def _image(address: int) -> int:
    """Where the library that holds `address` begins in memory."""
    found = (ctypes.c_void_p * 4)()  # Dl_info: file name, base, symbol, its address
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), found)
    return found[1] or 0


class Loaded:
    """A compiled kernel in this process."""

    def __init__(self, library: Path) -> None:
        _engine()
        self.library = library
        self.handle = ctypes.CDLL(str(library))
        self.entry = ctypes.cast(self.handle.emu_entry, ctypes.c_void_p).value or 0
        self.image = _image(self.entry)

    def run(self, launch: CLaunch, limit: float) -> None:
        """Runs it; after `limit` seconds the launch is stopped and reported as hanging."""
        engine, state, active = _engine(), threading.Lock(), True

        def stop() -> None:
            with state:
                if active:
                    engine.emu_cancel()

        launch.entry, launch.image = self.entry, self.image
        with _running:
            timer = threading.Timer(limit, stop)
            timer.daemon = True
            engine.emu_begin()
            timer.start()
            engine.emu_run(ctypes.byref(launch))
            with state:
                active = False
            engine.emu_end()
            timer.cancel()
