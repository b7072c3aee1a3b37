"""A converted folder runs here and elsewhere, says what it is, and never stands where it harms."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import converting
import qwen35_mlx
from converting import converted, differing, digests, main_tensors, read_file
from qwen35_mlx.cache import KVState
from test_logits import draft, make_prompt, relative

# Relative L2 error of the logits: the same numbers, in the same order of summation.
SAME = 2e-5
BLOCK = {"group_size": 64, "bits": 4, "mode": "affine"}
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    @cache
    def written(name: str) -> Path:
        return converting.write_source(tmp_path_factory.mktemp(name) / "source", name)

    return written


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source: Folders) -> Folders:
    """`made(name, **options)`: a converted folder, not to be changed."""

    @cache
    def out(name: str, **given: Any) -> Path:
        return converted(source(name), tmp_path_factory.mktemp("made") / name, **given)

    return out


@pytest.fixture
def plain(source: Folders, tmp_path: Path) -> Path:
    """A source of the test's own."""
    return Path(shutil.copytree(source("moe"), tmp_path / "source"))


def without_our_additions(folder: Path) -> Path:
    """As another program sees it, or would upload it."""
    for name in ("mtp.safetensors", "norms.safetensors", "manifest.json"):
        (folder / name).unlink()
    values = json.loads((folder / "config.json").read_text())
    del values["qwen35_mlx"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# -- the same model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_unpacked_folders_have_the_logits_of_their_source(
    name: str, source: Folders, made: Folders
) -> None:
    before = qwen35_mlx.load(source(name), dtype=mx.float32)
    after = qwen35_mlx.load(made(name, bits=16), dtype=mx.float32)
    for case in ("text_65", "image", "video"):
        prompt = make_prompt(name, case)
        assert relative(after.logits(prompt), np.array(before.logits(prompt))) <= SAME
    assert relative(draft(after, name), np.array(draft(before, name))) <= SAME


def test_a_uniform_folder_without_our_additions_is_one_of_mlx_community(
    made: Folders, tmp_path: Path
) -> None:
    given = {"bits": 4, "recipe": "uniform"}
    folder = without_our_additions(Path(shutil.copytree(made("moe", **given), tmp_path / "ours")))
    theirs = converting.write_source(tmp_path / "mlx", "moe", layout="mlx", quantize=BLOCK)
    prompt = make_prompt("moe", "image_video")
    found, expected = (qwen35_mlx.load(f).logits(prompt) for f in (folder, theirs))
    assert np.array_equal(np.array(found), np.array(expected))


def drafted(model: qwen35_mlx.Qwen35) -> np.ndarray:
    """The MTP head's logits for five tokens; a folder without the head has none."""
    places = np.broadcast_to(np.arange(5), (3, 1, 5))
    states = mx.random.normal((1, 5, model.config.text.hidden_size), key=mx.random.key(3))
    return np.array(model.model.draft(mx.arange(7, 12)[None], states, places, KVState()))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("moe", {"bits": 4}),
        ("moe_untied", {"bits": 3, "vision_bits": 8, "group_size": 32}),
        ("dense", {"mode": "mxfp4"}),
        ("dense", {"mode": "nvfp4"}),
        ("dense_tied", {"mode": "mxfp8", "recipe": "careful"}),
        ("dense", {"bits": 16, "vision_bits": 8}),
    ],
    ids=str,
)
def test_packed_folders_run_whole_and_without_our_additions(
    name: str, given: dict[str, Any], source: Folders, made: Folders, tmp_path: Path
) -> None:
    folder, prompt = made(name, **given), make_prompt(name, "image")
    before = np.array(qwen35_mlx.load(source(name), dtype=mx.float32).logits(prompt))
    ours = qwen35_mlx.load(folder, dtype=mx.float32)
    whole = np.array(ours.logits(prompt))
    assert SAME < relative(whole, before) < 0.9
    assert np.isfinite(drafted(ours)).all()
    bare = without_our_additions(Path(shutil.copytree(folder, tmp_path / "bare")))
    theirs = qwen35_mlx.load(bare, dtype=mx.float32)
    # BF16 norms are all that differs.
    assert 0 < relative(theirs.logits(prompt), whole) < 0.2


def test_our_own_8_bits_go_to_4_with_exact_norms_and_the_mtp_head(
    made: Folders, tmp_path: Path
) -> None:
    eight = made("moe", bits=8)
    four = converted(eight, tmp_path / "four", bits=4, recipe="uniform")
    name = "norms.safetensors"
    assert (four / name).read_bytes() == (eight / name).read_bytes()
    before, after = (read_file(folder / "mtp.safetensors") for folder in (eight, four))
    arrays = mx.load(str(eight / "mtp.safetensors"))
    assert isinstance(arrays, dict)
    expected = {n: tensor for n, tensor in before.items() if tensor.dtype == "F32"}
    assert len(expected) == 7
    for module in {n.removesuffix(".scales") for n in arrays if n.endswith(".scales")}:
        whole = converting.unpacked(arrays, module, group_size=64, bits=8, mode="affine")
        packed = converting.packed(whole, "affine", 4, 64)
        expected |= {f"{module}.{part}": value for part, value in packed.items()}
    assert differing(after, expected) == []
    plain = {n: t for n, t in main_tensors(eight).items() if len(t.shape) == 1}
    assert differing({n: main_tensors(four)[n] for n in plain}, plain) == []


