"""`python -m qwen35_mlx.convert`, which is `qwen35-mlx convert`."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Ctrl-C during the imports below is no traceback; `terminal.guarded` then takes over.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from .command import main

if __name__ == "__main__":
    main()
