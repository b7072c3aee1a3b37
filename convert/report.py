"""What a conversion cost: the rounding of each kind of matrix, and of the model's predictions."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen35_mlx import api, engine, memory, prompt
from qwen35_mlx.cache import Cache
from qwen35_mlx.errors import InputError, ModelError, OutOfMemory, one_line, shown
from qwen35_mlx.model import Model
from qwen35_mlx.tokenizer import Tokenizer

from . import recipe
from .layout import Target, matrices, targets
from .options import Options
from .source import Source, View, open_folder

SLICE_WEIGHTS = 4 << 20  # compared at once
ROWS = 32  # of logits at once: 32 MB for each model, a few times over
MOST_TOKENS = 1024
TOKEN_CHARACTERS = 128  # at most, of all but runs of blanks
VECTORS = "vectors, convolutions"
ABSENT = "not there"
LINE = 100  # columns of the table

Key = tuple[str, str]  # what it is, how it is stored


@dataclass(frozen=True)
class Row:
    """Matrices of one kind that are stored alike.

    error: `sqrt(sum (q - w)^2 / sum w^2)` over all their weights, q as the folder decodes to BF16
    and w of the source; None where the folder has none of them. worst: of one tensor, with its
    name.
    """

    matrices: str
    stored: str
    weights: int
    error: float | None
    worst_error: float | None
    worst: str


@dataclass(frozen=True)
class Divergence:
    """How the predictions on a text changed.

    mean, p99: KL divergence `sum p log(p / q)` of the source's distribution p from the folder's q,
    in nats, over all tokens. same_top: fraction of tokens after which both expect the same one.
    perplexities: of the text's tokens from the second on.
    """

    tokens: int
    mean: float
    p99: float
    same_top: float
    source_perplexity: float
    perplexity: float

    def lines(self) -> list[str]:
        return [
            f"KL divergence     {self.mean:.6f} nats a token, 99th percentile {self.p99:.6f}",
            f"same first choice {self.same_top:.2%} of {self.tokens:,} tokens",
            f"perplexity        {self.perplexity:.4f}; source {self.source_perplexity:.4f}",
        ]


@dataclass(frozen=True)
class Report:
    """rows: in the order of `recipe.RULES`. divergence: or why there is none, in `note`."""

    rows: tuple[Row, ...]
    divergence: Divergence | None
    note: str

    def table(self) -> str:
        """Text of at most 100 columns."""
        lines = [_line("matrices", "stored as", "weights", "error", "worst", "")]
        for row in self.rows:
            errors = (_percent(row.error), _percent(row.worst_error))
            worst = row.worst if row.worst_error else ""
            lines.append(_line(row.matrices, row.stored, _count(row.weights), *errors, worst))
        if self.divergence:
            lines += ["", *self.divergence.lines()]
        if self.note:
            lines += ["", *textwrap.wrap(self.note, LINE)]
        return "\n".join(lines)


def report(
    source: Path,
    out: Path,
    text: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare the folder `out` with the `source` it was made from.

    source: a folder in any layout that is read. out: one in MLX's layout, ours or another. text:
    what both models read, at most 1,024 tokens of it; None leaves the divergence out, and what
    stands in its way is a note. progress: weights compared, in all.
    Raises: ModelError when either cannot be read or they are not of one model.
    """
    rows = _rounding(source, out, progress)
    if text is None:
        return Report(rows, None, "")
    if open_folder(source).block is not None:
        note = "No KL divergence: the source is packed as FP8, which the runtime does not run."
        return Report(rows, None, note)
    try:
        return Report(rows, _divergence(source, out, _tokens(source, text)), "")
    except (InputError, OutOfMemory) as error:
        return Report(rows, None, f"No KL divergence: {one_line(error, 1000)}.")


# -- rounding --------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Squares of one tensor or of many."""

    weights: int = 0
    difference: float = 0.0
    whole: float = 0.0

    @property
    def error(self) -> float:
        if self.whole == 0.0:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.whole)

    def add(self, other: "_Sums") -> None:
        self.weights += other.weights
        self.difference += other.difference
        self.whole += other.whole


