"""Matrix products with a different matrix per row: the experts of a mixture."""

import mlx.core as mx

# From this many (token, expert) pairs on, rows sorted by expert read each matrix once.
SORT_FROM = 64


def route(logits: mx.array, K: int) -> tuple[mx.array, mx.array]:
    """The K most likely experts of each token and their weights, which sum to one.

    logits: `[N, E]` any float; softmax and renormalisation in f32.
    Returns: indices `[N, K]` uint32 and weights `[N, K]` f32.
    Source: transformers `Qwen3_5MoeTopKRouter`.
    """
    p = mx.softmax(logits.astype(mx.float32), axis=-1)
    chosen = mx.argpartition(-p, K - 1, axis=-1)[:, :K]
    weights = mx.take_along_axis(p, chosen, axis=-1)
    return chosen, weights / weights.sum(-1, keepdims=True)


class Packed:
    """One stack of E matrices `[E, out, in]`, plain or packed by `mx.quantize`."""

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        group_size: int = 0,
        bits: int = 0,
        mode: str = "affine",
    ) -> None:
        self.weight, self.scales, self.biases = weight, scales, biases
        self.group_size, self.bits, self.mode = group_size, bits, mode

    def __call__(self, x: mx.array, chosen: mx.array, is_sorted: bool) -> mx.array:
        """`x [..., 1, in]` times the matrix that `chosen [...]` names -> `[..., 1, out]`."""
        kind = x.dtype
        if mx.default_device().type == mx.DeviceType.cpu:
            # MLX's CPU gather_mm knows f32 only, and its gather_qmm sums in the type of x.
            kind = mx.float32
        y = self._product(x.astype(kind), chosen, is_sorted, kind)
        return y.astype(x.dtype)

    def _product(self, x: mx.array, chosen: mx.array, is_sorted: bool, kind: mx.Dtype) -> mx.array:
        if self.scales is None:
            weight = self.weight.swapaxes(-1, -2).astype(kind)
            return mx.gather_mm(x, weight, rhs_indices=chosen, sorted_indices=is_sorted)
        # Scales of the float formats are bytes without biases; only affine ones follow x.
        affine = self.biases is not None
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales.astype(kind) if affine else self.scales,
            self.biases.astype(kind) if self.biases is not None else None,
            rhs_indices=chosen,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=is_sorted,
        )


def by_expert(chosen: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Sort (token, expert) pairs by expert.

    chosen: `[N, K]`. Returns: the token of each sorted pair `[N K]`, its expert `[N K]`, and where
    each original pair went `[N K]`.
    """
    flat = chosen.flatten()
    order = mx.argsort(flat)
    return order // chosen.shape[1], flat[order], mx.argsort(order)
