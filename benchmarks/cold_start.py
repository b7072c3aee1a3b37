"""A whole process, from its start to its first token: make bench-cold, or

python benchmarks/cold_start.py [--rounds 7] [--json FILE]

`python -m qwen35_mlx.generate` and `python -m mlx_lm generate` answer the same question from the
same tiny folder, taking turns. Wall time from outside, to the first byte of the answer on stdout
and to the end of a process that answers one token; files are in the system's cache for both.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
from peers import machine

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Say something."
# mlx-lm writes this line before the answer; what counts is the first byte after it.
MLX_LM_HEAD = b"==========\n"


def commands(folder: Path, tokens: int) -> dict[str, list[str]]:
    common = ["--model", str(folder), "--prompt", QUESTION, "--max-tokens", str(tokens)]
    ours = ["qwen35_mlx.generate", *common, "--no-thinking", "--temperature", "0"]
    plain = ["--chat-template-config", '{"enable_thinking": false}']
    theirs = ["mlx_lm", "generate", *common, "--temp", "0", *plain]
    return {"ours": ["-m", *ours], "mlx-lm": ["-m", *theirs]}


def timed(arguments: list[str], head: bytes) -> dict[str, float]:
    """Seconds to the first byte of answer and to the end, and CPU seconds.

    head: what the program writes before its answer. Raises: RuntimeError when it fails.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=ROOT,
        bufsize=0,
    )
    assert process.stdout is not None and process.stderr is not None
    seen, first = b"", 0.0
    while byte := process.stdout.read(1):
        seen += byte
        if not first and len(seen) > len(head):
            first = time.perf_counter() - start
    errors = process.stderr.read()
    code = process.wait()
    end = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code or not first or not seen.startswith(head):
        raise RuntimeError(f"{arguments}: exit code {code}\n{seen!r}\n{errors.decode()[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"first": first, "end": end, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="asked for in the first-byte rows")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--cache", type=Path, default=checkpoints.DEFAULT_CACHE)
    args = parser.parse_args()
    folder = checkpoints.make("tiny", args.cache)
    heads = {"ours": b"", "mlx-lm": MLX_LM_HEAD}
    kinds = {"first byte of answer": args.tokens, "one token, process ended": 1}
    results: dict[str, dict[str, list[dict]]] = {k: {p: [] for p in heads} for k in kinds}
    for _ in range(args.rounds):
        for kind, tokens in kinds.items():
            for program, arguments in commands(folder, tokens).items():
                results[kind][program].append(timed(arguments, heads[program]))
    print(f"{machine()}\nmedians of {args.rounds} (least-most), seconds")
    print(f"{'':40} {'ours':24} {'mlx-lm':24} ratio")
    for kind, found in results.items():
        for measure in ("first" if kind.startswith("first") else "end", "cpu"):
            values = {p: [r[measure] for r in rs] for p, rs in found.items()}
            ours, theirs = (statistics.median(values[p]) for p in heads)
            cells = [
                f"{statistics.median(v):6.2f} ({min(v):.2f}-{max(v):.2f})".ljust(24)
                for v in values.values()
            ]
            label = kind + (", CPU time" if measure == "cpu" else "")
            print(f"{label:40} {' '.join(cells)} {theirs / ours:5.2f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "results": results}))


if __name__ == "__main__":
    main()
