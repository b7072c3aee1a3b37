"""One converted folder in three programs: make bench-convert, or

python benchmarks/same_logits.py [--source FOLDER]

The demonstration model is converted to 4 and 8 bits; mlx-lm and mlx-vlm load the folder as it is.
Relative L2 distance of their logits to this runtime's, arithmetic in f32, where this runtime reads
the main files' norms (rounded to BF16) as they do; and its own distance to the exact norms.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from peers import machine  # noqa: E402

from qwen35_mlx import Qwen35, convert, load  # noqa: E402
from qwen35_mlx.prompt import Prompt  # noqa: E402

PICTURE = ROOT / "examples" / "pictures" / "shapes.png"
TOKENS = 200


def without_declaration(folder: Path, copy: Path) -> Path:
    """The folder as an mlx-community one: this runtime then reads what the others read."""
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    values = json.loads(path.read_text())
    del values["qwen35_mlx"]
    path.write_text(json.dumps(values))
    for name in ("mtp.safetensors", "norms.safetensors"):
        (copy / name).unlink()
    return copy


def prompts(model: Qwen35) -> dict[str, Prompt]:
    """A text of random tokens, and a question about a picture."""
    ids = np.random.default_rng(0).integers(0, 900, TOKENS).astype(np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, TOKENS))
    text = Prompt(ids, positions, delta=0, media=(), thinking=False, tools=())
    parts = [
        {"type": "image", "image": Image.open(PICTURE)},
        {"type": "text", "text": "Describe this picture."},
    ]
    return {"text": text, "image": model.prompt([{"role": "user", "content": parts}])}


def mlx_lm_logits(folder: Path, prompt: Prompt) -> mx.array:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model(mx.array(prompt.tokens)[None])[0]


def mlx_vlm_logits(folder: Path, prompt: Prompt) -> mx.array:
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    model.set_dtype(mx.float32)
    given: dict[str, Any] = {}
    if prompt.media:
        media = prompt.media[0]
        given["pixel_values"] = mx.array(media.patches)
        given["image_grid_thw"] = mx.array([media.grid])
    return model(mx.array(prompt.tokens)[None], **given).logits[0]


def distance(found: mx.array, expected: mx.array) -> float:
    """Relative L2 distance over all positions."""
    mx.eval(found, expected)
    wrong = np.array(found.astype(mx.float32)) - np.array(expected)
    return float(np.linalg.norm(wrong) / np.linalg.norm(np.array(expected)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT / "examples" / "demo-model")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        for asked in (
            {"bits": 4, "recipe": "careful"},
            {"bits": 4, "recipe": "uniform"},
            {"bits": 8},
            {"mode": "mxfp4"},
            {"bits": 4, "vision_bits": 8},
        ):
            label = " ".join(f"{key} {value}" for key, value in asked.items())
            out = Path(scratch) / label.replace(" ", "-")
            options = convert.options(**asked)
            convert.convert(convert.open_folder(args.source), out, options, name="demo")
            exact = load(out, dtype=mx.float32)
            rounded = load(
                without_declaration(out, out.with_name("plain " + label)), dtype=mx.float32
            )
            for name, prompt in prompts(exact).items():
                expected = rounded.logits(prompt)
                figures = {"mlx-vlm": distance(mlx_vlm_logits(out, prompt), expected)}
                if name == "text":
                    figures["mlx-lm"] = distance(mlx_lm_logits(out, prompt), expected)
                figures["exact norms"] = distance(exact.logits(prompt), expected)
                said = ", ".join(f"{key} {value:.1e}" for key, value in figures.items())
                print(f"{label:24} {name:6} {said}", flush=True)


if __name__ == "__main__":
    main()
