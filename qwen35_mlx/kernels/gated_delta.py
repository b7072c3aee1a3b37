"""The gated delta rule: a matrix-valued state that decays, is read, corrected and read again.

Per value head, with state S `[Dk, Dv]`, decay `exp(log_g) <= 1` and write strength beta:

    S <- exp(log_g_t) S
    S <- S + k_t (beta_t (v_t - S^T k_t))^T
    o_t = S^T q_t

Everything is f32: in bf16 the decay alone loses the state within a thousand tokens.
"""

import mlx.core as mx

from . import library

CHUNK = 64
# Below this size (I + A)^-1 comes from powers of A; their entries stay small, C(7, 3) at most,
# while those of a 64 x 64 block reach 1e18 for repeated keys and would cancel in f32.
LEAF = 8

# Columns of the state that one threadgroup keeps, in registers. More share the reads of q and k and
# the products among them; fewer make more threadgroups, so that few heads still fill a large GPU.
COLUMNS = (64, 32, 16, 8)
ENOUGH_THREADGROUPS = 32
KERNEL_CHUNK = 16  # tokens


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the rule over T tokens.

    q, k: `[B, T, Hk, Dk]`, already normalised, q scaled; v: `[B, T, Hv, Dv]`; f32, f16 or bf16;
    log_g, at most 0, and beta: `[B, T, Hv]` f32; state: `[B, Hv, Dk, Dv]` f32, None for zeros;
    lengths: `[B]` int32, the tokens of each row that count, None for all.
    Value head j uses key head j / (Hv / Hk).
    Returns: o `[B, T, Hv, Dv]` of v's type, 0 beyond a row's length, and the state after the last
    token that counts.
    Source: transformers `torch_recurrent_gated_delta_rule` and `torch_chunk_gated_delta_rule`;
    the chunked form here inverts by blocks instead of row by row.
    """
    if library.uses("gated_delta") and fits(q, k, v):
        return launch(q, k, v, log_g, beta, state, lengths)
    return reference(q, k, v, log_g, beta, state, lengths)


def fits(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether the kernel serves these types and dims: 16 rows of the state at a time, 8 columns."""
    one_type = q.dtype == k.dtype == v.dtype
    Dk, Dv = k.shape[3], v.shape[3]
    # Threadgroup memory holds 16 keys and 16 queries.
    return one_type and v.size > 0 and Dk % 16 == 0 and Dk <= 128 and Dv % COLUMNS[-1] == 0


