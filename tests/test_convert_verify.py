"""Whatever happens to a converted folder is found by name, and hides nothing else."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen35_mlx.convert.verify import READ_BYTES, verify

import converting
import tiny
from converting import Raw, read_file, write_file
from qwen35_mlx.errors import ModelError

INDEX = "model.safetensors.index.json"
MATRIX = "language_model.model.layers.3.self_attn.o_proj"
NORM = "language_model.model.layers.1.input_layernorm.weight"
EXPERTS = "language_model.model.layers.2.mlp.switch_mlp.up_proj"
MTP_NORM = "mtp.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, mixed precision, several shards, MTP head and exact norms."""
    root = tmp_path_factory.mktemp("made")
    source = converting.write_source(root / "source", "moe")
    return converting.converted(source, root / "out", bits=4, shard_bytes=700_000)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite(path: Path, change: Callable[[dict[str, Raw]], object]) -> None:
    tensors = read_file(path)
    change(tensors)
    write_file(path, tensors)


def replace_bytes(folder: Path, file: str, name: str, change: Callable[[bytearray], None]) -> None:
    """Other bytes with the digest that belongs to them, so that only their values can be wrong."""

    def edit(tensors: dict[str, Raw]) -> None:
        data = bytearray(tensors[name].data)
        change(data)
        tensors[name] = Raw(tensors[name].dtype, tensors[name].shape, bytes(data))
        digest = hashlib.sha256(data).hexdigest()
        edit_json(
            folder / "manifest.json", lambda m: m["tensors"][file][name].update(sha256=digest)
        )

    rewrite(folder / file, edit)


def flip(path: Path, name: str) -> None:
    """One bit of the last byte of a tensor, where it lies."""
    data = read_file(path)[name].data
    content = bytearray(path.read_bytes())
    place = content.rindex(data) + len(data) - 1
    content[place] ^= 1
    path.write_bytes(content)


def only(problems: list[str], *parts: str) -> None:
    """One problem, which says all of `parts`."""
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems


def test_what_the_converter_writes_is_fine(made: Path) -> None:
    assert len(list(made.glob("model-*.safetensors"))) > 3
    assert verify(made) == []


@pytest.mark.parametrize(
    "given",
    [{"bits": 16}, {"mode": "mxfp4"}, {"mode": "mxfp8", "vision_bits": 8}, {"mode": "nvfp4"}],
    ids=str,
)
def test_every_format_is_fine(given: dict[str, Any], tmp_path: Path) -> None:
    source = converting.write_source(tmp_path / "source", "moe_untied")
    assert verify(converting.converted(source, tmp_path / "out", **given)) == []


