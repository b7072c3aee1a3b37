"""One picture from an address the user typed: http(s) only, capped in size and time."""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from .errors import InputError, one_line, shown

MAX_DOWNLOAD = 50 * 2**20  # bytes
CONNECT_SECONDS = 20
DOWNLOAD_SECONDS = 60


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            fp.close()
            raise urllib.error.URLError(f"it redirects to {shown(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, where: str) -> bytes:
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
