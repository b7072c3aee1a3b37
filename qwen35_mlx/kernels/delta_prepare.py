"""From the projections of Gated DeltaNet to the inputs of its recurrence."""

import mlx.core as mx

from . import library
from .fused import fused, silu

L2_EPS = 1e-6  # added to the sum of squares, not to their mean
MAX_DIM = 256  # a lane holds 9 values per 32 channels of a head in registers
SHORT = 256  # tokens; below this runs are short, so that there are enough of them for a GPU

Prepared = tuple[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array]


def delta_prepare(
    qkvz: mx.array,
    ba: mx.array,
    conv: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *,
    k_heads: int,
    k_dim: int,
    lengths: mx.array | None = None,
) -> Prepared:
    """Causal depthwise convolution with SiLU, l2 norms of q and k, and the gates, for T tokens.

    qkvz: `[B, T, 2 Hk Dk + 2 Hv Dv]`, any float: q | k | v | z; ba: `[B, T, 2 Hv]`, any float: the
    logits of beta, then those of the decay; conv: `[B, taps - 1, 2 Hk Dk + Hv Dv]`, type of qkvz:
    the inputs before these; conv_weight: `[taps, 2 Hk Dk + Hv Dv]`, the last tap is the present;
    A_log, dt_bias: `[Hv]`; lengths: `[B]` int32, the tokens of each row that count (None: all).
    Returns: q `[B, T, Hk, Dk]` normalised and scaled by Dk^-0.5; k, the same shape, normalised;
    v `[B, T, Hv, Dv]`; log_g and beta `[B, T, Hv]`; and the last taps - 1 inputs that counted, in
    the shape and type of conv. All but the last are f32, and zero beyond the lengths. f32 though it
    doubles the bytes: q, k and v rounded to bf16 would cost the state 2.5e-3.
    Source: transformers `Qwen3_5GatedDeltaNet`, which rounds the convolution to qkvz's type.
    """
    used = library.uses("delta_prepare") and fits(qkvz, conv, A_log, k_heads, k_dim)
    op = launch if used else reference
    return op(
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


def reference(
    qkvz: mx.array,
    ba: mx.array,
    conv: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *,
    k_heads: int,
    k_dim: int,
    lengths: mx.array | None = None,
) -> Prepared:
    """`delta_prepare` in MLX operations."""
    B, T, _ = qkvz.shape
    taps, channels = conv_weight.shape
    Hv, keys = A_log.shape[0], k_heads * k_dim
    window = mx.concatenate([conv, qkvz[..., :channels]], axis=1)
    mixed = silu(_convolve(window, conv_weight))
    q, k, v = mx.split(mixed, [keys, 2 * keys], axis=-1)
    q = _unit(q.reshape(B, T, k_heads, k_dim)) * k_dim**-0.5
    k = _unit(k.reshape(B, T, k_heads, k_dim))
    v = v.reshape(B, T, Hv, -1)
    beta = mx.sigmoid(ba[..., :Hv].astype(mx.float32))
    log_g = log_decay(ba[..., Hv:], A_log, dt_bias)
    if lengths is None:
        # A copy: a slice would keep the whole prompt's window alive.
        return q, k, v, log_g, beta, mx.contiguous(window[:, -(taps - 1) :])
    counted = (mx.arange(T) < lengths[:, None])[..., None]
    q, k, v = (mx.where(counted[..., None], x, 0.0) for x in (q, k, v))
    log_g, beta = (mx.where(counted, x, 0.0) for x in (log_g, beta))
    newest = lengths[:, None] + mx.arange(taps - 1)
    return q, k, v, log_g, beta, mx.take_along_axis(window, newest[..., None], axis=1)


def _convolve(window: mx.array, weight: mx.array) -> mx.array:
    """`[B, taps - 1 + T, channels]` with `[taps, channels]` -> `[B, T, channels]` f32."""
    taps = weight.shape[0]
    T = window.shape[1] - taps + 1
    window, weight = window.astype(mx.float32), weight.astype(mx.float32)
    out = weight[0] * window[:, :T]
    for j in range(1, taps):
        out = out + weight[j] * window[:, j : j + T]
    return out


def _unit(x: mx.array) -> mx.array:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last axis."""
    D = x.shape[-1]
    # As one rms_norm: mean(x^2) + eps / D is (sum(x^2) + eps) / D.
    return mx.fast.rms_norm(x, None, L2_EPS / D) * D**-0.5


@fused
def log_decay(a: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    """`-exp(A_log) softplus(a + dt_bias)` in f32, at most 0; in bf16 its error reaches 6%."""
    rate = mx.exp(A_log.astype(mx.float32))
    return -rate * mx.logaddexp(a.astype(mx.float32) + dt_bias.astype(mx.float32), 0.0)


def fits(qkvz: mx.array, conv: mx.array, A_log: mx.array, k_heads: int, k_dim: int) -> bool:
    """Whether the kernel serves these types and dims."""
    values = (conv.shape[2] - 2 * k_heads * k_dim) // A_log.shape[0]
    return qkvz.dtype == conv.dtype and max(k_dim, values) <= MAX_DIM and conv.shape[1] > 0


def launch(
    qkvz: mx.array,
    ba: mx.array,
    conv: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *,
    k_heads: int,
    k_dim: int,
    lengths: mx.array | None = None,
) -> Prepared:
    """`delta_prepare` as one kernel."""
    B, T, _ = qkvz.shape
    Hv, Hk, Dk = A_log.shape[0], k_heads, k_dim
    Dv = (conv.shape[2] - 2 * Hk * Dk) // Hv
    run = 8 if T < SHORT else 32
    names = ("qkvz", "ba", "conv", "conv_weight", "A_log", "dt_bias", "lengths")
    outputs = ("q", "k", "v", "log_g", "beta", "next_conv")
    lengths = mx.array([T], dtype=mx.int32) if lengths is None else lengths
    keys, gates = (B, T, Hk, Dk), (B, T, Hv)
    q, k, v, log_g, beta, newest = library.kernel("delta_prepare", names, outputs)(
        inputs=[qkvz, ba, conv, conv_weight, A_log, dt_bias, lengths],
        template=[
            ("X", qkvz.dtype),
            ("HK", Hk),
            ("HV", Hv),
            ("DK", Dk),
            ("DV", Dv),
            ("TAPS", conv.shape[1] + 1),
            ("RUN", run),
        ],
        grid=(32, 2 * Hk + Hv + 1, B * -(-T // run)),
        threadgroup=(32, 8, 1),
        output_shapes=[keys, keys, (B, T, Hv, Dv), gates, gates, conv.shape],
        output_dtypes=[mx.float32] * 5 + [conv.dtype],
    )
    return q, k, v, log_g, beta, newest
