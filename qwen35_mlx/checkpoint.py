"""A folder of safetensors as named arrays in this project's layout, whichever layout it declares.

Names in here are those of the published checkpoints (`model.language_model.layers.0...`), with two
additions: expert stacks end in `.weight`, and packed matrices have `.scales` and `.biases`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from .errors import ModelError, one_line
from .shards import Entry, declared_sidecars

READABLE = ("BF16", "F16", "F32", "U32", "U8")
# Zero-centred in Hugging Face folders: the factor is 1 + w. The gated norm and the tower's are not.
ZERO_CENTRED = re.compile(
    r"(input_layernorm|post_attention_layernorm|q_norm|k_norm|language_model\.norm|mtp\.norm"
    r"|pre_fc_norm_embedding|pre_fc_norm_hidden)\.weight$"
)
KEPT_F32 = re.compile(r"linear_attn\.(A_log|dt_bias|norm\.weight|conv1d\.weight)$")
MLX_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.", "model.visual."),
)
FOREIGN_MTP = ("mtp.", "language_model.mtp.")
LOOSE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.([0-9]{1,6})\.(gate|up|down)_proj\.weight$")


def is_mlx(stored: Mapping[str, Entry], folder: Path) -> bool:
    """True for mlx-community's names, False for Hugging Face's; they fix how norms are stored.

    Names decide because nothing else does: the config.json of an unquantised mlx folder is that of
    the folder it was made from. `read` compares the axes of the convolutions with the answer.
    """
    if any(name.startswith("language_model.") for name in stored):
        return True
    if any(name.startswith(("model.language_model.", "model.layers.")) for name in stored):
        return False
    example = next(iter(stored), "no tensor at all")
    raise ModelError(
        f"{folder}: weights are named like {example!r}; expected model.language_model.* "
        "(Hugging Face) or language_model.model.* (mlx-community)."
    )


def read(folder: Path, stored: Mapping[str, Entry], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Lazy arrays by name, matrices in `dtype`, norms whole (1 + w) and in f32.

    stored: what `entries` found. MTP tensors of an mlx-community folder are left out: nothing in
    such a folder declares whether its norms include the 1. Ours does.
    Raises: ModelError for a dtype this runtime does not read, or a tensor that has not the axes of
    the folder's layout.
    """
    mlx = is_mlx(stored, folder)
    for name, entry in stored.items():
        if entry.dtype not in READABLE:
            raise ModelError(
                f"{entry.file}: {name} is {entry.dtype}; expected one of {', '.join(READABLE)}. "
                "Convert the folder first."
            )
        _check_axes(name, entry, mlx)
    raw: dict[str, mx.array] = {}
    for file in sorted({entry.file for entry in stored.values()}):
        raw |= {n: a for n, a in _lazy(file).items() if stored[n].file == file}
    if mlx and declared_sidecars(folder) is None:
        raw = {n: a for n, a in raw.items() if not n.startswith(FOREIGN_MTP)}
    arrays = _from_mlx(raw, folder) if mlx else _from_hugging_face(raw, folder)
    return {name: _typed(name, value, dtype) for name, value in arrays.items()}


def _check_axes(name: str, entry: Entry, mlx: bool) -> None:
    """The tensors that are turned or joined below have as many axes as that needs."""
    shape = entry.shape
    advice = "Download or convert the folder again"
    if name.endswith("conv1d.weight"):
        fits = len(shape) == 3 and shape[2 if mlx else 1] == 1
        expected = "[C, K, 1]" if mlx else "[C, 1, K]"
        if not fits and len(shape) == 3 and shape[1 if mlx else 2] == 1:
            theirs, ours = ("Hugging Face's", "MLX's") if mlx else ("MLX's", "Hugging Face's")
            advice = f"The axes are {theirs}, the names {ours}: convert the folder again"
    elif name.endswith("patch_embed.proj.weight"):
        fits = len(shape) == 5 and min(shape) > 0
        expected = "[H, T, P, P, C]" if mlx else "[H, C, T, P, P]"
    elif ".switch_mlp." in name:
        fits, expected = len(shape) == 3, "three axes"
    elif LOOSE_EXPERT.match(name):
        fits, expected = len(shape) == 2, "two axes"
    else:
        return
    if not fits:
        raise ModelError(
            f"{entry.file}: {name} has shape {list(shape)}; expected {expected}. {advice}."
        )


def _lazy(file: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(file), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{file}: {one_line(error)}; expected safetensors that MLX can read. Download it again."
        ) from None
    assert isinstance(arrays, dict)
    return arrays


