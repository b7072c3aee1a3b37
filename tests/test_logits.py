"""The whole model against transformers on tiny checkpoints of the exact architecture.

The expected arrays lie in tests/goldens/logits and are made by tests/goldens/make_logits.py.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qwen35_mlx
import tiny
from qwen35_mlx import engine
from qwen35_mlx.api import Qwen35
from qwen35_mlx.cache import Cache, KVState
from qwen35_mlx.image import Media
from qwen35_mlx.prompt import MediaTokens, Prompt, positions
from qwen35_mlx.sampling import Sampler, Sampling

GOLDENS = Path(__file__).parent / "goldens" / "logits"
FACTS = json.loads((GOLDENS / "facts.json").read_text())

# Relative L2 error over all logits of a case.
TOLERANCE = {
    # Other orders of summation; transformers itself moves by 2e-6 between instruction sets.
    "float32": 2e-5,
    # How far a changed tensor moves the logits, as a fraction of how far it moves transformers'.
    "movement": 1e-2,
}
MODELS = ("dense", "moe")
TEXTS = ("text_1", "text_63", "text_64", "text_65", "text_300")
MEDIA = ("image", "images", "video", "image_video")
VARIANTS = (
    ("dense_yarn", "text_65"),
    ("dense_yarn", "image"),
    ("dense_tied", "prompt"),
    ("moe_untied", "prompt"),
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": {"shards": 3},
    "experts apart": {"experts_fused": False},
    "mlx": {"layout": "mlx"},
}

Load = Callable[..., Qwen35]


@cache
def golden(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{file}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def expected_logits(name: str, case: str) -> np.ndarray:
    """The texts are prefixes of the longest, and attention is causal: one array serves them all."""
    if case in TEXTS:
        return golden(name)["text_300.logits"][: int(case.removeprefix("text_"))]
    return golden(name)[f"{case}.logits"]


def relative(found: mx.array | np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error."""
    assert found.shape == expected.shape
    difference = np.array(found, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Writes a folder of drawn weights with the options of `tiny.write` and loads it, each once."""

    @cache
    def folder(name: str, *options: tuple[str, Any]) -> Path:
        config = tiny.CONFIGS[name]
        target = tmp_path_factory.mktemp(name)
        return tiny.write(target, config, tiny.draw(config), **dict(options))

    @cache
    def loaded(name: str, arithmetic: mx.Dtype | None, *options: tuple[str, Any]) -> Qwen35:
        return qwen35_mlx.load(folder(name, *options), dtype=arithmetic)

    return lambda name, arithmetic=None, **options: loaded(name, arithmetic, *options.items())


def make_prompt(name: str, case: str) -> Prompt:
    config, drawn = tiny.CONFIGS[name], tiny.case(tiny.CONFIGS[name], case)
    media = tuple(Media(m.patches, m.grid, m.timestamps) for m in drawn.media)
    keys = ("image", "video", "vision_start", "vision_end")
    ids = MediaTokens(*(config[f"{key}_token_id"] for key in keys))
    merge = config["vision_config"]["spatial_merge_size"]
    return Prompt(drawn.tokens, *positions(drawn.tokens, media, ids, merge), media=media)


@pytest.mark.parametrize("name", MODELS)
def test_drawn_weights_are_those_of_the_goldens(name: str) -> None:
    assert tiny.digest(tiny.draw(tiny.CONFIGS[name])) == FACTS[name]["tensors_sha256"]


@pytest.mark.parametrize("case", ("text_300", *MEDIA))
@pytest.mark.parametrize("name", MODELS)
def test_positions_are_those_of_transformers(name: str, case: str) -> None:
    prompt, stored = make_prompt(name, case), golden(name)
    assert np.array_equal(prompt.tokens, stored[f"{case}.tokens"])
    assert np.array_equal(prompt.positions, stored[f"{case}.positions"])
    assert prompt.delta == stored[f"{case}.delta"]


@pytest.mark.parametrize("case", (*TEXTS, *MEDIA))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(load: Load, name: str, case: str) -> None:
    found = load(name).logits(make_prompt(name, case))
    assert found.dtype == mx.float32
    assert relative(found, expected_logits(name, case)) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("name", "case"), VARIANTS)
def test_variants_have_the_logits_of_transformers(load: Load, name: str, case: str) -> None:
    found = load(name).logits(make_prompt(name, case))
    expected = golden("variants")[f"{name}.{case}.logits"]
    assert relative(found, expected) <= TOLERANCE["float32"]


def test_yarn_is_told_apart_by_its_goldens() -> None:
    plain, stretched = expected_logits("dense", "text_65"), golden("variants")
    assert relative(plain, stretched["dense_yarn.text_65.logits"]) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_of_a_folder_has_the_same_logits(
    load: Load, name: str, options: dict[str, Any]
) -> None:
    found = load(name, **options).logits(make_prompt(name, "image_video"))
    assert relative(found, expected_logits(name, "image_video")) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("name", "file", "case"),
    (
        ("dense", "bfloat16", "text_2000"),
        ("dense", "bfloat16", "image_video"),
        ("moe", "moe", "text_65"),
        ("moe", "moe", "image_video"),
    ),
)
def test_bfloat16_weights_in_float32_arithmetic(
    load: Load, name: str, file: str, case: str
) -> None:
    model = load(name, arithmetic=mx.float32, dtype="bfloat16")
    found = model.logits(make_prompt(name, case))
    assert relative(found, golden(file)[f"{case}.bfloat16_weights"]) <= TOLERANCE["float32"]


def top_two_gap(logits: np.ndarray) -> np.ndarray:
    """`[T]`: how far the largest logit is above the second."""
    ordered = np.sort(logits, axis=-1)
    return ordered[:, -1] - ordered[:, -2]


def test_bfloat16_arithmetic_is_no_further_off_than_that_of_transformers(load: Load) -> None:
    model = load("dense", dtype="bfloat16")
    found = np.array(model.logits(make_prompt("dense", "text_2000")))
    expected = golden("bfloat16")["text_2000.bfloat16_weights"]
    theirs = golden("bfloat16")["text_2000.transformers_bfloat16_error"]
    assert relative(found, expected) <= FACTS["dense"]["bfloat16_error"]["as_published"]
    differs = found.argmax(-1) != expected.argmax(-1)
    assert (top_two_gap(expected)[differs] < 2 * theirs[differs]).all()


@pytest.mark.parametrize("case", ("prompt", "image"))
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(load: Load, name: str, case: str) -> None:
    expected = golden(name)[f"{case}.greedy"].tolist()
    model, prompt = load(name), make_prompt(name, case)
    text = model.config.text
    tokens = engine.generate(
        model.model,
        prompt,
        Sampler(Sampling(temperature=0.0), text.vocab_size, prompt.tokens),
        max_tokens=len(expected),
        cache=Cache(text),
        clock=engine.Clock(),
    )
    assert list(tokens) == expected


def draft(model: Qwen35, name: str) -> mx.array:
    """The MTP head's logits `[T, V]` after the stored tokens and hidden states."""
    tokens, hidden = (golden(name)[f"draft.{key}"] for key in ("tokens", "hidden"))
    places = np.broadcast_to(np.arange(len(tokens)), (3, 1, len(tokens)))
    states = mx.array(hidden)[None]
    return model.model.draft(mx.array(tokens)[None], states, places, KVState())[0]


@pytest.mark.parametrize("name", MODELS)
def test_draft_logits_are_those_of_the_float64_reference(load: Load, name: str) -> None:
    assert relative(draft(load(name), name), golden(name)["draft.logits"]) <= TOLERANCE["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_moves_the_logits_as_far_as_in_transformers(name: str, tmp_path: Path) -> None:
    config = tiny.CONFIGS[name]
    tensors, prompt = tiny.draw(config), make_prompt(name, "image_video")
    expected = FACTS[name]["movement"]
    assert expected.keys() == tensors.keys()
    wrong = {}
    for tensor in tensors:
        changed = tensors | {tensor: tiny.perturbed(tensors, tensor)}
        model = qwen35_mlx.load(tiny.write(tmp_path, config, changed))
        if tensor.startswith("mtp."):
            moved = relative(draft(model, name), golden(name)["draft.logits"])
        else:
            moved = relative(model.logits(prompt), expected_logits(name, "image_video"))
        if abs(moved / expected[tensor] - 1) > TOLERANCE["movement"]:
            wrong[tensor] = f"moved by {moved:.1e}, in transformers by {expected[tensor]:.1e}"
    assert not wrong
