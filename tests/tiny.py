"""Tiny random Qwen3.5 checkpoints, the folders they are published in, and prompts for them.

Values come from PCG64's raw stream, which NumPy guarantees, and from integer sums, so goldens made
from them stay valid with any NumPy. Nothing here needs torch; MLX only writes the files.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from tiny_shapes import BASE_VOCAB, CONFIGS, TOKEN_ID, shapes

__all__ = ["BASE_VOCAB", "CASES", "CONFIGS", "TOKEN_ID", "Case", "Medium", "case", "draw", "write"]

Tensors = dict[str, np.ndarray]


def raw(name: str, count: int, seed: int = 0) -> np.ndarray:
    """`[count]` uint64 that belong to this name for ever."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)


def normal(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """`shape` float64, mean 0, deviation 1: the sum of the four 16-bit quarters of each draw."""
    draws = raw(name, int(np.prod(shape)), seed)
    quarters = [(draws >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    centred = np.sum(quarters, axis=0).astype(np.int64) - 2 * 0xFFFF
    return (centred * (np.sqrt(3.0) / 65536)).reshape(shape)


def draw(config: dict, seed: int = 0) -> Tensors:
    """Float32 tensors by Hugging Face name, drawn so that each of them matters to the logits."""
    tensors = {n: _value(n, s, seed).astype(np.float32) for n, s in shapes(config).items()}
    if config["tie_word_embeddings"]:
        # At scale 1 the residual stream would make every token predict itself.
        tensors["model.language_model.embed_tokens.weight"] *= np.float32(0.09375)
    return tensors


def _value(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    noise = normal(name, shape, seed)
    if name.endswith("A_log"):
        # exp(g) of the heads spans about 0.01 to 0.9999, in a different order in each layer.
        rates = np.linspace(-9.2, 1.4, shape[0])
        return rates[np.argsort(noise, kind="stable")] + 0.1 * noise
    if name.endswith("dt_bias"):
        return 0.5 + 0.5 * noise
    if name.endswith("conv1d.weight"):
        return 0.5 * noise
    if name.endswith("pos_embed.weight"):
        return 0.5 * noise
    if name.endswith("embed_tokens.weight"):
        return noise
    if is_zero_centred(name) or name.endswith(".bias"):
        return 0.2 * noise
    if len(shape) == 1:
        return 1 + 0.2 * noise
    fan_in = shape[-1] if "patch_embed" not in name else int(np.prod(shape[1:]))
    return noise / np.sqrt(fan_in)


def is_zero_centred(name: str) -> bool:
    """True for norms applied as 1 + w: all but the gated norm and those of the vision tower."""
    if "linear_attn" in name or "visual" in name:
        return False
    return name.endswith(("norm.weight", "norm_embedding.weight", "norm_hidden.weight"))


def perturbed(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The values of `name` with each entry scaled by 1 + 10% of noise."""
    noise = normal(f"noise on {name}", tensors[name].shape)
    return (tensors[name] * (1 + 0.1 * noise)).astype(np.float32)


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over names and bytes: says whether the draws are those the goldens were made from."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].tobytes())
    return state.hexdigest()


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest bfloat16 (ties to even), still stored as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def stays_float32(name: str) -> bool:
    """True for the tensors that Qwen publishes in float32 inside a bfloat16 checkpoint."""
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def rounded(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The values a bfloat16 Hugging Face folder holds, as float32."""
    return {n: v if stays_float32(n) else round_bf16(v) for n, v in tensors.items()}


def write(
    folder: Path,
    config: dict,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    shards: int = 1,
    layout: str = "huggingface",
    experts_fused: bool = True,
    quantize: dict | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder as Qwen publishes it (`huggingface`) or as mlx-community does (`mlx`).

    `dtype` is float32 or bfloat16. `quantize` (mlx only) is config.json's block: group_size, bits,
    mode, and overrides by module path, each a dict or False. `files` are further texts by name,
    such as `tokenizer.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config["text_config"]["dtype"] = dtype
    if layout == "mlx":
        arrays = _mlx_arrays(tensors, dtype)
        if quantize is not None:
            arrays = _quantized(arrays, quantize)
            config["quantization"] = config["quantization_config"] = quantize
    else:
        plain = tensors if experts_fused else unfused(tensors)
        arrays = {n: _array(v, "float32" if stays_float32(n) else dtype) for n, v in plain.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _save(folder, arrays, shards, "mlx" if layout == "mlx" else "pt")
    for name, content in (files or {}).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def _array(values: np.ndarray, dtype: str) -> mx.array:
    return mx.array(np.ascontiguousarray(values)).astype(
        {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]
    )


def _save(folder: Path, arrays: dict[str, mx.array], shards: int, format_name: str) -> None:
    names = sorted(arrays)
    parts = [names[i::shards] for i in range(shards)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = (
            "model.safetensors"
            if shards == 1
            else f"model-{number:05d}-of-{shards:05d}.safetensors"
        )
        mx.save_safetensors(
            str(folder / file), {n: arrays[n] for n in part}, {"format": format_name}
        )
        weight_map |= dict.fromkeys(part, file)
    if shards > 1 or format_name == "mlx":
        total = sum(a.nbytes for a in arrays.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def unfused(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The same tensors with each expert's three projections apart, as in the FP8 repositories."""
    result: Tensors = {}
    for name, value in tensors.items():
        head, experts, last = name.rpartition(".experts.")
        if not experts:
            result[name] = value
        elif last == "down_proj":
            result |= {f"{head}.experts.{e}.down_proj.weight": v for e, v in enumerate(value)}
        else:
            for e, both in enumerate(value):
                gate, up = np.split(both, 2)
                result[f"{head}.experts.{e}.gate_proj.weight"] = gate
                result[f"{head}.experts.{e}.up_proj.weight"] = up
    return result


def _mlx_arrays(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, mx.array]:
    """mlx-vlm's layout: norms hold 1 + w in `dtype`, channels last, experts split, no MTP."""
    arrays: dict[str, mx.array] = {}
    for name, value in tensors.items():
        if name.startswith("mtp."):
            continue
        kept = "float32" if name.endswith("A_log") else dtype
        array = _array(value, kept)
        if is_zero_centred(name):
            array = array + 1
        elif name.endswith("conv1d.weight"):
            array = array.swapaxes(1, 2)
        elif name.endswith("patch_embed.proj.weight"):
            array = array.transpose(0, 2, 3, 4, 1)
        path = mlx_name(name)
        if path.endswith("experts.gate_up_proj"):
            stem = path.replace("experts.gate_up_proj", "switch_mlp")
            gate, up = mx.split(array, 2, axis=1)
            arrays |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif path.endswith("experts.down_proj"):
            arrays[path.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = array
        else:
            arrays[path] = array
    return {name: mx.contiguous(array) for name, array in arrays.items()}


def mlx_name(name: str) -> str:
    """The mlx-community name of a Hugging Face tensor (experts are split further by `write`)."""
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "vision_tower."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def _quantized(arrays: dict[str, mx.array], block: dict) -> dict[str, mx.array]:
    base = {key: block[key] for key in ("group_size", "bits", "mode") if key in block}
    result: dict[str, mx.array] = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        settings = block.get(module, base)
        plain = (
            name == module or array.ndim < 2 or "conv1d" in name or name.startswith("vision_tower")
        )
        if plain or settings is False or array.shape[-1] % settings["group_size"]:
            result[name] = array
            continue
        parts = mx.quantize(array, **settings)
        result |= {
            f"{module}.{part}": v
            for part, v in zip(("weight", "scales", "biases"), parts, strict=False)
        }
    return result


@dataclass(frozen=True)
class Medium:
    """A picture (no timestamps) or clip: `patches` [t*gh*gw, 1536] in [-1, 1), grid (t, gh, gw)."""

    patches: np.ndarray
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Case:
    """Token ids `[T]` int32 with placeholders expanded, and the media in their order."""

    tokens: np.ndarray
    media: tuple[Medium, ...] = ()


# A piece is a number of ordinary tokens or a medium: ("image" | "video", t, gh, gw).
_PIECES: dict[str, tuple] = {
    "text_1": (1,),
    "text_63": (63,),
    "text_64": (64,),
    "text_65": (65,),
    "text_300": (300,),
    "text_2000": (2000,),
    "prompt": (20,),
    "draft": (15,),
    "image": (5, ("image", 1, 6, 10), 11),
    "images": (3, ("image", 1, 4, 6), 7, ("image", 1, 10, 8), 19),
    "video": (4, ("video", 3, 4, 8), 9),
    "image_video": (2, ("image", 1, 2, 14), 6, ("video", 4, 8, 4), 13),
}
CASES = tuple(_PIECES)
# Texts in which no choice, of experts or of greedy tokens, hangs on the rounding of float32.
_TEXT_OF = {"qwen3_5": "tokens of qwen3_5 2", "qwen3_5_moe": "tokens of qwen3_5_moe 4"}


def case(config: dict, name: str) -> Case:
    """The named prompt of this configuration; the texts are prefixes of one another."""
    text = iter(raw(_TEXT_OF[config["model_type"]], 2048) % np.uint64(BASE_VOCAB))
    tokens: list[int] = []
    media: list[Medium] = []
    for piece in _PIECES[name]:
        if isinstance(piece, int):
            tokens += [int(next(text)) for _ in range(piece)]
            continue
        kind, *grid = piece
        medium = _medium(config, f"{name} {len(media)}", kind, (grid[0], grid[1], grid[2]))
        rows = medium.grid[1] * medium.grid[2] // config["vision_config"]["spatial_merge_size"] ** 2
        block = [
            config["vision_start_token_id"],
            *[config[f"{kind}_token_id"]] * rows,
            config["vision_end_token_id"],
        ]
        for _ in range(medium.grid[0]):
            stamp = [int(next(text)) for _ in range(3)] if kind == "video" else []
            tokens += stamp + block
        media.append(medium)
    return Case(np.array(tokens, np.int32), tuple(media))


def _medium(config: dict, name: str, kind: str, grid: tuple[int, int, int]) -> Medium:
    vision = config["vision_config"]
    width = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    shape = (grid[0] * grid[1] * grid[2], width)
    levels = raw(f"patches of {name}", shape[0] * shape[1]) >> np.uint64(56)
    patches = ((levels.astype(np.float32) - 128) / 128).reshape(shape)
    stamps = tuple(0.5 + i for i in range(grid[0])) if kind == "video" else ()
    return Medium(patches, grid, stamps)
