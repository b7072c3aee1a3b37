"""Finds a clang, compiles with it, and keeps what it made in a folder of the user's.

An installed clang of 18 or newer is preferred; otherwise the `ziglang` package brings one. zig is
asked for its bare clang and its bare linker: its own front end would first build a C library.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .launch import CompileError

OLDEST = 18  # clang 16 has no arithmetic of bfloat
KEPT_DAYS = 30
MESSAGES = 8  # of clang, in a CompileError


@dataclass(frozen=True)
class Toolchain:
    """The commands that compile one file and that link one object."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    version: str


def _version(command: tuple[str, ...]) -> str:
    """The first line of `--version`, empty when the command is no clang of the needed age."""
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    line = run.stdout.partition("\n")[0]
    found = re.search(r"clang version (\d+)", line)
    return line if found and int(found[1]) >= OLDEST else ""


def _installed(wanted: str) -> Toolchain | None:
    names = ["clang++", *(f"clang++-{n}" for n in range(30, OLDEST - 1, -1))]
    for name in [wanted] if wanted else names:
        path = shutil.which(name)
        version = _version((path,)) if path else ""
        if path and version:
            how = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-nostdlib"]
            return Toolchain((path,), (path, "-shared", *how), version)
    return None


def _from_ziglang() -> Toolchain | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    zig = str(Path(spec.origin).parent / "zig")
    version = _version((zig, "clang"))
    if sys.platform == "darwin":
        link: tuple[str, ...] = (zig, "c++", "-shared", "-Wl,-undefined,dynamic_lookup")
    else:
        link = (zig, "ld.lld", "-shared")
    return Toolchain((zig, "clang"), link, version) if version else None


@cache
def toolchain() -> Toolchain:
    """The compiler of this machine. METAL_CPU_CLANG names another, or `ziglang`."""
    wanted = os.environ.get("METAL_CPU_CLANG", "")
    found = (None if wanted == "ziglang" else _installed(wanted)) or _from_ziglang()
    if found is None:
        raise CompileError(
            f"metal_cpu: no clang of {OLDEST} or newer and no ziglang. pip install ziglang."
        )
    return found


@cache
def folder() -> Path:
    """The cache: `metal_cpu-UID` under the system's temporary folder, closed to other users."""
    path = Path(tempfile.gettempdir()) / f"metal_cpu-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    state = path.lstat()
    if path.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise CompileError(f"{path}: not a folder that only this user can write. Remove it.")
    oldest = time.time() - KEPT_DAYS * 86400
    for file in path.iterdir():
        try:
            if file.stat().st_mtime < oldest:
                file.unlink()
        except FileNotFoundError:
            continue  # another process was first
    return path


@cache
def _processor() -> tuple[str, ...]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ()
    return ("-mf16c", "-mfma") if re.search(r"\bf16c\b", known) and " fma " in known else ()


BASE = (
    *("-fPIC", "-nostdinc", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    *(
        "-fno-math-errno",
        "-fno-finite-loops",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-fno-stack-protector",
    ),
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
)


def build(
    source: str,
    flags: tuple[str, ...],
    *,
    prefix: str = "",
    salt: str = "",
    judge: Callable[[str], None] = lambda messages: None,
) -> Path:
    """The library of `prefix` and `source`, from the cache or compiled.

    `prefix` is what many units begin with: it is compiled once. `salt` stands for the text of what
    it includes. `judge` sees what clang said and may raise.
    """
    tools = toolchain()
    flags = (*BASE, *_processor(), *flags)
    library = _cached([tools.version, salt, *flags, prefix, source], "so")
    if library.exists():
        os.utime(library)
        return library
    start = ("-include-pch", str(_precompiled(prefix, flags, salt))) if prefix else ()
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        file, made = Path(scratch) / "unit.o", Path(scratch) / "unit.so"
        judge(
            _run([*tools.compile, "-x", "c++", *flags, *start, "-c", "-o", str(file), "-"], source)
        )
        _run([*tools.link, str(file), "-o", str(made)], "")
        os.replace(made, library)  # whole or not at all, whoever else is compiling it
    return library


def _cached(what: list[str], ending: str) -> Path:
    return folder() / f"{hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:32]}.{ending}"


def _precompiled(prefix: str, flags: tuple[str, ...], salt: str) -> Path:
    """A precompiled header; the place of this file counts, since it names what it includes."""
    tools = toolchain()
    header = _cached([tools.version, salt, *flags, prefix, __file__], "pch")
    if not header.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:
            made = Path(scratch) / "unit.pch"
            quiet = ("-w", "-Xclang", "-fno-pch-timestamp")
            _run([*tools.compile, "-x", "c++-header", *flags, *quiet, "-o", str(made), "-"], prefix)
            os.replace(made, header)
    return header


def _run(command: list[str], source: str) -> str:
    run = subprocess.run(command, input=source, capture_output=True, text=True)
    if run.returncode != 0:
        raise CompileError(first_messages(run.stderr))
    return run.stderr


def first_messages(output: str) -> str:
    """The first errors among clang's messages, without the text it quotes."""
    lines = output.splitlines()
    errors = [line for line in lines if ": error:" in line or ": fatal error:" in line]
    return "\n".join((errors or lines)[:MESSAGES])
