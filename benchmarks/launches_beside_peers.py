"""GPU launches per decoded token of this program, mlx-lm and mlx-vlm:

python benchmarks/launches_beside_peers.py [--size 0.8b 35b-a3b ...] [--context 512]

Counted from traced graphs by the same rules for all; weights have shapes only. Each at 4 bits by
its own default recipe, greedily, and a step is what its own generation loop runs per token, with
its Metal kernels. `reference` is ours without them.
"""

import argparse
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from qwen35_mlx import bench, graph, launches, stand_ins
from qwen35_mlx.bench import Part

# Modules with compiled functions and kernels decide at import where they run.
with stand_ins.as_on_metal():
    import mlx.nn as nn
    import mlx_lm.models.qwen3_5
    import mlx_lm.models.qwen3_5_moe
    import mlx_vlm.models.qwen3_5
    import mlx_vlm.models.qwen3_5_moe
    from mlx.utils import tree_map_with_path
    from qwen35_mlx.convert import published

    from qwen35_mlx import family

Tree = dict[str, Any]
Step = Callable[[Tree], Any]
TAPS, HEAD_DIM = 4, 128  # of the linear attention
PROGRAMS = ("ours", "reference", "mlx-lm", "mlx-vlm")


def counted(step: Step, given: Tree) -> list[Part]:
    traced = graph.traced(step, given)
    return bench.by_part(traced, launches.counted(traced))


def mlx_lm_parts(size: family.Size, context: int) -> list[Part]:
    """Source: mlx-lm's `generate_step`."""
    values = published.config_values(size)
    module = mlx_lm.models.qwen3_5_moe if size.num_experts else mlx_lm.models.qwen3_5
    model = module.Model(module.ModelArgs.from_dict(values))
    pack(model)
    caches = model.make_cache()

    def step(given: Tree) -> Any:
        model.update(given["weights"])
        fill(caches, given["states"], context)
        logits = model(given["token"][None], cache=caches)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs.squeeze(0), arrays_of(caches)]

    return counted(step, arguments(model, values, context))


def mlx_vlm_parts(size: family.Size, context: int) -> list[Part]:
    """Source: mlx-vlm's `generate_step`, after a prompt of text."""
    values = published.config_values(size)
    module: ModuleType = mlx_vlm.models.qwen3_5_moe if size.num_experts else mlx_vlm.models.qwen3_5
    values["text_config"]["rope_parameters"]["type"] = "default"
    config = module.ModelConfig.from_dict(values)
    model = module.LanguageModel(config.text_config, config)
    pack(model)
    caches = model.make_cache()
    model._rope_deltas = mx.array([[0]])
    given = arguments(model, values, context)
    # What it keeps of the convolution's weights after the first token.
    taps = {
        str(number): {"linear_attn": mx.zeros((TAPS, layer.linear_attn.conv_dim))}
        for number, layer in enumerate(model.layers)
        if layer.is_linear
    }

    def step(given: Tree) -> Any:
        model.update(given["weights"])
        for number, kept in given["more_weights"]["layers"].items():
            mixer = model.layers[int(number)].linear_attn
            mixer._qwen3_5_decode_conv_weight = id(mixer.conv1d.weight), kept["linear_attn"]
        fill(caches, given["states"], context)
        logits = model(given["token"][None], cache=caches).logits[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs.squeeze(0), arrays_of(caches)]

    return counted(step, given | {"more_weights": {"layers": taps}})


def pack(model: nn.Module) -> None:
    """4 bits in groups of 64, BF16 elsewhere, each as the program's own conversion would."""
    own = model.quant_predicate

    def packing(path: str, module: nn.Module) -> Any:
        usable = hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
        return usable and (own is None or own(path, module))

    def typed(path: str, array: mx.array) -> mx.array:
        cast = mx.issubdtype(array.dtype, mx.floating) and model.cast_predicate(path)
        return array.astype(mx.bfloat16) if cast else array

    nn.quantize(model, 64, 4, class_predicate=packing)
    model.eval()
    model.update(tree_map_with_path(typed, model.parameters()))


def arguments(model: nn.Module, values: Tree, context: int) -> Tree:
    """Weights, states and a token; keys and values have room for another one."""
    text = values["text_config"]
    heads, room = text["linear_num_value_heads"], -(-(context + 1) // 256) * 256
    channels = HEAD_DIM * (2 * text["linear_num_key_heads"] + heads)
    kv = (1, text["num_key_value_heads"], room, text["head_dim"])
    states = [
        [mx.zeros((1, TAPS - 1, channels), mx.bfloat16), mx.zeros((1, heads, HEAD_DIM, HEAD_DIM))]
        if kind == "linear_attention"
        else [mx.zeros(kv, mx.bfloat16), mx.zeros(kv, mx.bfloat16)]
        for kind in text["layer_types"]
    ]
    token = mx.zeros((1,), mx.uint32)
    return {"weights": model.parameters(), "states": states, "token": token}


def fill(caches: list[Any], states: list[list[mx.array]], context: int) -> None:
    for cache, arrays in zip(caches, states, strict=True):
        if hasattr(cache, "cache"):
            cache.cache = list(arrays)
        else:
            cache.keys, cache.values, cache.offset = *arrays, context


def arrays_of(caches: list[Any]) -> list[Any]:
    return [c.cache if hasattr(c, "cache") else [c.keys, c.values] for c in caches]


def measured(size: family.Size, context: int) -> dict[str, list[Part]]:
    """Parts by program."""
    return {
        "ours": bench.measured(size.name, context=context)[1],
        "reference": bench.measured(size.name, context=context, reference=True)[1],
        "mlx-lm": mlx_lm_parts(size, context),
        "mlx-vlm": mlx_vlm_parts(size, context),
    }


def table(found: dict[str, dict[str, list[Part]]]) -> str:
    """Launches per token, and per layer of each kind."""
    lines = [f"{'':38}" + "".join(f"{program:>10}" for program in PROGRAMS)]
    for name, programs in found.items():
        totals = {p: sum(part.launches for part in parts) for p, parts in programs.items()}
        lines.append(f"{name + ', per token':38}" + "".join(f"{totals[p]:10,}" for p in PROGRAMS))
        for kind in (part.kind for part in programs["ours"]):
            cells = [part for p in PROGRAMS for part in programs[p] if part.kind == kind]
            each = "".join(f"{c.per_layer:10.1f}".replace(".0", "  ") for c in cells)
            layers = "" if kind == bench.ENDS else f" x {cells[0].layers}"
            lines.append(f"  {kind + layers:36}{each}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [size.name.lower() for size in family.SIZES]
    parser.add_argument("--size", nargs="+", choices=names, default=names)
    parser.add_argument("--context", type=int, default=bench.CONTEXT, help="tokens read before")
    args = parser.parse_args()
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("mlx", *PROGRAMS[2:]))
    print(f"{', '.join(versions)}; after {args.context:,} tokens")
    sizes = [size for size in family.SIZES if size.name.lower() in args.size]
    print(table({size.name: measured(size, args.context) for size in sizes}))


if __name__ == "__main__":
    main()
