"""The gated delta rule: a matrix-valued state that decays, is read, corrected and read again.

Per value head, with state S `[Dk, Dv]`, decay `exp(log_g) <= 1` and write strength beta:

    S <- exp(log_g_t) S
    S <- S + k_t (beta_t (v_t - S^T k_t))^T
    o_t = S^T q_t

Everything is f32: in bf16 the decay alone loses the state within a thousand tokens.
"""

import mlx.core as mx

CHUNK = 64
# Below this size (I + A)^-1 comes from powers of A; their entries stay small, C(7, 3) at most,
# while those of a 64 x 64 block reach 1e18 for repeated keys and would cancel in f32.
LEAF = 8


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Run the rule over T tokens; one token takes a direct step, more take the chunked form.

    q, k: `[B, T, Hk, Dk]` f32, already normalised, q scaled; v: `[B, T, Hv, Dv]` f32;
    log_g, beta: `[B, T, Hv]` f32; state: `[B, Hv, Dk, Dv]` f32, None for zeros.
    Value head j uses key head
    j / (Hv / Hk).
    Returns: o `[B, T, Hv, Dv]` f32 and the state after the last token.
    Source: transformers `torch_recurrent_gated_delta_rule` and `torch_chunk_gated_delta_rule`;
    the chunked form here inverts by blocks instead of row by row.
    """
    if state is None:
        state = mx.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]))
    return (_step if q.shape[1] == 1 else _chunked)(q, k, v, log_g, beta, state)


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

    G = mx.cumsum(log_g, axis=-1)
    lower = mx.tril(mx.ones((C, C), dtype=mx.bool_))
    # Mask the exponent, not the result: above the diagonal it is positive and may overflow.
    decay = mx.exp(mx.where(lower, G[..., :, None] - G[..., None, :], -mx.inf))
    kT = k.swapaxes(-1, -2)
    A = mx.tril((k @ kT) * decay * beta[..., None], -1)
    M = _inverse_of_unit_lower(A)
    grown = mx.exp(G)[..., None]
    U = M @ (beta[..., None] * v)
    W = M @ ((beta[..., None] * grown) * k)
    inner = (q @ kT) * decay
    reads = mx.concatenate([W, q * grown], axis=-2)  # one product with S serves both
    writes = (k * mx.exp(G[..., -1:] - G)[..., None]).swapaxes(-1, -2)
    last = mx.exp(G[..., -1])[..., None, None]

    S = state.reshape(B, Hk, R, Dk, Dv)
    outs = []
    for n in range(N):
        read = reads[:, :, :, n] @ S
        fresh = U[:, :, :, n] - read[..., :C, :]
        outs.append(read[..., C:, :] + inner[:, :, :, n] @ fresh)
        S = last[:, :, :, n] * S + writes[:, :, :, n] @ fresh
    out = mx.concatenate(outs, axis=3).reshape(B, Hv, N * C, Dv)[:, :, :T]
    return out.swapaxes(1, 2), S.reshape(B, Hv, Dk, Dv)


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
