"""What was typed, as far as it can be judged before anything is looked for."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen35_mlx.errors import ConversionError, InputError, one_line, shown

from .options import Options

REVISION = re.compile(r"\w[\w.-]{0,99}(/\w[\w.-]{0,99})*", re.ASCII)
APART = (
    ("MODEL", "--all", ""),
    ("--report", "--plan", ""),
    ("--report", "--stream", ", which keeps no source"),
    ("--revision", "--all", ""),
)


@dataclass(frozen=True)
class Request:
    """The options as typed, those for the format already checked.

    given: names of those that were typed, in the order of the help.
    """

    given: tuple[str, ...]
    model: str | None
    options: Options
    out: str | None
    every: bool
    plan: bool
    stream: bool
    revision: str | None
    verify: str | None
    report: bool
    text: str | None


def require_sense(request: Request) -> None:
    """Raises: ConversionError for options that contradict each other."""
    given = request.given
    if not {"MODEL", "--all", "--verify"}.intersection(given):
        raise ConversionError(
            "MODEL: none given; expected a Hub id, a size such as 4b, or a folder. Name one."
        )
    alone = [(name, "--verify", "") for name in given if name != "--verify"]
    for name, other, why in (*alone, *APART):
        if name in given and other in given:
            raise ConversionError(f"{name} with {other}{why}; expected one of them. Leave one out.")
    if request.text is not None and not request.report:
        raise ConversionError("--text: given without --report; expected both. Add --report.")
    if request.text is not None:
        read_text(request.text)  # what cannot be read is said before the hours of work
    if request.revision is not None and (
        not REVISION.fullmatch(request.revision) or ".." in request.revision
    ):
        raise ConversionError(
            f"--revision: {shown(request.revision)}; expected a commit, a tag or a branch. "
            "Take it from the repository's history."
        )
    if "" in (request.model, request.out, request.verify):
        raise ConversionError("a name is empty; expected a model or folder. Give its name.")


def read_text(path: str) -> str:
    """The text of --text. Raises: InputError when there is none."""
    if not os.path.isfile(path):
        raise InputError(f"--text {shown(path)}: no such file. Check the path.")
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--text {shown(path)}: {one_line(error)}; expected a file of UTF-8 text. Check it."
        ) from None
    if not text.strip():
        raise InputError(f"--text {shown(path)}: is empty; expected some text. Give another file.")
    return text
