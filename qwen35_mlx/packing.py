"""Packed matrices: `mx.quantize`'s formats, what config.json says of them, what widths show."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import ModelError
from .files import Section, brief

# The last three fix their own bits and group size.
MODES = {"affine": None, "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """One matrix's packing: `mode` of `mx.quantize`, bits per weight, columns per scale."""

    mode: str
    bits: int
    group_size: int


@dataclass(frozen=True)
class Quantization:
    """The folder's default format and its exceptions by module path (None: not packed)."""

    default: Format
    overrides: Mapping[str, Format | None] = field(default_factory=dict)

    def of(self, path: str) -> Format | None:
        """Format of the module called `path` in the folder's own naming."""
        return self.overrides.get(path, self.default)


def declared(top: Section) -> Quantization | None:
    """MLX's `quantization` block of a config.json; None where nothing is packed.

    Raises: ModelError naming another packing (FP8, GPTQ, AWQ ...), or values MLX does not have.
    """
    key = "quantization" if top.get("quantization") is not None else "quantization_config"
    if top.get(key) is None:
        return None
    block = top.section(key)
    if key == "quantization_config" and "quant_method" in block.values:
        raise ModelError(
            f"{top.where}: weights are packed as {brief(block.values['quant_method'])}; "
            "expected BF16 weights or an MLX quantization. Convert the folder first."
        )
    default = _format(block, None)
    overrides: dict[str, Format | None] = {}
    for key, value in block.values.items():
        if isinstance(value, dict):
            overrides[key] = _format(Section(value, f"{block.where}: {key}"), default)
        elif value is False:
            overrides[key] = None
        elif value is True:
            overrides[key] = default
    return Quantization(default, overrides)


def _format(block: Section, default: Format | None) -> Format:
    mode = block.values.get("mode", default.mode if default else "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise ModelError(
            f"{block.where}: mode is {brief(mode)}; expected one of {', '.join(MODES)}. "
            "Update the project or convert the folder again."
        )
    same = default if default and default.mode == mode else None
    bits, group = MODES[mode] or (same.bits if same else 4, same.group_size if same else 64)
    found = Format(mode, block.size("bits", bits), block.size("group_size", group))
    fixed = MODES[mode]
    if fixed and (found.bits, found.group_size) != fixed:
        raise ModelError(
            f"{block.where}: {mode} with {found.bits} bits and group {found.group_size}; "
            f"expected {fixed[0]} bits and group {fixed[1]}."
        )
    if mode == "affine" and (
        found.bits not in AFFINE_BITS or found.group_size not in AFFINE_GROUPS
    ):
        raise ModelError(
            f"{block.where}: {found.bits} bits in groups of {found.group_size}; "
            "expected 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128."
        )
    return found


def measured(
    name: str, weight: tuple[int, ...], scales: tuple[int, ...], columns: int, declared: Format
) -> Format:
    """Bits and group size as the packed widths have them; the configuration may omit overrides.

    name: of the weight, for the message. weight, scales: shapes `[..., width]`. columns: of the
    matrix before packing. declared: gives the mode.
    Raises: ModelError when no packing of that mode has these widths.
    """
    bits, bits_left = divmod(32 * weight[-1], columns)
    group, group_left = divmod(columns, max(scales[-1], 1))
    fixed = MODES[declared.mode]
    known = (bits, group) == fixed if fixed else bits in AFFINE_BITS and group in AFFINE_GROUPS
    if bits_left or group_left or not known:
        raise ModelError(
            f"{name} {weight} with scales {scales}; no {declared.mode} packing of {columns} "
            "columns has these widths. Convert it again."
        )
    return Format(declared.mode, bits, group)
