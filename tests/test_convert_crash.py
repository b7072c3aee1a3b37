"""However a conversion ends, the same command goes on from there to the very same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qwen35_mlx.convert import Progress, job, writer

import converting
from converting import converted, differing, digests
from qwen35_mlx.errors import ConversionError, ModelError

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 100_000  # some forty files
KILLS = 20
# The test's own way to convert, in a process that can be killed. It says when it has imported
# everything; is told how often rows are read before it says so and before it waits for its end, so
# that a slow machine cannot let it run past the moment; and at last says how often they were.
CHILD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from qwen35_mlx.convert import Source, convert, job, open_folder, options
source, out, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
job.SLICE_BYTES = 2 * 192 * 4  # a few rows, so that the work takes a while
print("ready", flush=True)
tell, hold = map(int, sys.stdin.readline().split())
real, calls = Source.rows, 0
def rows(*args):
    global calls
    if calls == tell:
        print("there", flush=True)
    if calls == hold:
        time.sleep(600)
    calls += 1
    return real(*args)
Source.rows = rows
chosen = replace(options(4), shard_size=shard_bytes)
convert(open_folder(source), out, chosen, name="Qwen/a-model")
print(calls)
"""
NEVER = -1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converting.write_source(tmp_path_factory.mktemp("source") / "moe", "moe", shards=3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    return run(source, tmp_path_factory.mktemp("undisturbed") / "out")


def run(source: Path, out: Path, progress: Callable[[Progress], None] | None = None) -> Path:
    return converted(source, out, bits=4, shard_bytes=SHARD_BYTES, progress=progress)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def weights(folder: Path) -> dict[str, Path]:
    """Safetensors files with final names; of a folder that just now gets another name, none."""
    with suppress(FileNotFoundError):
        return {path.name: path for path in folder.glob("*.safetensors")}
    return {}


def assert_nothing_is_half_written(folder: Path, undisturbed: Path) -> None:
    """What carries a final name is as in the undisturbed folder; the rest is our record of work."""
    manifest = json.loads((undisturbed / "manifest.json").read_text())["tensors"]
    for path in folder.iterdir():
        if path.name.endswith(".tmp") or path.name == ".lock":
            continue
        if path.name == "conversion.json":
            assert json.loads(path.read_text())["source"]["name"] == "Qwen/a-model"
        elif path.name.endswith(".sha256.json"):
            expected = manifest[path.name.removesuffix(".sha256.json")]
            # The exact norms of a shard are in it too, under other names.
            found = {n: d for n, d in json.loads(path.read_text()).items() if n in expected}
            assert found == {name: said["sha256"] for name, said in expected.items()}
        else:
            same = path.read_bytes() == (undisturbed / path.name).read_bytes()
            assert same, f"{path.name} is not whole"


def assert_same(found: Path, undisturbed: Path) -> None:
    assert differing(digests(found), digests(undisturbed)) == []
    assert not partial_of(found).exists()


# -- kill -9 ---------------------------------------------------------------------------------------


@contextmanager
def started(source: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A child; whatever happens, it is gone behind this."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(SHARD_BYTES)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def begin(child: subprocess.Popen[str], *, tell: int = NEVER, hold: int = NEVER) -> None:
    """Let a child that has imported everything go to work."""
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.stdin.write(f"{tell} {hold}\n")
    child.stdin.close()


def kill_after(child: subprocess.Popen[str], out: Path, files: int, seconds: float = 0.0) -> None:
    """kill -9 so long after so many files are finished; nothing if the child was faster."""
    deadline = time.monotonic() + 60
    while child.poll() is None and len(weights(partial_of(out))) < files:
        assert time.monotonic() < deadline, f"not {files} files"
        time.sleep(0.001)
    time.sleep(seconds)
    child.kill()
    assert child.wait() in (0, -signal.SIGKILL)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory, source: Path, undisturbed: Path) -> int:
    """How often an undisturbed child reads rows."""
    out = tmp_path_factory.mktemp("measured") / "out"
    with started(source, out) as child:
        begin(child)
        assert child.stdout is not None
        count = int(child.stdout.read())
    assert_same(out, undisturbed)
    return count


def test_kill_9_at_random_moments_leaves_work_that_the_same_command_completes(
    source: Path, undisturbed: Path, tmp_path: Path, calls: int
) -> None:
    """Of twenty equal parts of the work, one moment in each or in the next, or behind the last."""
    moments, finished = random.Random(20), []
    with ExitStack() as stack:
        child = stack.enter_context(started(source, tmp_path / "0"))
        for number in range(KILLS):
            out = tmp_path / str(number)
            begin(child, tell=calls * number // KILLS, hold=calls * (number + 2) // KILLS)
            assert child.stdout is not None and child.stdout.readline() == "there\n"
            kill_after(child, out, number, moments.random() / KILLS)
            # Imports of the next run beside the completion of this one.
            child = stack.enter_context(started(source, tmp_path / str(number + 1)))
            left = out if out.exists() else partial_of(out)
            assert_nothing_is_half_written(left, undisturbed)
            finished.append(len(weights(left)))
            assert_same(run(source, out), undisturbed)
            shutil.rmtree(out)
    # The moments were spread: before, between and after files.
    assert finished[0] < 5 < KILLS // 2 <= finished[KILLS // 2] < len(weights(undisturbed))
    assert all(count >= number for number, count in enumerate(finished))


def test_killed_again_and_again_it_still_arrives(
    source: Path, undisturbed: Path, tmp_path: Path, calls: int
) -> None:
    """Each run is killed some files after it began; the next goes on, not anew."""
    out, counts = tmp_path / "out", [0]
    while not out.exists():
        with started(source, out) as child:
            # A quarter of all rows are those of three files and more, wherever it goes on.
            begin(child, hold=calls // 4)
            kill_after(child, out, counts[-1] + 3)
        if not out.exists():
            assert_nothing_is_half_written(partial_of(out), undisturbed)
            counts.append(len(weights(partial_of(out))))
            assert counts[-1] > counts[-2]
    assert len(counts) >= 3
    assert_same(run(source, out), undisturbed)


# -- the disk --------------------------------------------------------------------------------------


class FullDisk:
    """A disk with room for `room` bytes more: the last write is cut short, the next refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.pwrite = room, os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.pwrite(descriptor, data[: self.room], offset)
        self.room -= count
        return count


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_disk_that_fills_up_is_said_and_the_next_run_completes(
    part: float, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, total = tmp_path / "out", sum(p.stat().st_size for p in weights(undisturbed).values())
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, int(part * total))
        with pytest.raises(ConversionError, match="out.partial: the disk is full") as raised:
            run(source, out)
    assert "the same command" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    left = partial_of(out)
    assert_nothing_is_half_written(left, undisturbed)
    assert {path.name for path in left.glob("*.tmp")} <= {"norms.safetensors.tmp"}
    times = {path.name: path.stat().st_mtime_ns for path in weights(left).values()}
    assert (len(times) > 0) == (part >= 0.3)
    assert_same(run(source, out), undisturbed)
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}


@pytest.mark.parametrize("call", [1, 2, 3, 4, 10, 25, 60])
def test_a_disk_that_fails_only_when_flushed_is_said_too(
    call: int, source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed allocation finds out then; also in the thread that finishes files."""
    calls = iter(range(1, 10_000))
    flush = writer.flush

    def failing(descriptor: int) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "flush", failing)
        with pytest.raises(ConversionError, match="out.partial: the disk is full"):
            run(source, tmp_path / "out")
    assert_nothing_is_half_written(partial_of(tmp_path / "out"), undisturbed)
    assert_same(run(source, tmp_path / "out"), undisturbed)


def test_another_fault_of_the_disk_is_said_with_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(ConversionError, match="out.partial: Input/output error"):
        run(source, tmp_path / "out")


def test_a_source_that_cannot_be_read_is_named_not_the_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, theirs = os.pread, {path.stat().st_ino for path in source.iterdir()}

    def failing(descriptor: int, count: int, offset: int) -> bytes:
        if os.fstat(descriptor).st_ino in theirs:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(ModelError, match=f"{source}/model-.*: Input/output error"):
        run(source, tmp_path / "out")


class Disk:
    """What `shutil.disk_usage` says; and what lay in the folder when it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.seen = free, set[str]()
        monkeypatch.setattr(shutil, "disk_usage", self)

    def __call__(self, path: Path) -> Any:
        self.seen |= {file.name for file in path.iterdir()}
        return SimpleNamespace(free=self.free)


def test_a_disk_too_small_is_refused_beforehand_with_the_number_of_bytes(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, files = tmp_path / "out", weights(undisturbed)
    total = sum(path.stat().st_size for path in files.values())
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, total + job.SPARE - 1)
        with pytest.raises(ConversionError) as raised:
            run(source, out)
        assert f"{total:,} bytes are still to be written" in str(raised.value)
        assert not weights(partial_of(out))
        assert_nothing_is_half_written(partial_of(out), undisturbed)
        with pytest.raises(ConversionError):  # goes on to say so
            run(source, out)
        Disk(patch, total + job.SPARE)
        assert_same(run(source, out), undisturbed)


def test_what_is_done_needs_no_room_and_what_a_killed_run_left_gives_its_own_back(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after(150))
    left, names = partial_of(out), weights(undisturbed)
    done = weights(left)
    todo = sorted(names.keys() - done.keys())
    assert len(done) > 5 < len(todo)
    stale = [name for name in todo if name.startswith("model-")][0]
    (left / f"{stale}.tmp").write_bytes(bytes(50_000))
    missing = sum(names[name].stat().st_size for name in todo)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, missing + job.SPARE)
        assert_same(run(source, out), undisturbed)
    assert f"{stale}.tmp" not in disk.seen and set(done) <= disk.seen


# -- interruptions ---------------------------------------------------------------------------------


def stop_after(calls: int) -> Callable[[Progress], None]:
    """Ctrl-C at that report of progress."""
    left = iter(range(calls))

    def stop(progress: Progress) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("calls", [0, 1, 17, 60, 133, 200, 300, 326])
def test_an_interrupted_run_is_gone_on_with(
    calls: int, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", list[Progress]()
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after(calls))
    assert_nothing_is_half_written(partial_of(out), undisturbed)
    assert {path.name for path in partial_of(out).glob("*.tmp")} <= {"norms.safetensors.tmp"}
    done = len(weights(partial_of(out)))
    assert_same(run(source, out, seen.append), undisturbed)
    first, last = seen[0], seen[-1]
    assert (first.done_bytes > 0) == (first.tensors > 0) == (done > 0)
    assert (last.tensors, last.done_bytes) == (last.total_tensors, last.total_bytes)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)


def forget_norms(left: Path) -> None:
    (left / "norms.safetensors.tmp").unlink()


def break_norms(left: Path) -> None:
    path = left / "norms.safetensors.tmp"
    path.write_bytes(bytes(path.stat().st_size))


def cut_a_file(left: Path) -> None:
    path = min(weights(left).values())
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(left: Path) -> None:
    max(weights(left).values()).unlink()


def flip_a_bit(left: Path) -> None:
    _flip(sorted(weights(left).values())[1])


def flip_a_bit_of_a_norm(left: Path) -> None:
    norms = left / "norms.safetensors.tmp"
    header = int.from_bytes(norms.read_bytes()[:8], "little")
    _flip(norms, slice(8 + header, None))


def _flip(path: Path, where: slice = slice(-9, None)) -> None:
    """One bit in each byte of `where`; a place of unwritten norms may be hit too."""
    data = bytearray(path.read_bytes())
    data[where] = bytes(byte ^ 1 for byte in data[where])
    path.write_bytes(data)


def empty_a_record(left: Path) -> None:
    next(left.glob("model-*.sha256.json")).write_text("{}")


def damage_a_record(left: Path) -> None:
    next(left.glob("model-*.sha256.json")).write_text("{")


def lose_a_record(left: Path) -> None:
    min(left.glob("*.sha256.json")).unlink()


@pytest.mark.parametrize(
    "change",
    [
        forget_norms,
        break_norms,
        cut_a_file,
        lose_a_file,
        lose_a_record,
        flip_a_bit,
        flip_a_bit_of_a_norm,
        empty_a_record,
        damage_a_record,
    ],
)
def test_what_was_lost_between_two_runs_is_made_again(
    change: Callable[[Path], None], source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after(120))
    assert len(weights(partial_of(out))) > 3
    change(partial_of(out))
    assert_same(run(source, out), undisturbed)


@pytest.mark.parametrize(
    "state", ("{", "[]", "{}", '{"options": 5, "source": {}}', '{"options": {}, "source": "x"}')
)
def test_a_damaged_record_of_the_work_is_said_and_nothing_is_overwritten(
    state: str, source: Path, tmp_path: Path
) -> None:
    left = partial_of(tmp_path / "out")
    left.mkdir()
    (left / "conversion.json").write_text(state)
    with pytest.raises(ConversionError, match="conversion.json: does not say .* Remove the folder"):
        run(source, tmp_path / "out")
    assert (left / "conversion.json").read_text() == state


@pytest.mark.parametrize("name", (".lock", "conversion.json.tmp", ".lock and a pipe"))
def test_nothing_is_written_through_links_in_an_unfinished_folder(
    name: str, source: Path, tmp_path: Path
) -> None:
    left, elsewhere = partial_of(tmp_path / "out"), tmp_path / "elsewhere"
    left.mkdir()
    elsewhere.write_text("precious")
    if name.endswith("pipe"):
        os.mkfifo(left / ".lock")
    else:
        (left / name).symlink_to(elsewhere)
    with pytest.raises(ConversionError, match="is no plain file"):
        run(source, tmp_path / "out")
    assert elsewhere.read_text() == "precious"


def test_a_source_cut_short_during_the_run_is_named_and_once_whole_gone_on_with(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    theirs, out = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "out"
    reports = iter(range(1000))
    last = theirs / "model-00003-of-00003.safetensors"
    whole, times = last.read_bytes(), last.stat()

    def cut(progress: Progress) -> None:
        if next(reports) == 150:
            last.write_bytes(whole[: len(whole) // 3])

    with pytest.raises(ModelError, match=f"{last.name}: ends [0-9,]+ bytes early"):
        run(theirs, out, cut)
    assert_nothing_is_half_written(partial_of(out), undisturbed)
    assert weights(partial_of(out))
    last.write_bytes(whole)
    with pytest.raises(ConversionError, match="the source is now .* and not the same"):
        run(theirs, out)
    os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert_same(run(theirs, out), undisturbed)


def test_a_run_that_ended_between_the_name_and_the_tidying_is_tidied_later(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    for name in (".lock", "conversion.json", "model-00001-of-00009.safetensors.sha256.json"):
        (out / name).write_text("{}")
    assert_same(run(source, out), undisturbed)