def launch(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`gated_delta` by `metal/gated_delta.metal`, in chunks of `KERNEL_CHUNK` tokens."""
    B, T, Hv, Dv = v.shape
    Dk = k.shape[3]
    columns = _columns(B * Hv, Dv)
    threads = 4 * columns  # a simdgroup of 32 for every 8 columns
    kernel = library.kernel(
        "gated_delta", ("q", "k", "v", "log_g", "beta", "state", "lengths"), ("o", "last")
    )
    o, last = kernel(
        inputs=[
            q,
            k,
            v,
            log_g,
            beta,
            _state(state, k, v),
            mx.array([T]) if lengths is None else lengths.astype(mx.int32),
        ],
        template=[
            ("In", v.dtype),
            ("Dk", Dk),
            ("Dv", Dv),
            ("SG", columns // 8),
            ("RAGGED", lengths is not None),
        ],
        grid=(threads * (Dv // columns), Hv, B),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B, T, Hv, Dv), (B, Hv, Dk, Dv)],
        output_dtypes=[v.dtype, mx.float32],
    )
    return o, last


def _columns(heads: int, Dv: int) -> int:
    """Columns of one threadgroup: 64 where that makes threadgroups enough, else at most 32."""
    wide = Dv % COLUMNS[0] == 0 and heads * Dv >= COLUMNS[0] * ENOUGH_THREADGROUPS
    return next(c for c in COLUMNS[0 if wide else 1 :] if Dv % c == 0)


def _state(state: mx.array | None, k: mx.array, v: mx.array) -> mx.array:
    """The state, zeros for None."""
    return mx.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3])) if state is None else state


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`gated_delta` in MLX operations; one token takes a direct step, more the chunked form."""
    kind, state = v.dtype, _state(state, k, v)
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    if lengths is not None:
        # Neither decay nor write, and what lies there may be anything.
        real = (mx.arange(v.shape[1]) < lengths[:, None])[..., None]
        log_g, beta = mx.where(real, log_g, 0), mx.where(real, beta, 0)
        q, k, v = (mx.where(real[..., None], x, 0) for x in (q, k, v))
    out, last = (_step if q.shape[1] == 1 else _chunked)(q, k, v, log_g, beta, state)
    return out.astype(kind), last


def _step(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token. The state is read once: `S^T k` and `S^T q` come from one product."""
    B, _, Hk, Dk = k.shape
    Hv, Dv = v.shape[2:]
    R = Hv // Hk
    S = state.reshape(B, Hk, R, Dk, Dv)
    decay = mx.exp(log_g).reshape(B, Hk, R, 1, 1)
    rows = mx.stack([k[:, 0], q[:, 0]], axis=2)[:, :, None]  # [B, Hk, 1, 2, Dk]
    read = decay * (rows @ S)  # [B, Hk, R, 2, Dv]
    value = v.reshape(B, Hk, R, 1, Dv)
    delta = beta.reshape(B, Hk, R, 1, 1) * (value - read[..., :1, :])
    key_column = k.reshape(B, Hk, 1, Dk, 1)
    S = decay * S + key_column * delta
    dot = (q * k).sum(-1).reshape(B, Hk, 1, 1, 1)
    out = read[..., 1:, :] + dot * delta
    return out.reshape(B, 1, Hv, Dv), S.reshape(B, Hv, Dk, Dv)


def _chunked(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """T tokens in chunks of C: all work inside chunks at once, then one hand-over per chunk.

    With G the running sum of log_g inside a chunk and D_ij = exp(G_i - G_j) for i >= j:
    A = strictly lower (beta K K^T o D), M = (I + A)^-1, U = M beta V, W = M beta exp(G) K;
    then per chunk  V' = U - W S,  O = exp(G) Q S + (Q K^T o D) V',
    S <- exp(G_C) S + (exp(G_C - G) K)^T V'.
    """
    B, T, Hk, Dk = k.shape
    Hv, Dv = v.shape[2:]
    R = Hv // Hk
    C = min(CHUNK, max(LEAF, 1 << (T - 1).bit_length()))
    N = -(-T // C)
    # Padding leaves the state alone: no decay (log_g 0), no write (beta 0, k 0).
    q, k = (_split(x, N, C)[:, :, None] for x in (q, k))  # [B, Hk, 1, N, C, Dk]
    v = _split(v, N, C).reshape(B, Hk, R, N, C, Dv)
    log_g, beta = (_split(x[..., None], N, C).reshape(B, Hk, R, N, C) for x in (log_g, beta))

    decay = _decays(log_g)
    kT = k.swapaxes(-1, -2)
    A = mx.tril((k @ kT) * decay * beta[..., None], -1)
    M = _inverse_of_unit_lower(A)
    grown = mx.exp(mx.cumsum(log_g, axis=-1))[..., None]
    U = M @ (beta[..., None] * v)
    W = M @ ((beta[..., None] * grown) * k)
    inner = (q @ kT) * decay
    reads = mx.concatenate([W, q * grown], axis=-2)  # one product with S serves both
    writes = (k * decay[..., -1, :, None]).swapaxes(-1, -2)
    last = grown[..., -1:, :]

    S = state.reshape(B, Hk, R, Dk, Dv)
    outs = []
    for n in range(N):
        read = reads[:, :, :, n] @ S
        fresh = U[:, :, :, n] - read[..., :C, :]
        outs.append(read[..., C:, :] + inner[:, :, :, n] @ fresh)
        S = last[:, :, :, n] * S + writes[:, :, :, n] @ fresh
    out = mx.concatenate(outs, axis=3).reshape(B, Hv, N * C, Dv)[:, :, :T]
    return out.swapaxes(1, 2), S.reshape(B, Hv, Dk, Dv)


def _decays(log_g: mx.array) -> mx.array:
    """`[..., C]` -> `[..., C, C]`: exp(G_i - G_j) on and below the diagonal, 0 above.

    The exponents are sums over the tokens j + 1 to i: one token that forgets nearly all makes G
    so large that a difference of two would have lost the digits that decide about later tokens.
    """
    C = log_g.shape[-1]
    ones = mx.ones((C, C), dtype=mx.bool_)
    sums = mx.cumsum(mx.where(mx.tril(ones, -1), log_g[..., None], 0), axis=-2)
    return mx.where(mx.tril(ones), mx.exp(sums), 0)


def _split(x: mx.array, N: int, C: int) -> mx.array:
    """`[B, T, H, D]` -> `[B, H, N, C, D]`, zeros after T."""
    B, T, H, D = x.shape
    if T < N * C:
        x = mx.pad(x, [(0, 0), (0, N * C - T), (0, 0), (0, 0)])
    return x.swapaxes(1, 2).reshape(B, H, N, C, D)


def _inverse_of_unit_lower(A: mx.array) -> mx.array:
    """`(I + A)^-1` for strictly lower triangular A `[..., C, C]`, C a power of two >= LEAF.

    Leaves by the finite series (I - A)(I + A^2)(I + A^4), then pairs of blocks are joined:
    the lower left block of the inverse is -X22 A21 X11.
    """
    C = A.shape[-1]
    n = -_diagonal_blocks(A, LEAF)
    n2 = n @ n
    X = mx.eye(LEAF) + n
    X = X + X @ n2
    X = X + X @ (n2 @ n2)
    size = LEAF
    while size < C:
        below = _diagonal_blocks(A, 2 * size)[..., size:, :size]
        first, second = X[..., 0::2, :, :], X[..., 1::2, :, :]
        corner = -(second @ below @ first)
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        X = mx.concatenate([top, mx.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return X[..., 0, :, :]


def _diagonal_blocks(A: mx.array, size: int) -> mx.array:
    """`[..., C, C]` -> `[..., C / size, size, size]`."""
    C = A.shape[-1]
    if C == size:
        return A[..., None, :, :]
    grid = A.reshape(*A.shape[:-2], C // size, size, C // size, size)
    return mx.moveaxis(mx.diagonal(grid, axis1=-4, axis2=-2), -1, -3)
