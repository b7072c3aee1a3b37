"""What a conversion will write is known, and exact, before a weight is read."""

import json
import struct
from typing import Any

import pytest
from qwen35_mlx.convert import Options, Plan, options, plan, published
from qwen35_mlx.convert.published import config_values

import converting
import tiny
import tiny_shapes
from converting import SIZES, planned, source_of
from qwen35_mlx import family
from qwen35_mlx.errors import ModelError
from qwen35_mlx.packing import Format


def stored(made: Plan) -> dict[str, Any]:
    """Every tensor of every file; those in F32 beside the main ones under their file's name."""
    return {
        f"{'norms: ' if file.name.startswith('norms') else ''}{part.name}": part
        for file in made.files
        for part in file.parts
    }


# -- all eight sizes -------------------------------------------------------------------------------


@SIZES
def test_every_row_of_every_source_tensor_is_used_exactly_once(size: family.Size) -> None:
    source = source_of(config_values(size))
    made = plan(source, options(4))
    read: dict[Any, list[tuple[int, int]]] = {}
    for target in made.targets:
        written = sorted((piece.at, piece.count) for piece in target.pieces)
        assert_tiles(written, target.rows)
        for piece in target.pieces:
            read.setdefault(piece.view.entry, []).append((piece.first, piece.count))
            assert piece.view.columns == target.columns
    assert read.keys() == set(source.entries.values()) and not made.left_out
    rows = {p.view.entry: p.view.rows for t in made.targets for p in t.pieces}
    for entry, spans in read.items():
        assert_tiles(sorted(spans), rows[entry])


def assert_tiles(spans: list[tuple[int, int]], length: int) -> None:
    end = 0
    for first, count in spans:
        assert (first, count > 0) == (end, True)
        end = first + count
    assert end == length


@SIZES
def test_parameters_are_those_of_the_family(size: family.Size) -> None:
    made = planned(size)
    head = sum(t.nparameters for t in made.targets if t.name.startswith("mtp."))
    assert head == size.mtp_parameters
    assert made.nparameters - head == size.parameters


@SIZES
@pytest.mark.parametrize(
    ("bits", "key"), [(4, "mlx_4bit_bytes"), (8, "mlx_8bit_bytes"), (16, "mlx_bf16_bytes")]
)
def test_uniform_main_files_have_the_published_bytes(
    size: family.Size, bits: int, key: str
) -> None:
    assert planned(size, bits=bits, recipe="uniform").main_bytes == getattr(size, key)


@SIZES
def test_unpacked_tensors_have_the_names_and_shapes_of_mlx_vlm(size: family.Size) -> None:
    config = config_values(size)
    made = planned(size, bits=16)
    expected = converting.in_folder(tiny_shapes.shapes(config))
    found = {name: part.shape for name, part in stored(made).items() if "norms: " not in name}
    assert found == expected
    in_main = {part.name for file in made.main_files for part in file.parts}
    assert in_main == {name for name in expected if not name.startswith("mtp.")}


@SIZES
def test_exact_norms_and_the_mtp_head_lie_outside_the_main_files(size: family.Size) -> None:
    made = planned(size)
    files = {file.name: file for file in made.files[len(made.main_files) :]}
    assert list(files) == ["mtp.safetensors", "norms.safetensors"]
    assert all(part.name.startswith("mtp.") for part in files["mtp.safetensors"].parts)
    layers = size.num_hidden_layers
    # Two for each layer, two of attention or one of the delta net, and the last.
    norms = 2 * layers + 2 * (layers // 4) + 3 * (layers // 4) + 1
    exact = files["norms.safetensors"].parts
    assert len(exact) == norms and {part.dtype for part in exact} == {"F32"}
    in_head = {p.name: p.dtype for p in files["mtp.safetensors"].parts if len(p.shape) == 1}
    assert len(in_head) == 7 and set(in_head.values()) == {"F32"}


@SIZES
def test_memory_does_not_grow_with_the_size(size: family.Size) -> None:
    assert planned(size).peak_memory == planned(family.SIZES[0]).peak_memory <= 3_000_000_000


@SIZES
@pytest.mark.parametrize("given", [{"bits": 3}, {"mode": "nvfp4"}, {"bits": 16}], ids=str)
def test_headers_say_where_the_tensors_lie(size: family.Size, given: dict[str, Any]) -> None:
    for file in planned(size, **given).files:
        length = struct.unpack("<Q", file.header[:8])[0]
        assert len(file.header) == 8 + length and length % 8 == 0
        header = json.loads(file.header[8:])
        assert header.pop("__metadata__") == {"format": "mlx"}
        assert list(header) == [part.name for part in file.parts]
        end = 0
        for part in file.parts:
            begin, stop = header[part.name]["data_offsets"]
            assert begin == end and stop - begin == part.nbytes
            assert file.spans[part.name][0] == 8 + length + begin
            assert file.spans[part.name][0] % converting.ITEM[part.dtype] == 0
            assert header[part.name]["dtype"] == part.dtype
            assert tuple(header[part.name]["shape"]) == part.shape
            end = stop
        assert file.nbytes == len(file.header) + end


@SIZES
@pytest.mark.parametrize("shard_size", ["100MB", "5GB"])
def test_shards_keep_to_their_size_unless_one_matrix_is_larger(
    size: family.Size, shard_size: str
) -> None:
    made = planned(size, bits=8, shard_size=shard_size)
    count = len(made.main_files)
    for number, file in enumerate(made.main_files, start=1):
        several = f"model-{number:05d}-of-{count:05d}.safetensors"
        assert file.name == (several if count > 1 else "model.safetensors")
        matrices = {part.name.rpartition(".")[0] for part in file.parts}
        assert file.data_bytes <= made.options.shard_size or len(matrices) == 1
    assert count > 1 or made.main_bytes <= made.options.shard_size


@SIZES
def test_the_plan_is_the_same_from_one_file_and_from_many(size: family.Size) -> None:
    single, sharded = planned(size), planned(size, files=7)
    assert stored(single) == stored(sharded)
    assert size.mlx_4bit_bytes < 5e9 or single.main_files != sharded.main_files
    assert single.main_bytes == sharded.main_bytes
    assert single.bits_per_weight == sharded.bits_per_weight


def test_shards_are_complete_in_the_order_in_which_the_source_is_read() -> None:
    """Else every output file would stay open until the last source file came."""
    made = plan(
        source_of(tiny.CONFIGS["moe"], files=5), Options(Format("affine", 4, 64), "uniform", 16, 1)
    )
    place = {file: i for i, file in enumerate(made.source_files)}
    done: dict[str, int] = {}
    for source, steps in made.steps.items():
        for target, _ in steps:
            if target.file == "model":
                done[made.destinations(target)[0]] = place[source]
    in_order = [done[file.name] for file in made.main_files]
    assert in_order == sorted(in_order) and set(in_order) == set(range(5))


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["35b", "397b"])
def test_experts_one_by_one_give_the_same_files(name: str) -> None:
    config = config_values(family.find(name))
    shapes = tiny_shapes.shapes(config)
    apart = converting.unfused(shapes)
    assert len(apart) > len(shapes)
    made = plan(source_of(config, apart), options(4))
    assert made.files == plan(source_of(config, shapes), options(4)).files


