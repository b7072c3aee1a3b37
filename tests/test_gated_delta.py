"""The gated delta rule against its definition, token by token in float64."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.kernels.gated_delta import CHUNK, gated_delta

Arrays = tuple[np.ndarray, ...]
TOLERANCE = 1e-5  # relative L2; f32 sums of up to 300 terms, and a triangular inverse per chunk


def inputs(T: int, B: int = 2, Hk: int = 3, Hv: int = 12, Dk: int = 16, Dv: int = 24) -> Arrays:
    draw = np.random.default_rng(T)
    q, k = draw.normal(size=(2, B, T, Hk, Dk))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = draw.normal(size=(B, T, Hv, Dv))
    log_g = np.log(draw.uniform(0.01, 0.9999, size=(B, T, Hv)))
    beta = draw.uniform(0.01, 0.99, size=(B, T, Hv))
    state = draw.normal(size=(B, Hv, Dk, Dv))
    return q, k, v, log_g, beta, state


def definition(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, log_g: np.ndarray, beta: np.ndarray, S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    group = v.shape[2] // k.shape[2]
    q, k = np.repeat(q, group, axis=2), np.repeat(k, group, axis=2)
    out = np.zeros_like(v)
    for t in range(v.shape[1]):
        S = S * np.exp(log_g[:, t])[..., None, None]
        read = np.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - read))
        out[:, t] = np.einsum("bhkv,bhk->bhv", S, q[:, t])
    return out, S


def run(arrays: Arrays) -> Arrays:
    q, k, v, log_g, beta, state = (mx.array(a.astype(np.float32)) for a in arrays)
    return tuple(np.array(a) for a in gated_delta(q, k, v, log_g, beta, state))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 31, CHUNK - 1, CHUNK, CHUNK + 1, 131, 300])
def test_agrees_with_the_definition(T: int) -> None:
    arrays = inputs(T)
    out, state = run(arrays)
    wanted_out, wanted_state = definition(*arrays)
    assert error(out, wanted_out) < TOLERANCE
    assert error(state, wanted_state) < TOLERANCE


def test_repeated_keys_with_full_strength_do_not_cancel() -> None:
    """Equal keys, beta 1 and no decay: powers of a whole chunk's matrix would reach 1e18."""
    q, k, v, log_g, beta, state = inputs(128)
    k[:] = k[:, :1]
    log_g[:] = 0
    beta[:] = 1
    out, memory = run((q, k, v, log_g, beta, state))
    wanted_out, wanted_memory = definition(q, k, v, log_g, beta, state)
    assert error(out, wanted_out) < TOLERANCE
    assert error(memory, wanted_memory) < TOLERANCE


def test_complete_forgetting_stays_finite() -> None:
    q, k, v, log_g, beta, state = inputs(130)
    log_g[:] = -80.0
    out, memory = run((q, k, v, log_g, beta, state))
    wanted_out, wanted_memory = definition(q, k, v, log_g, beta, state)
    assert error(out, wanted_out) < TOLERANCE
    assert error(memory, wanted_memory) < TOLERANCE


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_two_calls_equal_one(cut: int) -> None:
    arrays = inputs(150)
    *streams, state = arrays
    whole, end = run(arrays)
    first, middle = run((*(a[:, :cut] for a in streams), state))
    second, last = run((*(a[:, cut:] for a in streams), middle))
    assert error(np.concatenate([first, second], axis=1), whole) < TOLERANCE
    assert error(last, end) < TOLERANCE


def test_a_thousand_steps_keep_the_state() -> None:
    """Slow decay over 4,096 tokens, where bf16 gates would lose the state."""
    arrays = inputs(4096, B=1, Hk=2, Hv=6)
    arrays[3][:] = np.log(0.999)
    out, state = run(arrays)
    wanted_out, wanted_state = definition(*arrays)
    assert error(out, wanted_out) < TOLERANCE
    assert error(state, wanted_state) < TOLERANCE
