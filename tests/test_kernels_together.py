"""Whole tiny models with every kernel executed from its Metal source: logits as the references'."""

from collections.abc import Callable, Iterator
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

import qwen35_mlx
from converting import converted, write_source
from metal_cpu import Launch, emulated, require_clean
from qwen35_mlx import engine
from qwen35_mlx.api import Qwen35
from qwen35_mlx.cache import Cache, KVState
from qwen35_mlx.kernels import library
from test_logits import make_prompt, relative

KERNELS = set(library.names())
SPARSE = {name for name in KERNELS if name.startswith("moe_")}
DENSE = KERNELS - SPARSE
MIXTURE = KERNELS - {"gate_up"}
# Relative L2 in f32 arithmetic: other orders of summation through all layers.
SAME = 2e-5
TOKENS = 5

Load = Callable[[str], Qwen35]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Both in 4 bits: the kernels of experts and embedding read packed matrices."""

    @cache
    def loaded(name: str) -> Qwen35:
        folder = tmp_path_factory.mktemp(name)
        made = converted(
            write_source(folder / "source", name), folder / "made", bits=4, group_size=32
        )
        return qwen35_mlx.load(made, dtype=mx.float32)

    return loaded


@pytest.fixture
def metal() -> Iterator[list[Launch] | None]:
    """Every kernel in use: on the GPU where there is one, else in the emulator, unchecked."""
    library.use(KERNELS)
    try:
        if mx.metal.is_available():
            yield None
        else:
            with emulated(checked=False) as launches:
                yield launches
    finally:
        library.use(())


def answer(model: Qwen35, name: str, case: str) -> np.ndarray:
    """Logits of a prompt, `[T, V]`, and below them of TOKENS more tokens, given one at a time."""
    prompt, net = make_prompt(name, case), model.model
    state = Cache(model.config.text)
    hidden = engine.read_prompt(net, prompt, state, keep=len(prompt.tokens))
    rows = [np.array(net.logits(hidden)[0])]
    for token in range(3, 3 + TOKENS):
        place = np.full((3, 1, 1), state.length + prompt.delta)
        hidden = net(net.embed(mx.array([[token]])), place, state)
        rows.append(np.array(net.logits(hidden)[0]))
    return np.concatenate(rows)


def verified(model: Qwen35) -> np.ndarray:
    """Logits of eight tokens read at once behind a prompt, as a verification of drafts does."""
    net, state = model.model, Cache(model.config.text)
    tokens = mx.arange(40)[None]
    net(net.embed(tokens[:, :32]), np.tile(np.arange(32), (3, 1, 1)), state)
    hidden = net(net.embed(tokens[:, 32:]), np.tile(np.arange(32, 40), (3, 1, 1)), state)
    return np.array(net.logits(hidden)[0])


def drafted(model: Qwen35, name: str) -> np.ndarray:
    hidden = 0.5 * mx.random.normal((1, 7, model.config.text.hidden_size), key=mx.random.key(3))
    place = np.tile(np.arange(7), (3, 1, 1))
    return np.array(model.model.draft(mx.arange(7)[None], hidden, place, KVState())[0])


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_prompt_with_a_picture_and_its_answer_are_the_references(
    name: str, load: Load, metal: list[Launch] | None
) -> None:
    model = load(name)
    library.use(())
    wanted = answer(model, name, "image")
    library.use(KERNELS)
    found = answer(model, name, "image")
    T = len(found) - TOKENS
    assert relative(found[:T], wanted[:T]) <= SAME
    assert relative(found[T:], wanted[T:]) <= SAME
    if metal is not None:
        used = {launch.name for launch in metal}
        sampling = {"top_k", "top_k_blocks"}
        assert used == (MIXTURE if name == "moe" else DENSE) - sampling


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_tokens_read_eight_at_a_time_and_drafts_are_the_references(
    name: str, load: Load, metal: list[Launch] | None
) -> None:
    model = load(name)
    library.use(())
    wanted = verified(model), drafted(model, name)
    library.use(KERNELS)
    assert relative(verified(model), wanted[0]) <= SAME
    assert relative(drafted(model, name), wanted[1]) <= SAME


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_sampled_tokens_are_the_references(
    name: str, load: Load, metal: list[Launch] | None
) -> None:
    model, sampling = load(name), qwen35_mlx.Sampling(temperature=0.7, top_k=20, seed=5)
    text = model.config.text

    def sampled() -> list[int]:
        prompt = make_prompt(name, "text_65")
        sampler = engine.Sampler(sampling, text.vocab_size, prompt.tokens)
        tokens = engine.generate(
            model.model,
            prompt,
            sampler,
            max_tokens=2 * TOKENS,
            cache=Cache(text),
            clock=engine.Clock(),
        )
        return list(tokens)

    library.use(())
    wanted = sampled()
    library.use(KERNELS)
    assert sampled() == wanted


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("schedule", ["forward", "reverse", 5])
def test_nothing_is_reported_of_a_whole_model(name: str, schedule: str | int, load: Load) -> None:
    model = load(name)
    library.use(KERNELS)
    try:
        with emulated(schedule=schedule) as launches:
            answer(model, name, "text_63")
    finally:
        library.use(())
    require_clean(launches)
