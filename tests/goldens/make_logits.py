"""Goldens of tests/test_logits.py: transformers' numbers on the tiny checkpoints of tests/tiny.py.

Write them, or say whether they would change:

    PYTHONPATH=tests python tests/goldens/make_logits.py [--check]

Needs torch 2.13 and transformers 5.23; to write also mlx-vlm 0.7, whose MTP drafter is compared.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiny
from goldens import draft_reference, reference

FOLDER = Path(__file__).parent / "logits"
Arrays = dict[str, np.ndarray]

# What other machines may change: thread counts and instruction sets (SSE4.2 against AVX-512) were
# seen to move float32 logits by up to 2e-6 and the errors of bfloat16 arithmetic by 16%.
SAME = 5e-6
SAME_BFLOAT16_ERROR = 0.3
# Distances below which rounding could decide: router probabilities, logits of greedy choices.
ROUTER_TIE, LOGIT_TIE = 1e-5, 2e-3
# A tensor matters when a 10% change moves a case by ten times the tolerance of the tests.
MATTERS = 10 * 2e-5
TEXTS = ("text_1", "text_63", "text_64", "text_65")
MEDIA = ("image", "images", "video", "image_video")
GREEDY = 32


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error over the whole array."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def full_precision(name: str) -> tuple[Arrays, dict]:
    """Every case in float32 of one configuration, greedy tokens, draft logits, and the margins."""
    config = tiny.CONFIGS[name]
    tensors = tiny.draw(config)
    model = reference.build(config, tensors)
    arrays: Arrays = {}
    facts: dict[str, Any] = {"tensors_sha256": tiny.digest(tensors), "greedy_gap": {}}
    for case in ("text_300", *MEDIA):
        arrays |= _case(model, config, case)
    for case in TEXTS:
        prompt = tiny.case(config, case)
        expected = arrays["text_300.logits"][: len(prompt.tokens)]
        # Only the long text is stored: attention is causal, so the short ones are its prefixes.
        assert relative(reference.logits(model, config, prompt), expected) < SAME, case
    for case in ("prompt", "image"):
        prompt = tiny.case(config, case)
        tokens, margin = reference.greedy(model, config, prompt, GREEDY)
        assert len(set(tokens.tolist())) > GREEDY // 2, f"{name} {case} repeats itself: {tokens}"
        assert margin > LOGIT_TIE, f"{name} {case}: the top two logits are {margin} apart"
        arrays[f"{case}.greedy"] = tokens
        facts["greedy_gap"][case] = margin
    if "num_experts" in config["text_config"]:
        facts["router_gap"] = _router_gaps(model, config, ("text_300", *MEDIA))
    drafts = _drafts(model, config, tensors)
    facts["movement"] = _movements(model, config, tensors, arrays | drafts)
    return arrays | drafts, facts


def _case(model: Any, config: dict, case: str) -> Arrays:
    prompt = tiny.case(config, case)
    ids, delta = reference.positions(model, config, prompt)
    return {
        f"{case}.tokens": prompt.tokens,
        f"{case}.positions": ids,
        f"{case}.delta": np.array(delta, np.int32),
        f"{case}.logits": reference.logits(model, config, prompt),
    }


def _router_gaps(model: Any, config: dict, cases: tuple[str, ...]) -> dict[str, list[float]]:
    """Per case and layer the smallest distance between the last chosen expert and the next."""
    chosen = config["text_config"]["num_experts_per_tok"]
    gaps = {}
    used = set()
    for case in cases:
        found: list[np.ndarray] = []
        with reference.routers(model, found):
            reference.logits(model, config, tiny.case(config, case))
        gaps[case] = [float(reference.gap(layer, chosen).min()) for layer in found]
        assert min(gaps[case]) > ROUTER_TIE, f"{case} has a router tie; take another text"
        for index, layer in enumerate(found):
            used |= {(index, int(e)) for e in np.argsort(-layer, -1)[:, :chosen].flat}
    assert len(used) == len(found) * config["text_config"]["num_experts"], "an expert is idle"
    return gaps


def _drafts(model: Any, config: dict, tensors: tiny.Tensors) -> Arrays:
    prompt = tiny.case(config, "draft")
    states = reference.hidden(model, config, prompt)
    first = reference.logits(model, config, prompt)[-1].argmax()
    shifted = np.append(prompt.tokens[1:], first).astype(np.int32)
    logits = draft_reference.draft(config, tensors, shifted, states)
    return {
        "draft.tokens": shifted,
        "draft.hidden": states,
        "draft.logits": logits.astype(np.float32),
    }


def against_mlx_vlm(name: str, drafts: Arrays) -> float:
    """How far mlx-vlm's drafter is from the float64 reference."""
    tensors = tiny.draw(tiny.CONFIGS[name])
    inputs = (drafts["draft.tokens"], drafts["draft.hidden"])
    peer = draft_reference.mlx_vlm_draft(tiny.CONFIGS[name], tensors, *inputs)
    error = relative(peer, drafts["draft.logits"])
    assert error < 2e-5, f"mlx-vlm's drafter differs from the reference by {error}"
    return error