def _rounding(
    source: Path, out: Path, progress: Callable[[int, int], None] | None
) -> tuple[Row, ...]:
    with closing(open_folder(source)) as theirs, closing(open_folder(out)) as ours:
        known = matrices(Model(theirs.config, theirs.has_vision, theirs.has_mtp))
        pairs = _pairs(theirs, ours)
        total, done = sum(target.nparameters for target, _ in pairs), 0
        sums: dict[Key, _Sums] = defaultdict(_Sums)
        worst: dict[Key, tuple[float, str]] = {}
        for target, view in pairs:
            key = _kind(target, known, theirs.config.tie_word_embeddings), _stored(view)
            one = _compared(theirs, ours, target, view)
            sums[key].add(one)
            if view is not None:
                worst[key] = max(worst.get(key, (-1.0, "")), (one.error, target.name))
            done += target.nparameters
            mx.clear_cache()
            if progress:
                progress(done, total)
    order = [rule.matrices for rule in recipe.RULES]
    order.append(VECTORS)
    return tuple(
        Row(*key, sums[key].weights, sums[key].error, *worst[key])
        if key in worst
        else Row(*key, sums[key].weights, None, None, "")
        for key in sorted(sums, key=lambda key: (order.index(key[0]), key[1]))
    )


def _pairs(theirs: Source, ours: Source) -> list[tuple[Target, View | None]]:
    """What the source becomes, and where the folder has it; None where it has it not.

    Raises: ModelError when they are not of one model.
    """
    if not ours.is_mlx:
        raise ModelError(
            f"{ours.where}: has the layout of Hugging Face; expected a converted folder. "
            "Give the source first."
        )
    plain = Options(None, "uniform")  # both are only read
    found = {target.name: target for target in targets(ours, plain)}
    pairs: list[tuple[Target, View | None]] = []
    for target in targets(theirs, plain):
        other = found.pop(target.name, None)
        if other and (other.shape, other.rows) != (target.shape, target.rows):
            raise ModelError(
                f"{ours.where}: {target.name} has shape {list(other.shape)}; the source's has "
                f"{list(target.shape)}. Compare a folder with the one it was made from."
            )
        pairs.append((target, other.pieces[0].view if other else None))
    for name in found:
        raise ModelError(
            f"{ours.where}: {name} is not in {theirs.where}; expected no more than the source "
            "has. Compare a folder with the one it was made from."
        )
    return pairs


def _kind(target: Target, known: dict[str, int], tied: bool) -> str:
    return recipe.rule_of(target.path, tied).matrices if target.path in known else VECTORS


def _stored(view: View | None) -> str:
    if view is None:
        return ABSENT
    if view.packing is None:
        return view.entry.dtype
    f = view.packing
    return f"{f.bits} bits / {f.group_size}" if f.mode == "affine" else f.mode


