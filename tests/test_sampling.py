"""Sampling: the filters against a plain numpy form, the draw against exact probabilities."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.errors import InputError
from qwen35_mlx.sampling import Sampler, Sampling, drawn

FAMILY_ROWS, FAMILY_IDS = 248_320, 248_077
DRAWS = 1500
# Chi-square over n classes has mean n - 1 and variance 2 (n - 1); five deviations above the mean
# are passed about once in 30,000 correct samplers, and the seeds here are fixed.
DEVIATIONS = 5.0

OFF: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def reference(
    logits: np.ndarray, s: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> np.ndarray:
    """Probability of each id, `[V]` float64, by the definitions written out over the vocabulary."""
    x = logits.astype(np.float64)
    for i in {*prompt, *generated}:
        x[i] = x[i] / s.repetition_penalty if x[i] > 0 else x[i] * s.repetition_penalty
    for i in set(generated):
        x[i] -= s.presence_penalty
    order = np.argsort(-x, kind="stable")
    x = (x - x.max()) / s.temperature
    kept = order[: s.top_k or len(x)]
    p = np.exp(x[kept]) / np.exp(x[kept]).sum()
    count = len(p) if s.top_p == 1 else int(np.searchsorted(np.cumsum(p), s.top_p)) + 1
    kept = kept[:count]
    kept = kept[np.exp(x[kept]) >= s.min_p]
    result = np.zeros(len(x))
    result[kept] = np.exp(x[kept]) / np.exp(x[kept]).sum()
    return result


def as_int(token: mx.array) -> int:
    return int(np.array(token).item())


def draws(logits: np.ndarray, s: Sampling, count: int, **options: Any) -> Counter[int]:
    """How often each id comes out of `count` independent steps at the same logits."""
    sampler = Sampler(s, **options)
    row = mx.array(logits)[None]
    return Counter(mx.concatenate([sampler(row) for _ in range(count)]).tolist())  # type: ignore[arg-type]


def fits(counts: Counter[int], p: np.ndarray) -> bool:
    """Chi-square of the counts against `p`; classes expected under 5 times are one class."""
    total = counts.total()
    common = [i for i in np.flatnonzero(p) if p[i] * total >= 5]
    rest = 1 - sum(p[i] for i in common)
    expected = [p[i] * total for i in common] + ([rest * total] if rest * total > 1 else [])
    found = [counts[int(i)] for i in common]
    if len(expected) > len(common):
        found.append(total - sum(found))
    chi = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    freedom = max(len(expected) - 1, 1)
    return bool(chi <= freedom + DEVIATIONS * math.sqrt(2 * freedom))


def normal(size: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


SETTINGS = [
    {},
    {"top_k": 0},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 1},
    {"top_k": 7, "top_p": 1.0},
    {"top_k": 7, "top_p": 0.6},
    {"top_k": 400, "top_p": 0.9},
    {"top_p": 1e-9, "top_k": 0},
    {"top_p": 0.3, "top_k": 0, "temperature": 0.4},
    {"min_p": 0.2, "top_k": 0, "top_p": 1.0},
    {"min_p": 0.3, "top_k": 9, "top_p": 0.97},
    {"min_p": 1.0},
    {"temperature": 0.1},
    {"temperature": 3.0, "top_k": 60, "top_p": 1.0},
    {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("size", [1, 5, 130, 3001])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_each_number_draws_the_token_in_whose_share_it_lies(
    values: dict[str, Any], size: int, dtype: mx.Dtype
) -> None:
    """Shares lie side by side, likelier tokens first, or by id where nothing had to be sorted."""
    padded = mx.array(np.append(normal(size, size), [99.0, 99.0])[None].astype(np.float32))
    row, s = padded.astype(dtype), Sampling(**values, seed=3)
    p = reference(np.array(row[0, :size].astype(mx.float32)), s)
    sorts = s.top_p < 1 or 0 < s.top_k < size
    order = np.argsort(-p, kind="stable") if sorts else np.arange(size)
    order = order[p[order] > 0]
    ends = np.cumsum(p[order])
    # float32 sums of up to 3,001 probabilities against float64.
    slack = 2e-5
    for inside in (0.0, 0.5, 1.0):
        u = ends - p[order] + inside * p[order] + slack * (1 - 2 * inside)
        wide = p[order] > 3 * slack
        found = drawn(row, size, s, mx.array(u[wide].astype(np.float32)))
        assert found.dtype == mx.uint32
        np.testing.assert_array_equal(np.array(found), order[wide])
    kept = set(np.array(drawn(row, size, s, mx.linspace(0, 1 - 2**-24, 4001))).tolist())
    assert kept <= set(order.tolist())


@pytest.mark.parametrize("values", SETTINGS[::3], ids=str)
def test_tokens_come_as_often_as_their_probability_says(values: dict[str, Any]) -> None:
    logits = normal(41, 17)
    s = Sampling(**values, seed=11)
    p = reference(logits, s)
    counts = draws(logits, s, DRAWS)
    assert set(counts) <= set(np.flatnonzero(p).tolist())
    assert fits(counts, p)


def test_the_fit_notices_a_wrong_temperature() -> None:
    logits = normal(41, 17)
    counts = draws(logits, Sampling(**{**OFF, "temperature": 1.2}, seed=11), DRAWS)
    assert not fits(counts, reference(logits, Sampling(**OFF)))


def test_equal_logits_are_drawn_alike() -> None:
    logits = np.zeros(6, np.float32)
    counts = draws(logits, Sampling(**OFF, seed=2), DRAWS)
    assert fits(counts, np.full(6, 1 / 6))
    # 0.5 is reached by three of six; the lower ids stay.
    counts = draws(logits, Sampling(**{**OFF, "top_p": 0.5}, seed=2), 300)
    assert set(counts) == {0, 1, 2}
    assert set(draws(logits, Sampling(**{**OFF, "top_k": 2}, seed=2), 300)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4)):
        counts = draws(logits, Sampling(**{**OFF, "top_p": top_p}, seed=4), 400)
        assert set(counts) == set(range(kept)), top_p


@pytest.mark.parametrize("values", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e-6, 0.0])
def test_a_tiny_temperature_is_greedy_and_not_nan(
    temperature: float, values: dict[str, Any]
) -> None:
    logits = normal(FAMILY_IDS // 100, 8, scale=30.0)
    s = Sampling(temperature=temperature, seed=0, **values)
    assert set(draws(logits, s, 5)) == {int(logits.argmax())}


def test_greedy_takes_the_first_of_equals_and_ignores_the_other_filters() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    s = Sampling(temperature=0, top_p=0.1, top_k=3, min_p=0.9)
    assert set(draws(logits, s, 3)) == {1}


def test_rows_above_the_tokenizers_ids_are_never_drawn() -> None:
    logits = mx.zeros((1, FAMILY_ROWS))
    logits[0, FAMILY_IDS:] = 50.0
    logits[0, 7] = 1.0
    sampler = Sampler(Sampling(temperature=0), FAMILY_IDS)
    assert sampler(logits).tolist() == [7]
    free = Sampling(temperature=1, top_k=0, top_p=1.0, seed=5, presence_penalty=1.0)
    sampler = Sampler(free, FAMILY_IDS, [FAMILY_ROWS - 1, 7])
    tokens = mx.concatenate([sampler(logits) for _ in range(20)])
    assert as_int(tokens.max()) < FAMILY_IDS
    # More ids than rows: a folder without padding.
    assert Sampler(Sampling(temperature=0), 99)(logits[:, :10]).tolist() == [7]


PENALTIES = [
    {"presence_penalty": 1.5},
    {"presence_penalty": -0.7},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 0.5, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("values", PENALTIES, ids=str)
@pytest.mark.parametrize("prompt", [[], [0, 3, 3, 9, 500]], ids=["no prompt", "prompt"])
def test_greedy_with_penalties_follows_the_definitions_step_by_step(
    values: dict[str, Any], prompt: list[int]
) -> None:
    s = Sampling(temperature=0, **values)
    rows = [normal(12, 100 + i, scale=0.6) for i in range(25)]
    for form in (prompt, np.array(prompt, np.int32), mx.array(prompt, dtype=mx.int32)):
        sampler = Sampler(s, None, form)
        generated: list[int] = []
        tokens = [sampler(mx.array(row)[None]) for row in rows]
        for row, token in zip(rows, map(as_int, tokens), strict=True):
            known = [i for i in prompt if i < 12]
            p = reference(row, Sampling(**values, **OFF), known, generated)
            assert token == int(p.argmax())
            generated.append(token)
        assert len(set(generated)) > 3


def test_presence_counts_what_was_generated_and_only_once() -> None:
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    s = Sampling(temperature=0, presence_penalty=1.5)
    sampler = Sampler(s, None, [0, 0, 0])
    row = mx.array(logits)[None]
    # 0 (the prompt does not count), then 1 (2 - 1.5 < 1), then 0 again (0.5 > 0 > -0.5) for ever.
    assert [as_int(sampler(row)) for _ in range(6)] == [0, 1, 0, 0, 0, 0]


def test_repetition_counts_the_prompt_and_moves_negative_logits_down() -> None:
    row = mx.array([[-1.0, -1.4, -1.6]])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), None, [0])
    assert [as_int(sampler(row)) for _ in range(3)] == [1, 2, 0]


def test_penalties_shape_the_distribution_that_is_drawn_from() -> None:
    logits = normal(15, 30, scale=1.0)
    s = Sampling(**OFF, presence_penalty=1.0, repetition_penalty=1.4, seed=0)
    counts: Counter[int] = Counter()
    first = int(logits.argmax())
    forced = mx.full((1, 15), -1e9)
    forced[0, first] = 1e9
    tokens = []
    for seed in range(DRAWS):
        sampler = Sampler(
            Sampling(**OFF, presence_penalty=1.0, repetition_penalty=1.4, seed=seed), None, [2, 5]
        )
        sampler(forced)
        tokens.append(sampler(mx.array(logits)[None]))
    counts.update(mx.concatenate(tokens).tolist())  # type: ignore[arg-type]
    assert fits(counts, reference(logits, s, [2, 5], [first]))


def test_without_penalties_no_mask_is_kept() -> None:
    sampler = Sampler(Sampling(seed=1), None, [1, 2])
    sampler(mx.zeros((1, 50)))
    assert sampler._generated is None and sampler._seen is None


def test_equal_seeds_give_equal_tokens_whatever_the_global_state() -> None:
    logits = normal(500, 40)
    row = mx.array(logits)[None]

    def tokens(seed: int | None, global_seed: int) -> list[int]:
        mx.random.seed(global_seed)
        sampler = Sampler(Sampling(**OFF, seed=seed))
        out = []
        for _ in range(20):
            out.append(sampler(row))
            mx.eval(mx.random.uniform(shape=(3,)))
        return mx.concatenate(out).tolist()  # type: ignore[return-value]

    for seed in (0, 1, 2**63, 2**64 - 1):
        assert tokens(seed, 1) == tokens(seed, 2)
    assert tokens(0, 1) != tokens(1, 1)
    assert len(set(tokens(0, 1))) > 5
    assert tokens(None, 1) != tokens(None, 1)


def test_drawing_leaves_the_global_state_alone() -> None:
    mx.random.seed(9)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(9)
    mx.eval(Sampler(Sampling(seed=1))(mx.zeros((1, 40))))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_step_is_only_described_and_not_computed() -> None:
    # MLX refuses every evaluation while a function is traced. What is traced is not run here:
    # on Linux that would start a C++ compiler.
    def two_steps(row: mx.array) -> mx.array:
        s = Sampling(presence_penalty=1.0, repetition_penalty=1.1, min_p=0.1, seed=1)
        sampler = Sampler(s, 3000, mx.array([1, 2]))
        first = sampler(row)
        return sampler(row + first[:, None])

    row = mx.array(normal(3001, 50))[None]
    assert mx.compile(two_steps)(row).shape == (1,)
    assert 0 <= as_int(two_steps(row)) < 3000
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda x: x * x.max().item())(row)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 1, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[1, V\]"):
        Sampler(Sampling())(mx.zeros(shape))


BAD: list[tuple[str, Any]] = [
    *(("temperature", v) for v in (-0.1, math.nan, math.inf, "1", None, True)),
    *(("top_p", v) for v in (0, -0.5, 1.0001, math.nan, None)),
    *(("top_k", v) for v in (-1, 1.5, True, None, "20", 2**31)),
    *(("min_p", v) for v in (-0.1, 1.1, math.nan)),
    *(("presence_penalty", v) for v in (-2.1, 2.1, math.nan, math.inf)),
    *(("repetition_penalty", v) for v in (0, -1.0, math.nan, math.inf)),
    *(("seed", v) for v in (-1, 2**64, 1.0, "7", True)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_value_out_of_range_is_one_line_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"sampling: {name} is {value!r}; expected ") and "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"min_p": 1},
        {"presence_penalty": -2},
        {"repetition_penalty": 0.01},
        {"seed": 2**64 - 1},
    ],
    ids=str,
)
def test_the_ends_of_every_range_are_usable(values: dict[str, Any]) -> None:
    token = Sampler(Sampling(**values))(mx.array(normal(30, 1))[None])
    assert 0 <= as_int(token) < 30
