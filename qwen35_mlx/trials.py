"""Every kernel as one model calls it, with random inputs; `python -m qwen35_mlx.trials` runs them.

Decoding and verification are tried with 1 and 4 tokens, reading a prompt with PROMPT.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from . import proof
from .config import Config
from .kernels import (
    add_norm,
    attention_prepare,
    delta_prepare,
    delta_step,
    embed,
    gated_delta,
    moe_combine,
    moe_down,
    moe_gate_up,
    moe_route,
    top_k,
)
from .kernels.moe import Packed, by_expert
from .packing import Format
from .proof import Trial

FEW, PROMPT = (1, 4), 300
TOP_K = 20  # that the model cards advise
STACK_BYTES = 192 << 20  # of experts that are drawn; more than the largest cache, of any size
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
Formats = Mapping[str, Format | None]
Experts = tuple[Format | None, Format | None, Format | None, Format | None]


@dataclass(frozen=True)
class Shapes:
    """What the text of a model's kernels depends on, in plain values.

    dtype: of activations. pairs: of dims that rotate. embedding: how its rows are packed. experts:
    of each layer of a mixture how gate_up, down and the shared expert's two are packed, without
    repetitions.
    """

    dtype: str
    vocab: int
    hidden: int
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    pairs: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int
    E: int
    K: int
    inner: int
    shared_inner: int
    embedding: Format | None
    experts: tuple[Experts, ...]


def shapes_of(config: Config, formats: Formats, dtype: mx.Dtype) -> Shapes:
    """The shapes of a model. formats: how its matrices are packed, by path of the module."""
    text, body = config.text, "model.language_model"
    layers = range(len(text.is_full_attention)) if text.num_experts else ()
    experts: dict[Experts, None] = {}  # in the order of the layers
    for n in layers:
        of = [
            formats.get(f"{body}.layers.{n}.mlp.{name}")
            for name in (
                "experts.gate_up_proj",
                "experts.down_proj",
                "shared_expert.gate_proj",
                "shared_expert.up_proj",
                "shared_expert.down_proj",
            )
        ]
        if of[2] == of[3]:  # else the shared expert is no expert like the others
            experts[of[0], of[1], of[2], of[4]] = None
    return Shapes(
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        vocab=text.vocab_size,
        hidden=text.hidden_size,
        eps=text.rms_norm_eps,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        pairs=text.rope.rotary_dim // 2,
        k_heads=text.linear_num_key_heads,
        v_heads=text.linear_num_value_heads,
        k_dim=text.linear_key_head_dim,
        v_dim=text.linear_value_head_dim,
        taps=text.linear_conv_kernel_dim,
        E=text.num_experts,
        K=text.num_experts_per_tok,
        inner=text.moe_intermediate_size,
        shared_inner=text.shared_expert_intermediate_size,
        embedding=formats.get(f"{body}.embed_tokens"),
        experts=tuple(experts),
    )


def from_plain(values: Mapping[str, Any]) -> Shapes:
    """What `dataclasses.asdict` and JSON made of `Shapes`."""

    def packing(value: Any) -> Format | None:
        return None if value is None else Format(**value)

    known = {field.name: values[field.name] for field in fields(Shapes)}
    known["embedding"] = packing(known["embedding"])
    known["experts"] = tuple(tuple(map(packing, four)) for four in known["experts"])
    return Shapes(**known)


def count(shapes: Shapes) -> int:
    """How many trials there are at most."""
    return len(_makers(shapes))


def trials(shapes: Shapes) -> Iterator[Trial]:
    """The trials of the kernels that take these shapes, those of one kernel next to each other."""
    for make in _makers(shapes):
        trial = make()
        if trial is not None:
            yield trial


Maker = Callable[[], Trial | None]


def _makers(s: Shapes) -> list[Maker]:
    few_and_many = (*FEW[:1], PROMPT)
    makers: list[Maker] = [partial(_embed, s, T) for T in (*FEW, PROMPT)]
    makers += [partial(_add_norm, s, T) for T in few_and_many]
    makers += [partial(_delta_step, s, T) for T in FEW]
    makers += [partial(_delta_prepare, s), partial(_gated_delta, s)]
    makers += [partial(_attention_prepare, s, T) for T in few_and_many]
    if s.E:
        makers += [partial(_moe_route, s, N) for N in few_and_many]
        makers += [partial(_moe_gate_up, s, four, N) for four in s.experts for N in FEW]
        makers += [partial(_moe_down, s, four, N) for four in s.experts for N in FEW]
        makers.append(partial(_moe_combine, s))
    return [*makers, partial(_top_k, s)]


class Draw:
    """Random arrays, the same for the same name."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        self.dtype = DTYPES[shapes.dtype]
        self._random = np.random.default_rng(list(name.encode()))

    def normal(
        self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: mx.Dtype | None = None
    ) -> mx.array:
        values = self._random.standard_normal(shape, np.float32) * np.float32(scale)
        return mx.array(values + np.float32(mean)).astype(dtype or self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> mx.array:
        return mx.array(self._random.uniform(low, high, shape).astype(np.float32))

    def rows(self, N: int, E: int, K: int) -> mx.array:
        """`[N, K]` of E, those of one row distinct."""
        chosen = [self._random.permutation(E)[:K] for _ in range(N)]
        return mx.array(np.stack(chosen).astype(np.uint32))

    def matrices(self, *shape: int, packing: Format | None) -> Packed:
        """`[..., out, in]` whose products with values around 1 are around 1."""
        columns = shape[-1]
        if packing is None:
            return Packed(self.normal(*shape, scale=columns**-0.5))
        if packing.mode != "affine":
            parts = mx.quantize(self.normal(*shape), packing.group_size, packing.bits, packing.mode)
            return Packed(parts[0], parts[1], None, packing)
        words = (*shape[:-1], columns * packing.bits // 32)
        packed = np.frombuffer(self._random.bytes(4 * int(np.prod(words))), np.uint32)
        step = 3.5 * columns**-0.5 / 2**packing.bits
        scales = self.uniform(0.5 * step, 1.5 * step, *shape[:-1], columns // packing.group_size)
        biases = scales * -(2.0 ** (packing.bits - 1))
        weight = mx.array(packed.reshape(words))
        return Packed(weight, scales.astype(self.dtype), biases.astype(self.dtype), packing)


def _trial(
    module: ModuleType,
    case: str,
    sets: Sequence[tuple[Any, ...]],
    nbytes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Trial:
    """The op of `module` on each of `sets`. nbytes: if not all of the inputs is read."""
    name = module.__name__.rpartition(".")[2]

    def run(op: Callable[..., Any], exact: bool, n: int) -> list[mx.array]:
        arguments = sets[n % len(sets)]
        found = op(*(_in_f32(a) if exact else a for a in arguments), **(options or {}))
        return list(found) if isinstance(found, tuple) else [found]

    reference = partial(run, module.reference, False)
    if nbytes is None:
        nbytes = sum(_nbytes(value) for value in sets[0])
    written = sum(array.nbytes for array in reference(0))
    exact = partial(run, module.reference, True)
    return Trial(name, case, partial(run, module.launch, False), reference, exact, nbytes + written)


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


def _tokens(T: int) -> str:
    return f"{T} token{'s' if T > 1 else ''}"


# -- one function per kernel -----------------------------------------------------------------------


def _embed(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, f"embed {T}")
    V = min(s.vocab, 4096)  # rows do not depend on one another
    matrix = draw.matrices(V, s.hidden, packing=s.embedding)
    tokens = mx.concatenate([draw.rows(1, V, min(T, V)), mx.array([[V - 1]], mx.uint32)], axis=1)
    # Drawn ones are unsigned; those of a prompt are not.
    tokens = tokens[:, -T:].astype(mx.int32 if T == PROMPT else mx.uint32)
    if not embed.fits(tokens, matrix, draw.dtype):
        return None
    row = _nbytes(matrix) // V
    sets = [(tokens, matrix, draw.dtype)]
    return _trial(embed, _tokens(T), sets, tokens.nbytes + T * row)


def _add_norm(s: Shapes, T: int) -> Trial | None:
    draw = Draw(s, f"add_norm {T}")
    x, y = (draw.normal(1, T, s.hidden) for _ in range(2))
    weight = draw.normal(s.hidden, scale=0.2, mean=1.0, dtype=mx.float32)
    return _trial(add_norm, _tokens(T), [(x, y, weight, s.eps)]) if add_norm.fits(x, y) else None


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
    return _trial(delta_step, _tokens(T), sets, options=heads)


def _delta_prepare(s: Shapes) -> Trial | None:
    draw = Draw(s, "delta_prepare")
    qkvz, ba, conv, _, conv_weight, A_log, dt_bias, _ = _delta_inputs(s, draw, PROMPT)
    if not delta_prepare.fits(qkvz, conv, A_log, s.k_heads, s.k_dim):
        return None
    heads = {"k_heads": s.k_heads, "k_dim": s.k_dim}
    z = PROMPT * s.v_heads * s.v_dim * qkvz.itemsize  # for the norm behind the recurrence
    sets = [(qkvz, ba, conv, conv_weight, A_log, dt_bias)]
    return _trial(delta_prepare, _tokens(PROMPT), sets, sum(map(_nbytes, sets[0])) - z, heads)


def _gated_delta(s: Shapes) -> Trial | None:
    draw = Draw(s, "gated_delta")
    q, k = (draw.normal(1, PROMPT, s.k_heads, s.k_dim, dtype=mx.float32) for _ in range(2))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = draw.normal(1, PROMPT, s.v_heads, s.v_dim, dtype=mx.float32)
    log_g = -mx.exp(draw.uniform(-9.2, 1.4, 1, PROMPT, s.v_heads))
    beta = draw.uniform(0, 1, 1, PROMPT, s.v_heads)
    state = draw.normal(1, s.v_heads, s.k_dim, s.v_dim, scale=0.5, dtype=mx.float32)
    if not gated_delta.fits(q, k, v):
        return None
    return _trial(gated_delta, _tokens(PROMPT), [(q * s.k_dim**-0.5, k, v, log_g, beta, state)])


def _attention_prepare(s: Shapes, T: int) -> Trial | None:
    if not attention_prepare.fits(s.head_dim, s.pairs):
        return None
    draw = Draw(s, f"attention_prepare {T}")
    qkv = draw.normal(1, T, 2 * (s.heads + s.kv_heads) * s.head_dim)
    weights = [draw.normal(s.head_dim, scale=0.2, mean=1.0, dtype=mx.float32) for _ in range(2)]
    angle = draw.uniform(0, 1000, 1, 1, T, s.pairs)
    options = {"heads": s.heads, "kv_heads": s.kv_heads, "eps": s.eps}
    sets = [(qkv, *weights, mx.cos(angle), mx.sin(angle))]
    return _trial(attention_prepare, _tokens(T), sets, options=options)


def _moe_route(s: Shapes, N: int) -> Trial | None:
    draw = Draw(s, f"moe_route {N}")
    logits, x = draw.normal(N, s.E, scale=2.0), draw.normal(N, s.hidden)
    gate = draw.normal(s.hidden, scale=s.hidden**-0.5, dtype=mx.float32)
    fits = moe_route.fits(logits, s.K, x, gate)
    return _trial(moe_route, _tokens(N), [(logits, s.K, x, gate)]) if fits else None


def _stack(s: Shapes, draw: Draw, rows: int, columns: int, packing: Format | None) -> Packed:
    """Some of the experts: enough that they lie in no cache, and no more."""
    bits = 8 * draw.dtype.size if packing is None else packing.bits
    E = max(s.K, min(s.E, STACK_BYTES // (rows * columns * bits // 8)))
    return draw.matrices(E, rows, columns, packing=packing)


def _streamed(experts: mx.array, *matrices: Packed) -> int:
    """Bytes of the matrices that `experts` name; every second one belongs to the shared expert."""
    chosen = len(set(np.array(experts).flatten().tolist()))
    routed = sum(chosen * _nbytes(m) // m.weight.shape[0] for m in matrices[::2])
    return routed + sum(map(_nbytes, matrices[1::2]))


def _named(four: Experts, N: int) -> str:
    def bits(packing: Format | None) -> str:
        return "plain" if packing is None else f"{packing.bits} bits"

    names = list(dict.fromkeys(bits(packing) for packing in four))
    return f"{_tokens(N)}, {' and '.join(names)}"


def _moe_gate_up(s: Shapes, four: Experts, N: int) -> Trial | None:
    draw = Draw(s, f"moe_gate_up {four} {N}")
    routed = _stack(s, draw, 2 * s.inner, s.hidden, four[0])
    shared = draw.matrices(2 * s.shared_inner, s.hidden, packing=four[2])
    x = draw.normal(N, s.hidden)
    ids = [draw.rows(N, routed.weight.shape[0], s.K) for _ in range(8)]
    if not moe_gate_up.fits(x, ids[0], routed, shared):
        return None
    nbytes = x.nbytes + ids[0].nbytes + _streamed(ids[0], routed, shared)
    return _trial(moe_gate_up, _named(four, N), [(x, i, routed, shared) for i in ids], nbytes)


def _moe_down(s: Shapes, four: Experts, N: int) -> Trial | None:
    draw = Draw(s, f"moe_down {four} {N}")
    routed = _stack(s, draw, s.hidden, s.inner, four[1])
    shared = draw.matrices(s.hidden, s.shared_inner, packing=four[3])
    h = draw.normal(N, s.K * s.inner + s.shared_inner)
    weights, gate = draw.uniform(0, 2 / s.K, N, s.K), draw.uniform(0, 1, N)
    ids = [draw.rows(N, routed.weight.shape[0], s.K) for _ in range(8)]
    if not moe_down.fits(h, ids[0], weights, gate, routed, shared):
        return None
    small = sum(x.nbytes for x in (h, ids[0], weights, gate))
    sets = [(h, i, weights, gate, routed, shared) for i in ids]
    return _trial(moe_down, _named(four, N), sets, small + _streamed(ids[0], routed, shared))


def _moe_combine(s: Shapes) -> Trial | None:
    draw = Draw(s, "moe_combine")
    back = by_expert(draw.rows(PROMPT, s.E, s.K))[2].astype(mx.uint32)
    y, shared_out = draw.normal(PROMPT * s.K, s.hidden), draw.normal(PROMPT, s.hidden)
    weights, gate = draw.uniform(0, 2 / s.K, PROMPT, s.K), draw.uniform(0, 1, PROMPT)
    if not moe_combine.fits(y, shared_out):
        return None
    return _trial(moe_combine, _tokens(PROMPT), [(y, back, weights, gate, shared_out)])


def _top_k(s: Shapes) -> Trial | None:
    draw = Draw(s, "top_k")
    logits, among = draw.normal(1, s.vocab, scale=3.0), s.vocab - 1  # ids may be fewer than rows
    k = min(TOP_K, among)
    fits = top_k.fits(logits, k)
    return _trial(top_k, f"{k} of {s.vocab:,}", [(logits, k, among)]) if fits else None


def main() -> None:
    """Answer the request on stdin as `proof.serve` does."""
    request = json.load(sys.stdin)
    for line in proof.serve(trials(from_plain(request["shapes"])), request["skip"]):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
