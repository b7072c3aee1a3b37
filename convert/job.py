"""One conversion from beginning to end: plan, make room, read rows, write rows, give the name."""

import errno
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from qwen35_mlx import memory
from qwen35_mlx.errors import ConversionError, OutOfMemory, shown

from . import folder
from .layout import Piece, Target
from .options import Options
from .plan import SLICE_BYTES, Plan, plan
from .source import Source
from .writer import Writer

Steps = list[tuple[Target, Piece]]
AHEAD = 2  # parts under way beside the one that is written; MLX has one thread for each stream
CACHE_BYTES = 256 << 20  # of freed arrays that MLX keeps
SPARE = 256_000_000  # of the disk: small files, and whatever else writes to it


@dataclass(frozen=True)
class Progress:
    """How far a conversion is. done_bytes, total_bytes: of the source's tensors."""

    tensors: int
    total_tensors: int
    done_bytes: int
    total_bytes: int


class Supply(Protocol):
    """Where the source's files come from, one after the other."""

    @property
    def spare_bytes(self) -> int:
        """Of the disk, that it may take on the way beside what is written."""

    def expect(self, files: Sequence[Path]) -> None:
        """These will be read, each once and in this order; no others. Called first."""

    def ready(self, file: Path) -> None:
        """`file` will be read now, and stays until it is dropped."""

    def drop(self, file: Path) -> None:
        """`file` is not needed any more."""

    def close(self) -> None:
        """All is done, or failed: stop what is under way."""


class Local:
    """A folder that is there already."""

    spare_bytes = 0

    def expect(self, files: Sequence[Path]) -> None: ...

    def ready(self, file: Path) -> None: ...

    def drop(self, file: Path) -> None: ...

    def close(self) -> None: ...