# -- what the folder says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("moe", {"bits": 4}),
        ("moe", {"bits": 8}),
        ("dense", {"mode": "mxfp4"}),
        ("moe_untied", {"bits": 3, "vision_bits": 8, "group_size": 32}),
        ("dense", {"bits": 16, "vision_bits": 8}),
        ("dense", {"bits": 16}),
    ],
    ids=str,
)
def test_config_json_names_exactly_the_modules_that_differ(
    name: str, given: dict[str, Any], made: Folders
) -> None:
    folder = made(name, **given)
    values = json.loads((folder / "config.json").read_text())
    block = values.get("quantization")
    assert values.get("quantization_config") == block
    whole = made(name, bits=16)
    stored, plain = (main_tensors(f) | read_file(f / "mtp.safetensors") for f in (folder, whole))
    modules = {n.removesuffix(".scales") for n in stored if n.endswith(".scales")}
    if not modules:
        assert block is None
        return
    default = {key: block.pop(key) for key in ("group_size", "bits", "mode")}
    expected: dict[str, Any] = {}
    for path, tensor in stored.items():
        module = path.removesuffix(".weight")
        is_matrix = path != module and len(tensor.shape) in (2, 3) and "conv1d" not in path
        if is_matrix and module not in modules:
            expected[module] = False
    for module in modules:
        columns = plain[f"{module}.weight"].shape[-1]
        words, groups = (stored[f"{module}.{part}"].shape[-1] for part in ("weight", "scales"))
        mode = "affine" if f"{module}.biases" in stored else default["mode"]
        found = {"group_size": columns // groups, "bits": 32 * words // columns, "mode": mode}
        if found != default:
            expected[module] = found
    assert block == expected


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_config_json_is_the_source_s_with_what_other_programs_need(
    name: str, source: Folders, made: Folders
) -> None:
    before = json.loads((source(name) / "config.json").read_text())
    after = json.loads((made(name, bits=4, group_size=32) / "config.json").read_text())
    ours = after.pop("qwen35_mlx")
    del after["quantization"], after["quantization_config"]
    before["vision_config"]["model_type"] = before["model_type"]
    assert after == before and after["text_config"]["dtype"] == "bfloat16"
    assert ours["sidecars"] == ["mtp.safetensors", "norms.safetensors"]
    assert len(ours["source"].pop("digest")) == 64
    assert ours["source"] == {"name": "Qwen/a-model", "revision": None}
    assert ours["options"]["bits"] == 4 and ours["options"]["recipe"] == "careful"


def test_the_tower_gets_the_type_that_lm_studio_reads(plain: Path, tmp_path: Path) -> None:
    values = json.loads((plain / "config.json").read_text())
    values["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    values["text_config"]["torch_dtype"] = "float16"
    (plain / "config.json").write_text(json.dumps(values))
    out = converted(plain, tmp_path / "out", bits=4)
    values = json.loads((out / "config.json").read_text())
    assert values["vision_config"]["model_type"] == "qwen3_5_moe"
    assert values["text_config"]["torch_dtype"] == values["text_config"]["dtype"] == "bfloat16"


def test_an_index_is_there_for_a_single_file_too(made: Folders) -> None:
    folder = made("moe", bits=4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = read_file(folder / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(stored, "model.safetensors")
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in stored.values())
    assert not any(name.startswith("mtp.") for name in stored)


def test_the_folder_holds_what_it_should_and_no_trace_of_the_work(
    source: Folders, made: Folders
) -> None:
    folder, before = made("moe", bits=4), source("moe")
    copied = converting.FILES.keys() - {"README.md"}
    ours = {"config.json", "manifest.json", "chat_template.jinja", "model.safetensors.index.json"}
    weights = {"model.safetensors", "mtp.safetensors", "norms.safetensors"}
    assert {path.name for path in folder.iterdir()} == copied | ours | weights
    assert all((folder / name).read_bytes() == (before / name).read_bytes() for name in copied)
    assert not list(folder.parent.glob("*.partial"))


def test_the_manifest_has_the_digest_of_every_tensor_and_file(made: Folders) -> None:
    folder = made("moe", bits=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = {path.name for path in folder.glob("*.safetensors")}
    assert manifest["tensors"].keys() == weights and manifest["left_out"] == {}
    for name in weights:
        stored = read_file(folder / name)
        assert manifest["tensors"][name].keys() == stored.keys()
        for tensor, said in manifest["tensors"][name].items():
            assert said["sha256"] == hashlib.sha256(stored[tensor].data).hexdigest()
            assert (said["dtype"], tuple(said["shape"])) == (
                stored[tensor].dtype,
                stored[tensor].shape,
            )
    others = {path.name for path in folder.iterdir()} - weights - {"manifest.json"}
    assert manifest["files"].keys() == others
    assert differing(manifest["files"], {n: digests(folder)[n] for n in others}) == []


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "jinja"])
def test_the_chat_template_gets_its_own_file_wherever_it_was(
    place: str, plain: Path, tmp_path: Path
) -> None:
    text = converting.TEMPLATE + f"{{# from {place} #}}"
    (plain / "tokenizer_config.json").write_text("{}")
    if place == "jinja":
        (plain / "chat_template.jinja").write_text(text)
    else:
        (plain / place).write_text(json.dumps({"chat_template": text}))
    out = converted(plain, tmp_path / "out", bits=4)
    assert (out / "chat_template.jinja").read_text() == text
