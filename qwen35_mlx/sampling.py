"""How the next token is drawn from the logits.

    l   logits of the ids the tokenizer knows                         [V]
    l = l / r where l > 0, l * r where l <= 0     for ids in the prompt or the output so far
    l = l - presence                              for ids in the output so far
    l = l / temperature, the k largest, p = softmax(l)
    top-p: the fewest of the largest p whose sum reaches top_p
    min-p: those with p >= min_p * max p
    draw from what is left, renormalised

Nothing here is evaluated: the engine queues the step that follows while the drawn token is read.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .errors import InputError
from .kernels.fused import fused
from .kernels.top_k import top_k

# Random numbers are made for so many tokens at once: it takes as many launches as for one.
_BLOCK = 128
# One over a temperature too small for float32 must not become infinite: 0 * inf is NaN.
_STEEPEST = 1e38


LARGEST = 1e30  # of any of the values; far beyond what changes anything


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. A value that is left at its "off" setting costs nothing.

    temperature: 0 takes the most likely token (greedy; penalties still apply).
    top_p: above 0, up to 1 (off).
    top_k: how many tokens remain; 0 is no limit.
    min_p: 0 (off) to 1, relative to the most likely token.
    presence_penalty: -2 to 2, taken off once from every id that was generated; 0 is off. The
        prompt does not count (OpenAI's and vLLM's definition).
    repetition_penalty: above 0; divides or multiplies the logits of every id in the prompt or
        the output; 1 is off (the definition of transformers).
    seed: 0 to 2**64 - 1: the same seed and the same logits give the same tokens. None: new
        randomness each time.

    Raises: InputError for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._require("temperature", "a number from 0 up", "Use 0 for greedy.", low=0.0)
        self._require("top_p", "above 0 and at most 1", "Use 1 for no limit.", above=0.0, high=1.0)
        self._require("min_p", "0 to 1", "Use 0 for no limit.", low=0.0, high=1.0)
        self._require("presence_penalty", "-2 to 2", "Use 0 for none.", low=-2.0, high=2.0)
        self._require(
            "repetition_penalty",
            "above 0 and at most 100",
            "Use 1 for none.",
            above=0.0,
            high=100.0,
        )
        self._require_integer("top_k", 2**31 - 1, "Use 0 for no limit.")
        if self.seed is not None:
            self._require_integer("seed", 2**64 - 1, "Use None for a random one.")

    def _require(
        self,
        name: str,
        expected: str,
        remedy: str,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared, not converted: an int may be too large for a float. NaN compares false.
        if not number or not (low <= value <= high and value > above and abs(value) < LARGEST):
            raise InputError(f"sampling: {name} is {value!r}; expected {expected}. {remedy}")

    def _require_integer(self, name: str, high: int, remedy: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
            raise InputError(
                f"sampling: {name} is {value!r}; expected an integer from 0 to {high}. {remedy}"
            )


class Sampler:
    """Draws the tokens of one output, one after the other.

    sampling: the values to use.
    vocab_size: number of ids the tokenizer knows; rows of the logits above it are padding and
        never drawn. None: all rows are ids.
    prompt_tokens: `[T]` ids of the prompt, for the repetition penalty.

    Ids once drawn are kept on the device as a mask, which is only there if a penalty needs it.
    Source: the order and definitions agree with vLLM's sampler and transformers' logits
    processors, except that the k largest are taken before the division by the temperature, which
    keeps their order, and that of equal logits at the edge of top-k the lower ids stay (vLLM
    keeps all of them).
    """

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int | None = None,
        prompt_tokens: Sequence[int] | np.ndarray | mx.array = (),
    ) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._prompt = prompt_tokens
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._key = mx.random.key(seed)
        mx.eval(self._key)  # a lazy key would bind the sampler to this thread
        self._uniform: mx.array | None = None  # `[_BLOCK]` f32 in [0, 1), one for each token
        self._used = 0  # of these
        self._generated: mx.array | None = None  # `[1, V]` bool: drawn so far
        self._seen: mx.array | None = None  # `[1, V]` bool: the same and the prompt's

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, not evaluated, and recorded for the penalties of the one after.

        logits: `[1, V]`, any floating type.

        Returns: `[1]` uint32.
        Raises: ValueError for another shape.
        """
        if logits.ndim != 2 or logits.shape[0] != 1:
            raise ValueError(f"Sampler: logits have shape {logits.shape}; expected [1, V].")
        size = min(self._vocab_size or logits.shape[1], logits.shape[1])
        logits = self._penalised(logits)
        if self._sampling.temperature == 0:
            token = mx.argmax(logits[:, :size], axis=-1)
        else:
            token = drawn(logits, size, self._sampling, self._random())
        at = token[:, None]
        if self._generated is not None:
            self._generated = mx.put_along_axis(self._generated, at, mx.array(True), axis=-1)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, at, mx.array(True), axis=-1)
        return token

    def arrays(self) -> list[mx.array]:
        """The sampler's state, to be evaluated together with the token that changed it."""
        state = self._key, self._uniform, self._generated, self._seen
        return [a for a in state if a is not None]

    def _random(self) -> mx.array:
        """The next number, `[1]`, which leaves `arrays` as they are but for each `_BLOCK`-th."""
        if self._uniform is None or self._used == _BLOCK:
            self._key, key = mx.random.split(self._key)
            self._uniform, self._used = mx.random.uniform(shape=(_BLOCK,), key=key), 0
        self._used += 1
        return self._uniform[self._used - 1 : self._used]

    def _penalised(self, logits: mx.array) -> mx.array:
        """`logits`, or float32 with both penalties taken."""
        presence = self._sampling.presence_penalty
        repetition = self._sampling.repetition_penalty
        if repetition != 1 and self._seen is None:
            self._seen = _mask(self._prompt, logits.shape[-1])
        if presence != 0 and self._generated is None:
            self._generated = _mask((), logits.shape[-1])
        # As arrays: a number would be part of the compiled function, and each its own compilation.
        if self._seen is None and self._generated is None:
            return logits
        if self._seen is None:
            return _without_presence(logits, self._generated, mx.array(presence))
        if self._generated is None:
            return _without_repetition(logits, self._seen, mx.array(repetition))
        factor, amount = mx.array(repetition), mx.array(presence)
        return _without_both(logits, self._seen, factor, self._generated, amount)


