"""What a message names, as bytes: the one place that opens a path, a `data:` URL or an address.

Only plain files are read, so a pipe or a device cannot hang the program; http(s) only where the
caller allows it.
"""

import base64
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError

MAX_DOWNLOAD = 50 * 2**20  # bytes
CONNECT_SECONDS = 20
DOWNLOAD_SECONDS = 60


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
        return BytesIO(_download(str(source), where))
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


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            fp.close()
            raise urllib.error.URLError(f"it redirects to {shown(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, where: str) -> bytes:
    """The bytes at an http(s) address, within `MAX_DOWNLOAD` and `DOWNLOAD_SECONDS`."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    found = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "qwen35_mlx"})
        opener = urllib.request.build_opener(_HttpRedirects)
        with opener.open(request, timeout=CONNECT_SECONDS) as reply:
            while part := reply.read1(2**16):
                found += part
                if len(found) > MAX_DOWNLOAD:
                    raise ValueError(f"more than {MAX_DOWNLOAD >> 20} MiB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not finished after {DOWNLOAD_SECONDS} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the reply
        raise InputError(
            f"{where}: {shown(url)}: {one_line(error)}; a picture was expected. "
            "Check the address, or download it and give its path."
        ) from None
    return bytes(found)


def one_line(error: object) -> str:
    """What an exception says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def shown(source: object) -> str:
    """A path or address as it may stand in a message: on one line, not too long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(source)[:200])
    return text if len(text) <= 80 else f"{text[:60]}... ({len(str(source))} characters)"
