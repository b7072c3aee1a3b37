"""Where a folder may be made: never over another, never in its source, never by two at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen35_mlx.convert import convert, job, open_folder, options

import converting
from converting import converted, differing, digests
from qwen35_mlx.errors import ConversionError, ModelError


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A source of the test's own."""
    return converting.write_source(tmp_path / "source", "moe")


@pytest.mark.parametrize("gone", ["tokenizer.json", "tokenizer_config.json", "template"])
def test_a_source_without_tokenizer_or_template_is_refused_before_anything_is_written(
    gone: str, plain: Path, tmp_path: Path
) -> None:
    if gone == "template":
        (plain / "tokenizer_config.json").write_text("{}")
    else:
        (plain / gone).unlink()
    named = gone if gone != "template" else "chat_template.jinja"
    with pytest.raises(ModelError, match=f"no {named}"):
        converted(plain, tmp_path / "out", bits=4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.json", "{}", "expected a tokenizer of the tokenizers library"),
        ("tokenizer_config.json", "{", "expected JSON"),
        ("chat_template.jinja", "{% if %}", "line 1: .* a jinja2 chat template was expected"),
        ("preprocessor_config.json", '{"patch_size": 0}', "patch_size"),
        ("preprocessor_config.json", "[]", "expected an object"),
        ("video_preprocessor_config.json", '{"fps": -1}', "fps is -1"),
        ("generation_config.json", "{", "expected JSON"),
        ("generation_config.json", '{"top_p": 7}', "top_p"),
        ("vocab.json", '{"a": 0', "expected JSON"),
        ("special_tokens_map.json", "[]", "expected an object"),
    ],
)
def test_a_damaged_small_file_is_refused_before_anything_is_written(
    name: str, content: str, named: str, plain: Path, tmp_path: Path
) -> None:
    (plain / name).write_text(content)
    with pytest.raises(ModelError, match=f"{name}: .*{named}") as raised:
        converted(plain, tmp_path / "out", bits=4)
    assert len(str(raised.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def foreign(out: Path, source: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def file(out: Path, source: Path) -> None:
    out.write_text("a file")


def dangling(out: Path, source: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


def mlx_folder(out: Path, source: Path) -> None:
    converting.write_source(out, "moe", layout="mlx")


def same_folder(out: Path, source: Path) -> None:
    out.symlink_to(source)


def foreign_partial(out: Path, source: Path) -> None:
    foreign(out.with_name(out.name + ".partial"), source)


def other_bits(out: Path, source: Path) -> None:
    converted(source, out, bits=8)


def other_name(out: Path, source: Path) -> None:
    convert(open_folder(source), out, options(4), name="Qwen/another")


def begun_otherwise(out: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        converted(source, out, bits=6, progress=interrupt)


def interrupt(progress: Any) -> None:
    raise KeyboardInterrupt


def begun_from_another(out: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        converted(source, out, bits=4, progress=interrupt)
    os.utime(source / "model.safetensors", (1, 1))


REFUSALS: list[tuple[Callable[[Path, Path], None], str]] = [
    (foreign, "exists and was not made by this program"),
    (file, "exists and was not made by this program"),
    (dangling, "exists and was not made by this program"),
    (mlx_folder, "exists and was not made by this program"),
    (same_folder, "is the source"),
    (foreign_partial, "exists and was not begun by this program"),
    (other_bits, "was made from Qwen/a-model with --bits 8 .*the same options"),
    (other_name, "was made from Qwen/another"),
    (begun_otherwise, "was begun from Qwen/a-model with --bits 6 .*expected the same options"),
    (begun_from_another, "the source is now Qwen/a-model, and not the same"),
]


@pytest.mark.parametrize(("prepare", "named"), REFUSALS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_stands_in_the_way_is_refused_and_stays_as_it_is(
    prepare: Callable[[Path, Path], None], named: str, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(out, plain)
    before = digests(tmp_path)
    with pytest.raises(ConversionError, match=named) as raised:
        converted(plain, out, bits=4)
    assert len(str(raised.value).splitlines()) == 1
    assert differing(digests(tmp_path), before) == []


@pytest.mark.parametrize("place", ["source", "source/out", ".", "source/../source", "link/a"])
def test_the_source_is_never_written_to(
    place: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(plain)
    monkeypatch.chdir(tmp_path)
    before = digests(plain)
    for given in (Path("source"), plain, tmp_path / "link"):
        with pytest.raises(ConversionError, match="expected a folder apart"):
            converted(given, Path(place), bits=4)
    assert digests(plain) == before and len(list(tmp_path.iterdir())) == 2


def test_a_source_called_like_our_unfinished_folder_is_not_taken_for_it(
    plain: Path, tmp_path: Path
) -> None:
    theirs = plain.rename(tmp_path / "out.partial")
    before = digests(theirs)
    with pytest.raises(ConversionError, match="expected a folder apart"):
        converted(theirs, tmp_path / "out", bits=4)
    assert digests(theirs) == before


def test_an_empty_folder_or_a_link_to_one_is_filled(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    first = converted(plain, tmp_path / "empty", bits=4)
    second = converted(plain, tmp_path / "link", bits=4)
    assert differing(digests(first), digests(second)) == []
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_the_working_folder_itself_may_be_the_output(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    converted(plain, Path("."), bits=4)
    assert (tmp_path / "here" / "config.json").is_file()


def test_a_place_where_nothing_can_be_written_is_refused_with_one_line(
    plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="file/out.*expected to write there"):
        converted(plain, tmp_path / "file" / "out", bits=4)


def test_a_name_that_is_too_long_leaves_no_folders_above_it(plain: Path, tmp_path: Path) -> None:
    for name in ("x" * 255, "y" * 300):
        with pytest.raises(ConversionError, match="File name too long") as raised:
            converted(plain, tmp_path / "new" / "parent" / name, bits=4)
        assert len(str(raised.value).splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_converting_leaves_the_source_alone_and_twice_changes_nothing(
    plain: Path, tmp_path: Path
) -> None:
    before, out = digests(plain), tmp_path / "out"
    converted(plain, out, bits=4)
    first, times = digests(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}
    converted(plain, out, bits=4)
    assert digests(plain) == before and digests(out) == first
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times


def test_a_folder_that_another_run_finished_meanwhile_is_taken(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(converted(plain, tmp_path / "expected", bits=4))
    out, planned = tmp_path / "out", job.plan

    def late(*given: Any) -> Any:
        (tmp_path / "expected").rename(out)  # since this run looked whether it is there
        return planned(*given)

    monkeypatch.setattr(job, "plan", late)
    converted(plain, out, bits=4)
    assert digests(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_second_conversion_into_the_same_folder_is_refused_while_the_first_works(
    plain: Path, tmp_path: Path
) -> None:
    out, refused = tmp_path / "out", []

    def second(progress: Any) -> None:
        if progress.tensors % 20:
            return
        with pytest.raises(ConversionError, match="another conversion writes there") as raised:
            converted(plain, out, bits=4)
        refused.append(raised)

    converted(plain, out, bits=4, progress=second)
    expected = converted(plain, tmp_path / "expected", bits=4)
    assert len(refused) > 5 and differing(digests(out), digests(expected)) == []
