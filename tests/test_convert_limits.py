"""What the system refuses: memory, files that may not be read, a folder that is gone."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qwen35_mlx.convert import command, folder
from qwen35_mlx.convert.source import Source
from qwen35_mlx.convert.verify import verify

from converting import DEMO, converted, digests
from qwen35_mlx.errors import ModelError

ROOT = Path(__file__).parents[1]
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from qwen35_mlx.convert.command import main
main(sys.argv[2:])
"""


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line on stderr after the stages of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        command.main([str(part) for part in argv])
    *stages, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    assert all(stage.startswith(("planning: ", "converting: ")) for stage in stages)
    return line


def denied(path: Path) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not kept")
def test_a_limit_on_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for limit, code in ((450 << 20, 2), (4 << 30, 0)):
        ended = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), str(DEMO), "--out", str(tmp_path / "x")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
        assert (tmp_path / "x").exists() == (code == 0)
        if code:
            assert ended.stderr.count("\n") == 1 and "of memory are missing" in ended.stderr
            assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_leaves_work_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls, out = Source.rows, 0, tmp_path / "x"

    def failing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise MemoryError
        return rows(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Source, "rows", failing)
        line = refused(capsys, DEMO, "--out", out, "--shard-size", "1MB")
    assert "x.partial: memory ran out; finished files stay. Close other programs" in line
    assert not out.exists() and (tmp_path / "x.partial").is_dir()
    with pytest.raises(SystemExit) as end:
        command.main([str(DEMO), "--out", str(out), "--shard-size", "1MB"])
    assert end.value.code == 0


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", ""])
def test_a_source_that_may_not_be_read_is_named_as_such(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise denied(DEMO / name)

    monkeypatch.setattr(folder, "state_of", failing)
    line = refused(capsys, DEMO, "--out", tmp_path / "x")
    assert f"{name}: Permission denied; expected to read it." in line and "--out" not in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_may_not_be_read_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = converted(DEMO, tmp_path / "x")
    before = digests(out)

    def failing(*_: Any) -> Any:
        raise denied(out / "manifest.json")

    monkeypatch.setattr(folder, "is_made", failing)
    line = refused(capsys, DEMO, "--out", out)
    assert "Permission denied; expected a folder that can be written" in line
    assert digests(out) == before


def test_verify_says_that_a_folder_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> Any:
        raise denied(path)

    monkeypatch.setattr(os, "listdir", failing)
    with pytest.raises(ModelError, match="x: Permission denied; expected a folder that can be"):
        verify(tmp_path / "x")


def test_a_working_folder_that_is_gone_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for argv in ((DEMO, "--out", "x"), (DEMO, "--out", "x", "--plan"), ("--verify", "x")):
        line = refused(capsys, *argv)
        assert "x: the working folder is gone; expected one, or a whole path." in line
    with pytest.raises(SystemExit) as end:
        command.main([str(DEMO), "--out", str(tmp_path / "x")])
    assert end.value.code == 0
