"""Conversion to 4 bits beside mlx-lm and mlx-vlm: make bench-convert, or

python benchmarks/conversion.py [--rounds 5] [--experts] [--json FILE]

The same random BF16 checkpoint, widths of 2B with 12 layers and its vision tower (3.2 GB), or with
--experts two layers of 35B-A3B (5.5 GB). Each program runs as a process of its own, taking turns;
wall time and peak resident memory from outside. mlx-lm leaves out the vision tower, both leave out
the MTP head; ours writes everything, digests it and flushes it to the disk.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import mlx.core as mx
from peers import machine

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo-model"
sys.path[:0] = [str(ROOT)]

from qwen35_mlx.convert.published import config_values  # noqa: E402

from qwen35_mlx.family import find  # noqa: E402
from tiny_shapes import shapes  # noqa: E402

SMALL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
SHARD_BYTES = 2_000_000_000


def make(name: str, layers: int, cache: Path) -> Path:
    """A folder with the widths of the size `name` and `layers` layers, written if not there yet."""
    folder = cache / f"convert-{name}-{layers}"
    if (folder / ".complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write(folder, describe(folder, name, layers))
    (folder / ".complete").touch()
    return folder


def made(name: str, layers: int, cache: Path) -> Path:
    """`make` in a process of its own: this one's peak of memory would count as its children's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(make, name, layers, cache).result()


def describe(folder: Path, name: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Write all but the weights of the size `name` with `layers` layers; the weights' shapes."""
    size = find(name)
    assert size is not None
    config = config_values(size)
    text = config["text_config"]
    text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    (folder / "config.json").write_text(json.dumps(config))
    for file in SMALL:
        shutil.copyfile(DEMO / file, folder / file)
    return shapes(config)


def _write(folder: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in wanted.items():
        if size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * math.prod(shape)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        arrays = {name: _drawn(name, wanted[name]) for name in names}
        mx.save_safetensors(str(folder / file), arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drawn(name: str, shape: tuple[int, ...]) -> mx.array:
    whole = name.endswith(("A_log", "linear_attn.norm.weight"))
    return (0.02 * mx.random.normal(shape)).astype(mx.float32 if whole else mx.bfloat16)


def commands(source: Path, out: Path) -> dict[str, list[str]]:
    packing = ["-q", "--q-bits", "4", "--q-group-size", "64"]
    theirs = ["--hf-path", str(source), "--mlx-path", str(out), *packing]
    ours = ["qwen35_mlx.convert", str(source), "--out", str(out), "--bits", "4"]
    return {
        "ours": [*ours, "--recipe", "uniform"],
        "mlx-lm": ["mlx_lm", "convert", *theirs],
        "mlx-vlm": ["mlx_vlm", "convert", *theirs],
    }


def measured(module: list[str], out: Path) -> dict[str, float]:
    """Seconds, and the peak of resident memory in MB, of one process.

    Raises: RuntimeError when it fails, or its memory cannot be told from this process's.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", *module], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{module}: exit code {process.returncode}\n{errors.decode()[-2000:]}")
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise RuntimeError(f"{module}: its peak of memory is hidden behind that of its parent")
    return {
        "seconds": seconds,
        "CPU seconds": usage.ru_utime + usage.ru_stime,
        "RSS peak MB": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """A row per figure: medians with least and most, and the better peer's median over ours."""
    lines = [" " * 14 + "".join(program.ljust(28) for program in results) + "ratio"]
    for kind in ("seconds", "CPU seconds", "RSS peak MB"):
        groups = [[found[kind] for found in runs] for runs in results.values()]
        medians = [statistics.median(group) for group in groups]
        cells = [
            f"{median:8.1f} ({min(group):.1f}-{max(group):.1f})".ljust(28)
            for median, group in zip(medians, groups, strict=True)
        ]
        lines.append(f"{kind:14}{''.join(cells)}{min(medians[1:]) / medians[0]:5.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", action="store_true", help="two layers of 35B-A3B")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--cache", type=Path, default=checkpoints.DEFAULT_CACHE)
    args = parser.parse_args()
    source = made(*(("35b", 2) if args.experts else ("2b", 12)), args.cache)
    out = args.cache / "converted"
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{machine()}\n{source.name}, {nbytes / 1e9:.1f} GB")
    results: dict[str, list[Any]] = {program: [] for program in commands(source, out)}
    for number in range(args.rounds):
        for program, module in commands(source, out).items():
            results[program].append(measured(module, out))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    print("\n".join(table(results)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