def convert(
    source: Source,
    out: Path,
    options: Options,
    *,
    name: str,
    revision: str | None = None,
    supply: Supply | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Make `out` from `source`, or go on where an earlier run of the same conversion ended.

    name, revision: of the source, as the folder will declare them. supply: brings the source's
    files where they are not all there.
    Returns: `out`, complete. Raises: ConversionError, ModelError, OutOfMemory.
    """
    folder.require_apart(source.folder, out)
    state = folder.state_of(source, name, revision, options)
    if folder.is_made(out, name, options):
        folder.require_same_source(out, state)
        folder.tidy(out)
        return out
    planned = plan(source, options)
    folder.require_small_files(source.folder)
    memory.require(planned.peak_memory, f"converting {shown(name)}", "Close other programs.")
    explained = _explained(folder.partial_of(out))
    with explained, folder.begun(out, state) as partial, closing(source):
        if folder.is_made(out, name, options):  # by another run, since this one looked
            folder.require_same_source(out, state)
            folder.discard(partial)
            return out
        folder.copy_small_files(source.folder, partial)
        with closing(supply or Local()) as bringing:
            _fill(source, planned, partial, bringing, progress)
        folder.finish(partial, out, planned, source, state)
    return out


def _fill(
    source: Source,
    planned: Plan,
    partial: Path,
    supply: Supply,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Write every file of the plan that is not finished."""
    with closing(Writer(partial, planned)) as writer, _small_cache():
        todo = {
            file: [step for step in steps if not writer.is_done(step[0])]
            for file, steps in planned.steps.items()
        }
        last_use = {path: place for place, path in _uses(todo)}
        supply.expect(list(last_use))  # by first use: a key keeps its place
        _require_disk(partial, writer.missing_bytes + supply.spare_bytes)
        writer.expect(step for steps in todo.values() for step in steps)
        meter = _Meter(planned, todo, progress)
        held: list[Path] = []
        streams = cycle([mx.new_stream(mx.default_device()) for _ in range(AHEAD)])
        for place, steps in enumerate(todo.values()):
            for path in [p for p in needed_files(steps) if p not in held]:
                supply.ready(path)
                held.append(path)
            for part in _ahead(source, steps, streams):
                target, piece = part.target, part.piece
                writer.put(target, piece.at + part.first, part.arrays)
                meter.moved(target, part.count)
                if part.first + part.count == piece.count:
                    writer.piece_done(target)
                    meter.piece_done(target)
            for path in [path for path in held if last_use[path] == place]:
                source.close(path)
                supply.drop(path)
                held.remove(path)


def _uses(todo: Mapping[Path, Steps]) -> Iterator[tuple[int, Path]]:
    """(place in the order of work, file that is read there), in that order."""
    for place, steps in enumerate(todo.values()):
        for path in needed_files(steps):
            yield place, path


def needed_files(steps: Steps) -> list[Path]:
    """The source files that these steps read, each once."""
    return sorted({e.file for _, piece in steps for e in piece.view.entries})


@dataclass(frozen=True)
class _Part:
    """Rows of a piece; arrays: their bytes, `[count, bytes of a row]`."""

    target: Target
    piece: Piece
    first: int
    count: int
    arrays: dict[str, mx.array]


def _ahead(source: Source, steps: Steps, streams: Iterator[mx.Stream]) -> Iterator[_Part]:
    """Every part; the next ones are read and computed while its taker writes it."""
    begun: deque[_Part] = deque()
    for target, piece in steps:
        for first, count in _slices(piece):
            with mx.stream(next(streams)):
                arrays = target.convert(source.rows(piece.view, piece.first + first, count))
                # NumPy has no bf16. A view taken later would wait for what is queued by then.
                stored = {part: array.view(mx.uint8) for part, array in arrays.items()}
                mx.async_eval(stored)
            begun.append(_Part(target, piece, first, count, stored))
            if len(begun) > AHEAD:
                yield begun.popleft()
    yield from begun


def _slices(piece: Piece) -> Iterator[tuple[int, int]]:
    """(first row within the piece, rows) of parts that are small in memory."""
    most = max(1, SLICE_BYTES // (2 * piece.view.columns))
    for first in range(0, piece.count, most):
        yield first, min(most, piece.count - first)


class _Meter:
    """Counts what was written and reports it; what an earlier run finished counts as done."""

    def __init__(
        self,
        planned: Plan,
        todo: Mapping[Path, Steps],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.progress = progress
        self.left: dict[str, int] = {}
        for steps in todo.values():
            for target, _ in steps:
                self.left[target.name] = self.left.get(target.name, 0) + 1
        self.total_tensors = len(planned.targets)
        self.total = 2 * planned.nparameters
        self.done = 2 * sum(t.nparameters for t in planned.targets if t.name not in self.left)
        self._report()

    def moved(self, target: Target, rows: int) -> None:
        self.done += 2 * rows * target.columns
        self._report()

    def piece_done(self, target: Target) -> None:
        self.left[target.name] -= 1
        if not self.left[target.name]:
            del self.left[target.name]
            self._report()

    def _report(self) -> None:
        if self.progress:
            tensors = self.total_tensors - len(self.left)
            self.progress(Progress(tensors, self.total_tensors, self.done, self.total))


@contextmanager
def _small_cache() -> Iterator[None]:
    """MLX keeps freed arrays for reuse; here they would only add to the peak."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def _require_disk(partial: Path, missing: int) -> None:
    free = shutil.disk_usage(partial).free
    if missing + SPARE > free:
        raise ConversionError(
            f"{shown(partial)}: {missing:,} bytes are still to be written, and {SPARE:,} to "
            f"spare; {free:,} are free. Free some, or choose another --out."
        )


@contextmanager
def _explained(partial: Path) -> Iterator[None]:
    """What the disk or the memory refuses, as one line; finished files stay."""
    try:
        yield
    except MemoryError:
        raise OutOfMemory(
            f"{shown(partial)}: memory ran out; finished files stay. Close other programs and run "
            "the same command: it goes on from there."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ConversionError(
                f"{shown(partial)}: the disk is full; finished files stay. Free some space and "
                "run the same command: it goes on from there."
            ) from None
        raise ConversionError(
            f"{shown(partial)}: {error.strerror or error}; expected to write there. Mend that and "
            "run the same command: it goes on from what is finished, if anything is."
        ) from None
