"""config.json: all eight sizes parse, and what cannot be run faithfully is refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from qwen35_mlx.convert.published import config_values

from qwen35_mlx import config, family
from qwen35_mlx.errors import ModelError
from qwen35_mlx.packing import Format
from tiny import CONFIGS
from tiny_shapes import ROPE, YARN


def changed(key: str, value: Any, section: str | None = "text_config") -> dict[str, Any]:
    values = copy.deepcopy(CONFIGS["moe" if "expert" in key else "dense"])
    (values[section] if section else values)[key] = value
    return values


def rope(**values: Any) -> dict[str, Any]:
    return changed("rope_parameters", ROPE | values)


def yarn(**values: Any) -> dict[str, Any]:
    return changed("rope_parameters", YARN | values)


@pytest.mark.parametrize("size", family.SIZES, ids=lambda size: size.name)
def test_each_size_parses_to_its_shapes(size: family.Size) -> None:
    found = config.parse(config_values(size), size.name)
    assert found.text.hidden_size == size.hidden_size
    assert found.text.num_hidden_layers == size.num_hidden_layers
    assert found.text.num_experts == size.num_experts
    assert found.text.is_full_attention == tuple(i % 4 == 3 for i in range(size.num_hidden_layers))
    assert found.text.head_dim == 256 and found.text.rope.rotary_dim == 64
    assert found.vision is not None and found.vision.out_hidden_size == size.hidden_size
    assert found.text.mtp_num_hidden_layers == 1


def test_text_only_and_older_rope_keys_mean_the_same() -> None:
    nested = config.parse(CONFIGS["dense"], "nested").text
    flat = {**CONFIGS["dense"]["text_config"], "model_type": "qwen3_5_text"}
    rope = flat.pop("rope_parameters")
    flat["rope_theta"] = rope["rope_theta"]
    flat["partial_rotary_factor"] = rope["partial_rotary_factor"]
    flat["rope_scaling"] = {
        "type": "mrope",
        "mrope_section": rope["mrope_section"],
        "mrope_interleaved": True,
    }
    found = config.parse(flat, "flat")
    assert found.text == nested and found.vision is None


def test_many_layers_without_their_types_are_refused_before_any_is_made() -> None:
    values = changed("num_hidden_layers", 10**12)
    del values["text_config"]["layer_types"]
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000000000"):
        config.parse(values, "x")


def test_null_means_absent_in_yarn_and_flags() -> None:
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"))
    found = config.parse(yarn(**nulls, original_max_position_embeddings=None), "x").text.rope
    assert found == config.parse(yarn(), "x").text.rope
    assert (
        config.parse(changed("tie_word_embeddings", None, None), "x").tie_word_embeddings is False
    )


def test_yarn_scales_cosines_by_its_factor() -> None:
    rope = config.parse(CONFIGS["dense_yarn"], "yarn").text.rope
    assert rope.factor == 4 and rope.attention_factor == pytest.approx(1.138629436111989)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (changed("model_type", "llama", None), "'llama'"),
        (changed("hidden_act", "gelu"), "hidden_act is 'gelu'"),
        (changed("attention_bias", True), "attention_bias is True"),
        (changed("attn_output_gate", False), "attn_output_gate is False"),
        (changed("mlp_only_layers", [2]), r"mlp_only_layers is \[2\]"),
        (changed("mtp_use_dedicated_embeddings", True), "mtp_use_dedicated_embeddings"),
        (changed("mtp_num_hidden_layers", 2), "mtp_num_hidden_layers is 2"),
        (changed("layer_types", ["sliding_attention"] * 4), "'sliding_attention'"),
        (changed("layer_types", ["full_attention"]), "expected a list of 4 names"),
        (changed("hidden_size", None), "hidden_size is None"),
        (changed("hidden_size", "96"), "hidden_size is '96'"),
        (changed("num_key_value_heads", 3), "expected a multiple of 3"),
        (changed("num_experts_per_tok", 9), "num_experts_per_tok is 9"),
        (changed("rope_parameters", {"rope_type": "longrope"}), "'longrope'"),
        (changed("rope_parameters", {"mrope_interleaved": False}), "mrope_interleaved is False"),
        (changed("rope_parameters", {"mrope_section": [16, 24, 24]}), "sum 32"),
        (changed("deepstack_visual_indexes", [5], "vision_config"), "deepstack_visual_indexes"),
        (changed("quantization_config", {"quant_method": "fp8"}, None), "'fp8'"),
        (changed("quantization", {"bits": 4, "mode": "int4"}, None), "mode is 'int4'"),
        (changed("quantization", {"bits": 7, "group_size": 64}, None), "7 bits"),
        (changed("quantization", {"mode": "nvfp4", "group_size": 32}, None), "group 16"),
        (changed("quantization", {"mode": ["affine"]}, None), r"mode is \['affine'\]"),
        (changed("quantization_config", [4], None), "quantization_config: found a list"),
        (changed("dtype", "float8_e4m3fn"), "dtype is 'float8_e4m3fn'"),
        (changed("dtype", ["bfloat16"]), "dtype is"),
        (changed("tie_word_embeddings", "false", None), "tie_word_embeddings is 'false'"),
        (changed("tie_word_embeddings", 1, None), "tie_word_embeddings is 1"),
        (changed("eos_token_id", "abc", None), "eos_token_id is 'abc'"),
        (changed("eos_token_id", ["a"], None), "eos_token_id is"),
        (changed("eos_token_id", [7, True], None), "eos_token_id is"),
        (changed("eos_token_id", [7, -1], None), "eos_token_id is"),
        (changed("rms_norm_eps", float("nan")), "rms_norm_eps is nan"),
        (changed("rms_norm_eps", float("inf")), "rms_norm_eps is inf"),
        (changed("rms_norm_eps", 10**400), "rms_norm_eps is 1000"),
        (changed("rms_norm_eps", 0), "rms_norm_eps is 0; expected a number above 0"),
        (rope(rope_theta=float("nan")), "rope_theta is nan"),
        (rope(rope_theta=1), "rope_theta is 1; expected a number above 1"),
        (rope(rope_theta="1e7"), "rope_theta is '1e7'"),
        (rope(partial_rotary_factor=-0.25), "partial_rotary_factor is -0.25"),
        (rope(partial_rotary_factor=1.5), "partial_rotary_factor is 1.5"),
        (rope(mrope_section=["a", 2, 3]), r"mrope_section is \['a', 2, 3\]"),
        (rope(mrope_section=[11.0, 11, 10]), r"mrope_section is \[11.0, 11, 10\]"),
        (rope(mrope_section=[40, -4, -4]), r"mrope_section is \[40, -4, -4\]"),
        (yarn(factor=0), "factor is 0"),
        (yarn(factor=-4), "factor is -4"),
        (yarn(factor=0.5), "factor is 0.5; expected at least 1"),
        (yarn(factor="4"), "factor is '4'"),
        (yarn(factor=float("inf")), "factor is inf"),
        (yarn(original_max_position_embeddings="x"), "original_max_position_embeddings is 'x'"),
        (yarn(beta_fast="fast"), "beta_fast is 'fast'"),
        (yarn(beta_slow=[1]), r"beta_slow is \[1\]"),
        (yarn(attention_factor="1"), "attention_factor is '1'"),
        (changed("num_hidden_layers", 10**9), "num_hidden_layers is 1000000000; .* at most 1,000"),
        (changed("depth", 10**9, "vision_config"), "depth is 1000000000; .* at most 1,000"),
        (changed("vocab_size", 10**12), "vocab_size is 1000000000000; .* at most 16,777,216"),
        (changed("num_experts", 10**12), "num_experts is 1000000000000"),
        (changed("max_position_embeddings", 2**31 + 1), "max_position_embeddings is 2147483649"),
        (changed("num_attention_heads", 2**20), "head_dim is 268,435,456; .* at most 16,777,216"),
        (changed("linear_value_head_dim", 2**23), "convolution's channels is"),
        (changed("patch_size", 2**20, "vision_config"), "values of a patch is"),
        (changed("hidden_size", "9" * 1000), r"hidden_size is '9{56}\.\.\.; expected"),
        ([], "found a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_run_is_refused_by_name(values: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        config.parse(values, "here/config.json")
    assert str(caught.value).startswith("here/config.json")
    assert "\n" not in str(caught.value)


def test_quantization_overrides_are_kept_by_path() -> None:
    block = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "a.gate": {"group_size": 32, "bits": 8},
        "a.plain": False,
        "a.small": {"mode": "mxfp4", "bits": 4, "group_size": 32},
    }
    found = config.parse(changed("quantization", block, None), "q").quantization
    assert found is not None
    assert found.of("anything") == Format("affine", 4, 64)
    assert found.of("a.gate") == Format("affine", 8, 32)
    assert found.of("a.plain") is None
    assert found.of("a.small") == Format("mxfp4", 4, 32)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no config.json"),
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"3", "found a int"),
    ],
)
def test_a_broken_file_is_one_line(content: bytes | None, named: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=named) as caught:
        config.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "x" * 10_000])
def test_a_missing_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        config.read(tmp_path / name)


def test_eos_is_one_id_or_several() -> None:
    assert config.parse(changed("eos_token_id", [7, 9], None), "x").eos_token_ids == (7, 9)
    assert config.parse(json.loads(json.dumps(CONFIGS["dense"])), "x").eos_token_ids
