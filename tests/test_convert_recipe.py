"""Options, and the precision map: which matrix gets how many bits."""

import json
from typing import Any

import pytest
from qwen35_mlx.convert import Options, Plan, options, plan
from qwen35_mlx.convert.published import config_values

import converting
import tiny
from converting import SIZES, planned, source_of
from qwen35_mlx import family
from qwen35_mlx.errors import ConversionError
from qwen35_mlx.packing import Format

SPARSE = family.find("397b")

# -- options ---------------------------------------------------------------------------------------

TABLE: list[tuple[dict[str, Any], Options]] = [
    ({}, Options(Format("affine", 4, 64), "careful")),
    ({"bits": 3}, Options(Format("affine", 3, 64), "careful")),
    ({"bits": 8}, Options(Format("affine", 8, 64), "uniform")),
    ({"bits": 8, "recipe": "careful"}, Options(Format("affine", 8, 64), "careful")),
    ({"bits": 4, "recipe": "uniform"}, Options(Format("affine", 4, 64), "uniform")),
    ({"bits": 5, "group_size": 128}, Options(Format("affine", 5, 128), "uniform")),
    ({"bits": 6, "group_size": 32}, Options(Format("affine", 6, 32), "uniform")),
    ({"bits": 16}, Options(None, "uniform")),
    ({"bits": 16, "vision_bits": 8}, Options(None, "uniform", 8)),
    ({"mode": "mxfp4"}, Options(Format("mxfp4", 4, 32), "careful")),
    ({"mode": "mxfp8"}, Options(Format("mxfp8", 8, 32), "uniform")),
    ({"mode": "nvfp4"}, Options(Format("nvfp4", 4, 16), "careful")),
    ({"mode": "nvfp4", "bits": 4, "group_size": 16}, Options(Format("nvfp4", 4, 16), "careful")),
    ({"shard_size": "500MB"}, Options(shard_size=500_000_000)),
    ({"shard_size": "1.5 GiB"}, Options(shard_size=3 << 29)),
    ({"shard_size": 1_000_000}, Options(shard_size=1_000_000)),
]