def _movements(model: Any, config: dict, tensors: tiny.Tensors, arrays: Arrays) -> dict:
    """For each tensor how far 10% of noise on it moves the case with all modalities, or drafts."""
    prompt = tiny.case(config, "image_video")
    table = {}
    for name in tensors:
        values = tiny.perturbed(tensors, name)
        if name.startswith("mtp."):
            inputs = (arrays["draft.tokens"], arrays["draft.hidden"])
            moved = draft_reference.draft(config, tensors | {name: values}, *inputs)
            table[name] = relative(moved, arrays["draft.logits"])
        else:
            with reference.replaced(model, name, values):
                moved = reference.logits(model, config, prompt)
            table[name] = relative(moved, arrays["image_video.logits"])
        assert table[name] > MATTERS, f"{name} moves the logits by {table[name]} only"
    return table


def rounded_weights(name: str, cases: tuple[str, ...]) -> Arrays:
    """Weights rounded to bfloat16 as published, arithmetic in float32."""
    config = tiny.CONFIGS[name]
    model = reference.build(config, tiny.rounded(tiny.draw(config)))
    if "num_experts" in config["text_config"]:
        _router_gaps(model, config, cases)
    logits = {c: reference.logits(model, config, tiny.case(config, c)) for c in cases}
    return {f"{case}.bfloat16_weights": values for case, values in logits.items()}


def bfloat16_run(name: str, expected: np.ndarray) -> tuple[Arrays, dict]:
    """transformers' bfloat16 arithmetic on 2,000 positions, measured against `expected`."""
    config = tiny.CONFIGS[name]
    tensors = tiny.draw(config)
    prompt = tiny.case(config, "text_2000")
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny.write(Path(folder), config, tensors, dtype="bfloat16")
        for label, keep in (("all_bfloat16", False), ("as_published", True)):
            model = reference.load_bfloat16(
                config, Path(folder), tiny.rounded(tensors), keep_float32=keep
            )
            found = reference.logits(model, config, prompt)
            errors[label] = relative(found, expected)
    worst = np.abs(found - expected).max(axis=-1)
    facts = {"bfloat16_error": errors, "bfloat16_top1_differs": _top1_differs(found, expected)}
    return {"text_2000.transformers_bfloat16_error": worst}, facts


def _top1_differs(found: np.ndarray, expected: np.ndarray) -> int:
    return int((found.argmax(-1) != expected.argmax(-1)).sum())


def variant(name: str, cases: tuple[str, ...]) -> Arrays:
    """Logits of a configuration that differs in one respect from `dense` or `moe`."""
    config = tiny.CONFIGS[name]
    model = reference.build(config, tiny.draw(config))
    return {
        f"{name}.{case}.logits": reference.logits(model, config, tiny.case(config, case))
        for case in cases
    }


def build() -> tuple[dict[str, Arrays], dict]:
    """All arrays by file name, and the facts that go beside them."""
    files: dict[str, Arrays] = {}
    facts: dict[str, Any] = {}
    for name in ("dense", "moe"):
        files[name], facts[name] = full_precision(name)
    files["bfloat16"] = rounded_weights("dense", ("text_2000", "image_video"))
    extra, more = bfloat16_run("dense", files["bfloat16"]["text_2000.bfloat16_weights"])
    files["bfloat16"] |= extra
    facts["dense"] |= more
    files["moe"] |= rounded_weights("moe", ("text_65", "image_video"))
    files["variants"] = variant("dense_yarn", ("text_65", "image"))
    files["variants"] |= variant("dense_tied", ("prompt",)) | variant("moe_untied", ("prompt",))
    return files, facts


def moved(files: dict[str, Arrays]) -> list[str]:
    """One line for each stored array that the rebuilt one no longer equals."""
    lines = []
    for name, arrays in files.items():
        with np.load(FOLDER / f"{name}.npz") as stored:
            for key in sorted(set(stored.files) ^ set(arrays)):
                lines.append(f"{name}: {key} is on one side only")
            for key in sorted(set(stored.files) & set(arrays)):
                old, new = stored[key], arrays[key]
                if old.shape != new.shape:
                    lines.append(f"{name}: {key} was {old.shape} and is {new.shape}")
                elif np.issubdtype(old.dtype, np.integer):
                    lines += [f"{name}: {key} differs"] if (old != new).any() else []
                elif relative(new, old) > (SAME_BFLOAT16_ERROR if "error" in key else SAME):
                    lines.append(f"{name}: {key} moved by {relative(new, old):.1e}")
    return lines


def write(files: dict[str, Arrays], facts: dict) -> None:
    """The arrays, and beside them the facts with the versions that made both."""
    for name in ("dense", "moe"):
        facts[name]["draft_against_mlx_vlm"] = against_mlx_vlm(name, files[name])
    packages = ("torch", "transformers", "mlx", "mlx-vlm", "numpy")
    facts["versions"] = {package: version(package) for package in packages}
    facts["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    FOLDER.mkdir(exist_ok=True)
    for name, arrays in files.items():
        np.savez_compressed(FOLDER / f"{name}.npz", allow_pickle=False, **arrays)
    (FOLDER / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Goldens of tests/test_logits.py.")
    parser.add_argument("--check", action="store_true", help="compare with the stored files only")
    check = parser.parse_args().check
    files, facts = build()
    if check:
        lines = moved(files)
        print("\n".join(lines) or "nothing moved")
        return 1 if lines else 0
    write(files, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
