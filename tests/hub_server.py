"""A small Hub on 127.0.0.1: what huggingface_hub asks for, what it was asked, and what goes wrong.

Large files are elsewhere, as with the real one: their address answers with a redirection.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


@dataclass
class FakeHub:
    """What the server has and does; a test changes it while it runs. Files go by their name."""

    repos: dict[str, Files] = field(default_factory=dict)  # at the head of the main branch
    heads: dict[str, str] = field(default_factory=dict)  # repo -> its commit, where not SHA
    history: dict[tuple[str, str], Files] = field(default_factory=dict)  # repo, earlier commit
    status: dict[str, tuple[int, str]] = field(default_factory=dict)  # repo -> answer, error code
    file_status: dict[str, tuple[int, str]] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)  # how many more times it answers 429
    cut: set[str] = field(default_factory=set)  # the connection always breaks half way
    cut_at: dict[str, list[int]] = field(default_factory=dict)  # each breaks one, after n bytes
    slow: set[str] = field(default_factory=set)  # stop coming half way
    no_ranges: bool = False  # every answer is a whole file
    sizes: dict[str, int] = field(default_factory=dict)  # that are listed, where not the true one
    damaged: set[str] = field(default_factory=set)  # arrive with another first byte of the weights
    watch: Callable[[], object] = lambda: None  # called at each request
    asked: list[str] = field(default_factory=list)  # paths
    sent: list[str] = field(default_factory=list)  # file@first byte
    nbytes: Counter[str] = field(default_factory=Counter)  # that were sent
    url: str = ""

    def head(self, repo: str) -> str:
        """The commit of the main branch."""
        return self.heads.get(repo, SHA)

    def move(self, repo: str, commit: str, files: Files) -> None:
        """The main branch goes on to `commit`, which holds `files`."""
        self.history[repo, self.head(repo)] = self.repos[repo]
        self.heads[repo], self.repos[repo] = commit, files

    def at(self, repo: str, revision: str) -> Files | None:
        """The files of a commit or of the main branch."""
        if revision in ("main", self.head(repo)):
            return self.repos[repo]
        return self.history.get((repo, revision))

    def listing(self, files: Files) -> list[dict]:
        """Each file as `tree` and `siblings` have it; `oid` of a large one is that of git."""
        found = []
        for name, data in files.items():
            oid, size = hashlib.sha1(data).hexdigest(), self.sizes.get(name, len(data))
            about = {"type": "file", "path": name, "rfilename": name, "size": size}
            about |= {"oid": oid, "blobId": oid}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                about["lfs"] = {"size": size, "sha256": digest, "oid": digest, "pointerSize": 134}
            found.append(about)
        return found


def handler(state: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

        def answer(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            state.watch()
            path = unquote(urlsplit(self.path).path)
            state.asked.append(path)
            kind, *parts = path.strip("/").split("/")
            if kind == "cdn":
                files = state.at("/".join(parts[:2]), parts[2])
                return self.file(parts[3], (files or {})[parts[3]], X_Repo_Commit=parts[2])
            parts = parts[1:] if kind == "api" else [kind, *parts]
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo in state.status or repo not in state.repos:
                code, name = state.status.get(repo, (404, "RepoNotFound"))
                return self.answer(code, b"{}", X_Error_Code=name)
            commit = rest[1] if len(rest) > 1 else "main"
            files = state.at(repo, commit)
            if files is None:
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            commit = state.head(repo) if commit == "main" else commit
            if kind != "api":
                return self.resolve(repo, commit, "/".join(rest[2:]), files)
            listed = state.listing(files)
            about = listed if "tree" in rest else {"id": repo, "sha": commit, "siblings": listed}
            self.answer(200, json.dumps(about).encode())

        def resolve(self, repo: str, commit: str, name: str, files: Files) -> None:
            if name in state.file_status or name not in files:
                code, error = state.file_status.get(name, (404, "EntryNotFound"))
                return self.answer(code, b"", X_Error_Code=error)
            if state.busy.get(name, 0) > 0:
                state.busy[name] -= 1
                return self.answer(429, b"")
            if not name.endswith(".safetensors"):
                return self.file(name, files[name], X_Repo_Commit=commit)
            self.answer(
                302,
                b"",
                Location=f"{state.url}/cdn/{repo}/{commit}/{name}",
                X_Repo_Commit=commit,
                X_Linked_Size=str(len(files[name])),
                X_Linked_Etag=f'"{hashlib.sha256(files[name]).hexdigest()}"',
            )

        def file(self, name: str, data: bytes, **headers: str) -> None:
            size, etag = len(data), f'"{hashlib.sha1(data).hexdigest()}"'
            if name in state.damaged:
                start = 8 + int.from_bytes(data[:8], "little")
                data = data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]
            asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
            begin = 0 if state.no_ranges else int(asked.split("-")[0])
            stop = size if state.no_ranges else int(asked.split("-")[1] or size - 1) + 1
            if self.command == "GET":
                state.sent.append(f"{name}@{begin}")
            if begin >= size > 0:
                return self.answer(416, b"", Content_Range=f"bytes */{size}")
            part = data[begin:stop]
            whole = state.no_ranges or "Range" not in self.headers
            if not whole:
                headers["Content_Range"] = f"bytes {begin}-{begin + len(part) - 1}/{size}"
            headers |= {"ETag": etag, "Accept_Ranges": "none" if state.no_ranges else "bytes"}
            if self.command == "HEAD":
                return self.answer(200, part, **headers)
            self.body(name, 200 if whole else 206, part, headers)

        def body(self, name: str, code: int, data: bytes, headers: dict[str, str]) -> None:
            """The answer, or as much of it as comes."""
            cuts = state.cut_at.get(name, [])
            send = len(data)
            if name in state.cut | state.slow:
                send = len(data) // 2
            elif cuts and len(data) > cuts[0]:
                send = cuts.pop(0)
            state.nbytes[name] += send
            if send == len(data):
                return self.answer(code, data, **headers)
            self.send_response(code)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[:send])
            self.wfile.flush()
            self.close_connection = True
            if name in state.slow:
                time.sleep(20)

    return Handler


@contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch, cache: Path, repos: dict[str, Files]
) -> Iterator[FakeHub]:
    """The server, and huggingface_hub in this process pointed at it, with its cache in `cache`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    state = FakeHub(repos=repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        close_session()
        server.shutdown()
        server.server_close()
