"""Qwen3.5 on a Mac: text, pictures and video in, streamed text out.

    import qwen35_mlx
    model = qwen35_mlx.load("Qwen/Qwen3.5-4B")
    for event in model.stream([{"role": "user", "content": "Hello"}]):
        ...

Nothing here prints or exits; every exception raised on purpose is a `Qwen35Error`.
"""

import os
from pathlib import Path

# On the newest GPUs MLX would round the operands of f32 products to 10 bits of fraction; the
# recurrent state needs all 23. MLX reads this once, when it first multiplies.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # A bare checkout: `convert` and `metal` lie beside the package, not in it.
    __path__.append(str(_root))

from .api import Finish, Progress, Qwen35, Result, Usage, load  # noqa: E402
from .errors import Cancelled, InputError, ModelError, OutOfMemory, Qwen35Error  # noqa: E402
from .parse import Reasoning, Text, ToolCall  # noqa: E402
from .prompt import Prompt  # noqa: E402
from .sampling import Sampling  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "Finish",
    "InputError",
    "ModelError",
    "OutOfMemory",
    "Progress",
    "Prompt",
    "Qwen35",
    "Qwen35Error",
    "Reasoning",
    "Result",
    "Sampling",
    "Text",
    "ToolCall",
    "Usage",
    "load",
]
