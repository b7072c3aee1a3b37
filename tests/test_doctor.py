"""The doctor's command, with the emulator as its GPU and kernels that are broken on purpose."""

import json
import math
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

import broken_kernels
import qwen35_mlx
from broken_kernels import CALLS, KERNEL, SECONDS, SLOW, TEXTS, broken
from converting import DEMO, converted, write_source
from metal_cpu import CompileError, emulated
from qwen35_mlx import apart, chips, choice, doctor, family, hub, proof, shapes, subject
from qwen35_mlx.kernels import library
from qwen35_mlx.proof import Verdict
from test_kernels_together import DENSE, KERNELS, SAME, answer
from test_logits import relative

MAC = {"device_name": "Apple M4 Max", "memory_size": 64 << 30}
FEW = ("embed", KERNEL, "top_k")  # the one that is broken, and others before and behind it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("doctor")
    return converted(write_source(place / "source"), place / "made", bits=4, group_size=32)


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU as far as the choice of kernels is concerned, and an empty home."""
    monkeypatch.setattr(choice, "gpu", lambda: MAC)
    monkeypatch.setattr(choice.platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.setenv("QWEN35_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(choice.REFERENCE, raising=False)


def examine_with(monkeypatch: pytest.MonkeyPatch, how: str, *only: str) -> None:
    worker = [sys.executable, "-P", "-m", "broken_kernels", how, *only]
    seconds = SECONDS if how == "hanging" else 60.0
    monkeypatch.setattr(apart, "verdicts", partial(apart.verdicts, worker=worker, seconds=seconds))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        doctor.command, [str(a) for a in arguments], standalone_mode=False, catch_exceptions=False
    )


def rows(output: str) -> dict[str, list[str]]:
    """The lines of the table by kernel."""
    found: dict[str, list[str]] = {}
    for line in output.split("\n\n")[1].splitlines()[1:]:
        found.setdefault(line.split()[0], []).append(line)
    return found


def test_without_metal_it_says_so_and_is_content(folder: Path) -> None:
    if mx.metal.is_available():
        pytest.skip("there is Metal here")
    result = run(folder)
    assert result.return_value == 0 and result.output == f"{doctor.NO_GPU}\n"
    assert json.loads(run(folder, "--json").output) == {"metal": False}


@pytest.mark.usefixtures("a_mac")
def test_sound_kernels_are_all_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_with(monkeypatch, "sound")
    output = run(folder).output
    kernels = DENSE - {"top_k_blocks"}
    table = rows(output)
    assert table.keys() == kernels
    assert all(line.endswith("yes") for lines in table.values() for line in lines)
    assert f"{len(kernels)} of {len(kernels)} kernels are used" in output
    assert "Apple M4 Max, 546 GB/s, macOS 26.1, MLX " in output
    model = qwen35_mlx.load(folder, dtype=mx.float32)
    # Loaded in another type than the folder's, it has other kernels: nothing is known of them.
    formats = {"model.language_model.embed_tokens": None}
    assert choice.remembered(shapes.shapes_of(model.config, formats, mx.float32)) is None


REASONS = {
    "wrong": "differs",
    "nan": "differs",
    SLOW: "slower",
    "uncompilable": "does not run: ",
    "hanging": f"gave no answer within {SECONDS:g} s",
    "ending the process": "ended the process (exit code 11",
}


def test_every_fault_has_its_reason() -> None:
    assert REASONS.keys() == {*TEXTS, *CALLS, SLOW}


@pytest.mark.usefixtures("a_mac")
@pytest.mark.parametrize("how", REASONS)
def test_a_broken_kernel_is_not_used_and_the_table_says_why(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine_with(monkeypatch, how, *FEW)
    result = run(folder)
    assert result.return_value == 0
    table = rows(result.output)
    assert set(table) == set(FEW)
    for kernel, lines in table.items():
        assert all(line.endswith(" no" if kernel == KERNEL else " yes") for line in lines)
    assert f"{KERNEL}: not used: {REASONS[how]}" in result.output
    assert max(map(len, result.output.splitlines())) < 80 or how == "uncompilable"
    assert f"{len(FEW) - 1} of {len(FEW)} kernels are used" in result.output
    (kept,) = (Path(choice.files.home()) / "kernels").iterdir()
    remembered = [Verdict(**verdict) for verdict in json.loads(kept.read_text())["verdicts"]]
    assert proof.chosen(remembered) == set(FEW) - {KERNEL}


@pytest.fixture
def all_kernels() -> Iterator[None]:
    library.use(KERNELS)
    yield
    library.use(())


@pytest.mark.usefixtures("all_kernels")
@pytest.mark.parametrize("how", TEXTS)
def test_the_output_with_a_broken_kernel_left_out_is_unchanged(how: str, folder: Path) -> None:
    model = qwen35_mlx.load(folder, dtype=mx.float32)
    with emulated(checked=False) as launches, broken(how):
        library.use(())
        wanted = answer(model, "dense", "text_65")
        library.use(KERNELS - {KERNEL})
        assert relative(answer(model, "dense", "text_65"), wanted) <= SAME
        assert KERNEL not in {launch.name for launch in launches} and launches
        # The fault is one that shows.
        library.use(KERNELS)
        if how == "uncompilable":
            with pytest.raises(CompileError, match="no double"):
                answer(model, "dense", "text_65")
        else:
            assert not relative(answer(model, "dense", "text_65"), wanted) <= 100 * SAME


@pytest.mark.usefixtures("a_mac")
def test_the_variable_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_with(monkeypatch, "sound", "top_k")
    monkeypatch.setenv(choice.REFERENCE, "1")
    assert "QWEN35_REFERENCE is set: no kernel is used" in run(folder).output
    assert json.loads(run(folder, "--json").output)["used"] == []


@pytest.mark.usefixtures("a_mac")
def test_json_has_the_whole_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_with(monkeypatch, "nan", KERNEL, "top_k")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(run(folder, "--json").output, parse_constant=refuse)
    assert found["metal"] and found["used"] == ["top_k"] and found["chip"] == "Apple M4 Max"
    assert found["bandwidth_gbps"] == 546
    by_kernel = {trial["kernel"]: trial for trial in found["trials"]}
    assert by_kernel[KERNEL]["error"] is None and by_kernel[KERNEL]["why_not"] == "differs"
    assert by_kernel["top_k"]["seconds"] == 1 and by_kernel["top_k"]["why_not"] is None


@pytest.mark.usefixtures("a_mac")
def test_kernels_that_cannot_be_tried_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "verdicts", partial(apart.verdicts, worker=["/no/such/python"]))
    with pytest.raises(qwen35_mlx.ModelError, match="kernels: cannot be tried .* expected"):
        run(folder)


def test_a_table_has_speed_and_share_of_the_chip() -> None:
    verdicts = [
        Verdict("embed", "1 token", 273_000_000, 2e-6, 1e-4, 1e-3, 3e-3),
        Verdict("add_norm", "1 token", 1000, math.nan, 1e-4),
    ]
    about: dict[str, Any] = {"chip": "Apple X", "macos": "26.1", "mlx": "0.32.4", "qwen35_mlx": "1"}
    table = doctor.report("4B", about, verdicts, 546.0)
    sound, broken_line = (rows(table)[kernel][0].split() for kernel in ("embed", "add_norm"))
    assert sound[3:] == ["2e-06", "1e-04", "1,000", "3,000", "273.0", "50%", "yes"]
    assert broken_line[3:] == ["NaN", "1e-04", "-", "-", "-", "-", "no"]
    assert "\nadd_norm: not used: differs\n" in table
    unknown = rows(doctor.report("4B", about, verdicts, None))["embed"][0].split()
    assert unknown[-3:] == ["273.0", "-", "yes"]


@pytest.mark.parametrize(
    ("name", "gb", "gbps"),
    [
        ("Apple M1", 16, 68.25),
        ("Apple M3 Max", 36, 300),
        ("Apple M3 Max", 64, 400),
        ("Apple M3 Max", 96, 300),
        ("Apple M4 Max", 36, 410),
        ("Apple M4 Max", 128, 546),
        ("Apple M3 Ultra", 512, 819),
        ("Apple M9", 64, None),
        ("AMD", 64, None),
    ],
)
def test_bandwidth_of_known_chips_only(name: str, gb: int, gbps: float | None) -> None:
    assert chips.bandwidth(name, gb << 30) == gbps


def test_the_help_fits_a_screen_and_says_what_was_executed_where() -> None:
    output = run("--help").output
    assert len(output.splitlines()) <= 30
    assert "on a CPU, and none on an Apple GPU yet" in " ".join(output.split())
    assert "Examples:" in output and "QWEN35_REFERENCE=1" in output


def test_a_size_needs_no_folder_and_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(choice, "gpu", dict)
    monkeypatch.setenv("QWEN35_HOME", str(tmp_path))
    for size in family.SIZES:
        assert run(size.name.lower()).return_value == 0


def test_a_size_is_what_generate_takes_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was converted here, else mlx-community's: 4 bits throughout."""
    monkeypatch.setattr(hub, "conversion", lambda _: None)
    title, _, formats = subject.as_loaded("4b", None, None)
    assert title == "4B, 4bit, uniform"
    assert {packing.bits for path, packing in formats.items() if packing} == {4}
    monkeypatch.setattr(hub, "conversion", lambda size: DEMO if size.name == "4B" else None)
    assert subject.as_loaded("4b", None, None)[0].startswith("demo-model")
    assert subject.as_loaded("4b", 8, None)[0] == "4B, 8bit, uniform"


def test_the_clock_of_the_worker_is_its_own() -> None:
    clock = broken_kernels.Clock()
    x = [mx.array(np.ones(3, np.float32))]
    plan = proof.Plan("a", "b", lambda: proof.Trial(lambda _: x, lambda _: x, lambda _: x, 12))
    verdict = proof.examine(clock.timed(plan, 3.0), clock)
    assert verdict and (verdict.seconds, verdict.reference_seconds) == (3.0, 2.0)
