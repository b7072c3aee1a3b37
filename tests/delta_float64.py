"""Gated DeltaNet between its projections, token by token in float64: the yardstick of its kernels.

Also random arguments for them, and what their results may be off.
Names and shapes are those of the kernels: `B` rows, `T` tokens, `Hk` and `Hv` key and value heads,
`Dk` and `Dv` their dims. Arrays of any float type come in (bf16 values as f32), float64 goes out.
`lengths [B]` counts the tokens of each row that matter; without it all do.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from kernel_checks import TYPES, as_float64, mlx_array, rounding, silu
from qwen35_mlx.kernels.delta_prepare import Prepared
from qwen35_mlx.kernels.delta_step import Stepped

Array = np.ndarray
Given = dict[str, Any]  # arguments of an op by name: arrays of MLX, and numbers
Result = TypeVar("Result")
L2_EPS = EPS = 1e-6
# f32 sums of up to 256 terms, relative to the largest value of a head or row.
TOLERANCE = 1e-5

# Ranges of the decay's logits; exp(A_log) lies between 1 and 16.
DECAYS = {"mixed": (-6.0, 2.0), "near 0": (3.0, 30.0), "near 1": (-24.0, -8.0)}
# Key and value heads of the eight sizes, whole, halved and quartered.
HEADS = [(16 // n, Hv // n) for Hv in (16, 32, 48, 64) for n in (1, 2, 4)]


def step_arguments(
    shape: tuple[int, ...],
    kind: str,
    kinds: dict[str, str] | None = None,
    *,
    taps: int = 4,
    magnitude: float = 1.0,
    decay: str = "mixed",
) -> Given:
    """Random arguments of `delta_step`; magnitude: of q | k | v before their norms.

    In the types that a model of activations `kind` has them in, or in those of `kinds`.
    """
    B, T, Hk, Hv, Dk, Dv = shape
    random = np.random.default_rng(0)
    channels = 2 * Hk * Dk + Hv * Dv

    def normal(*shape: int) -> Array:
        return random.normal(size=shape)

    logits = [normal(B, T, Hv) * 4, random.uniform(*DECAYS[decay], (B, T, Hv))]
    mixed = magnitude * normal(B, taps - 1 + T, channels)
    arrays = {
        "qkvz": np.concatenate([mixed[:, taps - 1 :], normal(B, T, Hv * Dv)], axis=-1),
        "ba": np.concatenate(logits, axis=-1),
        "conv": mixed[:, : taps - 1],
        "memory": normal(B, Hv, Dk, Dv),
        "conv_weight": 0.5 * normal(taps, channels),
        "A_log": np.log(random.uniform(1, 16, Hv)),
        "dt_bias": 0.5 * normal(Hv),
        "norm_weight": 1 + 0.2 * normal(Dv),
    }
    f32 = dict.fromkeys(("memory", "A_log", "norm_weight"), "float32")
    named = dict.fromkeys(arrays, kind) | f32 | (kinds or {})
    given = {name: mlx_array(value, TYPES[named[name]]) for name, value in arrays.items()}
    return given | {"k_heads": Hk, "k_dim": Dk, "eps": EPS}


def prepare_arguments(shape: tuple[int, ...], kind: str, *kinds: Any, **how: Any) -> Given:
    """Random arguments of `delta_prepare`: those of `delta_step` that it takes."""
    given = step_arguments(shape, kind, *kinds, **how)
    return {name: given[name] for name in given if name not in ("memory", "norm_weight", "eps")}


def call(op: Callable[..., Result], given: Given, lengths: Any = None) -> Result:
    counted = None if lengths is None else mx.array(lengths, dtype=mx.int32)
    found = op(**given, lengths=counted)
    mx.eval(found)
    return found


def exactly(given: Given) -> Given:
    """The arrays in float64."""
    return {k: as_float64(v) if isinstance(v, mx.array) else v for k, v in given.items()}


def nbytes(given: Given) -> int:
    """Of the arrays."""
    return sum(v.nbytes for v in given.values() if isinstance(v, mx.array))


def agree(found: mx.array, wanted: Array) -> None:
    """Raises AssertionError unless `found` is `wanted`, rounded once to its type."""
    assert found.shape == wanted.shape
    largest = np.abs(wanted).max(-1, keepdims=True)
    allowed = rounding(wanted, found.dtype) + TOLERANCE * largest
    error = np.abs(as_float64(found) - wanted)
    worst = np.unravel_index(np.nan_to_num(error - allowed, nan=np.inf).argmax(), error.shape)
    assert (error <= allowed).all(), f"{found[worst]} for {wanted[worst]} at {worst}"


def prepared_agrees(found: Prepared, given: Given, lengths: Any = None) -> None:
    *streams, conv = prepare(**exactly(given), lengths=lengths)
    for name, value, wanted in zip(["q", "k", "v", "log_g", "beta"], found, streams, strict=False):
        assert value.dtype == mx.float32, name
        # Gates of a token differ by orders of magnitude: each is compared with itself.
        is_gate = wanted.ndim == 3
        agree(value[..., None] if is_gate else value, wanted[..., None] if is_gate else wanted)
        if lengths is not None:
            assert all(not value[b, n:].any() for b, n in enumerate(lengths)), name
    assert found[5].dtype == given["conv"].dtype
    assert np.array_equal(as_float64(found[5]), conv)


def step_agrees(found: Stepped, given: Given, lengths: Any = None) -> None:
    y, conv, memory = step(**exactly(given), lengths=lengths)
    assert found[0].dtype == found[1].dtype == given["qkvz"].dtype
    # By token, not by head: of a head whose q and k happen to be orthogonal the norm shows the
    # rounding of q . k at its full size.
    agree(found[0], y)
    assert np.array_equal(as_float64(found[1]), conv)
    agree(found[2].flatten(-2), memory.reshape(*memory.shape[:2], -1))


def counts(lengths: Array | None, B: int, T: int) -> Array:
    """`[B]` tokens of each row that count."""
    return np.full(B, T) if lengths is None else np.asarray(lengths, dtype=int)


def recurrence(
    q: Array,
    k: Array,
    v: Array,
    log_g: Array,
    beta: Array,
    state: Array | None,
    lengths: Array | None = None,
) -> tuple[Array, Array]:
    """The gated delta rule: decay, read, correct, read again.

    q, k: `[B, T, Hk, Dk]`, normalised, q scaled; v: `[B, T, Hv, Dv]`; log_g, beta: `[B, T, Hv]`;
    state: `[B, Hv, Dk, Dv]`, None for zeros. Tokens beyond a row's length leave its state alone.
    Returns: o `[B, T, Hv, Dv]`, zero beyond the lengths, and the state after the last token.
    """
    q, k, v, log_g, beta = (np.asarray(a, dtype=np.float64) for a in (q, k, v, log_g, beta))
    B, T, Hv, Dv = v.shape
    group = Hv // k.shape[2]
    q, k = np.repeat(q, group, axis=2), np.repeat(k, group, axis=2)
    S = np.zeros((B, Hv, k.shape[3], Dv)) if state is None else np.array(state, dtype=np.float64)
    out = np.zeros_like(v)
    for b, n in enumerate(counts(lengths, B, T)):
        for t in range(n):
            S[b] *= np.exp(log_g[b, t])[:, None, None]
            delta = beta[b, t, :, None] * (v[b, t] - np.einsum("hkv,hk->hv", S[b], k[b, t]))
            S[b] += k[b, t, :, :, None] * delta[:, None, :]
            out[b, t] = np.einsum("hkv,hk->hv", S[b], q[b, t])
    return out, S


def prepare(
    qkvz: Array,
    ba: Array,
    conv: Array,
    conv_weight: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    k_heads: int,
    k_dim: int,
    lengths: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Convolution, SiLU, l2 norms and gates: q, k, v, log_g, beta and the next `conv`.

    qkvz: `[B, T, 2 Hk Dk + 2 Hv Dv]`; ba: `[B, T, 2 Hv]`; conv: `[B, taps - 1, channels]`;
    conv_weight: `[taps, channels]`; A_log, dt_bias: `[Hv]`. All are zero beyond the lengths.
    """
    qkvz, ba, conv, conv_weight, A_log, dt_bias = (
        np.asarray(a, dtype=np.float64) for a in (qkvz, ba, conv, conv_weight, A_log, dt_bias)
    )
    B, T = qkvz.shape[:2]
    taps, channels = conv_weight.shape
    Hv, keys = A_log.shape[0], k_heads * k_dim
    window = np.concatenate([conv, qkvz[..., :channels]], axis=1)
    mixed = np.zeros((B, T, channels))
    for t in range(T):
        mixed[:, t] = silu((conv_weight * window[:, t : t + taps]).sum(1))
    q, k = mixed[..., :keys], mixed[..., keys : 2 * keys]
    q, k = (_unit(x.reshape(B, T, k_heads, k_dim)) for x in (q, k))
    v = mixed[..., 2 * keys :].reshape(B, T, Hv, -1)
    beta = 1 / (1 + np.exp(-ba[..., :Hv]))
    log_g = -np.exp(A_log) * np.logaddexp(ba[..., Hv:] + dt_bias, 0)
    streams = [q * k_dim**-0.5, k, v, log_g, beta]
    n = counts(lengths, B, T)
    for stream in streams:
        for b in range(B):
            stream[b, n[b] :] = 0
    newest = np.stack([window[b, n[b] : n[b] + taps - 1] for b in range(B)])
    return streams[0], streams[1], streams[2], streams[3], streams[4], newest


def _unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + L2_EPS)


def step(
    qkvz: Array,
    ba: Array,
    conv: Array,
    memory: Array,
    conv_weight: Array,
    A_log: Array,
    dt_bias: Array,
    norm_weight: Array,
    *,
    k_heads: int,
    k_dim: int,
    eps: float,
    lengths: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The whole mixer between its projections: y `[B, T, Hv Dv]`, conv and memory."""
    *streams, newest = prepare(
        qkvz,
        ba,
        conv,
        conv_weight,
        A_log,
        dt_bias,
        k_heads=k_heads,
        k_dim=k_dim,
        lengths=lengths,
    )
    q, k, v, log_g, beta = streams
    o, memory = recurrence(q, k, v, log_g, beta, memory, lengths)
    z = np.asarray(qkvz, dtype=np.float64)[..., conv.shape[2] :].reshape(o.shape)
    normed = o / np.sqrt((o * o).mean(-1, keepdims=True) + eps)
    y = normed * np.asarray(norm_weight, dtype=np.float64) * silu(z)
    return y.reshape(*qkvz.shape[:2], -1), newest, memory