def _compared(theirs: Source, ours: Source, target: Target, view: View | None) -> _Sums:
    """Both tensors slice by slice, never whole."""
    if view is None:
        return _Sums(target.nparameters)
    sums = _Sums()
    for piece in target.pieces:
        most = max(1, SLICE_WEIGHTS // target.columns)
        for first in range(0, piece.count, most):
            count = min(most, piece.count - first)
            w = _as_stored(target, theirs.rows(piece.view, piece.first + first, count))
            q = ours.rows(view, piece.at + first, count).astype(mx.float32)
            parts = mx.stack([mx.square(q - w).sum(axis=1), mx.square(w).sum(axis=1)])
            # Rows in F32, their sums in F64, which MLX has not on a GPU.
            difference, whole = np.array(parts).astype(np.float64).sum(axis=1)
            sums.add(_Sums(count * target.columns, float(difference), float(whole)))
    return sums


def _as_stored(target: Target, rows: mx.array) -> mx.array:
    """Rows of the source with the axes and offsets of the folder, F32."""
    if target.turn is not None:
        rows = rows.reshape(-1, *target.turn).transpose(0, 2, 3, 4, 1).reshape(rows.shape)
    rows = rows.astype(mx.float32)
    return rows + 1 if target.add_one else rows


# -- predictions -----------------------------------------------------------------------------------


def _tokens(source: Path, text: str) -> np.ndarray:
    """`[T]` int32, T from 2 to 1,024. Raises: InputError for a shorter text."""
    beginning = text[: MOST_TOKENS * TOKEN_CHARACTERS]
    tokens = prompt.from_text(beginning, Tokenizer.read(source)).tokens[:MOST_TOKENS]
    if len(tokens) < 2:
        raise InputError(
            "the text has under two tokens of the model; expected more. Give more text."
        )
    return tokens


def _divergence(source: Path, out: Path, tokens: np.ndarray) -> Divergence:
    """Both models one after the other; of the first only the output head stays in memory."""
    p_head, p_hidden = _read(source, tokens)
    mx.clear_cache()
    q_head, q_hidden = _read(out, tokens)
    if p_hidden.shape != q_hidden.shape:
        raise ModelError(
            f"{shown(out)}: has width {q_hidden.shape[-1]}; the source has {p_hidden.shape[-1]}. "
            "Compare a folder with the one it was made from."
        )
    columns: list[np.ndarray] = []
    for first in range(0, len(tokens), ROWS):
        rows = slice(first, first + ROWS)
        following = mx.array(np.append(tokens, 0)[1:][rows])
        p, q = p_head(p_hidden[rows]), q_head(q_hidden[rows])
        columns.append(np.array(_compare(p, q, following)))
        mx.clear_cache()
    kl, same, p_loss, q_loss = np.concatenate(columns, axis=1).astype(np.float64)
    return Divergence(
        tokens=len(tokens),
        mean=float(kl.mean()),
        p99=float(np.quantile(kl, 0.99)),
        same_top=float(same.mean()),
        source_perplexity=_perplexity(p_loss),
        perplexity=_perplexity(q_loss),
    )


def _perplexity(losses: np.ndarray) -> float:
    """Of `[T]` losses in nats, the last of which has no token; infinite for a senseless model."""
    with np.errstate(over="ignore"):
        return float(np.exp(losses[:-1].mean()))


def _read(folder: Path, tokens: np.ndarray) -> tuple[Callable[[mx.array], mx.array], mx.array]:
    """A model's output head and its last hidden states `[T, hidden]` on `tokens`.

    Raises: OutOfMemory before the weights are read, or before the text is.
    """
    # Both compute alike, so that only the weights differ; without a GPU F32 is the faster one.
    loaded = api.load(folder, dtype=mx.bfloat16 if mx.metal.is_available() else mx.float32)
    model, text, T = loaded.model, loaded.config.text, len(tokens)
    working = memory.prompt_bytes(loaded.config, T, (), engine.CHUNK, model.dtype.size)
    working += 8 * 4 * ROWS * text.vocab_size
    memory.require(working, f"{T:,} tokens", "Close other programs, or give a shorter text.")
    cache = Cache(text, capacity=T)
    hidden = engine.read_prompt(model, prompt.from_tokens(tokens), cache, keep=T)[0]
    if loaded.config.tie_word_embeddings:
        return model.model.language_model.embed_tokens.as_linear, hidden
    return model.lm_head, hidden


def _compare(p: mx.array, q: mx.array, following: mx.array) -> mx.array:
    """Logits `[T, V]` of both and the next tokens `[T]` -> `[4, T]` f32.

    KL divergence in nats; whether both expect the same token; minus the log of what each gives to
    the one that follows.
    """
    p, q = (x.astype(mx.float32) for x in (p, q))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (p, q))
    kl = mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)  # rounding goes below
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(mx.float32)
    losses = [-mx.take_along_axis(x, following[:, None], axis=-1)[:, 0] for x in (p, q)]
    return mx.stack([kl, same, *losses])


# -- the table -------------------------------------------------------------------------------------


def _line(*cells: str) -> str:
    *fixed, last = cells
    widths = (-21, -12, 8, 9, 9)
    text = " ".join(
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, width in zip(fixed, widths, strict=True)
    )
    room = LINE - len(text) - 2
    name = last.removeprefix("language_model.model.").removesuffix(".weight")
    return f"{text}  {name if len(name) <= room else '...' + name[3 - room :]}".rstrip()


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.3%}"


def _count(weights: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if weights >= size:
            return f"{weights / size:.1f} {unit}"
    return f"{weights:,}"
