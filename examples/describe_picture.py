# Run, after `make demo`: .venv/bin/python examples/describe_picture.py
"""Describe a picture; other pictures and models: describe_picture.py photo.jpg 4b."""

import sys
from pathlib import Path

from qwen35_mlx import load

HERE = Path(__file__).parent
picture, model_name = [*sys.argv[1:], *("", "")][:2]

model = load(model_name or HERE / "demo-model")
question = [
    {"type": "image", "image": picture or HERE / "pictures" / "shapes.png"},
    {"type": "text", "text": "Describe this picture."},
]
result = model.generate([{"role": "user", "content": question}], thinking=False)
print(result.text)
