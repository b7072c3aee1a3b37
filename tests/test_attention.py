"""Attention against its definition in float64, whole and by blocks of queries."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.kernels import attention as module
from qwen35_mlx.kernels.attention import attention

TOLERANCE = 1e-5  # relative L2; softmax and two f32 products


def definition(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool
) -> np.ndarray:
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = scale * np.einsum("bhtd,bhsd->bhts", q, k)
    T, S = scores.shape[2:]
    if causal:
        scores[..., np.arange(S)[None] > np.arange(T)[:, None] + S - T] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bhsd->bhtd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 5, 13, 40])
@pytest.mark.parametrize("score_bytes", [module.SCORE_BYTES, 7 * 4 * 2 * 12 * 45])
def test_agrees_with_the_definition(
    T: int, causal: bool, score_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORE_BYTES", score_bytes)
    draw = np.random.default_rng(T)
    q = draw.normal(size=(2, 12, T, 32))
    k, v = draw.normal(size=(2, 2, 3, 45, 32))
    Q, K, V = (mx.array(a.astype(np.float32)) for a in (q, k, v))
    found = np.array(attention(Q, K, V, 0.3, causal))
    wanted = definition(q, k, v, 0.3, causal)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)


def test_a_long_prompt_never_holds_all_scores() -> None:
    """1,024 queries against 8,192 keys: scores of 8 heads would be 268 MB."""
    q, k = mx.zeros((1, 8, 1024, 32)), mx.zeros((1, 2, 8192, 32))
    mx.eval(q, k)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(attention(q, k, k, scale=1.0, causal=True))
    # Scores, their softmax and the mask of one block at a time.
    assert mx.get_peak_memory() - before < 4 * module.SCORE_BYTES
