"""How often the demonstration model is right, through the library.

make bench-demo, or python benchmarks/demo_accuracy.py [--model FOLDER] [--seed N] [--show N]

Greedy answers to held-out scenes, clips and tool requests, which training never saw (split by
hash), with and without thinking, compared word for word; and the same scenes with a grey picture.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(ROOT), str(EXAMPLES / "train_demo")]  # runs from a bare checkout too

import qwen35_mlx  # noqa: E402
import world  # noqa: E402
from qwen35_mlx import Qwen35, Result, Sampling  # noqa: E402

GREEDY = Sampling(temperature=0)
BARS = {"scenes": 0.95, "clips": 0.90, "tool calls": 0.95}


def answer(model: Qwen35, item: world.Item, messages: list[dict[str, Any]], thinks: bool) -> Result:
    return model.generate(
        messages, tools=item.tools, thinking=thinks, sampling=GREEDY, max_tokens=300
    )


def is_right(item: world.Item, found: Result) -> bool:
    calls = [{"name": call.name, "arguments": call.arguments} for call in found.tool_calls]
    if item.call is None:
        return found.text == item.answer and not calls
    return calls == [item.call]


def with_grey(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, every picture replaced by an even grey of its size."""

    def part(value: dict[str, Any]) -> dict[str, Any]:
        if value["type"] != "image":
            return value
        return value | {"image": Image.new("RGB", value["image"].size, (128, 128, 128))}

    return [
        m if isinstance(m["content"], str) else m | {"content": [part(p) for p in m["content"]]}
        for m in messages
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", default=str(EXAMPLES / "demo-model"))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--show", type=int, default=0, help="print this many wrong answers")
    given = options.parse_args()
    model = qwen35_mlx.load(given.model)
    sets = {
        "scenes": world.held_out_scenes(200, given.seed),
        "clips": world.held_out_clips(50, given.seed),
        "tool calls": world.held_out_tool_requests(50, given.seed),
    }
    met, shown = True, 0
    for name, items in sets.items():
        for thinks in (False, True):
            right = 0
            for item in items:
                found = answer(model, item, item.messages, thinks)
                is_good = is_right(item, found)
                right += is_good
                if not is_good and shown < given.show:
                    shown += 1
                    print(f"  wanted {item.call or item.answer!r}\n  found  {found!r}")
            met &= right >= BARS[name] * len(items)
            mode = "thinking" if thinks else "direct"
            print(
                f"{name}, {mode}: {right} of {len(items)} exact (bar {BARS[name]:.0%})", flush=True
            )
    grey = sum(
        is_right(item, answer(model, item, with_grey(item.messages), thinks=False))
        for item in sets["scenes"]
    )
    met &= grey < 0.05 * len(sets["scenes"])
    print(f"scenes with a grey picture: {grey} of {len(sets['scenes'])} (bar under 5%)")
    sys.exit(not met)


if __name__ == "__main__":
    main()
