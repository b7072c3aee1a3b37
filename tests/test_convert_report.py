"""The report's numbers are those of whole tensors and whole logits, computed apart from it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from qwen35_mlx.convert.report import Report, Row, _perplexity, report

import converting
import qwen35_mlx
import tiny
from converting import Raw, read_file, write_file
from qwen35_mlx import memory, prompt
from qwen35_mlx.errors import ModelError

DEMO = Path(__file__).parents[1] / "examples" / "demo-model"
TEXT = "Ships come and go; the harbour of Lisbon opened early, and nobody slept. " * 3
LAYERS = "model.language_model.layers"
# Sums of squares in another order, F32 rows.
SAME_SUMS = 1e-5
# Log-probabilities in F32 on both sides, logits up to about 30.
SAME_LOGITS = {"mean": 2e-5, "p99": 2e-4, "perplexity": 1e-4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converting.write_source(tmp_path_factory.mktemp("source"), "moe")


@pytest.fixture(scope="module")
def four(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converting.converted(source, tmp_path_factory.mktemp("four") / "out", bits=4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("demo")
    return {
        bits: converting.converted(DEMO, root / str(bits), bits=bits, recipe="uniform")
        for bits in (4, 8, 16)
    }


@pytest.fixture(scope="module")
def reports(demo: dict[int, Path]) -> dict[int, Report]:
    return {bits: report(DEMO, folder, TEXT) for bits, folder in demo.items()}


def rows_of(made: Report, matrices: str) -> list[Row]:
    return [row for row in made.rows if row.matrices == matrices]


def row_of(made: Report, matrices: str) -> Row:
    (row,) = rows_of(made, matrices)
    return row


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def rounded(array: np.ndarray, bits: int) -> np.ndarray:
    """A whole BF16 matrix packed in groups of 64 and decoded again, as float64."""
    parts = mx.quantize(mx.array(array).astype(mx.bfloat16), 64, bits)
    return np.array(mx.dequantize(*parts, 64, bits).astype(mx.float32)).astype(np.float64)


# -- rounding --------------------------------------------------------------------------------------


def test_the_error_is_that_of_whole_matrices(source: Path, four: Path) -> None:
    tensors = tiny.rounded(converting.drawn("moe"))
    names = [name for name in tensors if ".experts." in name]
    whole = np.concatenate([tensors[name].ravel().astype(np.float64) for name in names])
    found = np.concatenate([rounded(tensors[name], 4).ravel() for name in names])
    row = row_of(report(source, four), "experts")
    assert (row.stored, row.weights) == ("4 bits / 64", whole.size)
    assert row.error == pytest.approx(relative(found, whole), rel=SAME_SUMS)


def test_the_worst_matrix_is_named(source: Path, four: Path) -> None:
    tensors = tiny.rounded(converting.drawn("moe"))
    errors = {
        tiny.mlx_name(name): relative(rounded(array, 6), array.astype(np.float64))
        for name, array in tensors.items()
        if name.endswith("linear_attn.out_proj.weight")
    }
    row = row_of(report(source, four), "delta net output")
    assert row.worst == max(errors, key=lambda name: errors[name])
    assert row.worst_error == pytest.approx(max(errors.values()), rel=SAME_SUMS)


def test_small_slices_give_the_same_errors(
    source: Path, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report(source, four)
    monkeypatch.setattr("qwen35_mlx.convert.report.SLICE_WEIGHTS", 1000)
    for row, other in zip(report(source, four).rows, whole.rows, strict=True):
        assert (row.matrices, row.stored, row.weights) == (
            other.matrices,
            other.stored,
            other.weights,
        )
        assert row.error == pytest.approx(other.error, rel=SAME_SUMS)


def test_sixteen_bits_lose_nothing(reports: dict[int, Report]) -> None:
    assert {row.error for row in reports[16].rows} == {0.0}
    assert {row.stored for row in reports[16].rows} == {"BF16", "F32"}


def test_more_bits_lose_less(reports: dict[int, Report]) -> None:
    for row in reports[8].rows:
        if row.stored == "8 bits / 64":
            (coarse,) = rows_of(reports[4], row.matrices)
            assert row.error and coarse.error
            assert 5 * row.error < coarse.error


def test_all_weights_are_counted_in_the_order_of_the_recipe(source: Path, four: Path) -> None:
    rows = report(source, four).rows
    assert sum(row.weights for row in rows) == sum(a.size for a in converting.drawn("moe").values())
    kinds = list(dict.fromkeys(row.matrices for row in rows))
    assert kinds[:3] == ["patches, positions", "vision tower", "router"]
    assert kinds[-1] == "vectors, convolutions"


def test_experts_apart_give_the_same_report(source: Path, four: Path, tmp_path: Path) -> None:
    apart = converting.write_source(tmp_path, "moe", experts_fused=False)
    for row, other in zip(report(apart, four).rows, report(source, four).rows, strict=True):
        assert row.error == pytest.approx(other.error, rel=SAME_SUMS)
        assert (row.weights, row.worst) == (other.weights, other.worst)


def test_an_fp8_source_is_decoded(tmp_path: Path) -> None:
    """Codes 1 with scale 0.5 and code 2 with scale 3, then one changed code in the folder."""
    source = converting.write_source(tmp_path / "source", "dense_tied")
    name = f"{LAYERS}.1.mlp.down_proj.weight"
    tensors = read_file(source / "model.safetensors")
    shape = tensors[name].shape
    codes = np.full(shape, 0x38, np.uint8)  # 1.0
    scales = np.full((-(-shape[0] // 128), -(-shape[1] // 128)), 0.5, np.float32)
    scales[:, -1] = 3
    tensors[name] = converting.raw(codes, "F8_E4M3")
    tensors[f"{name}_scale_inv"] = converting.raw(scales, "BF16")
    write_file(source / "model.safetensors", tensors)
    values = json.loads((source / "config.json").read_text())
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    values["quantization_config"] = block
    (source / "config.json").write_text(json.dumps(values))
    out = converting.converted(source, tmp_path / "out", bits=16)
    made = report(source, out, TEXT)
    assert row_of(made, "feed-forward").error == 0.0
    assert made.divergence is None and "FP8" in made.table().splitlines()[-1]
    codes[0, 0] = 0x40  # 2.0 instead of 1.0, times 0.5
    tensors[name] = converting.raw(codes, "F8_E4M3")
    write_file(source / "model.safetensors", tensors)
    row = row_of(report(source, out), "feed-forward")
    whole = np.where(np.arange(shape[1]) < 128 * (shape[1] // 128), 0.5, 3.0)
    squares = shape[0] * np.sum(whole**2) - 0.5**2 + 1.0**2
    assert row.worst_error == pytest.approx(0.5 / math.sqrt(squares), rel=SAME_SUMS)


def test_a_source_of_mlx_community_is_compared(tmp_path: Path) -> None:
    block = {"group_size": 64, "bits": 8, "mode": "affine"}
    source = converting.write_source(tmp_path / "source", "moe", layout="mlx", quantize=block)
    out = converting.converted(source, tmp_path / "out", bits=4, recipe="uniform")
    rows = {row.matrices: row for row in report(source, out).rows}
    assert rows["vision tower"].error == 0.0
    assert 0.05 < (rows["experts"].error or 0) < 0.15
    same = report(source, source).rows
    assert {row.error for row in same} == {0.0}
    assert row_of(report(source, source), "experts").stored == "8 bits / 64"


def test_what_the_folder_lacks_has_a_row(source: Path, tmp_path: Path) -> None:
    block = {"group_size": 64, "bits": 4, "mode": "affine"}
    other = converting.write_source(tmp_path, "moe", layout="mlx", quantize=block)
    lacking = row_of(report(source, other), "draft head's input")
    assert (lacking.stored, lacking.error, lacking.worst) == ("not there", None, "")
    assert lacking.weights == 192 * 384


def test_folders_of_other_models_are_refused(source: Path, four: Path, tmp_path: Path) -> None:
    dense = converting.write_source(tmp_path / "dense", "dense")
    with pytest.raises(ModelError, match="Compare a folder with the one"):
        report(dense, four)
    with pytest.raises(ModelError, match="layout of Hugging Face"):
        report(four, source)


def test_progress_counts_all_weights(source: Path, four: Path) -> None:
    seen: list[tuple[int, int]] = []
    report(source, four, progress=lambda done, total: seen.append((done, total)))
    total = sum(array.size for array in converting.drawn("moe").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- predictions -----------------------------------------------------------------------------------


def log_probabilities(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """`[T, V]` float64 and the tokens, through the public interface."""
    arithmetic = mx.bfloat16 if mx.metal.is_available() else mx.float32
    model = qwen35_mlx.load(folder, dtype=arithmetic)
    asked = prompt.from_text(TEXT, model.tokenizer)
    logits = np.array(model.logits(asked)).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), asked.tokens


def test_the_divergence_is_that_of_whole_logits(
    demo: dict[int, Path], reports: dict[int, Report]
) -> None:
    found = reports[4].divergence
    assert found is not None
    p, tokens = log_probabilities(DEMO)
    q, _ = log_probabilities(demo[4])
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    place = np.arange(len(tokens) - 1)
    perplexities = [math.exp(-x[place, tokens[1:]].mean()) for x in (p, q)]
    assert found.tokens == len(tokens) > 40
    assert found.mean == pytest.approx(kl.mean(), abs=SAME_LOGITS["mean"])
    assert found.p99 == pytest.approx(np.quantile(kl, 0.99), abs=SAME_LOGITS["p99"])
    assert found.same_top == (p.argmax(-1) == q.argmax(-1)).mean() < 1
    assert [found.source_perplexity, found.perplexity] == pytest.approx(
        perplexities, rel=SAME_LOGITS["perplexity"]
    )


def test_sixteen_bits_predict_the_same(reports: dict[int, Report]) -> None:
    found = reports[16].divergence
    assert found is not None
    assert 0 <= found.mean < 1e-6
    assert found.same_top == 1
    assert found.perplexity == found.source_perplexity


def test_more_bits_predict_better(reports: dict[int, Report]) -> None:
    four, eight = reports[4].divergence, reports[8].divergence
    assert four is not None and eight is not None
    assert 0 < 5 * eight.mean < four.mean
    assert eight.p99 < four.p99


def test_untied_heads_are_used(tmp_path: Path) -> None:
    small = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (DEMO / name).read_text() for name in small}
    config: dict[str, Any] = json.loads(json.dumps(tiny.CONFIGS["moe_untied"]))
    config["text_config"]["vocab_size"] = 1024
    source = tiny.write(
        tmp_path / "source", config, tiny.draw(config), dtype="bfloat16", files=files
    )
    out = converting.converted(source, tmp_path / "out", bits=16)
    same = report(source, out, "Two ships.").divergence
    assert same is not None and same.mean < 1e-6
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    tensors = read_file(changed / "model.safetensors")
    head = tensors["lm_head.weight"]
    swapped = np.frombuffer(head.data, np.uint16)[::-1]
    tensors["lm_head.weight"] = Raw(head.dtype, head.shape, swapped.tobytes())
    write_file(changed / "model.safetensors", tensors)
    other = report(changed, out, "Two ships.").divergence
    assert other is not None and not other.mean < 0.1


def test_a_senseless_model_has_no_perplexity_and_no_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert _perplexity(np.array([900.0, 800.0, 0.0])) == np.inf
    assert _perplexity(np.array([1.0, 3.0, 99.0])) == pytest.approx(np.e**2)
    assert list(recwarn) == []


def test_a_long_text_is_cut(demo: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen35_mlx.convert.report.MOST_TOKENS", 33)
    found = report(DEMO, demo[16], TEXT).divergence
    assert found is not None and found.tokens == 33


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "No KL divergence: the text has under two tokens of the model; expected more. Give"),
        ("a <|image_pad|> b", "No KL divergence: "),
    ],
)
def test_a_text_that_the_model_cannot_read_is_a_note(
    text: str, said: str, demo: dict[int, Path]
) -> None:
    found = report(DEMO, demo[16], text)
    assert found.rows and found.divergence is None
    assert found.note.startswith(said) and found.note.endswith(".")


def test_too_little_memory_is_a_note(
    demo: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    made = report(DEMO, demo[16], TEXT)
    assert made.divergence is None
    assert made.rows
    assert made.note.startswith("No KL divergence: ")
    assert "GB are free" in made.table()


# -- the table -------------------------------------------------------------------------------------


def test_the_table_fits(source: Path, four: Path, reports: dict[int, Report]) -> None:
    for made in (report(source, four), *reports.values()):
        lines = made.table().splitlines()
        assert max(map(len, lines)) <= 100
        for row, line in zip(made.rows, lines[1:], strict=False):
            assert line.startswith(f"{row.matrices} ")
            assert f" {row.stored} " in line
            assert f" {row.error:.3%}" in line
    assert "nats" in reports[4].table()
    assert "nats" not in report(source, four).table()


def test_long_names_and_large_numbers_fit() -> None:
    name = "mtp.layers.0.mlp.shared_expert.down_proj.weight"
    row = Row("vectors, convolutions", "8 bits / 128", 397_000_000_000, 12.3456, 99.9, name)
    row_without = Row("experts", "not there", 10**6, None, None, "")
    note = "No KL divergence: " + "many words " * 30
    table = Report((row, row_without), None, note).table()
    assert max(map(len, table.splitlines())) <= 100
    assert "397.0 B" in table and "1234.560%" in table and "shared_expert.down_proj" in table
