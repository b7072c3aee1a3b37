"""Prompt in, tokens out: chunked reading, then one step computed while the last one is read."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .cache import Cache
from .errors import Cancelled
from .model import Model
from .prompt import Prompt
from .sampling import Sampler

# Tokens per evaluation: bounds the work of one GPU command buffer. The CPU has no launches to save;
# there shorter chunks keep arrays in its caches and skip most of the masked half of the scores.
CHUNK = 1024 if mx.metal.is_available() else 256

ReportProgress = Callable[[int, int], None]


@dataclass
class Clock:
    """Times of one generation, in seconds since its start."""

    start: float = field(default_factory=time.perf_counter)
    prompt_done: float = 0.0
    first_token: float = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.start


def read_prompt(
    model: Model,
    prompt: Prompt,
    cache: Cache,
    *,
    keep: int = 1,
    progress: ReportProgress | None = None,
    cancel: threading.Event | None = None,
) -> mx.array:
    """Run the whole prompt through the model in chunks.

    keep: hidden states of this many last tokens are returned, `[1, keep, hidden]`, evaluated.
    progress: called with tokens done and in all. Raises: Cancelled between chunks.
    """
    T = len(prompt.tokens)
    rows, features = _see(model, prompt, cancel)
    kept: list[mx.array] = []
    for start in range(0, T, CHUNK):
        _check(cancel)
        stop = min(start + CHUNK, T)
        x = model.embed(mx.array(prompt.tokens[None, start:stop].astype(np.uint32)))
        first, last = np.searchsorted(rows, (start, stop))
        if last > first:
            x[0, mx.array(rows[first:last] - start)] = features[first:last].astype(x.dtype)
        hidden = model(x, prompt.positions[:, None, start:stop], cache)
        wanted = hidden[:, max(0, T - keep - start) :]
        mx.eval(wanted, *cache.arrays())
        if wanted.shape[1]:
            kept.append(wanted)
        mx.clear_cache()
        if progress:
            progress(stop, T)
    return kept[0] if len(kept) == 1 else mx.concatenate(kept, axis=1)


def _see(
    model: Model, prompt: Prompt, cancel: threading.Event | None
) -> tuple[np.ndarray, mx.array]:
    """Where placeholders stand, `[P]`, and what the tower sees there, `[P, hidden]`."""
    config = model.config
    pads = (config.image_token_id, config.video_token_id)
    rows = np.flatnonzero(np.isin(prompt.tokens, pads)) if prompt.media else np.zeros(0, np.int64)
    seen = []
    for medium in prompt.media:
        _check(cancel)
        seen.append(model.see(medium.patches, medium.grid))
    features = mx.concatenate(seen) if seen else mx.zeros((0, config.text.hidden_size))
    if len(rows) != features.shape[0]:
        raise ValueError(f"{len(rows)} placeholders for {features.shape[0]} picture rows")
    return rows, features


def generate(
    model: Model,
    prompt: Prompt,
    sampler: Sampler,
    *,
    max_tokens: int,
    cache: Cache,
    clock: Clock,
    progress: ReportProgress | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[int]:
    """Token ids, at most `max_tokens`; the caller stops by closing the iterator.

    While the caller looks at token n, token n + 1 is already being computed.
    Raises: Cancelled between chunks of the prompt and between tokens.
    """
    hidden = read_prompt(model, prompt, cache, progress=progress, cancel=cancel)
    clock.prompt_done = clock.now()
    token = sampler(model.logits(hidden[:, -1]))
    mx.async_eval(token, *sampler.arrays())
    for n in range(max_tokens):
        _check(cancel)
        following = None
        if n + 1 < max_tokens:
            position = np.full((3, 1, 1), cache.length + prompt.delta, np.int32)
            hidden = model(model.embed(token[:, None]), position, cache)
            following = sampler(model.logits(hidden[:, -1]))
            # The states too: they are no part of the token's own graph, and would stay lazy.
            mx.async_eval(following, *cache.arrays(), *sampler.arrays())
        value = token.item()
        assert isinstance(value, int)
        if n == 0:
            clock.first_token = clock.now()
        yield value
        if following is not None:
            token = following


def _check(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("generation: cancelled by the caller.")
