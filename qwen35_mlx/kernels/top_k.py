"""The k largest of a row without sorting it."""

import mlx.core as mx

from . import library

# Logits per block. The k blocks with the largest maxima hold the k largest logits: a block behind
# them has k better elements before it. For the family's vocabulary and k = 20 that leaves 1,940
# maxima and 2,560 logits to choose from.
BLOCK = 128
_LARGEST_K = 64
_LARGEST_V = 1 << 20
_BLOCKS_PER_SIMDGROUP = 8
_SIMDGROUPS = 4  # per threadgroup of the first launch
# Bits of a logit as f32 that are not always zero: the others need not be searched.
_BITS = {mx.float32: 32, mx.float16: 19, mx.bfloat16: 16}
_THREADS = (256, 512)  # of the second launch, least and most


def top_k(logits: mx.array, k: int, among: int | None = None) -> tuple[mx.array, mx.array]:
    """The k largest of each row, largest first, of equals the lower index first.

    logits: `[B, V]` f32, f16 or bf16; NaN counts as -infinity, and a
    subnormal f32 may count as 0. among: how many of a row count, from the first on, at least k;
    None: all. A slice in its place would be copied for the kernel.

    Returns: values `[B, k]` f32 and indices `[B, k]` uint32.
    Raises: ValueError for another shape, k or `among`.
    """
    if logits.ndim != 2:
        raise ValueError(f"top_k: logits have shape {logits.shape}; expected [B, V].")
    V = logits.shape[1]
    among = V if among is None else among
    if not 1 <= k <= among <= V:
        raise ValueError(f"top_k: k is {k} among {among}; expected 1 <= k <= among <= {V}.")
    if library.uses("top_k") and fits(logits, k):
        return launch(logits, k, among)
    return reference(logits, k, among)


def fits(logits: mx.array, k: int) -> bool:
    """Whether the kernel serves this type, width and k."""
    return k <= _LARGEST_K and logits.shape[1] <= _LARGEST_V and logits.dtype in _BITS


def reference(logits: mx.array, k: int, among: int) -> tuple[mx.array, mx.array]:
    """The same in MLX operations.

    MLX partitions by sorting everything; here the maxima of the blocks are sorted, then the
    chosen blocks. Its sort keeps the order of equals, so the result is that of sorting everything.
    """
    B, V = logits.shape[0], among
    blocks = -(-V // BLOCK)
    logits = logits[:, :V]
    logits = mx.where(mx.isnan(logits), -mx.inf, logits)
    if k >= blocks:
        indices = mx.argsort(-logits, axis=-1)[:, :k]
    else:
        table = mx.pad(logits, [(0, 0), (0, blocks * BLOCK - V)], constant_values=-mx.inf)
        table = table.reshape(B, blocks, BLOCK)
        chosen = mx.sort(mx.argsort(-table.max(axis=-1), axis=-1)[:, :k], axis=-1)
        candidates = mx.take_along_axis(table, chosen[..., None], axis=1).reshape(B, -1)
        order = mx.argsort(-candidates, axis=-1)[:, :k]
        indices = mx.take_along_axis(chosen, order // BLOCK, axis=-1) * BLOCK + order % BLOCK
    values = mx.take_along_axis(logits, indices, axis=-1).astype(mx.float32)
    return values, indices.astype(mx.uint32)


def launch(logits: mx.array, k: int, among: int) -> tuple[mx.array, mx.array]:
    """The same by `metal/top_k_blocks.metal` and `metal/top_k.metal`."""
    B, width = logits.shape
    blocks = -(-among // BLOCK)
    largest_of_blocks = library.kernel("top_k_blocks", ("logits", "size"), ("maxima",))
    (maxima,) = largest_of_blocks(
        inputs=[logits, among],
        template=[("Width", width)],
        grid=(32 * -(-blocks // _BLOCKS_PER_SIMDGROUP), B, 1),
        threadgroup=(32 * _SIMDGROUPS, 1, 1),
        output_shapes=[(B, blocks)],
        output_dtypes=[mx.float32],
    )
    threads, each = _plan(min(k, blocks))
    choose = library.kernel("top_k", ("logits", "maxima", "size", "k"), ("values", "indices"))
    values, indices = choose(
        inputs=[logits, maxima, among, k],
        template=[
            ("Width", width),
            ("Bits", _BITS[logits.dtype]),
            ("Each", each),
            ("Maxima", -(-width // (BLOCK * _THREADS[0]))),
        ],
        grid=(threads, B, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B, k), (B, k)],
        output_dtypes=[mx.float32, mx.uint32],
    )
    return values, indices


def _plan(chosen: int) -> tuple[int, int]:
    """Threads that choose among `chosen` blocks, and logits of each, a divisor of a block."""
    least, most = _THREADS
    each = 8
    while chosen * BLOCK > most * each:
        each *= 2
    return max(least, 32 * -(-chosen * BLOCK // (32 * each))), each
