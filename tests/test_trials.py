"""The trials of a model are of the texts that this model launches, and of no others."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
from qwen35_mlx.sampling import Sampler, Sampling
from qwen35_mlx.shapes import Shapes, from_plain, shapes_of
from test_kernels_together import DENSE, KERNELS, MIXTURE
from tiny_shapes import CONFIGS

TRIED = KERNELS - {"top_k_blocks"}  # launched with top_k, and tried with it
# Tokens that a model reads at once: long and short prompts, what a chunk may leave, a verification.
TOKENS = (300, 100, 9, 8, 7, 6, 5, 4, 3, 2, 1)
SAMPLINGS = (
    Sampling(temperature=0.7, top_k=20, seed=1),
    Sampling(temperature=0.7, top_k=20, presence_penalty=1.5, seed=1),
    Sampling(temperature=0.7, top_k=64, top_p=0.9, seed=1),
    Sampling(temperature=0.7, top_k=33, repetition_penalty=1.1, seed=1),
    Sampling(temperature=0.7, top_k=1, seed=1),
)


def asked_at_load(
    load_it: Callable[[], Qwen35], patch: pytest.MonkeyPatch
) -> tuple[Qwen35, Shapes]:
    """The model, and the shapes for which its kernels would be chosen."""
    asked: list[Shapes] = []
    patch.setattr(loader.choice, "use", lambda shapes, _: asked.append(shapes))
    return load_it(), asked[0]


def size_shapes(size: family.Size, bits: int = 4, recipe: str | None = None) -> Shapes:
    source = published.source(size)
    targets = layout.targets(source, options(bits, recipe=recipe))
    formats = {target.path: target.packing for target in targets}
    return shapes_of(source.config, formats, mx.bfloat16)


def tried(shapes: Shapes) -> list[Launch]:
    with emulated(checked=False) as launches:
        for plan in trials.plans(shapes):
            trial = plan.make()
            if trial is not None:
                mx.eval(trial.launch(0))
    return launches


def launched(model: Qwen35) -> list[Launch]:
    """All that generation may ask of the kernels."""
    net, state = model.model, Cache(model.config.text)
    library.use(KERNELS)
    with emulated(checked=False) as launches:
        for T in TOKENS:
            place = np.tile(np.arange(state.length, state.length + T), (3, 1, 1))
            x = net.embed((mx.arange(T)[None] % 300).astype(mx.uint32))
            logits = net.logits(net(x, place, state)[:, -1])
        for sampling in SAMPLINGS:
            # The tokenizer may know fewer ids than the logits have.
            sampler = Sampler(sampling, model.config.text.vocab_size - 7, [3, 5])
            mx.eval(sampler(logits), sampler(logits))
    library.use(())
    return launches


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize(
    ("dtype", "packing"),
    [
        (mx.bfloat16, {"bits": 4, "group_size": 32, "recipe": "careful"}),
        (mx.float32, {"bits": 4, "group_size": 32, "recipe": "uniform"}),
        (mx.bfloat16, {"bits": 16}),
    ],
    ids=["bf16 careful", "f32 uniform", "plain"],
)
def test_every_text_that_a_model_launches_was_tried(
    name: str,
    dtype: mx.Dtype,
    packing: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_source(tmp_path / "source", name)
    folder = converted(source, tmp_path / "made", **packing)
    model, shapes = asked_at_load(lambda: load(folder, dtype=dtype), monkeypatch)
    monkeypatch.setattr(trials, "STACK_BYTES", 1)
    used = launched(model)
    plain = {"embed"} if packing["bits"] == 16 else set()
    assert {launch.name for launch in used} == (MIXTURE if name == "moe" else DENSE) - plain
    found = {launch.text for launch in tried(shapes)}
    assert not Counter(launch.name for launch in used if launch.text not in found)


@pytest.mark.parametrize("packing", [Format("affine", 4, 32), None], ids=["packed", "plain"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_every_kernel_is_right_in_every_trial(
    name: str, packing: Format | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "AT_ONCE", 1)
    monkeypatch.setattr(proof, "ROUNDS", 1)
    monkeypatch.setattr(trials, "STACK_BYTES", 1)
    monkeypatch.setattr(trials, "PROMPT", 40)
    given = config.parse(CONFIGS[name], name)
    modules = Model(given, has_vision=False, has_mtp=False).named_modules()
    formats = {path: packing for path, _ in modules}
    expected = TRIED & (MIXTURE if name == "moe" else DENSE) - (set() if packing else {"embed"})
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        with emulated(checked=False):
            found = [proof.examine(plan) for plan in trials.plans(shapes_of(given, formats, dtype))]
        verdicts = [verdict for verdict in found if verdict is not None]
        assert all(verdict.is_right for verdict in verdicts), verdicts
        assert {v.kernel for v in verdicts} == expected
        # Speed is known of each kernel.
        assert {v.kernel for v in verdicts if v.seconds > 0} == expected


@pytest.mark.parametrize("size", family.SIZES, ids=lambda size: size.name)
def test_all_sizes_have_their_trials(size: family.Size) -> None:
    shapes = size_shapes(size)
    plans = trials.plans(shapes)
    names = [plan.kernel for plan in plans]
    assert set(names) == TRIED & (MIXTURE if size.num_experts else DENSE)
    # Those of one kernel lie together, so that one that hangs is left out as a whole.
    assert [n for i, n in enumerate(names) if n not in names[:i]] == [
        n for i, n in enumerate(names) if i == 0 or names[i - 1] != n
    ]
    assert len({(plan.kernel, plan.case) for plan in plans}) == len(plans)
    text = published.source(size).config.text
    found = shapes.hidden, shapes.E, shapes.K
    assert found == (text.hidden_size, text.num_experts, text.num_experts_per_tok)


@pytest.mark.parametrize("packing", [Format("affine", 4, 64), Format("affine", 8, 32), None])
def test_experts_are_drawn_as_far_as_the_bytes_allow(
    packing: Format | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = family.find("397b")
    assert size is not None
    shapes = size_shapes(size)
    monkeypatch.setattr(trials, "STACK_BYTES", 16 << 20)
    stacks = trials._stacks(shapes, 64, 1024, (32, 64), (packing, None))
    assert stacks is not None
    scales = 1.0 if packing is None else 1 + 32 / packing.group_size / packing.bits
    bits = 16 if packing is None else packing.bits
    one = 64 * 1024 * bits // 8
    E = stacks[0].weight.shape[0]
    assert E == min(shapes.E, (16 << 20) // one) > shapes.K
    assert trials._nbytes(stacks[0]) == E * one * scales
    # As many as are chosen, however large they are.
    monkeypatch.setattr(trials, "STACK_BYTES", 1)
    stacks = trials._stacks(shapes, 64, 512, (32, 64), (packing, None))
    assert stacks is not None and stacks[0].weight.shape[0] == shapes.K


@pytest.mark.parametrize("packing", [Format("mxfp4", 4, 32), Format("affine", 3, 64)])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_matrices_that_no_kernel_reads_are_neither_drawn_nor_tried(
    name: str, packing: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config.parse(CONFIGS[name], name)
    modules = Model(given, has_vision=False, has_mtp=False).named_modules()
    shapes = shapes_of(given, {path: packing for path, _ in modules}, mx.bfloat16)
    products = {"delta_project", *(("moe_gate_up", "moe_down") if shapes.E else ("gate_up",))}
    plans = [plan for plan in trials.plans(shapes) if plan.kernel in products]
    assert {plan.kernel for plan in plans} == products
    monkeypatch.setattr(trials.Draw, "matrices", None)
    assert [plan.make() for plan in plans] == [None] * len(plans)


@pytest.mark.parametrize("packing", [Format("affine", 4, 64), Format("affine", 8, 32), None])
def test_layers_are_drawn_until_no_cache_holds_them(
    packing: Format | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = family.find("9b")
    assert size is not None
    shapes = replace(size_shapes(size), hidden=256)
    one = trials._nbytes(trials.Draw(shapes, "").matrices(64, 256, packing=packing))
    for room, wanted in ((5 * one, range(5, 7)), (1, range(2, 3)), (99 * one, range(40, 41))):
        monkeypatch.setattr(trials, "STACK_BYTES", room)
        trials._layers.cache_clear()
        layers = trials._layers(shapes, (64, 8), (packing, None))
        assert len(layers) in wanted
        assert {tuple(m.weight.shape[0] for m in layer) for layer in layers} == {(64, 8)}
        assert [m.packing for m in layers[0]] == [packing, None]


def test_layers_that_are_packed_differently_are_all_tried() -> None:
    size = family.find("35b")
    assert size is not None
    names = (
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_expert.gate_proj",
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    )
    layers = {f"model.language_model.layers.{n}": bits for n, bits in ((0, 4), (1, 8), (2, 4))}
    layers["mtp.layers.0"] = 6
    formats: dict[str, Format | None] = {
        f"{layer}.mlp.{name}": Format("affine", bits, 64)
        for layer, bits in layers.items()
        for name in names
    }
    formats["mtp.layers.0.mlp.gate"] = None
    mixed = shapes_of(published.source(size).config, formats, mx.bfloat16)
    routed = [four[0] for four in mixed.experts]
    assert routed == [Format("affine", bits, 64) if bits else None for bits in (4, 8, 0, 6)]


def test_dense_layers_that_are_packed_differently_are_all_tried_as_far_as_they_are_joined() -> None:
    size = family.find("9b")
    assert size is not None
    layers = {n: f"model.language_model.layers.{n}" for n in range(4)}  # of these 3 is attention

    def packed(bits: int) -> Format:
        return Format("affine", bits, 64)

    formats: dict[str, Format | None] = {f"{layers[0]}.linear_attn.in_proj_b": packed(8)}
    for name in ("qkv", "z", "b", "a"):
        formats[f"{layers[1]}.linear_attn.in_proj_{name}"] = packed(4)
        formats[f"{layers[2]}.linear_attn.in_proj_{name}"] = packed(4 if name == "z" else 8)
        formats[f"{layers[3]}.linear_attn.in_proj_{name}"] = packed(6)
    for layer, gate, up in ((layers[0], 4, 4), (layers[2], 4, 8), ("mtp.layers.0", 8, 8)):
        formats[f"{layer}.mlp.gate_proj"] = packed(gate)
        formats[f"{layer}.mlp.up_proj"] = packed(up)
    found = shapes_of(published.source(size).config, formats, mx.bfloat16)
    # Layers that are not named are plain.
    assert found.projections == ((packed(4), packed(4)), (None, None))
    assert found.gate_up == (packed(4), None, packed(8))


def test_shapes_survive_the_way_to_another_process() -> None:
    for size in family.SIZES:
        shapes = size_shapes(size)
        assert from_plain(json.loads(json.dumps(asdict(shapes)))) == shapes
