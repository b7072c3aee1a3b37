"""The command: a model's name in, a verified folder out, or what it would take."""

import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from qwen35_mlx.convert import command, overview, published

import tiny_shapes
from converting import DEMO, digests, read_file, write_file
from hub_server import SHA, FakeHub, serving
from qwen35_mlx import convert, family

ROOT = Path(__file__).parents[1]
REPO, SMALLEST = "someone/demo", "Qwen/Qwen3.5-0.8B"
NEXT_SHA = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class Run:
    """Runs the command in this process."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *argv: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            command.main([str(part) for part in argv], "qwen35-mlx convert")
        out, err = self.capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    def fine(self, *argv: str | Path) -> tuple[str, list[str]]:
        """stdout and the lines of stderr of a run that must succeed."""
        code, out, err = self(*argv)
        assert code == 0, err
        return out, err.splitlines()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the person who runs the tests is read or written."""
    monkeypatch.setenv("QWEN35_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.delenv("QWEN35_TRACEBACK", raising=False)
    return tmp_path / "home"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that has the demonstration model under two names."""
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    repos = {REPO: files, SMALLEST: files, "Qwen/Qwen3.5-4B": files}
    with serving(monkeypatch, tmp_path / "hf" / "hub", repos) as state:
        yield state


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    source = convert.open_folder(DEMO)
    return convert.convert(source, out, convert.options(), name="demo-model")


def below(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# -- making a folder ---------------------------------------------------------------------------


def test_each_stage_is_one_line_with_figures_when_stderr_is_no_terminal(
    run: Run, tmp_path: Path
) -> None:
    out, lines = run.fine(DEMO, "--out", tmp_path / "new" / "x")
    assert out == ""
    patterns = (
        r"planning: demo-model, 7\.7 MB to read, 3\.8 MB to write",
        r"converting: 0 of 103 tensors done, 0 bytes of 7\.7 MB",
        r"finishing: 3 files, 3\.8 MB",
        r"verifying: 3\.8 MB",
        rf"done: .*{re.escape('new/x')}, 3\.8 MB, 7\.93 bits per weight, \d+\.\d s",
    )
    assert len(lines) == len(patterns)
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(pattern, line), line
    assert (tmp_path / "new" / "x" / "manifest.json").is_file()
    assert not (tmp_path / "new" / "x.partial").exists()


def test_the_options_are_those_of_the_folder(run: Run, tmp_path: Path) -> None:
    form = ("--mode", "mxfp4", "--recipe", "uniform", "--vision-bits", "8", "--shard-size", "2MB")
    run.fine(DEMO, "--out", tmp_path / "x", *form)
    declared = convert.open_folder(tmp_path / "x").values["qwen35_mlx"]
    assert declared["options"] == {
        "bits": 4,
        "mode": "mxfp4",
        "group_size": 32,
        "recipe": "uniform",
        "vision_bits": 8,
        "shard_size": 2_000_000,
    }
    assert len(declared["source"].pop("digest")) == 64
    assert declared["source"] == {"name": "demo-model", "revision": None}


def test_without_out_the_folder_is_among_the_models_and_named_by_its_format(
    run: Run, home: Path
) -> None:
    run.fine(DEMO)
    run.fine(f"{DEMO}/", "--mode", "nvfp4")
    run.fine(DEMO, "--bits", "16")
    names = sorted(path.name for path in (home / "models").iterdir())
    assert names == ["demo-model-4bit", "demo-model-bf16", "demo-model-nvfp4"]


def test_a_finished_folder_is_verified_and_left_as_it_is(
    run: Run, made: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    _, lines = run.fine(DEMO, "-o", out)
    assert lines[0] == "verifying: 3.8 MB" and len(lines) == 2
    assert lines[1].startswith("complete already, and verified: ")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_weights_that_changed_since_are_not_taken_for_converted(run: Run, tmp_path: Path) -> None:
    source = Path(shutil.copytree(DEMO, tmp_path / "model"))
    run.fine(source, "-o", tmp_path / "x")
    os.utime(source / "model.safetensors")
    before = digests(tmp_path / "x")
    code, _, err = run(source, "-o", tmp_path / "x")
    assert (code, err.count("\n")) == (2, 1) and "x: was made from another model" in err
    assert digests(tmp_path / "x") == before


def test_report_compares_the_folder_with_its_source(run: Run, made: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What shapes are in this picture?", "utf-8")
    out, lines = run.fine(DEMO, "-o", made, "--report", "--text", text)
    assert lines[-1].startswith("comparing with the source: ")
    assert re.search(r"^output head +6 bits", out, re.M)
    assert re.search(r"^KL divergence +[0-9.]+ nats", out, re.M)


@pytest.mark.parametrize(
    ("prefixes", "missing"),
    [
        (("model.visual.",), "no vision tower"),
        (("mtp.",), "no MTP head"),
        (("model.visual.", "mtp."), "no vision tower and no MTP head"),
    ],
)
def test_a_source_without_parts_that_it_declares_is_converted_with_a_note(
    run: Run, tmp_path: Path, prefixes: tuple[str, ...], missing: str
) -> None:
    source = Path(shutil.copytree(DEMO, tmp_path / "model"))
    stored = read_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(prefixes)}
    write_file(source / "model.safetensors", kept)
    out, lines = run.fine(source, "-o", tmp_path / "x", "--plan")
    assert f"MB (local folder; {missing}, which config.json declares)\n" in out and not lines
    _, lines = run.fine(source, "-o", tmp_path / "x")
    said = f"note: model: {missing}, which config.json declares; the new folder will have none"
    assert [line for line in lines if line.startswith(said)] == lines[:1]
    assert convert.open_folder(tmp_path / "x").lacking == convert.open_folder(source).lacking


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "MODEL: none given; expected a Hub id, a size such as 4b, or a folder."),
        (["4b", "--all"], "MODEL with --all; expected one of them."),
        (["4b", "--verify", "x"], "MODEL with --verify; expected one of them."),
        (["--all", "--verify", "x"], "--all with --verify; expected one of them."),
        (["--verify", "x", "--plan"], "--plan with --verify; expected one of them."),
        (["--verify", "x", "-b", "4"], "--bits with --verify; expected one of them."),
        (["--verify", "x", "-o", "y"], "--out with --verify; expected one of them."),
        (["--verify", "x", "--stream"], "--stream with --verify; expected one of them."),
        (["--verify", "x", "--mode=affine"], "--mode with --verify; expected one of them."),
        (["--verify", "x", "--text", "y"], "--text with --verify; expected one of them."),
        (["--all", "--revision", SHA], "--revision with --all; expected one of them."),
        (["4b", "--report", "--stream"], "--report with --stream, which keeps no source;"),
        (["4b", "--report", "--plan"], "--report with --plan; expected one of them."),
        (["4b", "--text", "README.md"], "--text: given without --report; expected both."),
        (["4b", "--report", "--text", "none.txt"], "--text none.txt: no such file."),
        (["4b", "--report", "--text", "/dev/null"], "--text /dev/null: no such file."),
        (["4b", "--report", "--text", str(DEMO / "model.safetensors")], "--text /"),
        (["5b"], "5b: no such folder; expected a model folder, a Hub id"),
        (["x" * 5000], "xxx"),
        ([""], "a name is empty; expected a model or folder."),
        (["someone/.."], "someone/..: no such folder; expected"),
        (["4b", "--bits", "7"], "--bits: 7; expected one of 3, 4, 5, 6, 8, 16."),
        (["4b", "--bits", "many"], "Invalid value for '-b' / '--bits'"),
        (["4b", "--bits", "8", "--mode", "mxfp4"], "--bits: 8 with --mode mxfp4, which fixes 4."),
        (["4b", "--bits", "16", "--group-size", "32"], "--group-size: given with --bits 16"),
        (["4b", "--mode", "gguf"], "--mode: gguf; expected one of affine"),
        (["4b", "--shard-size", "big"], "--shard-size: 'big'; expected at least 1MB"),
        (["4b", "--revision", "../main"], "--revision: ../main; expected a commit"),
        (["4b", "--revision", "-x"], "--revision: -x; expected a commit"),
        (["4b", "--revision", "\u00fc"], "--revision: \u00fc; expected a commit"),
        ([str(DEMO), "--revision", SHA], "--revision: given with "),
        ([str(DEMO), "--out", str(DEMO)], f"{overview.shown(DEMO)}: is the source, or lies inside"),
        ([str(DEMO), "--out", "file"], "file: exists and was not made by this program"),
        ([str(DEMO), "--out", "file/x"], "file/x: nothing can be made in /"),
        ([str(DEMO), "--out", "other"], "other: exists and was not made by this program"),
        ([str(DEMO), "--out", "y" * 300], "yyy"),
        ([str(DEMO), "--plan", "--out", "y" * 300], "yyy"),
        (["--verify", "other"], "other: was not made by this program's converter;"),
        (["other"], "other: no config.json; expected a Qwen3.5 model folder."),
        ([str(DEMO), "stray"], "Got unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("mine")
    before = below(tmp_path)
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {message}") or (len(message) < 5 and message in err), err
    assert below(tmp_path) == before


def test_a_folder_made_or_begun_otherwise_is_refused_and_stays(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(made)
    code, _, err = run(DEMO, "-o", made, "--bits", "8")
    assert code == 2 and "was made from demo-model with --bits 4" in err
    assert digests(made) == before

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert.Source, "rows", stop)
        assert run(DEMO, "-o", tmp_path / "x")[0] == 130
    before = digests(tmp_path / "x.partial")
    code, _, err = run(DEMO, "-o", tmp_path / "x", "--bits", "8")
    assert (code, err.count("\n")) == (2, 1)
    assert "x.partial: was begun from demo-model with --bits 4" in err
    assert digests(tmp_path / "x.partial") == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**6))
    code, out, err = run(DEMO, "-o", tmp_path / "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "258.8 MB of disk are missing at" in err
    planned = convert.plan(convert.open_folder(DEMO), convert.options())
    figures = f"{planned.output_bytes:,} bytes of disk and {planned.peak_memory:,} of memory"
    assert f"; {figures} are needed. " in err
    assert below(tmp_path) == []
    out, _ = run.fine(DEMO, "-o", tmp_path / "x", "--plan")
    assert re.search(r"^  this machine +258\.8 MB of disk are missing at ", out, re.M)


# -- verify ------------------------------------------------------------------------------------


def test_verify_names_every_damaged_tensor_and_exits_1(
    run: Run, made: Path, tmp_path: Path
) -> None:
    out, lines = run.fine("--verify", made)
    assert (out, lines[0]) == ("", "verifying: 3.8 MB")
    assert re.fullmatch(r"verified: .*/out, 3\.8 MB, \d+\.\d s", lines[1]) and len(lines) == 2
    broken = Path(shutil.copytree(made, tmp_path / "broken"))
    entry = convert.open_folder(broken).entries["language_model.model.embed_tokens.scales"]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\x12")
    code, out, err = run("--verify", broken)
    assert code == 1
    assert out.count("\n") == 1 and "language_model.model.embed_tokens.scales" in out
    assert "1 problem found" in err
    code, again, _ = run(DEMO, "-o", broken)  # a complete folder is not taken on trust
    assert (code, again) == (1, out)


# -- plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", family.SIZES, ids=lambda size: size.name)
def test_published_tensors_are_those_of_the_family(size: family.Size) -> None:
    source = published.source(size)
    shapes = {name: entry.shape for name, entry in source.entries.items()}
    assert shapes == tiny_shapes.shapes(source.values)
    planned = convert.plan(source, convert.options(recipe="uniform"))
    assert planned.main_bytes == size.mlx_4bit_bytes
    kept = {name for name, entry in source.entries.items() if entry.dtype == "F32"}
    layers = size.num_hidden_layers - size.full_attention_layers
    assert len(kept) == 2 * layers and all("linear_attn." in name for name in kept)


def test_a_size_is_planned_without_network_or_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    out, lines = run.fine("9b", "--plan", "--vision-bits", "8", "--out", tmp_path / "x")
    assert lines == [] and below(tmp_path) == []
    for pattern in (
        r"Qwen/Qwen3.5-9B -> .*/x",
        r"  source +19\.3 GB \(published shapes\)",
        r"  output +6\.3 GB in 4 files",
        r"  bits per weight 5\.22",
        r"  peak memory +[0-9.]+ MB; [0-9.,]+ GB free",
        r"  peak disk +25\.6 GB \(download 19\.3 GB \+ output 6\.3 GB\); .* free at .*",
        r"  visual\.blocks\.\*\.mlp\.linear_fc2 \(27 matrices, 4,304 columns\)",
        r"  feed-forward +4 bits, group 64 +51\.6 %  most bytes of a dense model.*",
    ):
        assert re.search(f"^{pattern}$", out, re.M), f"{pattern}\n{out}"
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100


def test_the_plan_of_a_folder_is_what_conversion_then_writes(
    run: Run, made: Path, tmp_path: Path
) -> None:
    out, _ = run.fine(DEMO, "--plan")
    written = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    assert written == convert.plan(convert.open_folder(DEMO), convert.options()).output_bytes
    assert f"output          {written / 1e6:.1f} MB in 3 files" in out
    assert "peak disk       output 3.8 MB; " in out  # the source is here already
    shares = [float(share) for share in re.findall(r" ([0-9.]+) %  ", out)]
    assert len(shares) == 10 and sum(shares) == pytest.approx(100, abs=0.5)


def test_what_is_left_out_is_said_with_its_reason(made: Path) -> None:
    ours = convert.open_folder(made)
    values = {key: value for key, value in ours.values.items() if key != "qwen35_mlx"}
    foreign = convert.Source(made, values, ours.entries)
    text = overview.details([convert.plan(foreign, convert.options())])
    names = [name for name in ours.entries if name.startswith("mtp.")]
    classes = {re.sub(r"\.[0-9]+(?=\.)", ".*", name) for name in names}
    lines = text.partition("Left out:\n")[2].splitlines()
    assert {line.split()[0] for line in lines} == classes and len(lines) == len(classes)
    why = "nothing in this layout declares how its norms are stored"
    assert f"  mtp.norm.weight (1 tensor): {why}" in lines


def test_all_sizes_are_one_table_the_smallest_first(run: Run, tmp_path: Path) -> None:
    out, _ = run.fine("--all", "--plan", "--stream", "--out", tmp_path)
    rows = re.findall(r"^  (Qwen/\S+) +([0-9.]+ [GM]B) +([0-9.]+ [GM]B) ", out, re.M)
    assert [row[0] for row in rows] == [size.hf_id for size in family.SIZES]
    assert rows[0][1:] == ("1.7 GB", "724.7 MB") and rows[7][1:] == ("806.8 GB", "228.7 GB")
    # Streaming needs the output and two source files, of which experts fill one each.
    assert re.search(r"397B-A17B .* 245\.9 GB ", out)
    assert re.search(r"^  experts +4 bits, group 64 +91\.8-97\.4 %  ", out, re.M)
    assert below(tmp_path) == []


# -- from the Hub ------------------------------------------------------------------------------


def test_a_hub_id_is_planned_from_headers_alone(run: Run, fake: FakeHub, tmp_path: Path) -> None:
    out, _ = run.fine(REPO, "--plan", "--out", tmp_path / "x")
    assert "source          7.7 MB (headers from the Hub)" in out
    assert "(download 7.7 MB + output 3.8 MB)" in out
    assert 0 < fake.nbytes["model.safetensors"] < 100_000
    assert not (tmp_path / "x.partial").exists()
    out, _ = run.fine(REPO, "--plan", "--stream", "--out", tmp_path / "x")
    assert "(two source files 7.7 MB + output 3.8 MB)" in out


def test_a_download_and_a_stream_make_the_same_folder(
    run: Run, fake: FakeHub, tmp_path: Path
) -> None:
    _, lines = run.fine(REPO, "--stream", "--revision", SHA, "--out", tmp_path / "streamed")
    assert lines[0].startswith(f"planning: {REPO}, ")
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    _, lines = run.fine(REPO, "--out", tmp_path / "fetched")
    assert re.fullmatch(
        rf"downloading: {REPO}, [0-9.]+ MB to download, [0-9.,]+ GB free in .*", lines[0]
    )
    assert digests(tmp_path / "streamed") == digests(tmp_path / "fetched")
    declared = convert.open_folder(tmp_path / "fetched").values["qwen35_mlx"]["source"]
    assert declared == {"name": REPO, "revision": SHA}
    # What is in the cache is neither asked for nor fetched again.
    fake.asked.clear()
    run.fine(REPO, "--revision", SHA, "--bits", "8", "--out", tmp_path / "eight")
    out, _ = run.fine(REPO, "--plan")
    assert "(Hugging Face cache)" in out and fake.asked == []


def test_a_text_too_short_for_a_report_costs_no_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a")
    out, lines = run.fine(DEMO, "-o", tmp_path / "x", "--report", "--text", tmp_path / "text")
    assert lines[-2].startswith("done: ")
    assert "No KL divergence: the text has under two tokens of the model;" in " ".join(out.split())


def test_another_commit_needs_streaming(run: Run, fake: FakeHub, tmp_path: Path) -> None:
    code, _, err = run(REPO, "--revision", SHA, "--out", tmp_path / "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not in the Hugging Face cache; only --stream fetches" in err
    assert below(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_fetched(
    run: Run, fake: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for way in ([], ["--stream"]):
        code, _, err = run(REPO, "--out", tmp_path / "file" / "x" / "y", *way)
        assert (code, err.count("\n")) == (2, 1) and "y: nothing can be made in /" in err
    assert fake.asked == [] and below(tmp_path) == ["file"]


def test_a_finished_folder_of_another_commit_is_refused(
    run: Run, fake: FakeHub, tmp_path: Path
) -> None:
    """Streaming leaves nothing in the cache that the folder could be compared with."""
    stream = (REPO, "--stream", "--out", tmp_path / "x")
    run.fine(*stream)
    fake.asked.clear()
    _, lines = run.fine(*stream, "--revision", SHA)
    assert lines[-1].startswith("complete already, and verified: ") and fake.asked == []
    run.fine(*stream, "--revision", "main")
    fake.move(REPO, NEXT_SHA, fake.repos[REPO])
    for given in (NEXT_SHA, "main"):
        code, _, err = run(*stream, "--revision", given)
        assert (code, err.count("\n")) == (2, 1)
        assert f"x: was made from another {REPO} at {SHA} than this one" in err


def test_all_goes_on_after_a_failure_and_skips_what_is_done(
    run: Run, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SIZES", family.SIZES[:3])
    code, out, err = run("--all", "--out", tmp_path / "all")
    assert (code, out) == (2, "")
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["Qwen3.5-0.8B-4bit", "Qwen3.5-4B-4bit"]
    lines = err.splitlines()
    assert lines[-1].startswith("failed: 2B: Qwen/Qwen3.5-2B: not found on ")
    assert [line for line in lines if line.startswith("failed")] == lines[-1:]
    order = [line.partition(":")[0] for line in lines if line.startswith(("done", "error"))]
    assert order == ["done", "error", "done"]
    fake.repos["Qwen/Qwen3.5-2B"] = fake.repos[REPO]
    fake.asked.clear()
    _, lines = run.fine("--all", "--out", tmp_path / "all")
    skipped = [line for line in lines if line.startswith("complete already, and verified: ")]
    assert len(skipped) == 2 and "0.8B" in skipped[0] and "-4B-" in skipped[1]
    assert fake.asked and all("Qwen3.5-2B" in path for path in fake.asked)
    # A folder that fails its verification gives the code that it gives alone.
    damaged = tmp_path / "all" / "Qwen3.5-0.8B-4bit" / "tokenizer.json"
    damaged.write_text(damaged.read_text() + " ")
    (tmp_path / "all" / "Qwen3.5-2B-4bit" / "config.json").unlink()
    code, out, err = run("--all", "--out", tmp_path / "all")
    assert code == 1 and out == "tokenizer.json: is not as it was written; its sha256 differs\n"
    failed = [line for line in err.splitlines() if line.startswith("failed")]
    assert failed[0] == "failed: 0.8B: verification found problems; see above"
    assert len(failed) == 2 and failed[1].startswith("failed: 2B: ")


# -- terminals and signals: real processes -----------------------------------------------------

CHILD = """
import signal, sys, time
from qwen35_mlx.convert import Source, command
signal.signal(signal.SIGINT, signal.default_int_handler)
real, calls = Source.rows, 0
def rows(*args):
    global calls
    calls += 1
    {before}
    return real(*args)
Source.rows = rows
command.main(sys.argv[1:])
"""
# Every tensor takes a while, as if there were gigabytes of them.
SLOW = CHILD.format(before="time.sleep(0.01)")
# The last rows are not read before Ctrl-C comes; the files before them are finished by then.
HELD = CHILD.format(before="calls < 100 or time.sleep(600)")


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "QWEN35_TRACEBACK")}
    return kept | {"PYTHONPATH": paths, "TERM": "xterm-256color", "COLUMNS": "120"}


def test_ctrl_c_keeps_finished_files_and_the_same_command_goes_on(run: Run, tmp_path: Path) -> None:
    argv = [str(DEMO), "--shard-size", "1MB", "--out", str(tmp_path / "x")]
    partial = tmp_path / "x.partial"
    with subprocess.Popen(
        [sys.executable, "-c", HELD, *argv],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if list(partial.glob("model-*.safetensors")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert (process.returncode, out) == (130, ""), err
    assert re.fullmatch(
        r"interrupted while converting, after \d+\.\d s; finished files stay in .*x\.partial, "
        r"and the same command goes on from there",
        last,
    ), err
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("model-*.safetensors")}
    assert kept
    _, lines = run.fine(*argv)
    started = re.match(r"converting: (\d+) of 103 tensors done", lines[1])
    assert started is not None and int(started[1]) > 0
    there = {name: (tmp_path / "x" / name).stat().st_mtime_ns for name in kept}
    assert there == kept


def test_a_terminal_gets_one_bar_with_tensors_bytes_and_speed(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(DEMO), "--out", str(tmp_path / "x")],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    while True:
        ready, _, _ = select.select([master], [], [], 60)
        assert ready, "the command hangs"
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(
        r"converting \d+ of 103 tensors .*\d\.\d/7\.7 MB +[0-9.]+ [kM]B/s +\d+% \d:\d\d:\d\d", text
    ), text
    kept = text.replace("\r\n", "\n").rstrip("\n").rpartition("\n")[2]
    assert re.search(r"done: .*x, 3\.8 MB, 7\.93 bits per weight, \d+\.\d s$", kept), kept
    assert "planning:" not in text and "verifying:" not in text


# Python imports a module of this name before anything else.
INTERRUPTED_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, *_):
        if name == os.environ["INTERRUPTED"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("argv", [("qwen35_mlx", "convert", "-h"), ("qwen35_mlx.convert", "-h")])
@pytest.mark.parametrize("module", ["mlx", "click"])
def test_ctrl_c_during_the_imports_is_no_traceback(
    argv: tuple[str, ...], module: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    paths = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        env=environment() | {"PYTHONPATH": paths, "INTERRUPTED": module},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_help_fits_one_screen_and_brings_nothing_heavy() -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('qwen35_mlx.convert', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "banned = ('torch', 'transformers', 'mlx_lm', 'rich', 'huggingface_hub', 'av')\n"
        "print('BANNED', *[m for m in banned if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    *lines, banned = done.stdout.splitlines()
    assert banned == "BANNED", done.stdout[-300:] + done.stderr[-2000:]
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "  python -m qwen35_mlx.convert 9b --plan" in lines
    listed = subprocess.run(
        [sys.executable, "-m", "qwen35_mlx", "convert", "-h"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert listed.stdout.startswith("Usage: qwen35-mlx convert [OPTIONS] [MODEL]")
