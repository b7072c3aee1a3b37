"""The small JSON files of a model folder: read with a cap, and their values with types."""

import json
from pathlib import Path
from typing import Any

from .errors import ModelError

JSON_BYTES = 64 << 20  # a tokenizer's configuration with its template stays far below


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
        text = " ".join(str(error).split())
        raise ModelError(f"{path}: {text}; expected JSON. Download it again.") from None
    return Section(values, str(path)).values


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

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.where}: {key} is {value!r}; expected a number.")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{self.where}: {key} is {value!r}; expected a whole number.")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value == 0:
            raise ModelError(f"{self.where}: {key} is 0; expected at least 1.")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.values.get(key, default))

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """A setting that changes the computation must have a value this runtime implements."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise ModelError(
                f"{self.where}: {key} is {value!r}; this runtime implements "
                f"{' or '.join(repr(a) for a in allowed)} only, as in all eight Qwen3.5 sizes."
            )
