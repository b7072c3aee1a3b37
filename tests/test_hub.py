"""Names become folders: local ones, conversions, the cache, and a small Hub on 127.0.0.1."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen35_mlx.convert.published import config_values

from hub_server import FakeHub, serving
from qwen35_mlx import family, hub
from qwen35_mlx.errors import ModelError, OutOfMemory
from tiny_shapes import CONFIGS

REPO = "someone/tiny"
SMALL = "mlx-community/Qwen3.5-0.8B-4bit"


def safetensors(count: int, name: str = "a") -> bytes:
    header = json.dumps({name: {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}})
    return len(header).to_bytes(8, "little") + header.encode() + bytes(count)


def config_08b() -> dict:
    size = family.find("0.8b")
    assert size is not None
    return config_values(size)


def model_files(config: dict | None = None) -> dict[str, bytes]:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    return {
        "config.json": json.dumps(config or CONFIGS["dense_tied"]).encode(),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "merges.txt": b"a b",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": safetensors(5_000),
        "model-2.safetensors": safetensors(7_000, "b"),
    }


UNWANTED = {"README.md": b"#", "model.gguf": b"G", "evil.py": b"!", "onnx/model.safetensors": b"x"}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "SPARE", 0)
    monkeypatch.setenv("QWEN35_HOME", str(tmp_path / "home"))
    repos = {REPO: model_files() | UNWANTED, SMALL: model_files(config_08b())}
    with serving(monkeypatch, tmp_path / "hf" / "hub", repos) as state:
        yield state


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# -- local folders -----------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, fake: FakeHub) -> None:
    folder = write(tmp_path / "mine", model_files())
    choice = hub.resolve(str(folder))
    assert (choice.folder, choice.bytes, hub.download(choice)) == (folder, 0, folder)
    assert fake.asked == []


def test_a_folder_wins_over_a_hub_id_and_a_size(
    tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "someone" / "tiny", model_files())
    write(tmp_path / "0.8b", model_files())
    assert hub.resolve(REPO).folder == Path(REPO)
    assert hub.resolve("0.8b").folder == Path("0.8b")
    assert fake.asked == []


@pytest.mark.parametrize(
    "name",
    [
        "../..",
        "a/../b",
        "someone/..",
        "./missing",
        "/no/such/folder",
        "a/b/c",
        "-x/y",
        "some one/tiny",
        "someone/ti--ny",
        "someone/tiny?x",
        "someone\\tiny",
        "nothing",
        "5b",
        "",
        "~nobody-of-that-name/model",
        "x" * 5000,
        "a\0b",
    ],
)
def test_what_is_no_name_of_a_model_never_reaches_the_hub(
    name: str, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    if name == "../..":  # a folder, and never more than that
        assert hub.resolve(name).folder == Path(name)
    else:
        with pytest.raises(
            ModelError, match=r"no such folder; expected a model folder.*\(0\.8b, 2b"
        ):
            hub.resolve(name)
    assert fake.asked == []


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file; expected a model folder"):
        hub.resolve(str(tmp_path / "m.gguf"))


# -- completeness ------------------------------------------------------------------------------


def test_a_folder_is_complete_only_with_every_shard_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", model_files())
    assert hub.is_complete(whole)
    for i, name in enumerate(("config.json", "tokenizer.json", "model-2.safetensors")):
        folder = Path(shutil.copytree(whole, tmp_path / f"without-{i}"))
        (folder / name).unlink()
        assert not hub.is_complete(folder), name
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    os.truncate(cut / "model-1.safetensors", 4_000)
    assert not hub.is_complete(cut)
    single = write(tmp_path / "single", {**model_files(), "model.safetensors": safetensors(3)})
    (single / "model.safetensors.index.json").unlink()
    assert hub.is_complete(single)


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({}, False),
        ({"tokenizer_config.json": b"{}"}, False),
        ({"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}, True),
        ({"chat_template.json": b'{"chat_template": "{{ messages }}"}'}, True),
    ],
)
def test_a_folder_is_complete_only_with_a_chat_template(
    tmp_path: Path, files: dict[str, bytes], complete: bool
) -> None:
    folder = write(tmp_path / "m", model_files() | files)
    assert hub.is_complete(folder)
    (folder / "chat_template.jinja").unlink()
    assert hub.is_complete(folder) is complete


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}', b"\xff\xfe"]
    + [b'{"weight_map": {"a": "../whole/model-1.safetensors"}}'],
)
def test_a_broken_or_straying_index_is_not_complete(tmp_path: Path, index: bytes) -> None:
    write(tmp_path / "whole", model_files())
    folder = write(tmp_path / "m", model_files() | {"model.safetensors.index.json": index})
    assert not hub.is_complete(folder)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 8, b"\x03\0\0\0\0\0\0\0{}", b"\x08" + b"\0" * 7],
)
def test_a_broken_weight_file_is_not_complete(tmp_path: Path, data: bytes) -> None:
    assert not hub.is_complete(write(tmp_path / "m", model_files() | {"model-1.safetensors": data}))


# -- sizes -------------------------------------------------------------------------------------


def test_a_size_is_the_newest_complete_conversion_of_that_size(
    tmp_path: Path, fake: FakeHub
) -> None:
    models = tmp_path / "home" / "models"
    small, other = model_files(config_08b()), model_files()
    incomplete = {k: v for k, v in small.items() if k != "model-2.safetensors"}
    for age, (name, files) in enumerate(
        [("incomplete", incomplete), ("other", other), ("new", small), ("old", small)]
    ):
        folder = write(models / name, files)
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    choice = hub.resolve("0.8B")
    assert (choice.folder, fake.asked) == (models / "new", [])
    assert choice.why == "newest local conversion of 0.8B"


def test_a_home_of_an_unknown_user_holds_no_conversions(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_HOME", "~nobody-of-that-name/x")
    assert hub.models() == Path("~nobody-of-that-name/x/models")
    assert hub.resolve("0.8b").folder is None


def test_a_size_without_conversion_is_the_4_bit_folder_of_mlx_community(fake: FakeHub) -> None:
    choice = hub.resolve("0.8b")
    total = sum(len(data) for data in model_files(config_08b()).values())
    assert (choice.repo, choice.folder, choice.bytes) == (SMALL, None, total)
    assert hub.is_complete(hub.download(choice))


def test_a_size_that_mlx_community_lacks_names_the_original(fake: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"Qwen3\.5-2B-4bit: not found .*Try Qwen/Qwen3\.5-2B"):
        hub.resolve("2b")


# -- downloads ---------------------------------------------------------------------------------


def test_only_model_files_are_downloaded_and_each_once(fake: FakeHub) -> None:
    choice = hub.resolve(REPO)
    reports: list[tuple[int, int]] = []
    folder = hub.download(choice, lambda done, total: reports.append((done, total)))
    assert {p.name for p in folder.iterdir()} == set(model_files())
    assert {name: (folder / name).read_bytes() for name in model_files()} == model_files()
    assert sorted(fake.sent) == sorted(f"{name}@0" for name in model_files())
    total = sum(map(len, model_files().values()))
    assert choice.bytes == choice.total_bytes == total
    assert reports[-1] == (total, total)
    assert all(0 <= done <= total for done, _ in reports)


def test_a_cached_snapshot_needs_no_network(fake: FakeHub) -> None:
    folder = hub.download(hub.resolve(REPO))
    fake.asked.clear()
    again = hub.resolve(REPO)
    assert (again.folder, hub.download(again), fake.asked) == (folder, folder, [])
    assert "cache" in again.why


def test_an_interrupted_download_goes_on_where_it_was(fake: FakeHub) -> None:
    fake.cut = {"model-2.safetensors"}
    choice = hub.resolve(REPO)
    with pytest.raises(ModelError, match=f"^{REPO}: "):
        hub.download(choice)
    fake.cut, fake.sent = set(), []
    rest = hub.resolve(REPO)
    assert rest.folder is None and 0 < rest.bytes < choice.bytes
    assert hub.is_complete(hub.download(rest))
    assert all(sent.startswith("model-") for sent in fake.sent), fake.sent


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "merges.txt"])
def test_weights_come_last_so_that_with_them_everything_is_here(fake: FakeHub, name: str) -> None:
    fake.cut = {name}
    with pytest.raises(ModelError, match=f"^{REPO}: "):
        hub.download(hub.resolve(REPO))
    assert not any("safetensors@" in sent for sent in fake.sent), fake.sent
    fake.cut = set()
    folder = hub.download(hub.resolve(REPO))
    assert {p.name for p in folder.iterdir()} == set(model_files())


def test_a_disk_without_room_is_refused_with_both_numbers(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SPARE", 10**9)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 10**8))
    choice = hub.resolve(REPO)
    fake.asked.clear()
    with pytest.raises(ModelError, match=r"needs 0\.0 GB and 1\.0 GB to spare; 0\.3 GB are free"):
        hub.download(choice)
    assert fake.asked == []


def test_another_family_is_refused_before_its_weights_are_fetched(fake: FakeHub) -> None:
    fake.repos["a/llama"] = model_files({"model_type": "llama"})
    with pytest.raises(ModelError, match="model_type is 'llama'"):
        hub.download(hub.resolve("a/llama"))
    assert fake.sent == ["config.json@0"]


def test_a_repository_without_safetensors_is_refused(fake: FakeHub) -> None:
    fake.repos["a/gguf"] = {"README.md": b"#", "m.gguf": b"G", "config.json": b"{}"}
    with pytest.raises(ModelError, match="a/gguf: holds no config.json with safetensors"):
        hub.resolve("a/gguf")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "a/b: not found on .*, or private.* Check the spelling. .* `hf auth"),
        (401, "RepoNotFound", "a/b: not found on .*, or private.* Check the spelling. .* `hf auth"),
        (403, "GatedRepo", "a/b: is gated on .* Accept its terms at .*/a/b, then run `hf auth"),
        (401, "", "a/b: .* expected .* run `hf auth login`|a/b: .*refuses access"),
        (403, "", r"a/b: .* refuses access \(403\); expected a valid token"),
        (418, "", "a/b: .* answered 418; expected 200. Try again later."),
    ],
)
def test_refusals_of_the_hub_are_one_line_with_advice(
    fake: FakeHub, status: int, code: str, message: str
) -> None:
    fake.status["a/b"] = (status, code)
    with pytest.raises(ModelError, match=message) as caught:
        hub.resolve("a/b")
    assert "\n" not in str(caught.value)


def test_without_network_the_advice_is_to_check_it(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(ModelError, match=f"a/b: cannot be fetched from {nowhere} .*Check the netw"):
        hub.resolve("a/b")


def test_offline_mode_is_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="a/b: not complete in the .* HF_HUB_OFFLINE is set"):
        hub.resolve("a/b")


# -- the command -------------------------------------------------------------------------------


def start(fake: FakeHub, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    env = os.environ | {
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(tmp_path / "hf2"),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "qwen35_mlx.generate", *options, "--prompt", "Hello"],
        cwd=Path(__file__).parents[1],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def generate(fake: FakeHub, tmp_path: Path, *options: str) -> tuple[int, str, str]:
    process = start(fake, tmp_path, *options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_ctrl_c_leaves_a_download_at_once(fake: FakeHub, tmp_path: Path) -> None:
    fake.slow = {"model-2.safetensors"}
    process = start(fake, tmp_path, "--model", REPO)
    while not any(sent.startswith("model-2") for sent in fake.sent):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert err.splitlines()[-1] == "interrupted; the download goes on from here next time"
    assert (process.returncode, time.monotonic() - begin < 5) == (130, True)


def test_the_command_says_what_it_will_download_first(fake: FakeHub, tmp_path: Path) -> None:
    code, out, err = generate(fake, tmp_path, "--model", REPO)
    first, last = err.splitlines()
    assert first.startswith(f"{REPO} (named on the Hub), 1") and " kB to download, " in first
    assert f"free in {tmp_path / 'hf2' / 'hub'}" in first
    assert last.startswith("error: ")  # the weights are no weights: refused at loading
    assert (code, out) == (2, "")


def test_the_command_says_an_error_of_the_hub_in_one_line(fake: FakeHub, tmp_path: Path) -> None:
    code, out, err = generate(fake, tmp_path, "--model", "no/body")
    assert err.startswith("error: no/body: not found on ")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_what_the_loader_would_refuse_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 GB on a Mac of 16 GiB, which gives a GPU two thirds of them."""
    from qwen35_mlx import generate as command
    from qwen35_mlx import memory

    monkeypatch.setattr(memory, "capacity", lambda: 11_453_246_122)
    choice = hub.Choice("a/b", "named on the Hub", repo="a/b", total_bytes=13 * 10**9)
    message = r"^a/b: its files are 13\.0 GB; .* use 11\.5 GB of memory here\. .* is 9B at 4 bits"
    with pytest.raises(OutOfMemory, match=message):
        command._refuse_oversize(choice)
    command._refuse_oversize(dataclasses.replace(choice, total_bytes=11 * 10**9))
