"""A repository on the Hub as a source: headers first, then one weight file after the other.

Nothing but the Hub client's session is used of it for the weights: its own download can neither be
stopped half way nor go on in the next run, and may keep a cache of the chunks it fetched.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen35_mlx import hub, shards
from qwen35_mlx.errors import ModelError
from qwen35_mlx.shards import Entry

from .source import Source, read_values
from .writer import digest

PART = ".part"  # of a file that is not all there
TRIES, WAIT_SECONDS, LONGEST_WAIT = 5, 1.0, 8.0  # in a row that bring nothing
BUSY = (408, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
READERS = 8  # of headers at a time
AT_ONCE = 2  # weight files on the disk: one is converted, the next one comes
STOP_SECONDS = 2.0  # to wait for a download that was told to stop


def open_hub(
    repo: str, shards_folder: Path, revision: str | None = None
) -> tuple[Source, "HubSupply"]:
    """A repository as a source, from its headers alone, and the supply of its weight files.

    shards_folder: where weight files will lie while they are converted, inside the unfinished
    folder; nothing is put there before the first is asked for. revision: a branch, tag or commit;
    None: the main branch. The commit it means now is used for everything, see `supply.revision`.
    Raises: ModelError for what the Hub does not give, is not Qwen3.5, or is damaged.
    """
    listed = hub.listing(repo, revision)
    folder = hub.small_files(repo, listed.revision)
    values = read_values(folder)
    commit = _Commit(repo, listed)
    pool = ThreadPoolExecutor(READERS)
    try:
        with hub.explained(repo):
            stored = shards.described(
                folder, listed.sizes.__contains__, lambda names: pool.map(commit.header, names)
            )
    except BaseException:
        commit.over.set()  # one failed; the others need not try for long
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    entries = {
        name: replace(entry, file=shards_folder / entry.file.name) for name, entry in stored.items()
    }
    return Source(folder, values, entries, where=repo), HubSupply(commit, shards_folder)


class HubSupply:
    """Brings weight files of one commit and takes them away; never more than two are there.

    While one file is converted, the next one comes in a thread. A file gets its name when it is
    whole and its digest is right; before that it has `PART` added, and the next run goes on there.
    most_bytes: of the disk, that the two largest take.
    """

    def __init__(self, commit: "_Commit", shards_folder: Path) -> None:
        self.folder = shards_folder
        self._commit = commit
        weights = [n for n in sorted(commit.listed.sizes) if n.endswith(".safetensors")]
        # In the order in which they will be asked for; all, until `expect` says which.
        self._due = [shards_folder / name for name in weights]
        self._held: list[Path] = []
        self._coming: _Coming | None = None
        self.most_bytes = self._largest(self._due)

    @property
    def revision(self) -> str:
        """The commit."""
        return self._commit.listed.revision

    @property
    def spare_bytes(self) -> int:
        """Of the disk, that those due may take; what an earlier run left is there already."""
        present = sum(path.stat().st_size for path in self._present())
        return max(0, self._largest(self._due) - present)

    def expect(self, files: Sequence[Path]) -> None:
        """These files will be asked for, in this order; what an earlier run left of others goes."""
        self._due = list(files)
        soon = {name for path in files[:AT_ONCE] for name in (path, _part(path))}
        for path in self._present():
            if path not in soon:
                path.unlink()

    def ready(self, file: Path) -> None:
        """Wait until `file` is whole, and let the one after it come meanwhile.

        Raises: ModelError when the Hub does not give it; OSError when the disk does not take it.
        """
        coming = self._coming or self._start(file)
        if coming.file != file:
            raise ValueError(f"{file} is asked for; {coming.file} was due")
        coming.join()
        error = coming.error
        if isinstance(error, OSError) and error.errno is not None:
            raise error  # of the disk: the job explains it
        with hub.explained(self._commit.repo):
            if error is not None:
                raise error
        self._coming = None
        self._held.append(file)
        self._prefetch()

    def drop(self, file: Path) -> None:
        """Remove `file`."""
        file.unlink(missing_ok=True)
        self._held.remove(file)
        self._prefetch()

    def close(self) -> None:
        """Stop what is coming. When all was asked for and dropped, nothing stays."""
        self._commit.over.set()
        if self._coming is not None:
            self._coming.join(STOP_SECONDS)  # it may wait for the network, and then gives up alone
        elif not self._due and not self._held:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _largest(self, files: Iterable[Path]) -> int:
        return sum(sorted(self._commit.listed.sizes[file.name] for file in files)[-AT_ONCE:])

    def _present(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _prefetch(self) -> None:
        if self._due and self._coming is None and len(self._held) < AT_ONCE:
            self._start(self._due[0])

    def _start(self, file: Path) -> "_Coming":
        self._due.remove(file)
        self._coming = _Coming(file, self._fetch)
        self._coming.start()
        return self._coming

    def _fetch(self, file: Path) -> None:
        """Make `file` whole from whatever is there of it, unless all is over before."""
        commit, part = self._commit, _part(file)
        file.parent.mkdir(exist_ok=True)
        if file.is_file():
            file.rename(part)  # of an earlier run, which may have ended with a power cut: check it
        with part.open("ab") as out:
            commit.receive(file.name, out.tell(), commit.listed.sizes[file.name], out.write)
        if not commit.over.is_set():
            commit.check(part, file.name)
            part.rename(file)


class _Commit:
    """The weight files of one commit, by HTTP. over: set to end whatever is under way."""

    def __init__(self, repo: str, listed: hub.Listing) -> None:
        self.repo, self.listed = repo, listed
        self.over = threading.Event()

    def header(self, name: str) -> dict[str, Entry]:
        """The tensors of the file `name`; no weights are fetched.

        Raises: ModelError when it is not there or not safetensors; what the Hub's client raises.
        """
        size = self.listed.sizes.get(name)
        if size is None:
            raise ModelError(f"{self.repo}: no {name}; config.json names it. Take another commit.")
        position = 0

        def read(count: int) -> bytes:
            nonlocal position
            found = bytearray()
            stop = min(position + count, size)
            self.receive(name, position, stop, found.extend)
            position = stop
            return bytes(found)

        return shards.parse_header(Path(self.repo, name), size, read)

    def check(self, path: Path, name: str) -> None:
        """Remove `path` unless it holds what the Hub lists as `name`. Raises: ModelError then."""
        size, expected = self.listed.sizes[name], self.listed.digests.get(name)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = os.fstat(descriptor).st_size
            wrong = found != size or (expected and digest(descriptor, 0, size) != expected)
        finally:
            os.close(descriptor)
        if wrong:
            path.unlink()
            raise ModelError(
                f"{self.repo}: {name} arrived damaged, {found:,} bytes of {size:,}; expected what "
                "the Hub lists. Run the same command again."
            )

    def receive(self, name: str, begin: int, stop: int, take: Callable[[bytes], object]) -> None:
        """Give `take` the bytes of `name` from `begin` up to `stop`; a cut connection is mended.

        Raises: the last error when several connections in a row bring nothing.
        """
        idle = 0
        while begin < stop and not self.over.is_set():
            came, broken = self._connection(name, begin, stop, take)
            begin += came
            idle = 0 if came else idle + 1
            if idle >= TRIES:
                raise broken or ModelError(
                    f"{self.repo}: {name} ends at byte {begin:,}; expected the "
                    f"{self.listed.sizes[name]:,} bytes the Hub lists. Try again later."
                )
            if begin < stop:
                self.over.wait(min(WAIT_SECONDS * 2**idle, LONGEST_WAIT))

    def _connection(
        self, name: str, begin: int, stop: int, take: Callable[[bytes], object]
    ) -> tuple[int, Exception | None]:
        """How many bytes one connection brought, and what ended it early."""
        came = 0
        try:
            with self._response(name, begin, stop) as response:
                # A server that knows no ranges sends the file from its first byte on.
                skip = begin if response.status_code == 200 else 0
                for chunk in _without(skip, response.iter_bytes()):
                    if self.over.is_set():
                        break
                    wanted = chunk[: stop - begin - came]
                    take(wanted)
                    came += len(wanted)
                    if came == stop - begin:
                        break
        except (OSError, ModelError):
            raise  # our disk, or what the Hub answered
        except Exception as error:
            return came, error
        return came, None

    @contextmanager
    def _response(self, name: str, begin: int, stop: int) -> Iterator[Any]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        span = {"Range": f"bytes={begin}-{stop - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff(
            "GET",
            hf_hub_url(self.repo, name, revision=self.listed.revision),
            max_retries=TRIES,
            base_wait_time=WAIT_SECONDS,
            max_wait_time=LONGEST_WAIT,
            retry_on_exceptions=(),  # the client cannot go on in the middle; `receive` does
            retry_on_status_codes=BUSY,
            headers=build_hf_headers() | span,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            if response.status_code == 416:
                raise ModelError(
                    f"{self.repo}: {name} has no byte {begin:,}; expected the "
                    f"{self.listed.sizes[name]:,} bytes the Hub lists. Try again later."
                )
            hf_raise_for_status(response)
            yield response


class _Coming(threading.Thread):
    """One file on its way. A daemon: the end of the program does not wait for the network."""

    def __init__(self, file: Path, fetch: Callable[[Path], None]) -> None:
        super().__init__(daemon=True)
        self.file, self.fetch = file, fetch
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.fetch(self.file)
        except Exception as error:
            self.error = error


def _part(file: Path) -> Path:
    return file.with_name(file.name + PART)


def _without(count: int, chunks: Iterable[bytes]) -> Iterable[bytes]:
    """`chunks` less their first `count` bytes."""
    for chunk in chunks:
        yield chunk[count:]
        count = max(0, count - len(chunk))
