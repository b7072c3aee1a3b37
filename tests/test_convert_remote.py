"""A repository of the Hub (a small one on 127.0.0.1) is converted one weight file at a time."""

import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from qwen35_mlx.convert import folder, job, remote

from converting import FILES, digests, read_file, write_sharded, write_source
from hub_server import SHA, FakeHub, Files, serving
from qwen35_mlx import convert
from qwen35_mlx.errors import ConversionError, ModelError, Qwen35Error

REPO = "someone/tiny"
NEXT_SHA = "fedcba9876543210fedcba9876543210fedcba98"
FIRST, SECOND, THIRD = (f"model-{i:05d}-of-00009.safetensors" for i in (1, 2, 3))
SHARDS = {FIRST, SECOND, THIRD}
# Several output files from each weight file, so that an interrupted run has finished some.
OPTIONS = replace(convert.options(bits=4, group_size=32), shard_size=300_000)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder of three weight files, of consecutive tensors as the real ones are."""
    source = write_source(tmp_path_factory.mktemp("local") / "source")
    tensors = sorted(read_file(source / "model.safetensors").items())
    third = len(tensors) // 3
    bounds = (0, third, 2 * third, len(tensors))
    write_sharded(source, [dict(tensors[a:b]) for a, b in pairwise(bounds)])
    (source / "model.safetensors").unlink()
    return source


@pytest.fixture(scope="module")
def expected(local: Path) -> dict[str, str]:
    """Digests of what it becomes when it is all there."""
    out = local.with_name("out")
    source = convert.open_folder(local)
    convert.convert(source, out, OPTIONS, name=REPO, revision=SHA)
    return digests(out)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.01)
    with serving(monkeypatch, tmp_path / "hf" / "hub", {REPO: read(local)}) as state:
        yield state


def read(source: Path) -> Files:
    return {path.name: path.read_bytes() for path in source.iterdir()}


def opened(out: Path, revision: str | None = None) -> tuple[convert.Source, remote.HubSupply]:
    return remote.open_hub(REPO, folder.partial_of(out) / "source", revision)


def stream(out: Path, revision: str | None = None, progress: Any = None) -> Path:
    source, supply = opened(out, revision)
    return convert.convert(
        source,
        out,
        OPTIONS,
        name=REPO,
        revision=supply.revision,
        supply=supply,
        progress=progress,
    )


def stop_at(share: float) -> Callable[[job.Progress], None]:
    """Ctrl-C when that much is converted."""

    def progress(now: job.Progress) -> None:
        if now.done_bytes >= share * now.total_bytes:
            raise KeyboardInterrupt

    return progress


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def fetched(fake: FakeHub) -> set[str]:
    """Weight files of which more than the header was sent."""
    return {name for name, data in weights(fake) if fake.nbytes[name] > 2 * header_bytes(data)}


def weights(fake: FakeHub) -> list[tuple[str, bytes]]:
    return [(name, data) for name, data in fake.repos[REPO].items() if name in SHARDS]


# -- what comes out ----------------------------------------------------------------------------


def test_a_streamed_folder_is_the_one_that_is_converted_locally(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    assert digests(stream(tmp_path / "out")) == expected
    assert not folder.partial_of(tmp_path / "out").exists()
    assert all(fake.nbytes[name] == header_bytes(d) + len(d) for name, d in weights(fake))


def test_planning_needs_the_headers_only_and_writes_nothing(fake: FakeHub, tmp_path: Path) -> None:
    source, supply = opened(tmp_path / "out")
    convert.plan(source, OPTIONS)
    assert {name: fake.nbytes[name] for name in SHARDS} == {
        name: header_bytes(data) for name, data in weights(fake)
    }
    largest = sum(sorted(len(data) for _, data in weights(fake))[-2:])
    assert supply.most_bytes == largest
    assert not folder.partial_of(tmp_path / "out").exists()


def test_never_more_than_two_weight_files_are_there(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    shards, counts = folder.partial_of(tmp_path / "out") / "source", set()

    def look(*_: object) -> None:
        counts.add(len(list(shards.iterdir())) if shards.is_dir() else 0)

    fake.watch = look
    assert digests(stream(tmp_path / "out", progress=look)) == expected
    assert counts == {0, 1, 2}


def test_the_next_file_comes_while_one_is_converted(fake: FakeHub, tmp_path: Path) -> None:
    seen: list[bool] = []

    def progress(now: job.Progress) -> None:
        if now.done_bytes and not seen:
            deadline = time.monotonic() + 10
            while SECOND not in fetched(fake) and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(SECOND in fetched(fake) and THIRD not in fetched(fake))

    stream(tmp_path / "out", progress=progress)
    assert seen == [True]


def test_rows_that_need_several_files_wait_for_all_of_them(fake: FakeHub, tmp_path: Path) -> None:
    """Dealt out in turn, the weight, scales and biases of a matrix lie in three files."""
    block = {"group_size": 64, "bits": 8, "mode": "affine"}
    source = write_source(tmp_path / "mlx", "moe", layout="mlx", quantize=block, shards=3)
    fake.repos[REPO] = read(source)
    here = convert.convert(
        convert.open_folder(source), tmp_path / "here", OPTIONS, name=REPO, revision=SHA
    )
    assert digests(stream(tmp_path / "out")) == digests(here)


def test_a_single_weight_file_needs_no_index(fake: FakeHub, tmp_path: Path) -> None:
    fake.repos[REPO] = read(write_source(tmp_path / "single"))
    out = stream(tmp_path / "out")
    assert (out / "manifest.json").is_file()


def test_a_finished_folder_is_not_downloaded_again(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    stream(tmp_path / "out")
    fake.nbytes.clear()
    assert digests(stream(tmp_path / "out")) == expected
    assert fetched(fake) == set()


# -- interruptions -----------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_was(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    fake.cut_at = {SECOND: [200_000, 50_000]}
    assert digests(stream(tmp_path / "out")) == expected
    begins = [int(sent.split("@")[1]) for sent in fake.sent if sent.startswith(SECOND)]
    assert begins[2:] == [0, 200_000, 250_000]


def test_a_server_without_ranges_is_no_hindrance(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    fake.no_ranges, fake.cut_at = True, {SECOND: [300_000] * 3}
    assert digests(stream(tmp_path / "out")) == expected


def test_after_many_cuts_the_next_run_goes_on_there(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    fake.cut_at = {THIRD: [200_000, *[0] * remote.TRIES]}
    with pytest.raises(ModelError, match=f"^{REPO}: cannot be fetched .* Check the network") as e:
        stream(tmp_path / "out")
    assert "\n" not in str(e.value)
    fake.sent.clear()
    fake.nbytes.clear()
    assert digests(stream(tmp_path / "out")) == expected
    assert f"{THIRD}@200000" in fake.sent
    assert fetched(fake) == {THIRD}


def test_what_is_finished_needs_no_weights_any_more(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "out", progress=stop_at(0.7))
    left = {
        path.name.removesuffix(".part")
        for path in folder.partial_of(tmp_path / "out").glob("source/*")
    }
    assert left == {THIRD}
    fake.nbytes.clear()
    assert digests(stream(tmp_path / "out")) == expected
    assert FIRST not in fetched(fake)


def test_what_an_earlier_run_left_and_nobody_needs_is_removed(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "out", progress=stop_at(0.7))
    left = folder.partial_of(tmp_path / "out") / "source"
    for name in ("other.safetensors", FIRST, ".DS_Store"):
        (left / name).write_bytes(b"x")
    assert digests(stream(tmp_path / "out")) == expected


def test_a_whole_file_that_a_power_cut_emptied_is_not_converted(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "out", progress=stop_at(0.7))
    left = folder.partial_of(tmp_path / "out") / "source" / THIRD
    left.with_name(THIRD + remote.PART).unlink(missing_ok=True)
    left.write_bytes(bytes(len(fake.repos[REPO][THIRD])))
    with pytest.raises(ModelError, match=f"^{REPO}: {THIRD} arrived damaged"):
        stream(tmp_path / "out")
    assert digests(stream(tmp_path / "out")) == expected


def test_ctrl_c_stops_what_is_coming(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(remote, "STOP_SECONDS", 0.1)
    source, supply = opened(tmp_path / "out")
    fake.slow = {SECOND}
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        job.convert(
            source, tmp_path / "out", OPTIONS, name=REPO, revision=SHA, supply=supply,
            progress=stop_at(0.1),
        )  # fmt: skip
    assert time.monotonic() - begin < 5
    fake.slow = set()
    assert digests(stream(tmp_path / "out")) == expected


def test_a_branch_that_moved_is_refused_and_its_old_commit_is_not(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "out", progress=stop_at(0.5))
    fake.move(REPO, NEXT_SHA, fake.repos[REPO] | {"README.md": b"# newer"})
    with pytest.raises(
        ConversionError, match=f"was begun from {REPO} at {SHA[:12]}.* at {NEXT_SHA[:12]}"
    ):
        stream(tmp_path / "out")
    assert digests(stream(tmp_path / "out", revision=SHA)) == expected


def test_everything_is_of_the_commit_that_was_there_at_first(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    source, supply = opened(tmp_path / "out")
    moved = fake.repos[REPO] | dict.fromkeys(SHARDS, b"no weights")
    fake.move(REPO, NEXT_SHA, moved)
    job.convert(source, tmp_path / "out", OPTIONS, name=REPO, revision=SHA, supply=supply)
    assert digests(tmp_path / "out") == expected
    assert not any("main" in path or NEXT_SHA in path for path in fake.asked)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "status", "code", "message"),
    [
        ("listing", 404, "RepoNotFound", "not found on .*, or private"),
        ("listing", 401, "RepoNotFound", "not found on .*, or private.* `hf auth login`"),
        ("listing", 429, "", "answered 429; .* Try again later"),
        ("header", 401, "GatedRepo", "is gated on .* Accept its terms"),
        ("header", 403, "", "refuses access .403."),
        ("weights", 403, "GatedRepo", "is gated on .* Accept its terms"),
        ("weights", 401, "", "refuses access .401.|not found on .*, or private"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    fake: FakeHub, tmp_path: Path, where: str, status: int, code: str, message: str
) -> None:
    if where == "weights":
        source, supply = opened(tmp_path / "out")
    if where == "listing":
        fake.status[REPO] = (status, code)
    else:
        fake.file_status[SECOND] = (status, code)
    with pytest.raises(ModelError, match=f"^{REPO}: .*{message}") as caught:
        if where == "weights":
            job.convert(source, tmp_path / "out", OPTIONS, name=REPO, revision=SHA, supply=supply)
        else:
            opened(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_busy_hub_is_asked_again(fake: FakeHub, tmp_path: Path, expected: dict[str, str]) -> None:
    fake.busy = dict.fromkeys(SHARDS, 3)
    assert digests(stream(tmp_path / "out")) == expected
    assert not any(fake.busy.values())


def test_a_hub_that_stays_busy_is_given_up(fake: FakeHub, tmp_path: Path) -> None:
    fake.busy = {THIRD: math.inf}
    with pytest.raises(ModelError, match=f"^{REPO}: .* answered 429; expected 200"):
        opened(tmp_path / "out")


def test_an_unknown_revision_is_named_as_such(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^{REPO}: has no such revision .* Check --revision"):
        opened(tmp_path / "out", "nowhere")


def test_without_network_the_advice_is_to_check_it(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    source, supply = opened(tmp_path / "out")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(ModelError, match=f"^{REPO}: cannot be fetched from {nowhere} .*Check the"):
        job.convert(source, tmp_path / "out", OPTIONS, name=REPO, revision=SHA, supply=supply)
    with pytest.raises(ModelError, match=f"^{REPO}: cannot be fetched from {nowhere} .*Check the"):
        opened(tmp_path / "out")


def test_a_file_shorter_than_listed_is_refused_before_any_weight(
    fake: FakeHub, tmp_path: Path
) -> None:
    fake.sizes = {SECOND: len(fake.repos[REPO][SECOND]) + 9}
    with pytest.raises(ModelError, match=f"^{REPO}/{SECOND}: holds .* bytes; its header describes"):
        opened(tmp_path / "out")


def test_a_file_that_ends_early_on_the_way_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    source, supply = opened(tmp_path / "out")
    data = fake.repos[REPO][SECOND]
    fake.repos[REPO][SECOND] = data[:-1000]
    with pytest.raises(ModelError, match=rf"^{REPO}: {SECOND} has no byte .*{len(data):,} bytes"):
        job.convert(source, tmp_path / "out", OPTIONS, name=REPO, revision=SHA, supply=supply)


def test_damaged_weights_are_refused_and_fetched_anew(
    fake: FakeHub, tmp_path: Path, expected: dict[str, str]
) -> None:
    fake.damaged = {SECOND}
    with pytest.raises(ModelError, match=f"^{REPO}: {SECOND} arrived damaged.* Run the same"):
        stream(tmp_path / "out")
    fake.damaged = set()
    assert digests(stream(tmp_path / "out")) == expected


def test_a_full_disk_is_said_as_of_any_conversion(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    receive = remote._Commit.receive

    def refuse(self: Any, name: str, begin: int, stop: int, take: Any) -> None:
        def full(data: bytes) -> None:
            raise OSError(28, "No space left on device")

        receive(self, name, begin, stop, full if name == SECOND else take)

    source, supply = opened(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(remote._Commit, "receive", refuse)
        with pytest.raises(ConversionError, match="the disk is full; finished files stay"):
            job.convert(source, tmp_path / "out", OPTIONS, name=REPO, revision=SHA, supply=supply)
    assert digests(stream(tmp_path / "out")) == expected


def test_the_room_for_two_weight_files_is_asked_for_before_the_first_comes(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    source, supply = opened(tmp_path / "out")
    planned = convert.plan(source, OPTIONS)
    needed = planned.output_bytes + supply.most_bytes + job.SPARE
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ConversionError, match="bytes are still to be written"):
        stream(tmp_path / "out")
    assert fetched(fake) == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert digests(stream(tmp_path / "out")) == expected


def damaged_header(files: Files) -> None:
    files[SECOND] = b"\xff" * 8 + files[SECOND][8:]


def huge_header(files: Files) -> None:
    files[SECOND] = (2**40).to_bytes(8, "little") + files[SECOND][8:]


def straying_index(files: Files) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    name = next(n for n, file in index["weight_map"].items() if file == SECOND)
    index["weight_map"][name] = "../../other.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def missing_shard(files: Files) -> None:
    del files[SECOND]


def unlisted_tensor(files: Files) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"].popitem()
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def missing_sidecar(files: Files) -> None:
    config = json.loads(files["config.json"])
    config["qwen35_mlx"] = {"format": 1, "sidecars": ["mtp.safetensors"]}
    files["config.json"] = json.dumps(config).encode()


def other_family(files: Files) -> None:
    files["config.json"] = b'{"model_type": "llama"}'


def no_index(files: Files) -> None:
    del files["model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_header, "bytes with a header of 18446744073709551615; expected safetensors"),
        (huge_header, "bytes with a header of 1099511627776; expected safetensors"),
        (straying_index, r"lies in '../../other\.safetensors'; expected a .safetensors file of"),
        (missing_shard, f"{SECOND} is missing; model.safetensors.index.json names it"),
        (unlisted_tensor, "which model.safetensors.index.json does not list for it"),
        (missing_sidecar, "no mtp.safetensors; config.json names it"),
        (other_family, "model_type is 'llama'"),
        (no_index, "no model.safetensors and no model.safetensors.index.json"),
    ],
)
def test_what_is_no_whole_model_is_refused_from_its_headers(
    fake: FakeHub, tmp_path: Path, damage: Callable[[Files], None], message: str
) -> None:
    damage(fake.repos[REPO])
    with pytest.raises(Qwen35Error, match=message) as caught:
        opened(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert fetched(fake) == set()
    assert not folder.partial_of(tmp_path / "out").exists()


def test_a_repository_without_tokenizer_is_refused_before_any_weight(
    fake: FakeHub, tmp_path: Path
) -> None:
    assert "tokenizer.json" in FILES
    del fake.repos[REPO]["tokenizer.json"]
    with pytest.raises(ModelError, match="no tokenizer.json"):
        stream(tmp_path / "out")
    assert fetched(fake) == set()
