"""Gated DeltaNet between its projections, for the few tokens of decoding and verification."""

import mlx.core as mx

from . import delta_prepare, library
from .fused import silu
from .gated_delta import reference as recurrence

MAX_TOKENS = 8  # q, k and v of so many tokens lie in a threadgroup's memory
MAX_K_DIM, MAX_V_DIM = 128, 256  # Dk / 2 registers of a thread hold the state, 2 Dv threads a head

Stepped = tuple[mx.array, mx.array, mx.array]


def delta_step(
    qkvz: mx.array,
    ba: mx.array,
    conv: mx.array,
    memory: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    *,
    k_heads: int,
    k_dim: int,
    eps: float,
    lengths: mx.array | None = None,
) -> Stepped:
    """`delta_prepare`, the gated delta rule and `rms_norm(o; norm_weight) silu(z)`, as one launch.

    qkvz: `[B, T, 2 Hk Dk + 2 Hv Dv]`, any float: q | k | v | z; ba: `[B, T, 2 Hv]`, any float: the
    logits of beta, then those of the decay; conv: `[B, taps - 1, 2 Hk Dk + Hv Dv]`, type of qkvz:
    the inputs before these; memory: `[B, Hv, Dk, Dv]` f32; conv_weight:
    `[taps, 2 Hk Dk + Hv Dv]`; A_log, dt_bias: `[Hv]`; norm_weight: `[Dv]`; lengths: `[B]` int32,
    the tokens of each row that count (None: all). The others leave conv and memory alone and give
    y = 0, so speculation rolls back to its first n tokens by running again from the old conv and
    memory with lengths = n: bit for bit what running these n alone would give.
    Returns: y `[B, T, Hv Dv]` in qkvz's type, rounded once, and the new conv and memory.
    Source: transformers `Qwen3_5GatedDeltaNet`, which keeps the convolution and the gate product in
    the type of qkvz; here both are f32.
    """
    used = library.uses("delta_step") and fits(qkvz, conv, memory)
    op = launch if used else reference
    return op(
        qkvz,
        ba,
        conv,
        memory,
        conv_weight,
        A_log,
        dt_bias,
        norm_weight,
        k_heads=k_heads,
        k_dim=k_dim,
        eps=eps,
        lengths=lengths,
    )


def reference(
    qkvz: mx.array,
    ba: mx.array,
    conv: mx.array,
    memory: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    *,
    k_heads: int,
    k_dim: int,
    eps: float,
    lengths: mx.array | None = None,
) -> Stepped:
    """`delta_step` in MLX operations, any T."""
    *streams, newest = delta_prepare.reference(
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
    # Zero keys, gates and strengths beyond the lengths leave the state alone.
    o, memory = recurrence(q, k, v, log_g, beta, memory)
    y = gated_norm(o, qkvz, norm_weight, eps)
    if lengths is not None:
        y = mx.where((mx.arange(y.shape[1]) < lengths[:, None])[..., None], y, mx.zeros_like(y))
    return y, newest, memory


def gated_norm(o: mx.array, qkvz: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`rms_norm(o; weight) silu(z)` per head in f32, rounded once. The norm is before the gate.

    o: `[B, T, Hv, Dv]` f32; qkvz: `[B, T, ...]`, z its last Hv Dv; weight: `[Dv]`.
    Returns: `[B, T, Hv Dv]` in qkvz's type.
    """
    B, T, Hv, Dv = o.shape
    z = qkvz[..., -Hv * Dv :].reshape(o.shape).astype(mx.float32)
    normed = mx.fast.rms_norm(o, weight.astype(mx.float32), eps)
    return (normed * silu(z)).astype(qkvz.dtype).reshape(B, T, Hv * Dv)


def fits(qkvz: mx.array, conv: mx.array, memory: mx.array) -> bool:
    """Whether the kernel serves so many tokens and these dims."""
    Dk, Dv = memory.shape[2:]
    return (
        qkvz.shape[1] <= MAX_TOKENS
        and qkvz.dtype == conv.dtype
        and memory.dtype == mx.float32
        and conv.shape[1] > 0
        and Dk <= MAX_K_DIM
        and Dk % 32 == 0
        and Dv <= MAX_V_DIM
        and Dv % 16 == 0
    )


def launch(
    qkvz: mx.array,
    ba: mx.array,
    conv: mx.array,
    memory: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    *,
    k_heads: int,
    k_dim: int,
    eps: float,
    lengths: mx.array | None = None,
) -> Stepped:
    """`delta_step` as one kernel."""
    B, T, _ = qkvz.shape
    _, Hv, Dk, Dv = memory.shape
    arrays = ("qkvz", "ba", "conv", "memory", "conv_weight", "A_log", "dt_bias", "norm_weight")
    outputs = ("y", "next_conv", "next_memory")
    lengths = mx.array([T], dtype=mx.int32) if lengths is None else lengths
    y, newest, state = library.kernel("delta_step", (*arrays, "eps", "lengths"), outputs)(
        inputs=[qkvz, ba, conv, memory, conv_weight, A_log, dt_bias, norm_weight, eps, lengths],
        template=[
            ("X", qkvz.dtype),
            ("HK", k_heads),
            ("HV", Hv),
            ("DK", Dk),
            ("DV", Dv),
            ("TAPS", conv.shape[1] + 1),
        ],
        grid=(2 * Dv, Hv, B),
        threadgroup=(2 * Dv, 1, 1),
        output_shapes=[(B, T, Hv * Dv), conv.shape, memory.shape],
        output_dtypes=[qkvz.dtype, conv.dtype, mx.float32],
    )
    return y, newest, state
