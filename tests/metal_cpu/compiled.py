"""A kernel's text, looked over, compiled and loaded."""

from dataclasses import dataclass

from . import lint, translate
from .runtime import Loaded
from .text import Text
from .toolchain import build

SHIM = str(translate.HERE / "msl")
LANGUAGE = (
    # Metal is C++14; what C++17 would not take of it is refused too.
    "-std=c++17",
    # A helper may hold a barrier: no call may be copied into the branches around it.
    *("-Xclang", "-fconvergent-functions"),
    *lint.WARNINGS,
)
# On a CPU, MLX puts arrays at odd multiples of 8 bytes; the fast mode works on them in place.
FAST = ("-O2", "-fmax-type-align=8")
CHECKED = (
    *("-O1", "-gline-tables-only", "-gdwarf-4", "-ftrivial-auto-var-init=pattern"),
    *("-Xclang", "-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    "-fsanitize=shift-exponent,integer-divide-by-zero,alignment,array-bounds,local-bounds,return",
    "-fno-sanitize-recover=all",
)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel's text for one set of types, loaded."""

    text: Text
    loaded: Loaded


def compile_text(text: Text, name: str, contract: bool, checked: bool) -> Compiled:
    """Compiles MLX's text; raises CompileError."""
    lint.textual(text, name)
    folder, salt = translate.includes()
    flags = (
        *LANGUAGE,
        *("-isystem", folder, "-isystem", SHIM),
        f"-ffp-contract={'fast' if contract else 'off'}",
        *(CHECKED if checked else FAST),
    )
    library = build(
        translate.unit(text, name),
        flags,
        prefix=translate.PREFIX,
        salt=salt,
        judge=lint.judge,
    )
    return Compiled(text, Loaded(library))
