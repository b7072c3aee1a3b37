"""What conversion costs in answers: make bench-convert, or

python benchmarks/converted_accuracy.py [--count 200] [--seed 1]

The demonstration model as it is, and converted to 8 and 4 bits: how many of the same held-out
pictures each describes word for word, greedily.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from demo_accuracy import EXAMPLES, answer, is_right, world

import qwen35_mlx
from qwen35_mlx import convert

DEMO = EXAMPLES / "demo-model"
# Points of 100 that a row may lie below the original.
ASKED = (
    ({"bits": 8}, 1.0),
    ({"bits": 4, "recipe": "careful"}, 5.0),
    ({"bits": 4, "recipe": "uniform"}, 5.0),
)


def right_answers(folder: Path, items: list[world.Item]) -> int:
    model = qwen35_mlx.load(folder)
    return sum(is_right(item, answer(model, item, item.messages, thinks=False)) for item in items)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--count", type=int, default=200)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    items = world.held_out_scenes(given.count, given.seed)
    whole = right_answers(DEMO, items)
    print(f"{'as trained, BF16':28} {whole} of {len(items)}", flush=True)
    found: dict[str, int] = {}
    met = True
    with tempfile.TemporaryDirectory() as scratch:
        for asked, bar in ASKED:
            label = " ".join(f"{key} {value}" for key, value in asked.items())
            out = Path(scratch) / label.replace(" ", "-")
            source = convert.open_folder(DEMO)
            convert.convert(source, out, convert.options(**asked), name="demo-model")
            found[label] = right_answers(out, items)
            met &= found[label] >= whole - bar / 100 * len(items)
            print(f"{label:28} {found[label]} of {len(items)} (bar {bar:g} points)", flush=True)
    met &= found["bits 4 recipe careful"] >= found["bits 4 recipe uniform"]
    sys.exit(not met)


if __name__ == "__main__":
    main()
