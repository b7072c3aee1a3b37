"""The preprocessing settings of a model folder, checked: what pictures and clips have in common."""

import math
from pathlib import Path
from typing import Any

from .errors import ModelError
from .files import LARGEST, Section, brief, is_whole, read_json

# Far above the family's 16 pixels, 65,536 and 469,762,048; what is larger is a damaged file. A
# picture is enlarged to the smallest area, so that one has to fit in memory.
PATCH, SMALLEST_AREA, AREA = 1024, 1 << 27, 1 << 40
COLOUR = 1e6  # of a mean or a divisor, and of its inverse


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
            f"{where}: size is {brief(size)}; an object with shortest_edge and longest_edge was "
            "expected. Correct it, or delete the file to use the family's settings."
        )
    found: dict[str, Any] = {}
    for name, edge, most in (
        ("min_pixels", "shortest_edge", SMALLEST_AREA),
        ("max_pixels", "longest_edge", AREA),
    ):
        stated = (values.get(name), size.get(name), size.get(edge), getattr(default, name))
        given = [positive(value, name, where, most) for value in stated if value is not None]
        if len(set(given[:-1])) > 1:
            raise ModelError(
                f"{where}: {name} and size.{edge} disagree ({sorted(set(given[:-1]))}); one area "
                "in pixels was expected. Keep one of them."
            )
        found[name] = given[0]  # the default comes last
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        value = values.get(name)
        value = getattr(default, name) if value is None else value
        found[name] = positive(value, name, where, PATCH)
    if found["min_pixels"] > found["max_pixels"]:
        raise ModelError(
            f"{where}: min_pixels {found['min_pixels']} is above max_pixels {found['max_pixels']}; "
            "the smaller first was expected. Swap them."
        )
    found["mean"] = _triple(values.get("image_mean"), default.mean, "image_mean", where)
    found["std"] = _triple(values.get("image_std"), default.std, "image_std", where)
    if min(map(abs, found["std"])) < 1 / COLOUR:
        raise ModelError(
            f"{where}: image_std is {list(found['std'])}; divisors well above 0 were expected. "
            "Use 0.5 three times."
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
        if not abs(_number(value) - expected) <= 1e-6:  # also refuses NaN
            raise ModelError(
                f"{where}: {name} is {brief(value)}; {expected!r} was expected, which Qwen3.5 was "
                "trained with. Correct it, or delete the file to use the family's settings."
            )


def positive(value: Any, name: str, where: str, most: int = LARGEST) -> int:
    """`value` as a whole number from 1 to `most`. Raises: ModelError."""
    if not is_whole(value) or not 1 <= value <= most:
        raise ModelError(
            f"{where}: {name} is {brief(value)}; a whole number from 1 to {most:,} was expected. "
            "Correct it, or delete the file to use the family's settings."
        )
    return int(value)


def _number(value: Any) -> float:
    """`value` as a float; NaN for what is no number or beyond every float."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _triple(value: Any, default: tuple[float, ...], name: str, where: str) -> tuple[float, ...]:
    if value is None:
        return default
    numbers = value if isinstance(value, list) else []
    good = [x for x in map(_number, numbers) if abs(x) <= COLOUR]  # not NaN
    if len(good) != 3 or len(numbers) != 3:
        raise ModelError(
            f"{where}: {name} is {brief(value)}; three numbers (red, green, blue) were expected. "
            "Correct it, or delete the file to use the family's settings."
        )
    return tuple(good)
