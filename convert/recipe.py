"""The precision map: one table that says for every matrix of the model how it is stored, and why.

Vectors and the causal convolution are not in it, for they are never packed: norms, `A_log` and
`dt_bias` are too small to matter in bytes and scale whole channels; `conv1d` has four columns.
"""

import re
from dataclasses import dataclass

from qwen35_mlx.errors import ConversionError
from qwen35_mlx.packing import Format

from .options import Options

BASE, RAISED, EIGHT, PLAIN, VISION = "base", "raised", "8 bits", "bf16", "vision"


@dataclass(frozen=True)
class Rule:
    """`matrices`: name for people. `pattern`: of module paths, the first that fits decides."""

    matrices: str
    pattern: str
    uniform: str
    careful: str
    why: str


# base: what --bits says. raised: two bits more (the next that MLX has), 8 at most.
# uniform is what mlx-community packs: everything but the tower.
RULES = (
    Rule("patches, positions", r"\.visual\.(patch_embed\.proj|pos_embed)$", PLAIN, PLAIN,
         "added to every row of a picture; half a percent of the tower"),
    Rule("vision tower", r"\.visual\.", VISION, VISION,
         "at most 0.5 billion weights; a picture's error reaches every answer about it"),
    Rule("router", r"\.mlp\.gate$", BASE, EIGHT,
         "a wrong score sends the token to another expert; 8 bits tell all but ties apart"),
    Rule("shared expert's gate", r"\.shared_expert_gate$", BASE, PLAIN,
         "one row, which scales a whole block"),
    Rule("decay and beta", r"\.in_proj_[ab]$", BASE, PLAIN,
         "few rows; the decay's error grows with every token that the state lives"),
    Rule("delta net output", r"\.linear_attn\.out_proj$", BASE, RAISED,
         "the matrix whose rounding raises the KL divergence most in published measurements"),
    Rule("delta net input", r"\.in_proj_(qkv|z)$", BASE, BASE,
         "large, and normalised or gated afterwards"),
    Rule("attention", r"\.self_attn\.[qkvo]_proj$", BASE, RAISED,
         "next in those measurements; one layer in four has it"),
    Rule("experts", r"\.experts\.(gate_up|down)_proj$", BASE, BASE,
         "nearly all bytes of a mixture of experts, and the least sensitive"),
    Rule("feed-forward", r"\.mlp\.(shared_expert\.)?(gate|up|down)_proj$", BASE, BASE,
         "most bytes of a dense model, and the least sensitive"),
    Rule("draft head's input", r"^mtp\.fc$", BASE, EIGHT,
         "joins token and state; official FP8 folders keep it whole"),
    Rule("output head", r"^lm_head$", BASE, RAISED,
         "its error goes straight into the logits"),
    Rule("embedding", r"\.embed_tokens$", BASE, BASE,
         "one row per token, no sum of errors"),
)  # fmt: skip
_TIED_HEAD = next(rule for rule in RULES if rule.matrices == "output head")
_HIGHER = {3: 5, 4: 6, 5: 8, 6: 8, 8: 8}


def rule_of(path: str, tied: bool) -> Rule:
    """The row for the module `path` (names of the published checkpoints).

    tied: whether the embedding is the output head too; it is then stored as that one.
    """
    for rule in RULES:
        if re.search(rule.pattern, path):
            return _TIED_HEAD if tied and rule.matrices == "embedding" else rule
    raise ValueError(f"no rule for {path}")


def wanted(rule: Rule, options: Options) -> Format | None:
    """How `options` store the matrices of `rule`, whatever their width; None is BF16."""
    level = rule.uniform if options.recipe == "uniform" else rule.careful
    base = options.base
    if level == VISION:
        group = base.group_size if base and base.mode == "affine" else 64
        return Format("affine", 8, group) if options.vision_bits == 8 else None
    if base is None or level == PLAIN:
        return None
    if level == BASE:
        return base
    # The float modes have no higher bits of their own.
    group = base.group_size if base.mode == "affine" else 64
    return Format("affine", 8 if level == EIGHT else _HIGHER[base.bits], group)


def format_of(path: str, columns: int, tied: bool, options: Options) -> Format | None:
    """The same for one matrix: BF16 where its width is no multiple of the group."""
    found = wanted(rule_of(path, tied), options)
    return found if found and columns % found.group_size == 0 else None


def require_packable(columns: dict[str, int], tied: bool, options: Options) -> None:
    """Raises: ConversionError when the group divides no matrix that --bits asks to pack."""
    base = options.base
    if base is None:
        return
    asked = [path for path in columns if wanted(rule_of(path, tied), options) == base]
    if asked and not any(columns[path] % base.group_size == 0 for path in asked):
        example = asked[0]
        raise ConversionError(
            f"--group-size: {base.group_size} divides the width of no matrix ({example} has "
            f"{columns[example]} columns); expected one that does. Try 32, or --bits 16."
        )
