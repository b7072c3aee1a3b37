"""Output files: filled piece by piece under a temporary name, renamed when whole and flushed."""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen35_mlx.errors import ModelError
from qwen35_mlx.files import read_json

from .layout import NORMS, Piece, Target
from .plan import OutFile, Plan

TEMPORARY, RECORD = ".tmp", ".sha256.json"
READ_BYTES = 1 << 20  # stays in the processor's cache while it is digested


class Writer:
    """The files of one plan in the unfinished folder.

    A finished file has its name and, beside it, a record of its tensors' digests, each of what was
    read back once the tensor was whole. The exact norms of all shards share one file, which
    therefore is finished last: its rows are flushed before the shard they belong to gets its name,
    and kept under the temporary name between runs.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.files = {file.name: file for file in plan.files}
        self._norms = f"{NORMS}.safetensors"
        self._norms_kept = self._is_begun(self._norms)
        self.finished = {name for name in self.files if self._is_finished(name)}
        for name in self.files.keys() - self.finished:
            if name != self._norms or not self._norms_kept:
                # Of a run that was killed: the disk may not have room for this and its successor.
                (folder / (name + TEMPORARY)).unlink(missing_ok=True)
        self._descriptors: dict[str, int] = {}
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: list[Future[None]] = []
        self._missing: Counter[str] = Counter()  # pieces, by file
        self._left: Counter[str] = Counter()  # pieces, by target
        self._digests: dict[str, Future[str]] = {}  # of parts that are whole, not of exact norms

    @property
    def missing_bytes(self) -> int:
        """Of files that are not finished."""
        return sum(f.nbytes for name, f in self.files.items() if name not in self.finished)

    def expect(self, steps: Iterable[tuple[Target, Piece]]) -> None:
        """Say what will be written; a file is finished with its last piece."""
        for target, _ in steps:
            self._missing.update(self._open_destinations(target))
            self._left[target.name] += 1
        for name in self.files.keys() - self.finished:
            if not self._missing[name]:
                self._seal(name)  # only the exact norms can have all their rows before

    def is_done(self, target: Target) -> bool:
        """Whether an earlier run finished what `target` becomes."""
        main, *norms = self.plan.destinations(target)
        kept = self._norms_kept or self._norms in self.finished
        return main in self.finished and (not norms or kept)

    def put(self, target: Target, row: int, arrays: dict[str, mx.array]) -> None:
        """Write the rows of `target` from `row` on; arrays: their bytes by part, uint8.

        Raises: OSError, of which a full disk is the likely one.
        """
        for part, array in arrays.items():
            name = target.name if part == NORMS else target.part_name(part)
            file = self.plan.file_of[NORMS + name if part == NORMS else name]
            if file.name in self.finished:
                continue
            row_bytes = array.nbytes // array.shape[0]
            place = file.spans[name][0] + row * row_bytes
            _write(self._descriptor(file), np.asarray(array).data.cast("B"), place)

    def piece_done(self, target: Target) -> None:
        """All rows of one piece of `target` were put."""
        self._left[target.name] -= 1
        if not self._left[target.name]:
            self._digest(target)
        for name in self._open_destinations(target):
            self._missing[name] -= 1
            if not self._missing[name]:
                self._seal(name)

    def close(self) -> None:
        """Wait for files that are being finished; begun ones are removed, except the norms.

        Raises: OSError when a file could not be finished.
        """
        try:
            for future in self._sealing:
                future.result()
        finally:
            self._sealer.shutdown()
            for name, descriptor in self._descriptors.items():
                os.close(descriptor)
                if name != self._norms:
                    with suppress(OSError):
                        (self.folder / (name + TEMPORARY)).unlink()
            self._descriptors.clear()

    def _open_destinations(self, target: Target) -> list[str]:
        return [name for name in self.plan.destinations(target) if name not in self.finished]

    def _descriptor(self, file: OutFile) -> int:
        if file.name not in self._descriptors:
            path = self.folder / (file.name + TEMPORARY)
            fresh = 0 if file.name == self._norms and self._norms_kept else os.O_TRUNC
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | fresh, 0o644)
            self._descriptors[file.name] = descriptor
            _write(descriptor, memoryview(file.header), 0)
            os.ftruncate(descriptor, file.nbytes)
        return self._descriptors[file.name]

    def _digest(self, target: Target) -> None:
        """Read a tensor that is whole back while others are converted."""
        for part in map(target.part_name, target.parts):
            file = self.plan.file_of[part]
            if file.name not in self.finished:
                descriptor, span = self._descriptor(file), file.spans[part]
                self._digests[part] = self._sealer.submit(digest, descriptor, *span)

    def _seal(self, name: str) -> None:
        descriptor = self._descriptor(self.files[name])
        norms = self._descriptors.get(self._norms)
        for done in [future for future in self._sealing if future.done()]:
            done.result()  # a disk that failed must not be written to for hours
        self._sealing.append(self._sealer.submit(self._finish, name, descriptor, norms))

    def _finish(self, name: str, descriptor: int, norms: int | None) -> None:
        if norms is not None:
            flush(norms)
        flush(descriptor)
        file = self.files[name]
        if name == self._norms:
            digests = file_digests(descriptor, file)
        else:
            digests = {part.name: self._digests.pop(part.name).result() for part in file.parts}
        if norms is not None and name != self._norms:
            digests |= self._norm_digests(norms, name)
        write_whole(self.folder / (name + RECORD), json.dumps(digests))
        (self.folder / (name + TEMPORARY)).rename(self.folder / name)
        flush_folder(self.folder)

    def _is_finished(self, name: str) -> bool:
        """Whether an earlier run's file is what its record says; if not, it is made anew."""
        file, path, record = self.files[name], self.folder / name, self.folder / (name + RECORD)
        if not path.is_file() or not record.is_file() or path.stat().st_size != file.nbytes:
            return False
        try:
            recorded = read_json(record)
        except ModelError:
            return False
        with path.open("rb") as opened:
            found = file_digests(opened.fileno(), file)
        if name != self._norms and self._norms_kept:
            with (self.folder / (self._norms + TEMPORARY)).open("rb") as opened:
                norms = self._norm_digests(opened.fileno(), name)
            self._norms_kept = all(recorded.get(norm) == value for norm, value in norms.items())
        return found == {part.name: recorded.get(part.name) for part in file.parts}

    def _norm_digests(self, descriptor: int, name: str) -> dict[str, str]:
        """sha256 of the exact norms that belong to the shard `name`."""
        file = self.files[self._norms]
        here = {part.name for part in self.files[name].parts}
        return {
            NORMS + part: digest(descriptor, *span)
            for part, span in file.spans.items()
            if part in here
        }

    def _is_begun(self, name: str) -> bool:
        path = self.folder / (name + TEMPORARY)
        file = self.files.get(name)
        if file is None or not path.is_file() or path.stat().st_size != file.nbytes:
            return False
        with path.open("rb") as begun:
            return begun.read(len(file.header)) == file.header


def file_digests(descriptor: int, file: OutFile) -> dict[str, str]:
    """sha256 of each tensor's bytes, by name."""
    return {part: digest(descriptor, *span) for part, span in file.spans.items()}


def digest(descriptor: int, offset: int, nbytes: int) -> str:
    """sha256 of a span of an open file."""
    state = hashlib.sha256()
    end = offset + nbytes
    while offset < end:
        data = os.pread(descriptor, min(READ_BYTES, end - offset), offset)
        if not data:
            raise OSError("the file ends early")
        state.update(data)
        offset += len(data)
    return state.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is either absent or whole, also after a power cut."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.rename(path)


def flush(descriptor: int) -> None:
    """Onto the disk itself: macOS's fsync leaves it in the drive's own memory."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # file systems on a network do not have it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Names and renames, too, are only then on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
