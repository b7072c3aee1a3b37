"""Growth, snapshot and restore of what a model remembers."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx import config
from qwen35_mlx.cache import GROWTH, Cache, DeltaState, KVState
from tiny import CONFIGS

TEXT = config.parse(CONFIGS["dense"], "tiny").text


def rows(start: int, stop: int) -> mx.array:
    """`[1, 2, T, 3]`, every element naming its head, token and dim."""
    head, token, dim = np.meshgrid(range(2), range(start, stop), range(3), indexing="ij")
    return mx.array((1e6 * head + 10 * token + dim).astype(np.float32))[None]


def test_appended_rows_survive_growth() -> None:
    state = KVState()
    cuts = [0, 5, 6, GROWTH - 1, GROWTH, GROWTH + 1, 3 * GROWTH]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        keys, values = state.append(rows(start, stop), -rows(start, stop))
    assert np.array_equal(np.array(keys), np.array(rows(0, cuts[-1])))
    assert np.array_equal(np.array(values), -np.array(rows(0, cuts[-1])))


def test_a_buffer_is_not_copied_per_token() -> None:
    state = KVState()
    capacities = set()
    for t in range(3 * GROWTH):
        state.append(rows(t, t + 1), rows(t, t + 1))
        assert state.keys is not None
        capacities.add(state.keys.shape[2])
    assert len(capacities) <= 3


def test_window_carries_the_last_inputs_over() -> None:
    state = DeltaState(TEXT)
    u = mx.array(np.random.default_rng(0).normal(size=(1, 9, TEXT.conv_dim)).astype(np.float32))
    state.window(u[:, :2])
    state.window(u[:, 2:3])
    window = state.window(u[:, 3:])
    assert np.array_equal(np.array(window), np.array(u))


def test_restore_goes_back_to_the_snapshot() -> None:
    cache = Cache(TEXT)
    kv = next(s for s in cache.states if isinstance(s, KVState))
    delta = next(s for s in cache.states if isinstance(s, DeltaState))
    kv.append(rows(0, 4), rows(0, 4))
    cache.length = 4
    point = cache.snapshot()
    kv.append(rows(50, 53), rows(50, 53))
    delta.window(mx.ones((1, 3, TEXT.conv_dim)))
    delta.memory = mx.ones((1, 2, 3, 4))
    cache.length = 7
    cache.restore(point)
    assert cache.length == 4 and delta.conv is None and delta.memory is None
    keys, _ = kv.append(rows(4, 5), rows(4, 5))
    assert np.array_equal(np.array(keys), np.array(rows(0, 5)))


def test_a_snapshot_of_the_future_is_refused() -> None:
    cache = Cache(TEXT)
    cache.length = 3
    point = cache.snapshot()
    cache.length = 2
    with pytest.raises(ValueError, match="3 tokens; cache has 2"):
        cache.restore(point)
