"""transformers' Qwen3.5 on the tiny checkpoints: logits, positions, greedy tokens, router gaps."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tiny import Case, Tensors, stays_float32

TIED_HEAD = "lm_head.weight"


def _classes(config: dict) -> tuple[Any, Any]:
    name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[config["model_type"]]
    return (
        getattr(transformers, f"{name}ForConditionalGeneration"),
        getattr(transformers, f"{name}Config"),
    )


def build(config: dict, tensors: Tensors) -> Any:
    """The float32 model on the CPU with eager attention; `mtp.*` has no place in transformers."""
    model_class, config_class = _classes(config)
    settings = config_class.from_dict(copy.deepcopy(config))
    model = model_class._from_config(settings, attn_implementation="eager", dtype=torch.float32)
    state = {n: torch.from_numpy(v.copy()) for n, v in tensors.items() if not n.startswith("mtp.")}
    report = model.load_state_dict(state, strict=False)
    missing = set(report.missing_keys) - ({TIED_HEAD} if config["tie_word_embeddings"] else set())
    if missing or report.unexpected_keys:
        raise ValueError(f"transformers: missing {missing}, unexpected {report.unexpected_keys}")
    model.tie_weights()
    return model.eval()


def load_bfloat16(config: dict, folder: Path, tensors: Tensors, *, keep_float32: bool) -> Any:
    """transformers' own bfloat16 model of a published folder.

    `from_pretrained` also rounds the tensors published in float32; `keep_float32` puts these back.
    """
    model_class, _ = _classes(config)
    model = model_class.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    if keep_float32:
        parameters = dict(model.named_parameters())
        for name in filter(stays_float32, tensors):
            parameters[name].data = torch.from_numpy(tensors[name].copy())
    return model


def inputs(config: dict, case: Case) -> dict[str, torch.Tensor]:
    """The keyword arguments of `forward` for one prompt."""
    tokens = torch.from_numpy(case.tokens.astype(np.int64))[None]
    kinds = torch.zeros_like(tokens)
    kinds[tokens == config["image_token_id"]] = 1
    kinds[tokens == config["video_token_id"]] = 2
    result = {"input_ids": tokens, "mm_token_type_ids": kinds}
    for key, prefix, wanted in (
        ("pixel_values", "image", False),
        ("pixel_values_videos", "video", True),
    ):
        media = [m for m in case.media if bool(m.timestamps) == wanted]
        if media:
            result[key] = torch.from_numpy(np.concatenate([m.patches for m in media]))
            result[f"{prefix}_grid_thw"] = torch.tensor([m.grid for m in media])
    return result


def _forget(model: Any) -> None:
    # The model keeps the rope delta of its last media prompt and applies it to later texts.
    model.model.rope_deltas = None


@torch.no_grad()
def logits(model: Any, config: dict, case: Case) -> np.ndarray:
    """`[T, V]` float32."""
    _forget(model)
    return model(**inputs(config, case)).logits[0].float().numpy()


@torch.no_grad()
def hidden(model: Any, config: dict, case: Case) -> np.ndarray:
    """`[T, hidden]` float32 after the final norm."""
    _forget(model)
    return model.model(**inputs(config, case)).last_hidden_state[0].numpy()


@torch.no_grad()
def positions(model: Any, config: dict, case: Case) -> tuple[np.ndarray, int]:
    """Position ids `[3, T]` int32 and the rope delta, from transformers' own rule."""
    known = inputs(config, case)
    grids = {key: known.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    ids, delta = model.model.get_rope_index(known["input_ids"], known["mm_token_type_ids"], **grids)
    return ids[:, 0].numpy().astype(np.int32), int(delta)


@torch.no_grad()
def greedy(model: Any, config: dict, case: Case, count: int) -> tuple[np.ndarray, float]:
    """`[count]` int32 tokens that follow the prompt, and the smallest gap of the top two logits."""
    _forget(model)
    out = model.generate(
        **inputs(config, case),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    gaps = [gap(step.float().numpy()).min() for step in out.logits]
    return out.sequences[0, len(case.tokens) :].numpy().astype(np.int32), float(min(gaps))


def gap(values: np.ndarray, rank: int = 1) -> np.ndarray:
    """Distance between the `rank`-th and the next largest entry of each row."""
    ordered = np.sort(values, axis=-1)
    return ordered[..., -rank] - ordered[..., -rank - 1]


@contextmanager
def routers(model: Any, found: list[np.ndarray]) -> Iterator[None]:
    """While open, `found` receives each layer's `[T, experts]` router probabilities, in order."""

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(torch.softmax(output[0].float(), -1).numpy())

    layers = model.model.language_model.layers
    hooks = [layer.mlp.gate.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(model: Any, name: str, values: np.ndarray) -> Iterator[None]:
    """While open, the parameter `name` holds `values`."""
    parameter = dict(model.named_parameters())[name]
    original = parameter.data
    parameter.data = torch.from_numpy(values.copy())
    try:
        yield
    finally:
        parameter.data = original