def test_progress_counts_all_bytes(made: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(made, lambda done, total: seen.append((done, total)))
    files = [read_file(path) for path in made.glob("*.safetensors")]
    total = sum(len(tensor.data) for tensors in files for tensor in tensors.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_more_than_one_slice_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert READ_BYTES == 1 << 20
    monkeypatch.setattr("qwen35_mlx.convert.verify.READ_BYTES", 1000)
    assert verify(folder) == []


# -- the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_flipped_bit_is_found(part: str, folder: Path) -> None:
    file = file_of(folder, f"{MATRIX}.{part}")
    flip(file, f"{MATRIX}.{part}")
    only(verify(folder), file.name, f"{MATRIX}.{part}", "sha256")


@pytest.mark.parametrize("file", ["mtp.safetensors", "norms.safetensors"])
def test_a_flipped_bit_in_a_sidecar_is_found(file: str, folder: Path) -> None:
    name = {"mtp.safetensors": MTP_NORM, "norms.safetensors": NORM}[file]
    flip(folder / file, name)
    assert any(file in line and name in line and "sha256" in line for line in verify(folder))


def test_a_truncated_file_is_found(folder: Path) -> None:
    file = file_of(folder, f"{EXPERTS}.weight")
    file.write_bytes(file.read_bytes()[:-1])
    only(verify(folder), file.name, "damaged")


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "mtp.safetensors").unlink()
    only(verify(folder), "mtp.safetensors", "missing")


def test_an_extra_file_is_found(folder: Path) -> None:
    write_file(folder / "more.safetensors", {"x": Raw("BF16", (1,), b"\0\0")})
    only(verify(folder), "more.safetensors", "manifest")


def test_a_missing_tensor_is_found(folder: Path) -> None:
    file = file_of(folder, f"{MATRIX}.scales")
    rewrite(file, lambda tensors: tensors.pop(f"{MATRIX}.scales"))
    only(verify(folder), file.name, f"{MATRIX}.scales", "missing")


def test_an_extra_tensor_is_found(folder: Path) -> None:
    file = file_of(folder, f"{MATRIX}.scales")
    rewrite(file, lambda tensors: tensors.update(extra=Raw("BF16", (1,), b"\0\0")))
    only(verify(folder), file.name, "extra", "manifest")


def test_another_shape_is_found(folder: Path) -> None:
    file = file_of(folder, NORM)
    rewrite(file, lambda found: found.update({NORM: Raw("BF16", (2, 96), found[NORM].data)}))
    problems = verify(folder)
    assert f"{file.name}: {NORM} is BF16 [2, 96]; expected BF16 [192]" in problems


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC1], ids=["inf", "-inf", "nan"])
def test_a_scale_that_is_not_finite_is_found(bad: int, folder: Path) -> None:
    name = f"{MATRIX}.scales"
    file = file_of(folder, name).name
    replace_bytes(folder, file, name, lambda data: data.__setitem__(slice(6, 8), bytes_of(bad)))
    only(verify(folder), file, name, "1 values", "not finite")


def bytes_of(code: int) -> bytes:
    return np.uint16(code).tobytes()


def test_a_nan_in_f32_is_found(folder: Path) -> None:
    nan = np.float32(np.nan).tobytes()
    name = "language_model.model.layers.0.linear_attn.A_log"
    file = file_of(folder, name).name
    replace_bytes(folder, file, name, lambda data: data.__setitem__(slice(4, 8), nan))
    only(verify(folder), file, name, "not finite")


@pytest.mark.parametrize(
    ("mode", "part", "code", "is_bad"),
    [
        ("mxfp4", "scales", 0xFF, True),
        ("mxfp4", "scales", 0x7F, False),
        ("mxfp8", "scales", 0xFF, True),
        ("mxfp8", "weight", 0x7F, True),
        ("mxfp8", "weight", 0xFF, True),
        ("mxfp8", "weight", 0xFE, False),
        ("mxfp4", "weight", 0xFF, False),
        ("nvfp4", "scales", 0x7F, True),
        ("nvfp4", "scales", 0xFF, True),
        ("nvfp4", "scales", 0xFE, False),
    ],
)
def test_codes_that_are_no_numbers_are_found(
    mode: str, part: str, code: int, is_bad: bool, float_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(float_folders[mode], tmp_path / "model"))
    name = f"{EXPERTS}.{part}"
    file = file_of(folder, name).name
    replace_bytes(folder, file, name, lambda data: data.__setitem__(5, code))
    problems = verify(folder)
    if is_bad:
        only(problems, file, name, "not finite")
    else:
        assert problems == []


@pytest.fixture(scope="module")
def float_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("floats")
    source = converting.write_source(root / "source", "moe")
    modes = ("mxfp4", "mxfp8", "nvfp4")
    return {mode: converting.converted(source, root / mode, mode=mode) for mode in modes}


def test_an_exact_norm_that_rounds_otherwise_is_found(folder: Path) -> None:
    other = np.float32(1.75).tobytes()
    replace_bytes(
        folder, "norms.safetensors", NORM, lambda data: data.__setitem__(slice(8, 12), other)
    )
    only(verify(folder), "norms.safetensors", NORM, "round")