@pytest.mark.parametrize(("given", "expected"), TABLE, ids=[str(given) for given, _ in TABLE])
def test_what_is_not_said_follows_from_the_rest(given: dict[str, Any], expected: Options) -> None:
    assert options(**given) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"bits": 7}, "--bits: 7"),
        ({"bits": 2}, "--bits: 2"),
        ({"bits": 0}, "--bits: 0"),
        ({"bits": 4, "group_size": 48}, "--group-size: 48"),
        ({"bits": 4, "group_size": 16}, "--group-size: 16"),
        ({"bits": 16, "group_size": 64}, "--group-size: given with --bits 16"),
        ({"mode": "mxfp4", "bits": 8}, "--bits: 8 with --mode mxfp4, which fixes 4"),
        ({"mode": "mxfp8", "bits": 4}, "--bits: 4 with --mode mxfp8, which fixes 8"),
        ({"mode": "nvfp4", "bits": 16}, "--bits: 16 with --mode nvfp4"),
        ({"mode": "nvfp4", "group_size": 32}, "--group-size: 32 with --mode nvfp4, which fixes 16"),
        ({"mode": "fp8"}, "--mode: fp8"),
        ({"recipe": "best"}, "--recipe: best"),
        ({"vision_bits": 4}, "--vision-bits: 4"),
        ({"shard_size": "5 apples"}, "--shard-size"),
        ({"shard_size": "999KB"}, "--shard-size"),
        ({"shard_size": "-5GB"}, "--shard-size"),
        ({"shard_size": ""}, "--shard-size"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        options(**given)


@pytest.mark.parametrize("group_size", [64, 128])
def test_a_group_that_divides_no_width_is_refused(group_size: int) -> None:
    config = json.loads(json.dumps(tiny.CONFIGS["dense"]))
    config["text_config"] |= {"linear_value_head_dim": 112, "head_dim": 72, "intermediate_size": 80}
    config["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 3]
    with pytest.raises(ConversionError, match=f"--group-size: {group_size} divides the width of"):
        plan(source_of(config), options(4, group_size=group_size))
    assert plan(source_of(config), options(4, group_size=32)).main_bytes


# -- what is stored how ----------------------------------------------------------------------------


def bits_of(made: Plan) -> dict[str, Any]:
    """Bits of each kind of matrix or vector; a kind must have one answer."""
    found: dict[str, Any] = {}
    for target in made.targets:
        kind = converting.numbers_apart(target.name).removesuffix(".weight")
        bits = target.packing.bits if target.packing else None
        assert found.setdefault(kind, bits) == bits, kind
    return found


GDN = "language_model.model.layers.N.linear_attn"
ATTENTION = "language_model.model.layers.N.self_attn"
MLP = "language_model.model.layers.N.mlp"
DRAFT = "mtp.layers.N"
# Bits of every matrix at 4 bits, careful; what is not here is in high precision.
CAREFUL = {
    f"{GDN}.in_proj_qkv": 4,
    f"{GDN}.in_proj_z": 4,
    f"{GDN}.out_proj": 6,
    "language_model.model.embed_tokens": 4,
    "language_model.lm_head": 6,
    "mtp.fc": 8,
    **{f"{stem}.{x}_proj": 6 for stem in (ATTENTION, f"{DRAFT}.self_attn") for x in "qkvo"},
}
HALVES = ("gate", "up", "down")
CAREFUL_DENSE = CAREFUL | {
    f"{stem}.{half}_proj": 4 for stem in (MLP, f"{DRAFT}.mlp") for half in HALVES
}
CAREFUL_SPARSE = CAREFUL | {
    f"{stem}.{block}{name}": bits
    for stem in (MLP, f"{DRAFT}.mlp")
    for block, name, bits in (
        ("", "gate", 8),
        *(("switch_mlp.", f"{half}_proj", 4) for half in HALVES),
        *(("shared_expert.", f"{half}_proj", 4) for half in HALVES),
    )
}


@SIZES
def test_careful_gives_the_sensitive_matrices_more_bits(size: family.Size) -> None:
    expected = dict(CAREFUL_SPARSE if size.num_experts else CAREFUL_DENSE)
    if size.name in ("0.8B", "2B", "4B"):
        del expected["language_model.lm_head"]
        expected["language_model.model.embed_tokens"] = 6
    found = bits_of(planned(size, bits=4, recipe="careful"))
    assert {kind: bits for kind, bits in found.items() if bits} == expected
    high: tuple[str, ...] = ("in_proj_a", "in_proj_b", "A_log", "dt_bias", "conv1d", "norm")
    high += ("shared_expert_gate",) if size.num_experts else ()
    for part in high:
        assert any(part in kind for kind in found.keys() - expected.keys()), part


@pytest.mark.parametrize(
    ("given", "raised", "eight"),
    [
        ({"bits": 3}, ("affine", 5, 64), ("affine", 8, 64)),
        ({"bits": 5, "group_size": 128}, ("affine", 8, 128), ("affine", 8, 128)),
        ({"bits": 6, "group_size": 32}, ("affine", 8, 32), ("affine", 8, 32)),
        ({"bits": 8}, ("affine", 8, 64), ("affine", 8, 64)),
        ({"mode": "mxfp4"}, ("affine", 6, 64), ("affine", 8, 64)),
        ({"mode": "nvfp4"}, ("affine", 6, 64), ("affine", 8, 64)),
        ({"mode": "mxfp8"}, ("affine", 8, 64), ("affine", 8, 64)),
    ],
    ids=str,
)
def test_careful_raises_from_any_base(
    given: dict[str, Any], raised: tuple[str, int, int], eight: tuple[str, int, int]
) -> None:
    made = planned(SPARSE, recipe="careful", **given)
    found = {converting.numbers_apart(t.path): t.packing for t in made.targets}
    stem = "model.language_model.layers.N"
    assert found[f"{stem}.mlp.experts.gate_up_proj"] == made.options.base
    assert found[f"{stem}.linear_attn.out_proj"] == Format(*raised)
    assert found[f"{stem}.mlp.gate"] == Format(*eight)
    assert found[f"{stem}.mlp.shared_expert_gate"] is None


@SIZES
def test_uniform_packs_every_matrix_outside_the_tower_alike(size: family.Size) -> None:
    made = planned(size, bits=4, recipe="uniform")
    for target in made.targets:
        matrix = len(target.shape) in (2, 3) and "conv1d" not in target.name
        alike = matrix and not target.name.startswith("vision_tower.")
        assert target.packing == (made.options.base if alike else None), target.name


@SIZES
@pytest.mark.parametrize("given", [{"bits": 4}, {"bits": 16}, {"mode": "nvfp4"}], ids=str)
def test_the_tower_at_8_bits_keeps_what_its_widths_forbid(
    size: family.Size, given: dict[str, Any]
) -> None:
    made = planned(size, vision_bits=8, **given)
    found = {t.name: t.packing for t in made.targets if t.name.startswith("vision_tower.")}
    kept = ("patch_embed", "pos_embed", "norm", ".bias")
    linears = {name for name in found if not any(part in name for part in kept)}
    depth = config_values(size)["vision_config"]["depth"]
    assert len(linears) == 4 * depth + 2
    if depth == 27:
        odd = {f"vision_tower.blocks.{block}.mlp.linear_fc2.weight" for block in range(27)}
        assert odd <= linears
        linears -= odd
    assert {name for name, packing in found.items() if packing} == linears
    assert {found[name] for name in linears} == {Format("affine", 8, 64)}