@pytest.mark.parametrize("name", ["dense", "dense_tied", "moe_untied"])
def test_a_folder_of_the_language_model_alone_has_the_same_names_without_the_tower(
    name: str,
) -> None:
    config = tiny.CONFIGS[name]
    text = config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}
    shapes = {
        n.replace("model.language_model.", "model."): shape
        for n, shape in tiny_shapes.shapes(config).items()
        if ".visual." not in n
    }
    made = plan(source_of(text, shapes), options(4, group_size=32))
    whole = stored(plan(source_of(config), options(4, group_size=32)))
    assert stored(made) == {n: part for n, part in whole.items() if "vision" not in n}


def test_a_tied_head_that_is_stored_all_the_same_is_left_out_with_the_reason() -> None:
    config = tiny.CONFIGS["dense_tied"]
    shapes = tiny_shapes.shapes(config) | {"lm_head.weight": (389, 96)}
    made = plan(source_of(config, shapes), options(4, group_size=32))
    assert made.left_out == {"lm_head.weight": "tied: the embedding is the output head"}
    assert not any("lm_head" in target.name for target in made.targets)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_missing_tensor_is_named(name: str) -> None:
    shapes = tiny_shapes.shapes(tiny.CONFIGS[name])
    parts = ("visual", "mtp", "layers", "embed_tokens", "language_model.norm")
    missing = [next(n for n in reversed(shapes) if part in n) for part in parts]
    for gone in missing:
        left = {n: shape for n, shape in shapes.items() if n != gone}
        with pytest.raises(ModelError, match=f"{gone} is missing"):
            plan(source_of(tiny.CONFIGS[name], left), options(4, group_size=32))


def test_a_missing_expert_is_named() -> None:
    shapes = converting.unfused(tiny_shapes.shapes(tiny.CONFIGS["moe"]))
    gone = "model.language_model.layers.2.mlp.experts.6.up_proj.weight"
    del shapes[gone]
    with pytest.raises(ModelError, match=f"{gone} is missing"):
        plan(source_of(tiny.CONFIGS["moe"], shapes), options(4))


@pytest.mark.parametrize(
    "extra",
    [
        "model.language_model.layers.4.input_layernorm.weight",
        "model.language_model.layers.0.mlp.experts.8.up_proj.weight",
        "model.language_model.layers.1.mlp.gate.weight_scale_inv",
        "model.audio.proj.weight",
        "mtp.layers.1.input_layernorm.weight",
    ],
)
def test_a_tensor_too_many_is_named(extra: str) -> None:
    shapes = tiny_shapes.shapes(tiny.CONFIGS["moe"]) | {extra: (3, 5)}
    with pytest.raises(ModelError, match=rf"{extra} \[3, 5\] belongs to no part"):
        plan(source_of(tiny.CONFIGS["moe"], shapes), options(4))


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.mlp.experts.gate_up_proj",
        "model.language_model.layers.0.linear_attn.conv1d.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.pos_embed.weight",
        "model.language_model.layers.3.self_attn.q_norm.weight",
        "mtp.fc.weight",
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(name: str) -> None:
    shapes = tiny_shapes.shapes(tiny.CONFIGS["moe"])
    right, wrong = shapes[name], (*shapes[name][:-1], shapes[name][-1] + 1)
    with pytest.raises(ModelError) as raised:
        plan(source_of(tiny.CONFIGS["moe"], shapes | {name: wrong}), options(4))
    for part in (name, str(list(wrong)), str(list(right))):
        assert part in str(raised.value)


@SIZES
def test_the_list_that_is_known_without_a_download_gives_the_same_plan(size: family.Size) -> None:
    made = plan(published.source(size), options(4))
    assert stored(made) == stored(planned(size)) and made.bits_per_weight > 4.5
