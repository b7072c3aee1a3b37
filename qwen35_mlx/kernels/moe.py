"""Matrix products with a different matrix per row: the experts of a mixture."""

import mlx.core as mx

from ..packing import Format


def route(logits: mx.array, K: int) -> tuple[mx.array, mx.array]:
    """The K most likely experts of each token and their weights, which sum to one.

    logits: `[N, E]` any float; softmax and renormalisation in f32.
    Returns: indices `[N, K]` uint32, the most likely first and of equal ones the lowest, and
    weights `[N, K]` f32.
    Source: transformers `Qwen3_5MoeTopKRouter`.
    """
    logits = logits.astype(mx.float32)
    # One integer that orders as (-logit, index): a partition has no order among equals, and in
    # bf16 equal logits are common.
    bits = (logits + 0.0).view(mx.int32)
    descending = ~mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = descending.astype(mx.int64) * (1 << 32) + mx.arange(logits.shape[-1], dtype=mx.int64)
    first = mx.sort(mx.partition(keys, K - 1, axis=-1)[:, :K], axis=-1)
    chosen = (first & 0xFFFFFFFF).astype(mx.uint32)
    weights = mx.take_along_axis(mx.softmax(logits, axis=-1), chosen, axis=-1)
    return chosen, weights / weights.sum(-1, keepdims=True)


def grouped_matmul(
    x: mx.array,
    chosen: mx.array,
    is_sorted: bool,
    weight: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    packing: Format | None = None,
) -> mx.array:
    """`x [..., 1, in]` times the matrix that `chosen [...]` names -> `[..., 1, out]`, type of x.

    weight: `[E, out, in]`, or packed with scales and biases as `mx.quantize` gives them.
    """
    kind = x.dtype
    if mx.default_device().type == mx.DeviceType.cpu:
        # MLX's CPU gather_mm knows f32 only, and its gather_qmm sums in the type of x.
        x = x.astype(mx.float32)
    if scales is None or packing is None:
        if weight.dtype != x.dtype and chosen.size < weight.shape[0]:
            # Fewer matrices than there are: only these are converted.
            y = x @ weight[chosen].astype(x.dtype).swapaxes(-1, -2)
        else:
            stack = weight.astype(x.dtype).swapaxes(-1, -2)
            y = mx.gather_mm(x, stack, rhs_indices=chosen, sorted_indices=is_sorted)
        return y.astype(kind)
    y = mx.gather_qmm(
        x,
        weight,
        # Scales of the float formats are bytes without biases; only affine ones follow x.
        scales if biases is None else scales.astype(x.dtype),
        None if biases is None else biases.astype(x.dtype),
        rhs_indices=chosen,
        transpose=True,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        sorted_indices=is_sorted,
    )
    return y.astype(kind)


def by_expert(chosen: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Sort (token, expert) pairs by expert.

    chosen: `[N, K]`. Returns: the token of each sorted pair `[N K]`, its expert `[N K]`, and where
    each original pair went `[N K]`.
    """
    flat = chosen.flatten()
    order = mx.argsort(flat)
    return order // chosen.shape[1], flat[order], mx.argsort(order)
