"""Reading a prompt in chunks, decoding behind it, stopping, and threads."""

import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

import qwen35_mlx
import tiny
from qwen35_mlx import Prompt, Sampling, engine
from qwen35_mlx.cache import Cache
from qwen35_mlx.errors import Cancelled
from qwen35_mlx.image import Media
from qwen35_mlx.sampling import Sampler

TOLERANCE = 1e-5  # relative L2, f32: another order of summation
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[qwen35_mlx.Qwen35]:
    config = tiny.CONFIGS[request.param]
    folder = tiny.write(tmp_path_factory.mktemp(request.param), config, tiny.draw(config))
    yield qwen35_mlx.load(folder)


def text_prompt(T: int, delta: int = 0) -> Prompt:
    tokens = (np.arange(T) * 7 % 331).astype(np.int32)
    return Prompt(tokens, np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)), delta)


def picture_prompt(model: qwen35_mlx.Qwen35) -> Prompt:
    """12 words, two pictures of 6 and 4 tokens with 5 words between them, 9 words."""
    pad = model.config.image_token_id
    media, tokens, positions, at = [], [], [], 0
    draw = np.random.default_rng(5)
    for words, grid in ((12, (1, 4, 6)), (5, (1, 4, 4)), (9, None)):
        tokens += list(draw.integers(0, 300, words))
        positions += [(at + i,) * 3 for i in range(words)]
        at += words
        if grid is None:
            continue
        rows, columns = grid[1] // 2, grid[2] // 2
        tokens += [pad] * (rows * columns)
        positions += [(at, at + r, at + c) for r in range(rows) for c in range(columns)]
        at += max(rows, columns)
        patches = draw.uniform(-1, 1, (grid[1] * grid[2], 1536)).astype(np.float32)
        media.append(Media(patches, grid, ()))
    ids = np.array(tokens, np.int32)
    return Prompt(ids, np.array(positions, np.int32).T, at - len(ids), tuple(media))


def distance(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.linalg.norm(a - b) / mx.linalg.norm(b))


@pytest.mark.parametrize("chunk", [1, 7, 13, 20])
def test_chunks_of_a_picture_prompt_equal_one(
    chunk: int, model: qwen35_mlx.Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts fall before, inside and between the pictures."""
    prompt = picture_prompt(model)
    whole = model.logits(prompt)
    monkeypatch.setattr(engine, "CHUNK", chunk)
    assert distance(model.logits(prompt), whole) < TOLERANCE


def test_only_the_last_rows_equal_the_tail_of_all(
    model: qwen35_mlx.Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 10)
    whole = model.logits(text_prompt(23))
    assert whole.shape == (23, model.config.text.vocab_size)
    for last in (1, 3, 10, 14):
        assert distance(model.logits(text_prompt(23), last=last), whole[-last:]) < TOLERANCE


@pytest.mark.parametrize("T", [20, 64, 100])
def test_decoding_equals_the_tail_of_reading(T: int, model: qwen35_mlx.Qwen35) -> None:
    net, text, prompt = model.model, model.config.text, text_prompt(T)
    cache, rows = Cache(text), []
    engine.read_prompt(net, text_prompt(T - 9), cache)
    for t in range(T - 9, T):
        x = net.embed(mx.array(prompt.tokens[None, t : t + 1]))
        rows.append(net.logits(net(x, np.full((3, 1, 1), t), cache))[0])
    assert cache.length == T
    assert distance(mx.concatenate(rows), model.logits(prompt)[-9:]) < TOLERANCE


def ids(model: qwen35_mlx.Qwen35, prompt: Prompt, n: int, **options: object) -> list[int]:
    sampler = Sampler(GREEDY, None, prompt.tokens)
    cache = Cache(model.config.text)
    tokens = engine.generate(
        model.model,
        prompt,
        sampler,
        max_tokens=n,
        cache=cache,
        clock=engine.Clock(),
        **options,  # type: ignore[arg-type]
    )
    return list(tokens)


def test_greedy_decoding_equals_reading_everything_again(model: qwen35_mlx.Qwen35) -> None:
    """Also behind a picture, where positions run ahead of the cache by delta."""
    prompt = picture_prompt(model)
    assert prompt.delta != 0
    found = ids(model, prompt, 8)
    tokens, positions = prompt.tokens, prompt.positions
    for token in found:
        longer = Prompt(tokens, positions, prompt.delta, prompt.media)
        assert int(model.logits(longer, last=1)[-1].argmax()) == token
        place = np.full((3, 1), len(tokens) + prompt.delta, np.int32)
        positions = np.concatenate([positions, place], axis=1)
        tokens = np.append(tokens, np.int32(token))


def test_two_streams_in_turn_do_not_mix(model: qwen35_mlx.Qwen35) -> None:
    prompts = [picture_prompt(model), text_prompt(31)]
    alone = [ids(model, p, 6) for p in prompts]
    running = [
        engine.generate(
            model.model,
            p,
            Sampler(GREEDY, None, p.tokens),
            max_tokens=6,
            cache=Cache(model.config.text),
            clock=engine.Clock(),
        )
        for p in prompts
    ]
    together = [list(pair) for pair in zip(*running, strict=True)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_a_stream_may_go_on_in_another_thread(model: qwen35_mlx.Qwen35) -> None:
    prompt = picture_prompt(model)
    sampling = Sampling(temperature=1.0, presence_penalty=1.0, repetition_penalty=1.1, seed=3)

    def start() -> Iterator[int]:
        return engine.generate(
            model.model,
            prompt,
            Sampler(sampling, None, prompt.tokens),
            max_tokens=12,
            cache=Cache(model.config.text),
            clock=engine.Clock(),
        )

    wanted = list(start())
    found: list[int] = []
    stream = start()
    for _ in range(12):
        worker = threading.Thread(target=lambda: found.append(next(stream)))
        worker.start()
        worker.join()
    assert found == wanted


def test_cancelling_ends_the_prompt_between_chunks(
    model: qwen35_mlx.Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 8)
    cancel, seen = threading.Event(), []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 16:
            cancel.set()

    with pytest.raises(Cancelled):
        ids(model, text_prompt(50), 3, cancel=cancel, progress=progress)
    assert seen == [(8, 50), (16, 50)]


def test_a_long_decode_keeps_no_graph(model: qwen35_mlx.Qwen35) -> None:
    """Memory after 60 tokens is that of the cache: no state stays lazy."""
    prompt = text_prompt(5)
    ids(model, prompt, 4)
    mx.clear_cache()
    before = mx.get_active_memory()
    tokens = engine.generate(
        model.model,
        prompt,
        Sampler(GREEDY, None, ()),
        max_tokens=80,
        cache=(cache := Cache(model.config.text)),
        clock=engine.Clock(),
    )
    for _ in range(60):
        next(tokens)
    mx.eval(cache.arrays())  # the step under way
    assert mx.get_active_memory() - before < 1.5 * cache.nbytes
