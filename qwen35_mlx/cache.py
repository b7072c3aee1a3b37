"""What a model remembers of the tokens it has read: keys and values, or a recurrent state."""

from dataclasses import dataclass

import mlx.core as mx

from .config import TextConfig

GROWTH = 256  # tokens; a buffer grows by at least this and by an eighth, so copies stay rare


class KVState:
    """Keys and values of one attention layer, `[2, B, Hk, S, D]`, append-only.

    capacity: tokens that are known to come; room for them is made at once.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self.buffer: mx.array | None = None

    def append(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values `[2, B, Hk, T, D]`; returns all keys and all values so far."""
        start, self.length = self.length, self.length + kv.shape[3]
        self.buffer = self._with_room(kv, start)
        self.buffer[:, :, :, start : self.length] = kv
        return self.buffer[0, :, :, : self.length], self.buffer[1, :, :, : self.length]

    def _with_room(self, fresh: mx.array, used: int) -> mx.array:
        """The buffer, or a larger one that begins with it, of `fresh`'s shape and type."""
        old = self.buffer
        if old is not None and self.length <= old.shape[3]:
            return old
        wanted = max(self.capacity, self.length + max(GROWTH, self.length // 8) * (used > 0))
        *outer, _, D = fresh.shape
        grown = mx.zeros((*outer, -(-wanted // GROWTH) * GROWTH, D), fresh.dtype)
        if old is not None:
            grown[:, :, :, :used] = old[:, :, :, :used]
        return grown

    def arrays(self) -> list[mx.array]:
        return [] if self.buffer is None else [self.buffer]


class DeltaState:
    """State of one Gated DeltaNet layer, empty until the first token.

    `conv`: the last inputs of the convolution, `[B, taps - 1, conv_dim]`, type of the activations.
    `memory`: `[B, Hv, Dk, Dv]` f32.
    """

    def __init__(self, config: TextConfig) -> None:
        self._conv_shape = config.linear_conv_kernel_dim - 1, config.conv_dim
        self._memory_shape = (
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        self.conv: mx.array | None = None
        self.memory: mx.array | None = None

    def begun(self, B: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """`conv` and `memory`; zeros before the first token."""
        if self.conv is None or self.memory is None:
            self.conv = mx.zeros((B, *self._conv_shape), dtype)
            self.memory = mx.zeros((B, *self._memory_shape))
        return self.conv, self.memory

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