def test_an_exact_norm_without_a_rounded_one_is_found(folder: Path) -> None:
    listed = {"dtype": "F32", "shape": [1], "sha256": hashlib.sha256(bytes(4)).hexdigest()}
    rewrite(folder / "norms.safetensors", lambda n: n.update(more=Raw("F32", (1,), bytes(4))))
    edit_json(
        folder / "manifest.json",
        lambda m: m["tensors"]["norms.safetensors"].update(more=listed),
    )
    problems = verify(folder)
    assert "norms.safetensors: more stands for no tensor of the main files" in problems
    assert any("more [1] belongs to no part of the model" in line for line in problems)


# -- the small files -------------------------------------------------------------------------------


SMALL_FILES = {*converting.FILES, "chat_template.jinja", INDEX} - {"README.md"}


@pytest.mark.parametrize("name", sorted(SMALL_FILES))
def test_a_missing_small_file_is_found(name: str, folder: Path) -> None:
    (folder / name).unlink()
    only(verify(folder), name, "missing")


def test_a_changed_small_file_is_found(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    only(verify(folder), "tokenizer.json", "sha256")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}, "metadata": 3}'])
def test_a_damaged_index_is_found(content: str, folder: Path) -> None:
    (folder / INDEX).write_text(content)
    problems = verify(folder)
    assert len(problems) == 2
    assert all(INDEX in line for line in problems)


def test_a_wrong_total_size_is_found(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["metadata"].update(total_size=5))
    assert any(f"{INDEX}: total_size is 5; the main files hold" in line for line in verify(folder))


def test_a_changed_index_is_found(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: "mtp.safetensors"}))
    first, second = verify(folder)
    assert "sha256" in first
    assert INDEX in second and NORM in second and "mtp.safetensors" in second


@pytest.mark.parametrize("block", ["quantization", "quantization_config"])
@pytest.mark.parametrize(
    "entry", [{"bits": 8, "group_size": 64}, {"bits": 6, "group_size": 32}, False], ids=str
)
def test_an_edited_quantization_entry_is_found(block: str, entry: object, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config[block].update({MATRIX: entry}))
    problems = verify(folder)
    assert any(f"{block}: {MATRIX} is" in line and "6 bits" in line for line in problems)
    assert any("config.json" in line and "sha256" in line for line in problems)
    assert len(problems) == 2


def test_another_mode_in_config_json_is_found(folder: Path) -> None:
    entry = {"mode": "mxfp8", "bits": 8, "group_size": 32}
    edit_json(folder / "config.json", lambda c: c["quantization"].update({MATRIX: entry}))
    assert any(f"quantization: {MATRIX} is mxfp8" in line for line in verify(folder))


def test_an_entry_for_no_matrix_is_found(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["quantization"].update(nothing=False))
    assert any("quantization: nothing is no matrix" in line for line in verify(folder))


def test_a_model_that_needs_other_tensors_is_found(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["text_config"].update(intermediate_size=1))
    edit_json(folder / "config.json", lambda c: c["text_config"].update(num_experts=9))
    problems = verify(folder)
    assert any("layers.0.mlp.gate.weight" in line for line in problems), problems


def test_sidecars_that_are_not_declared_are_found(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["qwen35_mlx"].update(sidecars=[]))
    assert any("sidecars is []" in line and "norms.safetensors" in line for line in verify(folder))


