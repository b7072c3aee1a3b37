"""The table of sizes: what it says of a size follows from that size's own config.json."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
from qwen35_mlx.convert.published import config_values

from qwen35_mlx import family
from qwen35_mlx.errors import ModelError
from qwen35_mlx.family import SIZES, Size
from qwen35_mlx.sampling import Sampling

MIB = 1 << 20
GROUP = 64  # of mlx-community's conversions

each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)

# name -> KV bytes per token, of MTP, recurrent state in MiB, total parameters with MTP, rows of
# q_proj, rows of in_proj_qkv: literal values of the family, for what the table computes.
FACTS = {
    "0.8B": (12_288, 2_048, 18, 873_438_784, 4_096, 6_144),
    "2B": (12_288, 2_048, 18, 2_274_069_824, 4_096, 6_144),
    "4B": (32_768, 4_096, 48, 4_659_865_088, 8_192, 8_192),
    "9B": (32_768, 4_096, 48, 9_653_104_368, 8_192, 8_192),
    "27B": (65_536, 4_096, 144, 27_781_427_952, 12_288, 10_240),
    "35B-A3B": (20_480, 2_048, 60, 35_951_822_704, 8_192, 8_192),
    "122B-A10B": (24_576, 2_048, 144, 125_086_497_008, 16_384, 12_288),
    "397B-A17B": (30_720, 2_048, 180, 403_397_928_944, 16_384, 12_288),
}

# 6-bit folders are no column of the table; they hold the rule below at a third width.
SIX_BIT_BYTES = {
    "0.8B": 813_097_664,
    "2B": 2_192_468_160,
    "4B": 4_085_344_768,
    "9B": 8_188_248_032,
    "27B": 22_777_605_088,
    "35B-A3B": 29_056_267_872,
    "122B-A10B": 100_120_675_296,
    "397B-A17B": 322_946_674_272,
}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def attention(t: dict[str, Any]) -> Shapes:
    H, D = t["hidden_size"], t["head_dim"]
    n, m = t["num_attention_heads"], t["num_key_value_heads"]
    yield "q_proj", (2 * n * D, H)  # a query and a gate for every head
    yield "k_proj", (m * D, H)
    yield "v_proj", (m * D, H)
    yield "o_proj", (H, n * D)
    yield "q_norm", (D,)
    yield "k_norm", (D,)


def delta_net(t: dict[str, Any]) -> Shapes:
    H, Hv = t["hidden_size"], t["linear_num_value_heads"]
    keys = t["linear_num_key_heads"] * t["linear_key_head_dim"]
    values = Hv * t["linear_value_head_dim"]
    C = 2 * keys + values
    yield "in_proj_qkv", (C, H)
    yield "in_proj_z", (values, H)
    yield "in_proj_b", (Hv, H)
    yield "in_proj_a", (Hv, H)
    yield "conv1d", (C, 1, t["linear_conv_kernel_dim"])
    yield "A_log", (Hv,)
    yield "dt_bias", (Hv,)
    yield "norm", (t["linear_value_head_dim"],)
    yield "out_proj", (H, values)


def feed_forward(t: dict[str, Any]) -> Shapes:
    H = t["hidden_size"]
    if "num_experts" not in t:
        yield from swiglu(H, t["intermediate_size"])
        return
    E, inner = t["num_experts"], t["moe_intermediate_size"]
    yield "gate", (E, H)
    for name, shape in swiglu(H, inner):
        yield f"experts.{name}", (E, *shape)
    for name, shape in swiglu(H, t["shared_expert_intermediate_size"]):
        yield f"shared_expert.{name}", shape
    yield "shared_expert_gate", (1, H)


def swiglu(H: int, inner: int) -> Shapes:
    yield "gate_proj", (inner, H)
    yield "up_proj", (inner, H)
    yield "down_proj", (H, inner)


def layer(t: dict[str, Any], kind: str) -> Shapes:
    yield "input_layernorm", (t["hidden_size"],)
    yield "post_attention_layernorm", (t["hidden_size"],)
    yield from attention(t) if kind == "full_attention" else delta_net(t)
    yield from feed_forward(t)


def text(config: dict[str, Any]) -> Shapes:
    t = config["text_config"]
    yield "embed_tokens", (t["vocab_size"], t["hidden_size"])
    if not config["tie_word_embeddings"]:
        yield "lm_head", (t["vocab_size"], t["hidden_size"])
    for kind in t["layer_types"]:
        yield from layer(t, kind)
    yield "norm", (t["hidden_size"],)


def mtp(config: dict[str, Any]) -> Shapes:
    t = config["text_config"]
    H = t["hidden_size"]
    yield "fc", (H, 2 * H)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield name, (H,)
    for _ in range(t["mtp_num_hidden_layers"]):
        yield from layer(t, "full_attention")


def vision(config: dict[str, Any]) -> Shapes:
    v = config["vision_config"]
    h, inner, merged = v["hidden_size"], v["intermediate_size"], v["spatial_merge_size"] ** 2
    yield "patch_embed", (h, v["in_channels"], v["temporal_patch_size"], *2 * (v["patch_size"],))
    yield "patch_embed.bias", (h,)
    yield "pos_embed", (v["num_position_embeddings"], h)
    for _ in range(v["depth"]):
        for width, into in ((3 * h, h), (h, h), (inner, h), (h, inner)):
            yield "linear", (width, into)
            yield "linear.bias", (width,)
        for _ in range(4):
            yield "norm", (h,)
    for width in (merged * h, v["out_hidden_size"]):
        yield "merger", (width, merged * h)
        yield "merger.bias", (width,)
    yield "merger.norm", (h,)
    yield "merger.norm.bias", (h,)


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def folder_bytes(size: Size, bits: int) -> int:
    """Tensor bytes of an mlx-community folder: every text matrix packed, the rest bf16, no MTP."""
    config = config_values(size)
    total = 2 * count(vision(config))
    for name, shape in text(config):
        elements = math.prod(shape)
        if name == "A_log":
            total += 4 * elements
        elif bits < 16 and len(shape) > 1 and name != "conv1d":
            assert shape[-1] % GROUP == 0
            total += elements * bits // 8 + elements // GROUP * 2 * 2  # a bf16 scale and bias each
        else:
            total += 2 * elements
    return total


@each_size
def test_parameter_counts_follow_from_the_config(size: Size) -> None:
    config = config_values(size)
    assert count(text(config)) + count(vision(config)) == size.parameters
    assert count(mtp(config)) == size.mtp_parameters
    assert size.parameters + size.mtp_parameters == FACTS[size.name][3]


@each_size
def test_folder_sizes_follow_from_the_config(size: Size) -> None:
    assert folder_bytes(size, 4) == size.mlx_4bit_bytes
    assert folder_bytes(size, 6) == SIX_BIT_BYTES[size.name]
    assert folder_bytes(size, 8) == size.mlx_8bit_bytes
    assert folder_bytes(size, 16) == size.mlx_bf16_bytes


@each_size
def test_memory_per_token_and_sequence(size: Size) -> None:
    kv, mtp_kv, state, *_ = FACTS[size.name]
    assert size.kv_bytes_per_token == kv
    assert size.mtp_kv_bytes_per_token == mtp_kv
    assert size.state_bytes == state * MIB


@each_size
def test_the_configs_shapes_agree_with_one_another(size: Size) -> None:
    config = config_values(size)
    t, v = config["text_config"], config["vision_config"]
    shapes = dict(text(config))
    assert shapes["q_proj"][0] == FACTS[size.name][4]
    assert shapes["in_proj_qkv"][0] == FACTS[size.name][5]
    assert len(t["layer_types"]) == t["num_hidden_layers"]
    assert t["layer_types"].count("full_attention") == size.full_attention_layers
    assert t["layer_types"][3] == t["layer_types"][-1] == "full_attention"
    assert t["linear_num_value_heads"] % t["linear_num_key_heads"] == 0
    assert t["num_attention_heads"] % t["num_key_value_heads"] == 0
    assert v["hidden_size"] % v["num_heads"] == 0
    assert v["out_hidden_size"] == t["hidden_size"]
    assert 2 * sum(t["rope_parameters"]["mrope_section"]) == 64
    moe = "-A" in size.name
    assert moe == ("num_experts" in t) == ("intermediate_size" not in t)
    assert config["model_type"] == v["model_type"] == ("qwen3_5_moe" if moe else "qwen3_5")
    assert t["model_type"] == config["model_type"] + "_text"
    assert t.get("tie_word_embeddings", False) == config["tie_word_embeddings"]


def test_a_config_is_the_callers_own() -> None:
    first = config_values(SIZES[0])
    first["text_config"]["rope_parameters"]["mrope_section"].append(1)
    assert config_values(SIZES[0]) != first


def test_the_table_holds_eight_sizes_in_order_of_weight() -> None:
    assert [size.name for size in SIZES] == list(FACTS)
    weights = [size.parameters for size in SIZES]
    assert weights == sorted(weights)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIZES[0].name = "1B"  # type: ignore[misc]


@each_size
def test_a_size_is_found_by_its_names(size: Size) -> None:
    short = size.name.split("-")[0]
    for name in (size.name, size.name.lower(), short, f"Qwen3.5-{size.name}", f" {short.lower()} "):
        assert family.find(name) is size
    assert size.hf_id == f"Qwen/Qwen3.5-{size.name}"
    assert size.mlx_id == f"mlx-community/Qwen3.5-{size.name}-4bit"


@pytest.mark.parametrize(
    "name", ["", "3b", "b", "4", "a3b", "4b-4bit", "Qwen/Qwen3.5-4B", "qwen3-4b", "./4b", "4b/"]
)
def test_other_names_are_no_size(name: str) -> None:
    assert family.find(name) is None


@each_size
def test_a_size_is_identified_by_its_shapes(size: Size) -> None:
    t = config_values(size)["text_config"]
    experts = t.get("num_experts", 0)
    found = family.identify(t["hidden_size"], t["num_hidden_layers"], experts)
    assert found is size
    assert family.identify(t["hidden_size"], t["num_hidden_layers"] + 4, experts) is None
    assert family.identify(t["hidden_size"] + 64, t["num_hidden_layers"], experts) is None
    assert family.identify(t["hidden_size"], t["num_hidden_layers"], experts + 1) is None


# The model cards' rows: temperature, top_p, top_k, presence penalty.
CARDS: dict[tuple[bool, bool, bool], tuple[float, float, int, float]] = {
    # small, thinking, vision
    (True, False, False): (1.0, 1.0, 20, 2.0),
    (True, False, True): (0.7, 0.8, 20, 1.5),
    (True, True, False): (1.0, 0.95, 20, 1.5),
    (True, True, True): (0.6, 0.95, 20, 0.0),
    (False, True, False): (1.0, 0.95, 20, 1.5),
    (False, True, True): (1.0, 0.95, 20, 1.5),
    (False, False, False): (0.7, 0.8, 20, 1.5),
    (False, False, True): (0.7, 0.8, 20, 1.5),
}


@each_size
def test_sampling_is_the_cards(size: Size) -> None:
    small = size.name in ("0.8B", "2B")
    for (is_small, thinking, vision_), row in CARDS.items():
        if is_small == small:
            found = family.recommended(size, thinking, vision_)
            assert (found.temperature, found.top_p, found.top_k, found.presence_penalty) == row
            assert (found.min_p, found.repetition_penalty, found.seed) == (0, 1, None)
    calm = size.modes.precise_coding
    assert (calm.temperature, calm.top_p, calm.presence_penalty) == (0.6, 0.95, 0.0)


def test_a_model_that_is_no_size_is_greedy() -> None:
    for thinking in (False, True):
        assert family.recommended(None, thinking, vision=True).temperature == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"eos_token_id": [1, 2], "pad_token_id": 3}, None),
        ({"temperature": None, "top_p": None}, None),
        ({"do_sample": False, "temperature": 0.6}, family.UNKNOWN),
        ({"do_sample": True}, Sampling(1.0, 1.0, 50)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            Sampling(0.6, 0.95, 20),
        ),
        ({"repetition_penalty": 1.05}, Sampling(1.0, 1.0, 50, repetition_penalty=1.05)),
        ({"min_p": 0.1, "presence_penalty": 1}, Sampling(1.0, 1.0, 50, 0.1, 1)),
    ],
    ids=str,
)
def test_generation_config_says_how_to_sample(
    values: dict[str, Any], expected: Sampling | None
) -> None:
    assert family.from_generation_config(values, "generation_config.json") == expected


def test_a_bad_generation_config_is_one_line_with_its_path() -> None:
    with pytest.raises(ModelError, match=r"^x/g\.json: sampling: top_p is 7; expected .*\.$"):
        family.from_generation_config({"top_p": 7}, "x/g.json")


def test_advice_names_the_largest_size_that_fits() -> None:
    assert family.fits_advice(8 * 10**9).startswith("The largest that fits is 9B at 4 bits (6.3 GB")
    assert "397B-A17B" in family.fits_advice(10**12)
    assert "0.8B at 4 bits, needs 0.7 GB" in family.fits_advice(10**8)
    assert "0.8B" in family.fits_advice(-5)
    for size in SIZES:
        assert size.name in family.fits_advice(int(size.mlx_4bit_bytes * 1.15) + 10**8)
