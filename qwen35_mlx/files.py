"""The small JSON files of a model folder: read with a cap, and their values with types."""

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import ModelError, one_line

JSON_BYTES = 64 << 20  # a tokenizer's configuration with its template stays far below
LARGEST = 1 << 24  # of a size or id: the family's largest are its 248,320 tokens


def home() -> Path:
    """This program's own folder: `$QWEN35_HOME`, or one below the user's caches."""
    return Path(os.path.expanduser(os.environ.get("QWEN35_HOME") or "~/.cache/qwen35_mlx"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises: ModelError when it is too large, unreadable, or no object.
    """
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise ModelError(
                f"{path}: {size:,} bytes; at most {JSON_BYTES:,} are read. Take the model's own."
            )
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; expected a readable file.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {one_line(error)}; expected JSON. Download it again.") from None
    return Section(values, str(path)).values


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0 on; true and 1.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def brief(value: Any) -> str:
    """A JSON value as an error quotes it, however long or deep it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; more digits than Python writes
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


class Section:
    """One JSON object, with access that checks types and names the key in errors."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            found = type(values).__name__
            raise ModelError(f"{where}: found a {found}; expected an object. Download it again.")
        self.values: dict[str, Any] = values
        self.where = where

    def section(self, key: str) -> "Section":
        return Section(self.values.get(key), f"{self.where}: {key}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands; null means absent."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        """A finite number above `above`."""
        value = self.get(key, default)
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, OverflowError):
            number = math.nan
        if not above < number < math.inf:
            raise ModelError(
                f"{self.where}: {key} is {brief(value)}; expected a number above {above:g}."
            )
        return number

    def integer(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """A whole number from 0 to `most`."""
        value: int = self.get(key, default)
        if not is_whole(value) or value > most:
            raise ModelError(
                f"{self.where}: {key} is {brief(value)}; "
                f"expected a whole number of at most {most:,}."
            )
        return value

    def size(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """A whole number from 1 to `most`."""
        value = self.integer(key, default, most)
        if value == 0:
            raise ModelError(f"{self.where}: {key} is 0; expected at least 1.")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} is {brief(value)}; expected true or false.")
        return value

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """A setting that changes the computation must have a value this runtime implements."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise ModelError(
                f"{self.where}: {key} is {brief(value)}; this runtime implements "
                f"{' or '.join(repr(a) for a in allowed)} only, as in all eight Qwen3.5 sizes."
            )
