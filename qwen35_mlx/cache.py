"""What a model remembers of the tokens it has read: keys and values, or a recurrent state."""

from dataclasses import dataclass

import mlx.core as mx

from .config import TextConfig

GROWTH = 256  # tokens; a buffer grows by at least this and by an eighth, so copies stay rare


class KVState:
    """Keys and values of one attention layer, `[B, Hk, S, D]`, append-only.

    capacity: tokens that are known to come; room for them is made at once.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Add `[B, Hk, T, D]`; returns all keys and values so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys = self._with_room(self.keys, k, start)
        self.values = self._with_room(self.values, v, start)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _with_room(self, old: mx.array | None, fresh: mx.array, used: int) -> mx.array:
        """`old`, or a larger buffer that begins with it, of `fresh`'s shape and type."""
        if old is not None and self.length <= old.shape[2]:
            return old
        B, H, _, D = fresh.shape
        wanted = max(self.capacity, self.length + max(GROWTH, self.length // 8) * (used > 0))
        grown = mx.zeros((B, H, -(-wanted // GROWTH) * GROWTH, D), fresh.dtype)
        if old is not None:
            grown[:, :, :used] = old[:, :, :used]
        return grown

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]


class DeltaState:
    """State of one Gated DeltaNet layer, empty until the first token.

    `conv`: the last inputs of the convolution, `[B, taps - 1, conv_dim]`, type of the activations.
    `memory`: `[B, Hv, Dk, Dv]` f32.
    """

    def __init__(self, config: TextConfig) -> None:
        self.taps = config.linear_conv_kernel_dim
        self.conv: mx.array | None = None
        self.memory: mx.array | None = None

    def window(self, u: mx.array) -> mx.array:
        """The last inputs followed by `u [B, T, conv_dim]`; remembers its last ones."""
        if self.conv is None:
            self.conv = mx.zeros((u.shape[0], self.taps - 1, u.shape[2]), u.dtype)
        window = mx.concatenate([self.conv, u], axis=1)
        # A copy: a slice would keep the whole prompt's window alive.
        self.conv = mx.contiguous(window[:, -(self.taps - 1) :])
        return window

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.conv, self.memory) if a is not None]


@dataclass(frozen=True)
class Snapshot:
    """A point in a conversation: how many tokens were read, and the small recurrent states."""

    length: int
    deltas: tuple[tuple[mx.array | None, mx.array | None], ...]


class Cache:
    """All layers' states; `length` counts the tokens read. capacity: tokens known to come."""

    def __init__(self, config: TextConfig, capacity: int = 0) -> None:
        self.states = [
            KVState(capacity) if full else DeltaState(config) for full in config.is_full_attention
        ]
        self.length = 0

    def snapshot(self) -> Snapshot:
        """Remember this point. KV is append-only, so its length is enough; states are kept."""
        deltas = [(s.conv, s.memory) for s in self.states if isinstance(s, DeltaState)]
        return Snapshot(self.length, tuple(deltas))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`, which must be of this cache and not ahead of it."""
        if snapshot.length > self.length:
            raise ValueError(f"snapshot at {snapshot.length} tokens; cache has {self.length}")
        deltas = iter(snapshot.deltas)
        for state in self.states:
            if isinstance(state, DeltaState):
                state.conv, state.memory = next(deltas)
            else:
                state.length = snapshot.length
        self.length = snapshot.length

    def arrays(self) -> list[mx.array]:
        """Every array held, to be evaluated together with the tokens that made it."""
        return [a for state in self.states for a in state.arrays()]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())
