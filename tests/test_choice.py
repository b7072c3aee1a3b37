"""What is remembered of a trial, for which combination, and what a loaded model then uses."""

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import tiny
from qwen35_mlx import Progress, apart, choice, config
from qwen35_mlx.api import load
from qwen35_mlx.kernels import library
from qwen35_mlx.proof import Verdict
from qwen35_mlx.shapes import Shapes, shapes_of
from tiny_shapes import CONFIGS

TINY = config.parse(CONFIGS["dense"], "tiny")
SHAPES = shapes_of(TINY, {}, mx.bfloat16)
MAC = {"device_name": "Apple M4 Max", "memory_size": 64 << 30}
VERDICTS = [
    Verdict("embed", "1 token", 10, 1e-6, 1e-4, 1.0, 2.0),
    Verdict("add_norm", "1 token", 10, float("nan"), 1e-4),
    Verdict("top_k", "20 of 389", 10, 0.0, 0.0, 2.0, 1.0),
]
TALK = "/Applications/Talk.app/Contents/MacOS/Talk"  # a program that embeds Python


@pytest.fixture(autouse=True)
def a_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU as far as the choice of kernels is concerned, and an empty home."""
    monkeypatch.setattr(choice, "gpu", lambda: MAC)
    monkeypatch.setenv("QWEN35_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(choice.REFERENCE, raising=False)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Shapes]:
    """The shapes for which kernels were tried, in a process that is not started."""
    asked: list[Shapes] = []

    def verdicts(shapes: Shapes, progress: Callable[[int, int], None] | None) -> list[Verdict]:
        asked.append(shapes)
        if progress:
            for done in (1, 2, 3):
                progress(done, 3)
        return list(VERDICTS)

    monkeypatch.setattr(apart, "verdicts", verdicts)
    return asked


def used(shapes: Shapes = SHAPES) -> set[str]:
    """What a first model with these shapes uses."""
    library.forget()
    choice.use(shapes)
    return in_use()


def in_use() -> set[str]:
    return {name for name in library.names() if library.uses(name)}


def only_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "home" / "kernels").iterdir()
    return path


def test_kernels_are_tried_once(tried: list[Shapes]) -> None:
    for _ in range(3):
        assert used() == {"embed"}
    assert tried == [SHAPES]
    # NaN and all: what was seen is what is remembered.
    assert [repr(v) for v in choice.remembered(SHAPES) or []] == [repr(v) for v in VERDICTS]


def test_a_kernel_that_gives_infinities_is_remembered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Shapes] = []
    wrong = Verdict("add_norm", "1 token", 10, float("inf"), 1e-4)

    def verdicts(shapes: Shapes, **_: Any) -> list[Verdict]:
        made.append(shapes)
        return [VERDICTS[0], wrong]

    monkeypatch.setattr(apart, "verdicts", verdicts)
    assert used() == used() == {"embed"}
    assert len(made) == 1


@pytest.mark.parametrize("changed", ["chip", "macos", "mlx", "version", "source", "shapes"])
def test_another_combination_is_tried_again(
    changed: str, tried: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    used()
    shapes = SHAPES
    if changed == "chip":
        monkeypatch.setattr(choice, "gpu", lambda: MAC | {"device_name": "Apple M5"})
    elif changed == "macos":
        monkeypatch.setattr(choice.platform, "mac_ver", lambda: ("26.1", (), ""))
    elif changed == "mlx":
        monkeypatch.setattr(choice.mx, "__version__", "0.99")
    elif changed == "version":
        monkeypatch.setattr(choice, "__version__", "0.99")
    elif changed == "source":
        monkeypatch.setattr(choice, "_sources", lambda: "other")
    else:
        shapes = replace(SHAPES, hidden=SHAPES.hidden + 1)
    used(shapes)
    assert len(tried) == 2


DAMAGED: list[object] = [
    {"error": "small"},
    {"error": None},
    {"error": -1.0},
    {"seconds": 0},
    {"reference_seconds": 0.0},
    {"seconds": 10**400},
    {"seconds": True},
    {"kernel": [1]},
    {"kernel": "nothing_like_it"},
    {"problem": 5},
    {"how": "fine"},
    None,
]


@pytest.mark.parametrize("damage", [*("", "{", "[]", "{}", "\0\0", "\xff"), *DAMAGED], ids=str)
def test_a_damaged_memory_is_none(damage: object, tried: list[Shapes], tmp_path: Path) -> None:
    used()
    path = only_file(tmp_path)
    kept = json.loads(path.read_text())
    if isinstance(damage, dict):
        kept["verdicts"][0] |= damage
        damage = json.dumps(kept)
    elif damage is None:
        damage = json.dumps(kept | {"verdicts": []})
    path.write_text(str(damage), encoding="latin-1")
    assert used() == {"embed"}
    assert len(tried) == 2
    assert choice.remembered(SHAPES) is not None


def test_a_memory_that_cannot_be_read_is_none(
    tried: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(choice.files, "read_json", refuse)
    assert used() == {"embed"}
    monkeypatch.undo()
    monkeypatch.setenv("QWEN35_HOME", "/x" * 3000)
    assert choice.remembered(SHAPES) is None


def test_what_is_remembered_is_private_and_no_scratch_file_is_left(
    tried: list[Shapes], tmp_path: Path
) -> None:
    used()
    path = only_file(tmp_path)
    assert path.suffix == ".json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_written_to_costs_the_memory_only(
    tried: list[Shapes], tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file")
    assert used() == used() == {"embed"}
    assert len(tried) == 2


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_variable_turns_kernels_off(
    value: str, off: bool, tried: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.REFERENCE, value)
    assert used() == (set() if off else {"embed"})
    assert bool(tried) is not off


def test_without_a_gpu_nothing_is_tried(
    tried: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "gpu", dict)
    assert used() == set()
    assert not tried


def test_a_gpu_that_mlx_does_not_compute_on_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(choice.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(choice.mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not choice.has_gpu()


@pytest.mark.parametrize("error", [RuntimeError("between two trials"), OSError(2, "none")])
def test_what_cannot_be_tried_is_not_used_and_not_remembered(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(apart, "verdicts", fail)
    assert used() == set()
    assert choice.remembered(SHAPES) is None


def test_a_program_that_embeds_python_uses_what_is_remembered_and_tries_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as here:
        here.setattr(sys, "executable", TALK)
        here.setattr(apart.subprocess, "Popen", None)  # nothing is started
        assert used() == set()
    with monkeypatch.context() as here:
        here.setattr(apart, "verdicts", lambda *_, **__: VERDICTS)
        used()
    monkeypatch.setattr(sys, "executable", TALK)
    assert used() == {"embed"}


def test_loading_tries_the_kernels_before_the_weights_and_says_so(
    tried: list[Shapes], tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "model", CONFIGS["dense"], tiny.draw(CONFIGS["dense"]))
    heard: list[Progress] = []
    load(folder, progress=heard.append)
    of_kernels = [(p.done, p.total) for p in heard if p.stage == "kernels"]
    assert of_kernels == [(1, 3), (2, 3), (3, 3)]
    stages = [p.stage for p in heard]
    assert stages == ["kernels"] * 3 + ["load"] * (len(stages) - 3) and len(stages) > 3
    assert in_use() == {"embed"}
    heard.clear()
    load(folder, progress=heard.append)
    assert {p.stage for p in heard} == {"load"}
    assert len(tried) == 1


def verdict(kernel: str, is_right: bool) -> Verdict:
    return Verdict(kernel, "c", 1, 0.0 if is_right else 1.0, 1e-4, 1.0, 2.0)


def test_models_in_one_process_use_what_none_of_them_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dense model does not try the kernels of experts, and does not take them from another."""
    seen: list[tuple[dict[str, bool], set[str]]] = [
        ({"add_norm": True, "moe_down": True}, {"add_norm", "moe_down"}),
        ({"add_norm": True, "embed": True}, {"add_norm", "embed", "moe_down"}),
        ({"add_norm": False, "embed": True}, {"embed", "moe_down"}),
        ({"add_norm": True}, {"embed", "moe_down"}),
    ]
    for kernels, left in seen:
        found = [verdict(kernel, is_right) for kernel, is_right in kernels.items()]
        monkeypatch.setattr(choice, "remembered", lambda _, found=found: found)
        choice.use(SHAPES)
        assert in_use() == left


def test_a_model_whose_kernels_cannot_be_tried_takes_them_from_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are in use for the whole process, and with its shapes nobody knows them."""
    found = [verdict("add_norm", True)]
    monkeypatch.setattr(choice, "remembered", lambda _: found)
    choice.use(SHAPES)
    assert in_use() == {"add_norm"}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no Python interpreter")

    monkeypatch.setattr(choice, "remembered", lambda _: None)
    monkeypatch.setattr(apart, "verdicts", fail)
    choice.use(SHAPES)
    assert in_use() == set()