def drawn(logits: mx.array, size: int, sampling: Sampling, u: mx.array) -> mx.array:
    """The ids that the numbers `u` stand for.

    logits: `[1, V]` with penalties taken, of which the first `size` count. sampling: at a
    temperature above 0. u: `[N]` f32 in [0, 1), each the share of the probability left that lies
    before the token, likelier ones first, or by id where nothing had to be sorted.

    Returns: `[N]` uint32.
    """
    top_p, min_p = sampling.top_p, mx.array(sampling.min_p)
    k = min(sampling.top_k or size, size)
    ids: mx.array | None = None
    if k < size or top_p < 1:
        values, ids = top_k(logits, k, size)
        largest = values[:, :1]
    else:
        values = logits[:, :size]
        largest = values.max(axis=-1, keepdims=True)
    steepness = mx.array(min(1 / sampling.temperature, _STEEPEST))
    if top_p < 1:
        weights = _powers(values, largest, steepness, mx.array(0.0))
        sums = mx.cumsum(weights, axis=-1)
        # The sorted prefix that is left; behind it 0.
        sums = weights = _reached(weights, sums, sums[:, -1:], mx.array(top_p), min_p)
        total = sums.max(axis=-1, keepdims=True)
    else:
        weights = _powers(values, largest, steepness, min_p)
        sums = mx.cumsum(weights, axis=-1)
        total = sums[:, -1:]
    choice = mx.argmax(_ranks(weights, sums, u[:, None], total), axis=-1)
    return choice if ids is None else ids[0][choice]


@fused
def _without_repetition(logits: mx.array, seen: mx.array, repetition: mx.array) -> mx.array:
    x = logits.astype(mx.float32)
    return mx.where(seen, mx.where(x > 0, x / repetition, x * repetition), x)


@fused
def _without_presence(logits: mx.array, generated: mx.array, presence: mx.array) -> mx.array:
    return logits.astype(mx.float32) - presence * generated


@fused
def _without_both(
    logits: mx.array,
    seen: mx.array,
    repetition: mx.array,
    generated: mx.array,
    presence: mx.array,
) -> mx.array:
    logits = _without_repetition(logits, seen, repetition)
    return _without_presence(logits, generated, presence)


@fused
def _powers(logits: mx.array, largest: mx.array, steepness: mx.array, min_p: mx.array) -> mx.array:
    """p / max p, or 0 below `min_p`."""
    # The largest becomes exactly 0, so that no temperature overflows it.
    p = mx.exp((logits.astype(mx.float32) - largest.astype(mx.float32)) * steepness)
    return mx.where(p >= min_p, p, 0.0)


@fused
def _reached(
    p: mx.array, sums: mx.array, total: mx.array, top_p: mx.array, min_p: mx.array
) -> mx.array:
    """`sums`, or 0 where what lies before has reached `top_p` or p is below `min_p`."""
    return mx.where((sums - p < top_p * total) & (p >= min_p), sums, 0.0)


@fused
def _ranks(weights: mx.array, sums: mx.array, u: mx.array, total: mx.array) -> mx.array:
    """The first of the largest is drawn: 2 behind `u`, 1 before it, 0 where no weight is.

    With u < 1 also u * total is below total in f32. But a GPU adds in blocks, and where a sum is a
    rounding too small or large a token without weight must not be the one.
    """
    found = mx.where(sums > u * total, 2.0, 1.0)
    return mx.where(weights > 0, found, 0.0)


def _mask(ids: Sequence[int] | np.ndarray | mx.array, size: int) -> mx.array:
    """`[1, size]` bool: True at `ids`; ids beyond `size` are ignored."""
    at = ids if isinstance(ids, mx.array) else mx.array(np.asarray(ids, dtype=np.int32))
    mask = mx.zeros((size + 1,), dtype=mx.bool_)
    if at.size:
        mask[mx.minimum(at, size)] = True
    return mask[None, :size]