@pytest.mark.parametrize("content", ["", "[]", '{"qwen35_mlx": '])
def test_a_damaged_config_json_hides_nothing(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    flip(folder / "mtp.safetensors", MTP_NORM)
    problems = verify(folder)
    assert sum("config.json" in line for line in problems) == 2
    assert any(MTP_NORM in line for line in problems)


# -- the manifest ----------------------------------------------------------------------------------


def test_without_the_manifest_the_rest_is_still_checked(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    only(verify(folder), "manifest.json", "missing")
    name = f"{MATRIX}.scales"
    file = file_of(folder, name)
    tensors = read_file(file)
    data = bytes_of(0x7FC0) + tensors[name].data[2:]
    write_file(file, tensors | {name: Raw("BF16", tensors[name].shape, data)})
    edit_json(folder / "config.json", lambda c: c["quantization"].update({MATRIX: False}))
    problems = verify(folder)
    assert any(name in line and "not finite" in line for line in problems)
    assert any(f"quantization: {MATRIX} is not packed" in line for line in problems)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F7"},
        {"dtype": None},
        {"shape": 3},
        {"shape": [-1]},
        {"shape": [1.5]},
        {"sha256": "abc"},
        {"sha256": None},
        {"bits": 7},
        {"mode": "other"},
        {"group_size": [64]},
    ],
    ids=str,
)
def test_a_malformed_entry_of_the_manifest_is_named(change: dict[str, Any], folder: Path) -> None:
    name = f"{MATRIX}.weight"
    file = file_of(folder, name).name
    edit_json(folder / "manifest.json", lambda m: m["tensors"][file][name].update(change))
    assert any("manifest.json" in line and name in line for line in verify(folder))


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"tensors": []}, {"files": 3}, {"tensors": {"../x.safetensors": {}}}],
    ids=str,
)
def test_a_malformed_manifest_is_named(change: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda manifest: manifest.update(change))
    assert any("manifest.json" in line for line in verify(folder))


def test_a_manifest_does_not_lead_out_of_the_folder(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    edit_json(folder / "manifest.json", lambda m: m["files"].update({"../secret": "0" * 64}))
    only(verify(folder), "manifest.json", "../secret")


def test_the_manifest_is_compared_with_the_widths(folder: Path) -> None:
    name = f"{MATRIX}.weight"
    file = file_of(folder, name).name
    edit_json(folder / "manifest.json", lambda m: m["tensors"][file][name].update(bits=4))
    assert any(line.startswith(f"manifest.json: {MATRIX} is") for line in verify(folder))


# -- all together ----------------------------------------------------------------------------------


def test_every_problem_is_told_in_one_run(folder: Path) -> None:
    flip(folder / "mtp.safetensors", MTP_NORM)
    short = file_of(folder, f"{EXPERTS}.weight")
    short.write_bytes(short.read_bytes()[:5000])
    norm = file_of(folder, "language_model.model.norm.weight")
    assert norm != short
    rewrite(norm, lambda tensors: tensors.pop("language_model.model.norm.weight"))
    (folder / "tokenizer_config.json").unlink()
    problems = verify(folder)
    for part in (MTP_NORM, short.name, "model.norm.weight is missing", "tokenizer_config.json"):
        assert any(part in line for line in problems), part
    assert all("\n" not in line for line in problems)


def test_problems_come_in_the_order_of_the_files_however_many_threads_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.glob("*.safetensors"):
        for name in read_file(path):
            flip(path, name)
    monkeypatch.setattr("qwen35_mlx.convert.verify.READ_BYTES", 1000)
    found = [[line for line in verify(folder) if "sha256" in line] for _ in range(3)]
    assert found[0] == found[1] == found[2]
    files = [line.partition(":")[0] for line in found[0]]
    assert files == sorted(files) and len(files) > 100


def test_an_interrupted_verification_ends_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def interrupting(done: int, _: int) -> None:
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("qwen35_mlx.convert.verify.READ_BYTES", 1000)
    with pytest.raises(KeyboardInterrupt):
        verify(folder, interrupting)
    assert len(seen) == 5
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert seen[-1] < total // 2


def test_other_folders_are_refused(tmp_path: Path) -> None:
    plain = tiny.write(tmp_path / "plain", tiny.CONFIGS["moe"], {}, files={"manifest.json": "{}"})
    for folder in (plain, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError, match="not made by this program"):
            verify(folder)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(ModelError, match="not finished"):
        verify(tmp_path)
