"""This program, mlx-lm and mlx-vlm side by side: make bench-peers, or

python benchmarks/peers.py [--rounds 7] [--model dense60m ...] [--only decode ...] [--json FILE]

Reading a prompt of 128, 512 and 2,048 tokens, and 64 tokens decoded greedily after a prompt of 128.
Each number comes from a fresh process (see worker.py), the programs taking turns, so that a busy
machine is as unfair to one as to the others. Medians, with the extremes; `ratio` is ours to the
better of the two peers, above 1 when ours is better.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoints

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("ours", "mlx-lm", "mlx-vlm")
MODELS = ("dense60m", "moe100m")
DECODED = 64
# In exact arithmetic all programs give the same tokens; float32 is near enough for these many.
COMPARED = {"tiny": 16, "moe100m": 16}


@dataclass(frozen=True)
class Row:
    """One line of the table: tokens of prompt, tokens asked for, and which seconds count."""

    name: str
    prompt: int
    tokens: int
    stage: str

    @property
    def counted(self) -> int:
        return self.prompt if self.stage == "prompt" else self.tokens - 1


ROWS = (
    Row("prompt 128", 128, 1, "prompt"),
    Row("prompt 512", 512, 1, "prompt"),
    Row("prompt 2048", 2048, 1, "prompt"),
    Row("decode 64", 128, DECODED + 1, "decode"),
)


def measured(program: str, folder: Path, prompt: int, tokens: int) -> dict:
    """What worker.py says, run in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), program, str(folder)]
    command += ["--prompt", str(prompt), "--tokens", str(tokens)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{program} on {folder}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_tokens(cache: Path) -> None:
    """Stop unless the three programs compute the same function.

    Raises: RuntimeError with the tokens of each program when they differ.
    """
    for name, count in COMPARED.items():
        folder = checkpoints.make(name, cache)
        tokens = {p: measured(p, folder, 150, count)["tokens"] for p in PROGRAMS}
        if len({tuple(t) for t in tokens.values()}) > 1:
            raise RuntimeError(f"{name}: the programs differ in their greedy tokens: {tokens}")
        print(f"{name}: all programs give the same {count} tokens {tokens['ours'][:5]} ...")


def run(folder: Path, rows: Sequence[Row], rounds: int) -> dict[str, dict[str, list[dict]]]:
    """Results by row and program, `rounds` of each."""
    results: dict[str, dict[str, list[dict]]] = {r.name: {p: [] for p in PROGRAMS} for r in rows}
    for round_ in range(rounds):
        for row in rows:
            for program in PROGRAMS:
                found = measured(program, folder, row.prompt, row.tokens)
                results[row.name][program].append(found)
        print(f"{folder.name}: round {round_ + 1} of {rounds} done", file=sys.stderr)
    return results


def table(row: Row, found: dict[str, list[dict]]) -> list[str]:
    """Lines of speed (wall and CPU time) and memory for one row."""
    stage, lines = row.stage, []
    kinds = {
        "tokens/s": [row.counted / r[f"{stage}_seconds"] for p in PROGRAMS for r in found[p]],
        "tokens/CPU s": [row.counted / r[f"{stage}_cpu"] for p in PROGRAMS for r in found[p]],
        "MLX peak MB": [r["mlx_peak"] / 1e6 for p in PROGRAMS for r in found[p]],
        "RSS peak MB": [r["rss_peak"] / 1e6 for p in PROGRAMS for r in found[p]],
    }
    for kind, values in kinds.items():
        n = len(values) // len(PROGRAMS)
        groups = [values[i * n : (i + 1) * n] for i in range(len(PROGRAMS))]
        mine, *theirs = (statistics.median(group) for group in groups)
        ratio = min(theirs) / mine if kind.endswith("MB") else mine / max(theirs)
        cells = [
            f"{statistics.median(g):8.1f} ({min(g):.1f}-{max(g):.1f})".ljust(26) for g in groups
        ]
        lines.append(f"{row.name:12} {kind:13} {''.join(cells)} {ratio:5.2f}")
    return lines


def machine() -> str:
    names = ("mlx", "mlx-lm", "mlx-vlm")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{platform.platform()}, {os.cpu_count()} cores, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows that contain this text")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--cache", type=Path, default=checkpoints.DEFAULT_CACHE)
    parser.add_argument("--no-compare", action="store_true", help="skip the check of the tokens")
    args = parser.parse_args()
    rows = [r for r in ROWS if not args.only or any(part in r.name for part in args.only)]
    print(machine())
    if not args.no_compare:
        compare_tokens(args.cache)
    everything = {}
    for name in args.model:
        everything[name] = run(checkpoints.make(name, args.cache), rows, args.rounds)
        print(f"\n{name}, medians of {args.rounds} (least-most)")
        print(" " * 27 + "".join(program.ljust(26) for program in PROGRAMS) + " ratio")
        for row in rows:
            print("\n".join(table(row, everything[name][row.name])))
    if args.json:
        report = {"machine": machine(), "rounds": args.rounds, "results": everything}
        args.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
