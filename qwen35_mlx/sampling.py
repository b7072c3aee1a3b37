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

# Elements per block in `_largest`: V / 128 block maxima and k * 128 candidates are both about
# 2,000 for the family's vocabulary and k = 20, which one threadgroup sorts.
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
        if self._vocab_size is not None:
            logits = logits[:, : self._vocab_size]
        logits = self._penalised(logits)
        greedy = self._sampling.temperature == 0
        token = mx.argmax(logits, axis=-1) if greedy else self._drawn(logits)
        at = token[:, None]
        if self._generated is not None:
            self._generated = mx.put_along_axis(self._generated, at, mx.array(True), axis=-1)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, at, mx.array(True), axis=-1)
        return token

    def arrays(self) -> list[mx.array]:
        """The sampler's state, to be evaluated together with the token that changed it."""
        return [a for a in (self._key, self._generated, self._seen) if a is not None]

    def _penalised(self, logits: mx.array) -> mx.array:
        """`logits`, or float32 with both penalties taken."""
        presence = self._sampling.presence_penalty
        repetition = self._sampling.repetition_penalty
        if repetition != 1:
            if self._seen is None:
                self._seen = _mask(self._prompt, logits.shape[-1])
            logits = logits.astype(mx.float32)
            changed = mx.where(logits > 0, logits / repetition, logits * repetition)
            logits = mx.where(self._seen, changed, logits)
        if presence != 0:
            if self._generated is None:
                self._generated = _mask((), logits.shape[-1])
            logits = logits.astype(mx.float32) - presence * self._generated
        return logits

    def _drawn(self, logits: mx.array) -> mx.array:
        top_p, top_k, min_p = self._sampling.top_p, self._sampling.top_k, self._sampling.min_p
        size = logits.shape[-1]
        ids: mx.array | None = None
        if 0 < top_k < size or top_p < 1:
            ids = _largest(logits, min(top_k or size, size))
            logits = mx.take_along_axis(logits, ids, axis=-1)
        logits = logits.astype(mx.float32)
        # The largest becomes exactly 0, so that no temperature overflows it.
        logits = logits - logits.max(axis=-1, keepdims=True)
        logits = logits * min(1 / self._sampling.temperature, _STEEPEST)
        if top_p < 1:
            p = mx.softmax(logits, axis=-1)
            # Kept while the sum before a token has not reached top_p: the first always is.
            logits = mx.where(mx.cumsum(p, axis=-1, inclusive=False) < top_p, logits, -mx.inf)
        if min_p > 0:
            logits = mx.where(logits >= math.log(min_p), logits, -mx.inf)
        self._key, key = mx.random.split(self._key)
        choice = mx.random.categorical(logits, key=key)
        if ids is None:
            return choice
        return mx.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]


def _largest(logits: mx.array, k: int) -> mx.array:
    """Ids of the `k` largest of `[1, V]`, largest first, of equals the lower id first: `[1, k]`.

    MLX partitions on the GPU by sorting everything, 248,320 logits for 20 of them. Instead the
    maximum of each block of ids decides which `k` blocks can hold one of the `k` largest (a block
    behind them has `k` better elements before it), and only those are sorted. MLX's sort keeps
    the order of equals, so the result is exactly that of sorting everything.
    """
    size = logits.shape[-1]
    blocks = -(-size // _BLOCK)
    if k >= blocks:
        return mx.argsort(-logits, axis=-1)[:, :k]
    padding = (0, blocks * _BLOCK - size)
    table = mx.pad(logits[0], padding, constant_values=-mx.inf).reshape(blocks, _BLOCK)
    chosen = mx.sort(mx.argsort(-table.max(axis=-1))[:k])
    order = mx.argsort(-table[chosen].reshape(-1))[:k]
    return (chosen[order // _BLOCK] * _BLOCK + order % _BLOCK)[None]


def _mask(ids: Sequence[int] | np.ndarray | mx.array, size: int) -> mx.array:
    """`[1, size]` bool: True at `ids`; ids beyond `size` are ignored."""
    at = ids if isinstance(ids, mx.array) else mx.array(np.asarray(ids, dtype=np.int32))
    mask = mx.zeros((size + 1,), dtype=mx.bool_)
    if at.size:
        mask[mx.minimum(at, size)] = True
    return mask[None, :size]