def _from_hugging_face(raw: dict[str, mx.array], folder: Path) -> dict[str, mx.array]:
    arrays = {}
    for name, value in _stacked(raw, folder).items():
        if name.startswith("model.") and not name.startswith(("model.language", "model.visual")):
            name = "model.language_model." + name.removeprefix("model.")  # a text-only folder
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            name += ".weight"
        elif name.endswith("conv1d.weight"):
            value = value.squeeze(1).T
        elif name.endswith("patch_embed.proj.weight"):
            value = value.reshape(value.shape[0], -1)
        elif ZERO_CENTRED.search(name):
            value = value.astype(mx.float32) + 1
        arrays[name] = value
    return arrays


def _stacked(raw: dict[str, mx.array], folder: Path) -> dict[str, mx.array]:
    """Loose experts joined as `gate_up_proj [E, 2 Im, H]` and `down_proj [E, H, Im]`."""
    arrays: dict[str, mx.array] = {}
    loose: dict[str, dict[tuple[int, str], mx.array]] = {}
    for name, value in raw.items():
        match = LOOSE_EXPERT.match(name)
        if match:
            loose.setdefault(match[1], {})[int(match[2]), match[3]] = value
        else:
            arrays[name] = value
    for prefix, parts in loose.items():
        count = 1 + max(expert for expert, _ in parts)
        for expert in range(count):
            for kind in ("gate", "up", "down"):
                name = f"{prefix}.{expert}.{kind}_proj.weight"
                if (expert, kind) not in parts:
                    raise ModelError(
                        f"{folder}: {name} is missing; expected all of {count} experts. "
                        "Download the folder again."
                    )
                rows, columns = parts[0, "gate"].shape
                expected = (columns, rows) if kind == "down" else (rows, columns)
                if (found := parts[expert, kind].shape) != expected:
                    raise ModelError(
                        f"{folder}: {name} has shape {list(found)}; expected {list(expected)} "
                        "as the first expert's. Download the folder again."
                    )
        both = [mx.concatenate([parts[e, "gate"], parts[e, "up"]]) for e in range(count)]
        arrays[f"{prefix}.gate_up_proj"] = mx.stack(both)
        arrays[f"{prefix}.down_proj"] = mx.stack([parts[e, "down"] for e in range(count)])
    return arrays


def _from_mlx(raw: dict[str, mx.array], folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for name, value in raw.items():
        name = from_mlx_name(name)
        if name.endswith("conv1d.weight"):
            value = value.squeeze(-1).T
        elif name.endswith("patch_embed.proj.weight"):
            value = value.transpose(0, 4, 1, 2, 3).reshape(value.shape[0], -1)
        arrays[name] = value
    for name in [n for n in arrays if ".switch_mlp.gate_proj." in n]:
        gate, up = arrays.pop(name), arrays.pop(name.replace("gate_proj", "up_proj"), None)
        if up is None or gate.shape != up.shape:
            found = "is missing" if up is None else f"has shape {list(up.shape)}"
            raise ModelError(
                f"{folder}: {name} has shape {list(gate.shape)} and its up_proj {found}; "
                "expected both packed alike. Convert the model again."
            )
        joined = name.replace("switch_mlp.gate_proj", "experts.gate_up_proj")
        arrays[joined] = mx.concatenate([gate, up], axis=1)
    return {n.replace("switch_mlp.down_proj", "experts.down_proj"): v for n, v in arrays.items()}


def from_mlx_name(name: str) -> str:
    """mlx-community's name of a tensor or module as the published checkpoints spell it."""
    for theirs, ours in MLX_PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def to_mlx_name(name: str) -> str:
    """The reverse. Joined experts, which have two names there, keep their own."""
    for theirs, ours in MLX_PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _typed(name: str, value: mx.array, dtype: mx.Dtype) -> mx.array:
    if value.dtype in (mx.uint32, mx.uint8):
        return value
    whole = ZERO_CENTRED.search(name) or KEPT_F32.search(name)
    return value.astype(mx.float32 if whole else dtype)


def evaluate(
    arrays: Mapping[str, mx.array], progress: Callable[[int, int], None] | None = None
) -> None:
    """Read all arrays from disk now: a lazy array can only be evaluated in the thread it came from.

    progress: called with bytes done and bytes in all.
    """
    total = sum(a.nbytes for a in arrays.values())
    done = 0
    for batch in _batches(list(arrays.values()), 64 << 20):
        mx.eval(batch)
        done += sum(a.nbytes for a in batch)
        if progress:
            progress(done, total)


def _batches(arrays: list[mx.array], limit: int) -> Iterator[list[mx.array]]:
    batch: list[mx.array] = []
    size = 0
    for array in arrays:
        batch.append(array)
        size += array.nbytes
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
