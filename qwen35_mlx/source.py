"""What a message names, as bytes: the one place that opens a path, a `data:` URL or an address.

Only plain files are read, so a pipe or a device cannot hang the program; http(s) only where the
caller allows it.
"""

import base64
import urllib.parse
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, one_line, shown


def open_stream(source: str | Path | bytes, where: str, allow_url: bool = False) -> BinaryIO:
    """The bytes behind `source`, seekable, to be closed by the caller. Raises: InputError."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if not isinstance(source, str | Path):
        raise InputError(
            f"{where}: {type(source).__name__}; a path, bytes, a data: URL or a Pillow picture was "
            "expected. Pass one of those."
        )
    scheme = source.split(":", 1)[0].lower() if isinstance(source, str) else ""
    if scheme == "data":
        return BytesIO(_data_url(str(source), where))
    if scheme in ("http", "https"):
        if not allow_url:
            raise InputError(
                f"{where}: the address {shown(source)}; a local picture or clip was expected, "
                "addresses are not opened here. Download it and give its path."
            )
        from . import web  # the clients of the standard library take 50 ms to import

        return BytesIO(web.fetch(str(source), where))
    if isinstance(source, str) and "://" in source[:16]:
        raise InputError(
            f"{where}: {shown(source)}; a path was expected, '{scheme}:' is not opened. "
            "Give the path of the file itself."
        )
    path = Path(source)
    try:
        if path.is_file():
            return path.open("rb")
        found = "a folder" if path.is_dir() else "not a plain file" if path.exists() else "no file"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        found = one_line(error)
    raise InputError(
        f"{where}: {shown(source)}: {found}; a picture or clip was expected. Check the path."
    )


def _data_url(url: str, where: str) -> bytes:
    header, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma in it")
        raw = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(raw, validate=False) if header.endswith(";base64") else raw
    except ValueError as error:
        raise InputError(
            f"{where}: {shown(url)}: {one_line(error)}; data:image/png;base64,... was expected. "
            "Encode the file again."
        ) from None
