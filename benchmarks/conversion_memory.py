"""Memory of converting the largest size: make bench-convert, or

python benchmarks/conversion_memory.py [--size 397b] [--layers 2 4] [--bits 4]

The true widths of a size, experts and vision tower included, with a few layers. The source's files
are sparse (they read as zeros), so 60 GB of them take no room; what is written does (about 4 GB a
layer at 4 bits). Correctness is the tests' business; here only the peak and the time count.
"""

import argparse
import json
import math
import os
import shutil
import struct
from pathlib import Path

import checkpoints
from conversion import describe, measured
from peers import machine


def make(name: str, layers: int, folder: Path) -> Path:
    """A sparse folder of the size `name`, one shard per layer and one for the rest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, shape in describe(folder, name, layers).items():
        head, _, rest = tensor.partition(".layers.")
        group = rest.split(".")[0] if head.endswith("language_model") and rest else "rest"
        groups.setdefault(group, {})[tensor] = shape
    weight_map: dict[str, str] = {}
    for group, tensors in groups.items():
        _write_sparse(folder / f"model-{group}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"model-{group}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_sparse(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    values, end = {}, 0
    for name, shape in tensors.items():
        whole = name.endswith(("A_log", "linear_attn.norm.weight"))
        start, end = end, end + (4 if whole else 2) * math.prod(shape)
        dtype = "F32" if whole else "BF16"
        values[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(values).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        os.truncate(file.fileno(), 8 + len(header) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="397b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bits", default="4")
    parser.add_argument("--cache", type=Path, default=checkpoints.DEFAULT_CACHE)
    args = parser.parse_args()
    print(machine())
    for layers in args.layers:
        source = make(args.size, layers, args.cache / "sparse")
        out = args.cache / "converted"
        nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        module = ["qwen35_mlx.convert", str(source), "--bits", args.bits, "--out", str(out)]
        found = measured(module, out)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        print(
            f"{args.size}, {layers} layers: {nbytes / 1e9:.1f} GB -> {written / 1e9:.1f} GB, peak "
            f"{found['RSS peak MB']:.0f} MB, {found['seconds']:.0f} s",
            flush=True,
        )
    shutil.rmtree(args.cache / "sparse")


if __name__ == "__main__":
    main()
