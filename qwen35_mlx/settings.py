"""The preprocessing settings of a model folder, checked: what pictures and clips have in common."""

import math
from pathlib import Path
from typing import Any

from .errors import ModelError
from .files import Section, read_json


def read_settings(folder: Path, name: str, section: str) -> tuple[dict[str, Any], str]:
    """The JSON object of one processor and the place it came from, for messages.

    transformers 5 writes one `processor_config.json` with a section for each processor in place of
    the older files.
    """
    for path, part in ((folder / name, None), (folder / "processor_config.json", section)):
        if not path.is_file():
            continue
        values = read_json(path)
        if part is not None:
            values = Section(values.get(part, {}), f"{path}: {part}").values
        return values, str(path)
    return {}, str(folder / name)


def shared_settings(values: dict[str, Any], where: str, default: Any) -> dict[str, Any]:
    """The settings that pictures and clips have in common, checked.

    `default` is the processor to take absent values from. Raises: ModelError.
    """
    _refuse_other_steps(values, where)
    size = values.get("size") or {}
    if not isinstance(size, dict):
        raise ModelError(
            f"{where}: size is {size!r}; an object with shortest_edge and longest_edge was "
            "expected. Correct it, or delete the file to use the family's settings."
        )
    found: dict[str, Any] = {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        given = {v for v in (values.get(name), size.get(name), size.get(edge)) if v is not None}
        if len(given) > 1:
            raise ModelError(
                f"{where}: {name} and size.{edge} disagree ({sorted(given, key=str)}); one area "
                "in pixels was expected. Keep one of them."
            )
        found[name] = positive(given.pop() if given else getattr(default, name), name, where)
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        value = values.get(name)
        found[name] = positive(getattr(default, name) if value is None else value, name, where)
    if found["min_pixels"] > found["max_pixels"]:
        raise ModelError(
            f"{where}: min_pixels {found['min_pixels']} is above max_pixels {found['max_pixels']}; "
            "the smaller first was expected. Swap them."
        )
    found["mean"] = _triple(values.get("image_mean"), default.mean, "image_mean", where)
    found["std"] = _triple(values.get("image_std"), default.std, "image_std", where)
    if 0.0 in found["std"]:
        raise ModelError(
            f"{where}: image_std holds 0; divisors were expected. Use 0.5 three times."
        )
    return found


def _refuse_other_steps(values: dict[str, Any], where: str) -> None:
    """Refuses settings that would ask for a step, or the lack of one, that is not done here."""
    steps: dict[str, Any] = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    steps |= {"do_convert_rgb": True, "do_center_crop": False, "do_pad": False}
    steps |= {"resample": 3, "rescale_factor": 1 / 255, "cap_pixels_per_frame": False}
    for name, expected in steps.items():
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or abs(value - expected) > 1e-6:
            raise ModelError(
                f"{where}: {name} is {value!r}; {expected!r} was expected, which Qwen3.5 was "
                "trained with. Correct it, or delete the file to use the family's settings."
            )


def positive(value: Any, name: str, where: str) -> int:
    """`value` as a whole number above 0. Raises: ModelError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{where}: {name} is {value!r}; a whole number above 0 was expected. "
            "Correct it, or delete the file to use the family's settings."
        )
    return value


def _triple(value: Any, default: tuple[float, ...], name: str, where: str) -> tuple[float, ...]:
    if value is None:
        return default
    numbers = value if isinstance(value, list) else []
    good = [float(x) for x in numbers if isinstance(x, int | float) and math.isfinite(x)]
    if len(good) != 3 or len(numbers) != 3:
        raise ModelError(
            f"{where}: {name} is {value!r}; three numbers (red, green, blue) were expected. "
            "Correct it, or delete the file to use the family's settings."
        )
    return tuple(good)
