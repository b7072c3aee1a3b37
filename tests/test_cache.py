"""Growth, snapshot and restore of what a model remembers."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx import config
from qwen35_mlx.cache import GROWTH, Cache, DeltaState, KVState
from tiny import CONFIGS

TEXT = config.parse(CONFIGS["dense"], "tiny").text


def rows(start: int, stop: int) -> mx.array:
    """Keys and values `[2, 1, 2, T, 3]`, every element naming its kind, head, token and dim."""
    which, head, token, dim = np.meshgrid(
        (1, -1), range(2), range(start, stop), range(3), indexing="ij"
    )
    return mx.array((which * (1e6 * head + 10 * token + dim + 1)).astype(np.float32))[:, None]


def test_appended_rows_survive_growth() -> None:
    state = KVState()
    cuts = [0, 5, 6, GROWTH - 1, GROWTH, GROWTH + 1, 3 * GROWTH]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        keys, values = state.append(rows(start, stop))
    wanted = np.array(rows(0, cuts[-1]))
    assert np.array_equal(np.array(keys), wanted[0])
    assert np.array_equal(np.array(values), wanted[1])


def test_a_buffer_is_not_copied_per_token() -> None:
    state = KVState()
    capacities = set()
    for t in range(3 * GROWTH):
        state.append(rows(t, t + 1))
        assert state.buffer is not None
        capacities.add(state.buffer.shape[3])
    assert len(capacities) <= 3


def test_a_recurrent_state_begins_with_zeros_and_is_then_kept() -> None:
    state = DeltaState(TEXT)
    conv, memory = state.begun(3, mx.bfloat16)
    heads, dims = TEXT.linear_num_value_heads, TEXT.linear_key_head_dim
    assert conv.shape == (3, TEXT.linear_conv_kernel_dim - 1, TEXT.conv_dim)
    assert memory.shape == (3, heads, dims, TEXT.linear_value_head_dim)
    assert (conv.dtype, memory.dtype) == (mx.bfloat16, mx.float32)
    assert not mx.any(conv).item() and not mx.any(memory).item()
    state.conv, state.memory = conv + 1, memory + 2
    assert [a.max().item() for a in state.begun(3, mx.bfloat16)] == [1, 2]


def test_restore_goes_back_to_the_snapshot() -> None:
    cache = Cache(TEXT)
    kv = next(s for s in cache.states if isinstance(s, KVState))
    delta = next(s for s in cache.states if isinstance(s, DeltaState))
    empty = cache.snapshot()
    kv.append(rows(0, 4))
    conv, memory = delta.begun(1, mx.float32)
    delta.conv, delta.memory = conv + 1, memory + 2
    cache.length = 4
    point = cache.snapshot()
    kv.append(rows(50, 53))
    delta.conv, delta.memory = conv + 5, memory + 6
    cache.length = 7
    cache.restore(point)
    assert cache.length == 4 and delta.conv is not None and delta.memory is not None
    assert delta.conv.shape == conv.shape and (delta.conv == 1).all()
    assert delta.memory.shape == memory.shape and (delta.memory == 2).all()
    keys, _ = kv.append(rows(4, 5))
    assert np.array_equal(np.array(keys), np.array(rows(0, 5))[0])
    cache.restore(empty)
    assert cache.length == 0 and delta.conv is None and delta.memory is None


def test_a_snapshot_of_the_future_is_refused() -> None:
    cache = Cache(TEXT)
    cache.length = 3
    point = cache.snapshot()
    cache.length = 2
    with pytest.raises(ValueError, match="3 tokens; cache has 2"):
        cache.restore(point)
