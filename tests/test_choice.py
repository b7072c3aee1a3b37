"""What is remembered of a trial, for which combination, and what a loaded model then uses."""

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import tiny
from qwen35_mlx import Progress, choice, config, proof, trials
from qwen35_mlx.api import load
from qwen35_mlx.kernels import library
from qwen35_mlx.proof import Verdict
from tiny_shapes import CONFIGS

SHAPES = trials.shapes_of(config.parse(CONFIGS["dense"], "tiny"), {}, mx.bfloat16)
MAC = {"device_name": "Apple M4 Max", "memory_size": 64 << 30}
VERDICTS = [
    Verdict("embed", "1 token", 10, 1e-6, 1e-4, 1.0, 2.0),
    Verdict("add_norm", "1 token", 10, float("nan"), 1e-4),
    Verdict("top_k", "20 of 389", 10, 0.0, 0.5, 2.0, 1.0),
]


@pytest.fixture(autouse=True)
def a_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with a GPU as far as the choice of kernels is concerned, and an empty home."""
    monkeypatch.setattr(choice, "gpu", lambda: MAC)
    monkeypatch.setenv("QWEN35_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(choice.REFERENCE, raising=False)
    monkeypatch.setattr(library, "_allowed", None)
    monkeypatch.setattr(library, "_used", frozenset())


@pytest.fixture
def examinations(monkeypatch: pytest.MonkeyPatch) -> list[trials.Shapes]:
    """The shapes for which kernels were tried, in a process that is not started."""
    asked: list[trials.Shapes] = []

    def examine(shapes: trials.Shapes, progress: Callable[[Verdict], None]) -> list[Verdict]:
        asked.append(shapes)
        for verdict in VERDICTS:
            progress(verdict)
        return list(VERDICTS)

    monkeypatch.setattr(proof, "examine_apart", examine)
    return asked


def only_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "home" / "kernels").iterdir()
    return path


def test_kernels_are_tried_once(examinations: list[trials.Shapes]) -> None:
    for _ in range(3):
        assert choice.kernels(SHAPES) == {"embed"}
    assert examinations == [SHAPES]
    # NaN and all: what was seen is what is remembered.
    assert [repr(v) for v in choice.remembered(SHAPES) or []] == [repr(v) for v in VERDICTS]


@pytest.mark.parametrize("changed", ["chip", "macos", "mlx", "version", "source", "shapes"])
def test_another_combination_is_tried_again(
    changed: str, examinations: list[trials.Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice.kernels(SHAPES)
    shapes = SHAPES
    if changed == "chip":
        monkeypatch.setattr(choice, "gpu", lambda: MAC | {"device_name": "Apple M5"})
    elif changed == "macos":
        monkeypatch.setattr(choice.platform, "mac_ver", lambda: ("26.1", (), ""))
    elif changed == "mlx":
        monkeypatch.setattr(choice, "version", lambda _: "0.99")
    elif changed == "version":
        monkeypatch.setattr(choice, "__version__", "0.99")
    elif changed == "source":
        monkeypatch.setattr(choice, "_sources", lambda: "other")
    else:
        shapes = replace(SHAPES, hidden=SHAPES.hidden + 1)
    choice.kernels(shapes)
    assert len(examinations) == 2


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "{}", '{"combination": 1, "verdicts": []}', "verdicts", "\0\0"],
)
def test_a_damaged_memory_is_none(
    damage: str, examinations: list[trials.Shapes], tmp_path: Path
) -> None:
    choice.kernels(SHAPES)
    path = only_file(tmp_path)
    if damage == "verdicts":
        kept = json.loads(path.read_text())
        damage = json.dumps(kept | {"verdicts": [{"kernel": "embed", "how": "fine"}]})
    path.write_text(damage)
    assert choice.kernels(SHAPES) == {"embed"}
    assert len(examinations) == 2
    assert choice.remembered(SHAPES) is not None


def test_what_is_remembered_is_private(examinations: list[trials.Shapes], tmp_path: Path) -> None:
    choice.kernels(SHAPES)
    path = only_file(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_written_to_costs_the_memory_only(
    examinations: list[trials.Shapes], tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file")
    assert choice.kernels(SHAPES) == choice.kernels(SHAPES) == {"embed"}
    assert len(examinations) == 2


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_variable_turns_kernels_off(
    value: str, off: bool, examinations: list[trials.Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.REFERENCE, value)
    assert choice.kernels(SHAPES) == (frozenset() if off else {"embed"})
    assert bool(examinations) is not off


def test_without_a_gpu_nothing_is_tried(
    examinations: list[trials.Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "gpu", dict)
    assert choice.kernels(SHAPES) == frozenset()
    library.use({"embed"})
    choice.use(SHAPES)
    assert library.uses("embed")  # a test's own choice stays
    assert not examinations


@pytest.mark.parametrize("error", [RuntimeError("ended between two trials"), OSError(2, "none")])
def test_what_cannot_be_tried_is_not_used_and_not_remembered(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(proof, "examine_apart", fail)
    assert choice.kernels(SHAPES) == frozenset()
    assert choice.remembered(SHAPES) is None


def test_a_program_that_embeds_python_uses_what_is_remembered_and_tries_nothing(
    examinations: list[trials.Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as here:
        here.setattr(sys, "executable", "/Applications/Talk.app/Contents/MacOS/Talk")
        assert choice.kernels(SHAPES) == frozenset() and not examinations
    choice.kernels(SHAPES)
    monkeypatch.setattr(sys, "executable", "/Applications/Talk.app/Contents/MacOS/Talk")
    assert choice.kernels(SHAPES) == {"embed"} and len(examinations) == 1


def test_loading_tries_the_kernels_before_the_weights_and_says_so(
    examinations: list[trials.Shapes], tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "model", CONFIGS["dense"], tiny.draw(CONFIGS["dense"]))
    heard: list[Progress] = []
    load(folder, progress=heard.append)
    stages = [p.stage for p in heard]
    assert stages[: len(VERDICTS)] == ["kernels"] * len(VERDICTS) and stages[-1] == "load"
    total = trials.count(SHAPES)
    of_kernels = [(p.done, p.total) for p in heard if p.stage == "kernels"]
    assert of_kernels == [*((n, total) for n in range(1, len(VERDICTS) + 1)), (total, total)]
    assert library.uses("embed") and not library.uses("add_norm") and not library.uses("top_k")
    heard.clear()
    load(folder, progress=heard.append)
    assert {p.stage for p in heard} == {"load"}
    assert len(examinations) == 1


def test_of_two_models_each_uses_what_both_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, left in (
        ({"embed", "add_norm"}, {"embed", "add_norm"}),
        ({"embed", "top_k"}, {"embed"}),
        ({"embed", "add_norm"}, {"embed"}),
    ):
        monkeypatch.setattr(choice, "kernels", lambda *_, names=names: frozenset(names))
        choice.use(SHAPES)
        assert {n for n in ("embed", "add_norm", "top_k") if library.uses(n)} == left


def test_no_scratch_file_is_left(examinations: list[trials.Shapes], tmp_path: Path) -> None:
    choice.kernels(SHAPES)
    assert [p.suffix for p in (tmp_path / "home" / "kernels").iterdir()] == [".json"]
    assert not [n for n in os.listdir(tmp_path / "home") if n != "kernels"]
