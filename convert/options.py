"""What a conversion was asked for, checked once; it is also what a resumed one must agree with."""

import re
from dataclasses import dataclass
from typing import Any

from qwen35_mlx.errors import ConversionError
from qwen35_mlx.packing import AFFINE_GROUPS, MODES, Format

BITS = (3, 4, 5, 6, 8, 16)
RECIPES = ("careful", "uniform")
SMALLEST_SHARD = 1_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Options:
    """base: format of a matrix without a reason for another; None keeps all in BF16 (16 bits).

    recipe: a column of `recipe.RULES`. vision_bits: 8, or 16 for BF16. shard_size: bytes.
    """

    base: Format | None = Format("affine", 4, 64)
    recipe: str = "careful"
    vision_bits: int = 16
    shard_size: int = 5_000_000_000

    @property
    def bits(self) -> int:
        return self.base.bits if self.base else 16

    @property
    def label(self) -> str:
        """What a folder's name says of it: `4bit`, `mxfp4`, `bf16`."""
        if self.base is None:
            return "bf16"
        return f"{self.base.bits}bit" if self.base.mode == "affine" else self.base.mode

    def as_json(self) -> dict[str, Any]:
        """The options as the folder's declaration and the unfinished folder's state hold them."""
        base = self.base
        return {
            "bits": self.bits,
            "mode": base.mode if base else None,
            "group_size": base.group_size if base else None,
            "recipe": self.recipe,
            "vision_bits": self.vision_bits,
            "shard_size": self.shard_size,
        }


def options(
    bits: int | None = None,
    mode: str = "affine",
    group_size: int | None = None,
    recipe: str | None = None,
    vision_bits: int = 16,
    shard_size: str | int = 5_000_000_000,
) -> Options:
    """Options as a person gives them: what is None follows from the rest.

    bits: 3, 4, 5, 6, 8 or 16; None: 4, or the mode's own. recipe: None is careful up to 4 bits and
    uniform above, where no tensor is sensitive any more. shard_size: bytes, or text such as "5GB".
    Raises: ConversionError for values that do not go together.
    """
    _one_of("--mode", mode, tuple(MODES))
    _one_of("--vision-bits", vision_bits, (8, 16))
    fixed = MODES[mode]
    if fixed:
        for name, given, own in (
            ("--bits", bits, fixed[0]),
            ("--group-size", group_size, fixed[1]),
        ):
            if given not in (None, own):
                raise ConversionError(
                    f"{name}: {given} with --mode {mode}, which fixes {own}. Leave one of them out."
                )
        bits, group_size = fixed
    bits = 4 if bits is None else bits
    _one_of("--bits", bits, BITS)
    if bits == 16 and group_size is not None:
        raise ConversionError(
            "--group-size: given with --bits 16, which packs nothing. Leave one of them out."
        )
    if not fixed and group_size is not None:
        _one_of("--group-size", group_size, AFFINE_GROUPS)
    recipe = recipe or ("careful" if bits <= 4 else "uniform")
    _one_of("--recipe", recipe, RECIPES)
    base = None if bits == 16 else Format(mode, bits, group_size or 64)
    return Options(base, recipe, vision_bits, _shard_bytes(shard_size))


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ConversionError(f"{name}: {value}; expected one of {listed}.")


def _shard_bytes(given: str | int) -> int:
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]*)\s*", str(given))
    unit = _UNITS.get(match[2].upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < SMALLEST_SHARD:
        raise ConversionError(
            f"--shard-size: {given!r}; expected at least 1MB, such as 5GB or 500MB."
        )
    return count
