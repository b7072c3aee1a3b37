"""Every kernel as one model calls it, with random inputs; `python -m qwen35_mlx.trials` runs them.

All texts that can be launched are tried: for one token, for the up to eight of a verification, for
short prompts and long ones. What differs in numbers only, as the tokens of a prompt, is tried once.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from . import apart
from .kernels import (
    add_norm,
    attention_prepare,
    delta_prepare,
    delta_project,
    delta_step,
    embed,
    gate_up,
    gated_delta,
    moe_combine,
    moe_down,
    moe_gate_up,
    moe_route,
    top_k,
)
from .kernels.moe import by_expert
from .kernels.packed import MAX_TOKENS, Packed, is_known, is_streamable
from .packing import Format
from .proof import Plan, Trial
from .shapes import DTYPES, Pair, Shapes, from_plain

PROMPT, SHORT_PROMPT = 300, 100  # on both sides of `delta_prepare.SHORT`
FEW = 4  # of several tokens at once, those that are timed
TOP_K = (20, 64)  # what the model cards advise, and the most that the kernel takes
MOST_LAYERS = 40  # of small ones that are drawn
STACK_BYTES = 128 << 20  # of matrices that are drawn: more than the largest cache, of any size


def plans(s: Shapes) -> list[Plan]:
    """The trials of a model, those of one kernel next to each other."""
    found = [_plan(_embed, _tokens(T), s, T) for T in (1, PROMPT)]
    found += [_plan(_add_norm, _tokens(T), s, T) for T in (1, PROMPT)]
    few = range(1, MAX_TOKENS + 1)
    for pair in s.projections:
        found += [_plan(_delta_project, _named(N, pair), s, N, pair) for N in few]
    found += [_plan(_delta_step, _tokens(T), s, T) for T in (1, FEW)]
    found += [_plan(_delta_prepare, _tokens(T), s, T) for T in (SHORT_PROMPT, PROMPT)]
    found.append(_plan(_gated_delta, _tokens(PROMPT), s, PROMPT))
    found += [_plan(_attention_prepare, _tokens(T), s, T) for T in (1, PROMPT)]
    for packing in s.gate_up:
        found += [_plan(_gate_up, _named(N, (packing,)), s, N, packing) for N in few]
    if s.E:
        found += [_plan(_moe_route, _tokens(N), s, N) for N in (1, FEW, PROMPT)]
        for op, part in ((_moe_gate_up, 0), (_moe_down, 1)):
            for pair in dict.fromkeys((four[part], four[part + 2]) for four in s.experts):
                found += [_plan(op, _named(N, pair), s, N, pair) for N in few]
        found.append(_plan(_moe_combine, _tokens(PROMPT), s, PROMPT))
    # A penalty makes the logits f32.
    for dtype in dict.fromkeys((s.dtype, "float32")):
        found += [_plan(_top_k, f"{k}, {dtype}", s, k, dtype) for k in TOP_K]
    return found


def _plan(make: Callable[..., Trial | None], case: str, *given: Any) -> Plan:
    return Plan(make.__name__.lstrip("_"), case, partial(make, *given))


def _tokens(T: int) -> str:
    return f"{T} token{'s' if T > 1 else ''}"


def _named(N: int, packings: Sequence[Format | None]) -> str:
    return f"{_tokens(N)}, {'+'.join(dict.fromkeys(map(_packed, packings)))}"


def _packed(packing: Format | None) -> str:
    if packing is None:
        return "plain"
    is_affine = packing.mode == "affine"
    return f"{packing.bits}b/{packing.group_size}" if is_affine else packing.mode


class Draw:
    """Random arrays, the same for the same name."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        self.dtype = DTYPES[shapes.dtype]
        self._random = np.random.default_rng(list(name.encode()))

    def normal(
        self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: mx.Dtype | None = None
    ) -> mx.array:
        key = mx.random.key(int(self._random.integers(2**32)))
        return (mx.random.normal(shape, key=key) * scale + mean).astype(dtype or self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> mx.array:
        return mx.array(self._random.uniform(low, high, shape).astype(np.float32))

    def rows(self, N: int, E: int, K: int) -> mx.array:
        """`[N, K]` of E, those of one row distinct."""
        chosen = [self._random.permutation(E)[:K] for _ in range(N)]
        return mx.array(np.stack(chosen).astype(np.uint32))

    def matrices(self, *shape: int, packing: Format | None) -> Packed:
        """`[..., out, in]`, plain or affine, whose products with values around 1 are around 1."""
        columns = shape[-1]
        if packing is None:
            weight = self.normal(*shape, scale=columns**-0.5)
            mx.eval(weight)  # else the f32 of all that are drawn would lie in memory at once
            return Packed(weight)
        words = (*shape[:-1], columns * packing.bits // 32)
        packed = np.frombuffer(self._random.bytes(4 * int(np.prod(words))), np.uint32)
        step = 3.5 * columns**-0.5 / 2**packing.bits
        scales = self.uniform(0.5 * step, 1.5 * step, *shape[:-1], columns // packing.group_size)
        biases = scales * -(2.0 ** (packing.bits - 1))
        weight = mx.array(packed.reshape(words))
        return Packed(weight, scales.astype(self.dtype), biases.astype(self.dtype), packing)


def _trial(
    module: ModuleType,
    sets: Sequence[tuple[Any, ...]],
    nbytes: int | None = None,
    options: Mapping[str, Any] | None = None,
    is_timed: bool = True,
) -> Trial:
    """The op of `module` on each of `sets`. nbytes: if not all of the inputs is read."""

    def run(op: Callable[..., Any], exact: bool, n: int) -> list[mx.array]:
        arguments = sets[n % len(sets)]
        found = op(*(_in_f32(a) if exact else a for a in arguments), **(options or {}))
        return list(found) if isinstance(found, tuple) else [found]

    reference = partial(run, module.reference, False)
    if nbytes is None:
        nbytes = sum(_nbytes(value) for value in sets[0])
    written = sum(array.nbytes for array in reference(0))
    exact = partial(run, module.reference, True)
    launch = partial(run, module.launch, False)
    return Trial(launch, reference, exact, nbytes + written, is_timed)


def _in_f32(value: Any) -> Any:
    """An argument of a reference that is to compute in f32."""
    if isinstance(value, Packed):
        weight, scales, biases, packing = value
        return Packed(_in_f32(weight), _in_f32(scales), _in_f32(biases), packing)
    if isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16):
        return value.astype(mx.float32)
    return mx.float32 if isinstance(value, mx.Dtype) else value


def _nbytes(value: Any) -> int:
    if isinstance(value, Packed):
        return sum(map(_nbytes, value[:3]))
    return value.nbytes if isinstance(value, mx.array) else 0


# -- one function per kernel; None where it does not fit -------------------------------------------


def _embed(s: Shapes, T: int) -> Trial | None:
    packing, V = s.embedding, min(s.vocab, 4096)  # rows do not depend on one another
    if packing is None or packing.mode != "affine":
        return None
    draw = Draw(s, f"embed {T}")
    matrix = draw.matrices(V, s.hidden, packing=packing)
    tokens = mx.concatenate([draw.rows(1, V, min(T, V)), mx.array([[V - 1]], mx.uint32)], axis=1)
    tokens = tokens[:, -T:]
    if not embed.fits(tokens, matrix, draw.dtype):
        return None
    row = _nbytes(matrix) // V
    return _trial(embed, [(tokens, matrix, draw.dtype)], tokens.nbytes + T * row)


def _add_norm(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, f"add_norm {T}")
    x, y = (draw.normal(1, T, s.hidden) for _ in range(2))
    weight = draw.normal(s.hidden, scale=0.2, mean=1.0, dtype=mx.float32)
    return _trial(add_norm, [(x, y, weight, s.eps)]) if add_norm.fits(x, y) else None


def _delta_inputs(s: Shapes, draw: Draw, T: int) -> tuple[mx.array, ...]:
    """qkvz, ba, conv, memory, conv_weight, A_log, dt_bias, norm_weight."""
    channels, values = 2 * s.k_heads * s.k_dim + s.v_heads * s.v_dim, s.v_heads * s.v_dim
    return (
        draw.normal(1, T, channels + values),
        draw.normal(1, T, 2 * s.v_heads),
        draw.normal(1, s.taps - 1, channels),
        draw.normal(1, s.v_heads, s.k_dim, s.v_dim, scale=0.5, dtype=mx.float32),
        draw.normal(s.taps, channels, scale=0.5, dtype=mx.float32),
        # Decays per token from 0.0001 to almost 4.
        draw.uniform(-9.2, 1.4, s.v_heads),
        draw.normal(s.v_heads, scale=0.5, mean=0.5, dtype=mx.float32),
        draw.normal(s.v_dim, scale=0.2, mean=1.0, dtype=mx.float32),
    )


def _delta_step(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, f"delta_step {T}")
    given = _delta_inputs(s, draw, T)
    if not delta_step.fits(given[0], given[2], given[3]):
        return None
    heads = {"k_heads": s.k_heads, "k_dim": s.k_dim, "eps": s.eps}
    # As in a model, where each layer has a state of its own.
    sets = [given, *(_delta_inputs(s, draw, T)[:4] + given[4:] for _ in range(7))]
    return _trial(delta_step, sets, options=heads)


def _delta_prepare(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, f"delta_prepare {T}")
    qkvz, ba, conv, _, conv_weight, A_log, dt_bias, _ = _delta_inputs(s, draw, T)
    if not delta_prepare.fits(qkvz, conv, A_log, s.k_heads, s.k_dim):
        return None
    heads = {"k_heads": s.k_heads, "k_dim": s.k_dim}
    z = T * s.v_heads * s.v_dim * qkvz.itemsize  # for the norm behind the recurrence
    sets = [(qkvz, ba, conv, conv_weight, A_log, dt_bias)]
    return _trial(delta_prepare, sets, sum(map(_nbytes, sets[0])) - z, heads)


def _gated_delta(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, "gated_delta")
    q, k = (draw.normal(1, T, s.k_heads, s.k_dim, dtype=mx.float32) for _ in range(2))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = draw.normal(1, T, s.v_heads, s.v_dim, dtype=mx.float32)
    log_g = -mx.exp(draw.uniform(-9.2, 1.4, 1, T, s.v_heads))
    beta = draw.uniform(0, 1, 1, T, s.v_heads)
    state = draw.normal(1, s.v_heads, s.k_dim, s.v_dim, scale=0.5, dtype=mx.float32)
    if not gated_delta.fits(q, k, v):
        return None
    return _trial(gated_delta, [(q * s.k_dim**-0.5, k, v, log_g, beta, state)])


def _attention_prepare(s: Shapes, T: int) -> Trial | None:
    if not attention_prepare.fits(s.head_dim, s.pairs):
        return None
    draw = Draw(s, f"attention_prepare {T}")
    qkv = draw.normal(1, T, 2 * (s.heads + s.kv_heads) * s.head_dim)
    weights = [draw.normal(s.head_dim, scale=0.2, mean=1.0, dtype=mx.float32) for _ in range(2)]
    angle = draw.uniform(0, 1000, 1, 1, T, s.pairs)
    options = {"heads": s.heads, "kv_heads": s.kv_heads, "eps": s.eps}
    sets = [(qkv, *weights, mx.cos(angle), mx.sin(angle))]
    return _trial(attention_prepare, sets, options=options)


def _moe_route(s: Shapes, N: int) -> Trial | None:
    draw = Draw(s, f"moe_route {N}")
    logits, x = draw.normal(N, s.E, scale=2.0), draw.normal(N, s.hidden)
    gate = draw.normal(s.hidden, scale=s.hidden**-0.5, dtype=mx.float32)
    given = (logits, s.K, x, gate)
    return _trial(moe_route, [given]) if moe_route.fits(*given) else None


@lru_cache(maxsize=1)
def _layers(
    s: Shapes, widths: tuple[int, ...], packings: tuple[Format | None, ...]
) -> list[tuple[Packed, ...]]:
    """Of some layers a matrix `[width, hidden]` for each of `widths`; none where one is not read.

    So many that they lie in no cache. Kept for the next number of tokens.
    """
    if not all(map(is_known, packings)):
        return []
    draw, each = Draw(s, f"{widths} {packings}"), list(zip(widths, packings, strict=True))
    bits = 8 * draw.dtype.size if packings[0] is None else packings[0].bits
    count = max(2, min(MOST_LAYERS, -(-STACK_BYTES // (widths[0] * s.hidden * bits // 8))))
    return [
        tuple(draw.matrices(width, s.hidden, packing=packing) for width, packing in each)
        for _ in range(count)
    ]


def _of_layers(
    module: ModuleType, s: Shapes, N: int, layers: list[tuple[Packed, ...]]
) -> Trial | None:
    """N rows times the matrices of one layer after the other."""
    x = Draw(s, f"{module.__name__} {N}").normal(1, N, s.hidden)
    if not layers or not module.fits(x, *layers[0]):
        return None
    return _trial(module, [(x, *matrices) for matrices in layers], is_timed=N in (1, FEW))


def _delta_project(s: Shapes, N: int, pair: Pair) -> Trial | None:
    widths = 2 * (s.k_heads * s.k_dim + s.v_heads * s.v_dim), 2 * s.v_heads
    return _of_layers(delta_project, s, N, _layers(s, widths, pair))


def _gate_up(s: Shapes, N: int, packing: Format | None) -> Trial | None:
    return _of_layers(gate_up, s, N, _layers(s, (2 * s.dense_inner,), (packing,)))


@lru_cache(maxsize=1)
def _stacks(
    s: Shapes, rows: int, columns: int, shared: tuple[int, int], pair: Pair
) -> tuple[Packed, Packed] | None:
    """Some routed experts `[E, rows, columns]`, and the shared one; None if they are not streamed.

    Enough that they lie in no cache. Kept for the next number of tokens.
    """
    if not all(map(is_known, pair)):
        return None
    draw = Draw(s, f"{rows} {columns} {pair}")
    routed, one = pair
    bits = 8 * draw.dtype.size if routed is None else routed.bits
    E = max(s.K, min(s.E, STACK_BYTES // (rows * columns * bits // 8)))
    found = (
        draw.matrices(E, rows, columns, packing=routed),
        draw.matrices(*shared, packing=one),
    )
    return found if all(is_streamable(matrix, 4) for matrix in found) else None


def _streamed(experts: mx.array, routed: Packed, shared: Packed) -> int:
    """Bytes of the matrices that `experts` name, each once, and of the shared one."""
    chosen = len(set(np.array(experts).flatten().tolist()))
    return chosen * _nbytes(routed) // routed.weight.shape[0] + _nbytes(shared)


def _moe_gate_up(s: Shapes, N: int, pair: Pair) -> Trial | None:
    of_shared = (2 * s.shared_inner, s.hidden)
    stacks = _stacks(s, 2 * s.inner, s.hidden, of_shared, pair)
    if stacks is None:
        return None
    draw, E = Draw(s, f"moe_gate_up {N}"), stacks[0].weight.shape[0]
    x, ids = draw.normal(N, s.hidden), [draw.rows(N, E, s.K) for _ in range(8)]
    if not moe_gate_up.fits(x, ids[0], *stacks):
        return None
    nbytes = x.nbytes + ids[0].nbytes + _streamed(ids[0], *stacks)
    sets = [(x, chosen, *stacks) for chosen in ids]
    return _trial(moe_gate_up, sets, nbytes, is_timed=N in (1, FEW))


def _moe_down(s: Shapes, N: int, pair: Pair) -> Trial | None:
    stacks = _stacks(s, s.hidden, s.inner, (s.hidden, s.shared_inner), pair)
    if stacks is None:
        return None
    draw, E = Draw(s, f"moe_down {N}"), stacks[0].weight.shape[0]
    h, ids = (
        draw.normal(N, s.K * s.inner + s.shared_inner),
        [draw.rows(N, E, s.K) for _ in range(8)],
    )
    weights, gate = draw.uniform(0, 2 / s.K, N, s.K), draw.uniform(0, 1, N)
    if not moe_down.fits(h, ids[0], weights, gate, *stacks):
        return None
    nbytes = sum(x.nbytes for x in (h, ids[0], weights, gate)) + _streamed(ids[0], *stacks)
    sets = [(h, chosen, weights, gate, *stacks) for chosen in ids]
    return _trial(moe_down, sets, nbytes, is_timed=N in (1, FEW))


def _moe_combine(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, "moe_combine")
    back = by_expert(draw.rows(T, s.E, s.K))[2].astype(mx.uint32)
    y, shared_out = draw.normal(T * s.K, s.hidden), draw.normal(T, s.hidden)
    weights, gate = draw.uniform(0, 2 / s.K, T, s.K), draw.uniform(0, 1, T)
    if not moe_combine.fits(y, shared_out):
        return None
    return _trial(moe_combine, [(y, back, weights, gate, shared_out)])


def _top_k(s: Shapes, k: int, dtype: str) -> Trial | None:
    draw, among = Draw(s, f"top_k {k} {dtype}"), s.vocab - 1  # ids may be fewer than rows
    logits = draw.normal(1, s.vocab, scale=3.0).astype(DTYPES[dtype])
    k = min(k, among)
    return _trial(top_k, [(logits, k, among)]) if top_k.fits(logits, k) else None


def _end_with(parent: int) -> None:
    """A kernel that hangs must not outlive the program that asked."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Answer the request on stdin as `apart.serve` does."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    request = json.load(sys.stdin)
    # The answer is alone on its stream: what else is printed goes the way of errors.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in apart.serve(plans(from_plain(request["shapes"])), request["skip"]):
        print(line, file=answer, flush=True)


if __name__ == "__main__":
    main()
