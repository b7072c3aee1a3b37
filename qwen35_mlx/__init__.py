"""Qwen3.5 on a Mac: text, pictures and video in, streamed text out.

    import qwen35_mlx
    model = qwen35_mlx.load("Qwen/Qwen3.5-4B")
    for event in model.stream([{"role": "user", "content": "Hello"}]):
        ...

Nothing here prints or exits; every exception raised on purpose is a `Qwen35Error`.
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .api import Finish, Progress, Qwen35, Result, Usage, load
    from .errors import Cancelled, InputError, ModelError, OutOfMemory, Qwen35Error
    from .parse import Reasoning, Text, ToolCall
    from .prompt import Prompt
    from .sampling import Sampling

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

# On the newest GPUs MLX would round the operands of f32 products to 10 bits of fraction; the
# recurrent state needs all 23. MLX reads this once, when it first multiplies.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # A bare checkout: `convert` and `metal` lie beside the package, not in it.
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: the command is there before MLX is."""
    if name in __all__:
        for module in ("errors", "parse", "sampling", "prompt", "api"):
            found = importlib.import_module(f".{module}", __name__)
            if name in vars(found):
                return vars(found)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
