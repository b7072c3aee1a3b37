"""Imported as `qwen35_mlx.convert`: writes complete 3- to 16-bit folders of Qwen3.5 for MLX.

Data walks through the files in this order: `options` (what was asked), `source` (a folder's rows as
floats), `recipe` (how each matrix is stored), `layout` (what the folder gets, from which rows),
`plan` (every byte of the output), `job` (does it), `writer` and `folder` (onto the disk, safely).
"""

import os
import signal
import sys

if (
    sys.argv[:1] == ["-m"]
    and __name__ in sys.orig_argv
    and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
):
    # `python -m` imports this, hence MLX, before `__main__`: Ctrl-C meanwhile is no traceback.
    # `terminal.guarded` then takes over.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from .job import Progress, convert
from .options import Options, options
from .plan import Plan, plan
from .source import Source, open_folder

__all__ = ["Options", "Plan", "Progress", "Source", "convert", "open_folder", "options", "plan"]
