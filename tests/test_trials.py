"""The trials of a model are of the kernels that this model launches, text for text."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert import layout, options, published

from converting import converted, write_source
from metal_cpu import Launch, emulated
from qwen35_mlx import config, family, loader, proof, trials
from qwen35_mlx.api import Qwen35, load
from qwen35_mlx.cache import Cache
from qwen35_mlx.kernels import library
from qwen35_mlx.model import Model
from qwen35_mlx.packing import Format
from test_kernels_together import DENSE, KERNELS
from tiny_shapes import CONFIGS

PLAIN_TRIALS = KERNELS - {"top_k_blocks"}  # launched with top_k, and tried with it


def shapes_of_folder(model: Qwen35, monkeypatch: pytest.MonkeyPatch) -> trials.Shapes:
    """What loading the folder once more asks the kernels' choice for."""
    asked: list[trials.Shapes] = []
    monkeypatch.setattr(loader.choice, "use", lambda shapes, _: asked.append(shapes))
    load(model.folder, dtype=mx.float32)
    return asked[0]


def size_shapes(size: family.Size, bits: int = 4, recipe: str | None = None) -> trials.Shapes:
    source = published.source(size)
    targets = layout.targets(source, options(bits, recipe=recipe))
    formats = {target.path: target.packing for target in targets}
    return trials.shapes_of(source.config, formats, mx.bfloat16)


def tried(shapes: trials.Shapes) -> list[Launch]:
    with emulated(checked=False) as launches:
        for trial in trials.trials(shapes):
            mx.eval(trial.launch(0))
    return launches


def launched(model: Qwen35) -> list[Launch]:
    """A prompt, a few tokens at once, and one."""
    net, state = model.model, Cache(model.config.text)
    library.use(KERNELS)
    try:
        with emulated(checked=False) as launches:
            for T in (trials.PROMPT, trials.FEW[1], 1):
                place = np.tile(np.arange(state.length, state.length + T), (3, 1, 1))
                kind = mx.int32 if T == trials.PROMPT else mx.uint32  # of the engine's tokens
                x = net.embed((mx.arange(T)[None] % 300).astype(kind))
                mx.eval(net.logits(net(x, place, state)[:, -1]))
    finally:
        library.use(())
    return launches


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("recipe", ["careful", "uniform"])
def test_every_text_that_a_model_launches_was_tried(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(
        write_source(tmp_path / "source", name),
        tmp_path / "made",
        bits=4,
        group_size=32,
        recipe=recipe,
    )
    model = load(folder, dtype=mx.float32)
    found = {launch.text for launch in tried(shapes_of_folder(model, monkeypatch))}
    used = launched(model)
    assert {launch.name for launch in used} == (
        (KERNELS if name == "moe" else DENSE) - {"top_k", "top_k_blocks"}
    )
    assert not Counter(launch.name for launch in used if launch.text not in found)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_every_kernel_is_right_in_every_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "AT_ONCE", 1)
    monkeypatch.setattr(proof, "ROUNDS", 1)
    monkeypatch.setattr(trials, "PROMPT", 40)
    given = config.parse(CONFIGS[name], name)
    modules = Model(given, has_vision=False, has_mtp=False).named_modules()
    formats = {path: Format("affine", 4, 32) for path, _ in modules}
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        with emulated(checked=False):
            verdicts = [
                proof.examine(trial)
                for trial in trials.trials(trials.shapes_of(given, formats, dtype))
            ]
        assert all(verdict.is_right for verdict in verdicts), verdicts
        assert {v.kernel for v in verdicts} == PLAIN_TRIALS & (KERNELS if name == "moe" else DENSE)


@pytest.mark.parametrize("size", family.SIZES, ids=lambda size: size.name)
def test_all_sizes_have_their_trials_and_their_bytes_fit_in_memory(size: family.Size) -> None:
    shapes = size_shapes(size)
    makers = trials._makers(shapes)
    names = [make.func.__name__.lstrip("_") for make in makers]  # type: ignore[attr-defined]
    assert set(names) == PLAIN_TRIALS & (KERNELS if size.num_experts else DENSE)
    # Those of one kernel lie together, so that one that hangs is left out as a whole.
    assert [n for i, n in enumerate(names) if n not in names[:i]] == [
        n for i, n in enumerate(names) if i == 0 or names[i - 1] != n
    ]
    text = published.source(size).config.text
    assert (shapes.hidden, shapes.E, shapes.K) == (
        text.hidden_size,
        text.num_experts,
        text.num_experts_per_tok,
    )
    for rows, columns in ((2 * shapes.inner, shapes.hidden), (shapes.hidden, shapes.inner)):
        if shapes.E:
            drawn = max(shapes.K, min(shapes.E, trials.STACK_BYTES // (rows * columns // 2)))
            assert drawn * rows * columns // 2 <= 256 << 20


def test_layers_that_are_packed_differently_are_all_tried() -> None:
    size = family.find("35b")
    assert size is not None
    shapes = size_shapes(size)
    assert len(shapes.experts) == len(set(shapes.experts)) >= 1
    formats = {
        f"model.language_model.layers.{n}.mlp.{name}": Format("affine", bits, 64)
        for n, bits in ((0, 4), (1, 8), (2, 4))
        for name in (
            "experts.gate_up_proj",
            "experts.down_proj",
            "shared_expert.gate_proj",
            "shared_expert.up_proj",
            "shared_expert.down_proj",
        )
    }
    mixed = trials.shapes_of(published.source(size).config, formats, mx.bfloat16)
    routed = [four[0] for four in mixed.experts]
    assert routed == [Format("affine", 4, 64), Format("affine", 8, 64), None]


def test_shapes_survive_the_way_to_another_process() -> None:
    for size in family.SIZES:
        shapes = size_shapes(size)
        assert trials.from_plain(json.loads(json.dumps(asdict(shapes)))) == shapes
