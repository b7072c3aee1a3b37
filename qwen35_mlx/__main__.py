"""`qwen35-mlx COMMAND`, `python -m qwen35_mlx COMMAND`. A command is imported when used."""

import os
import signal
import sys
from importlib import import_module

from . import __version__

COMMANDS = {
    "generate": ("qwen35_mlx.generate", "Ask one question, with pictures and videos."),
    "convert": ("qwen35_mlx.convert.command", "Make a 3- to 16-bit folder for MLX of a model."),
    "doctor": ("qwen35_mlx.doctor", "Check and time the Metal kernels on this Mac's GPU."),
    "bench": ("qwen35_mlx.bench", "Count what a token costs a GPU; needs none."),
}


def main() -> None:
    """Run the command named first; without one, list them."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            # Ctrl-C during the import is no traceback; `terminal.guarded` then takes over.
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        import_module(COMMANDS[name][0]).main(rest, f"qwen35-mlx {name}")
    else:
        import click

        from . import terminal

        @click.command(add_help_option=False)
        def overview() -> None:
            if name in ("--help", "-h"):
                print(_usage(), flush=True)
            elif name == "--version":
                print(f"qwen35-mlx {__version__}", flush=True)
            else:
                known = ", ".join(COMMANDS)
                raise click.UsageError(f"no command {name!r}; expected one of: {known}.")

        sys.exit(terminal.guarded(overview, [], "qwen35-mlx"))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"Usage: qwen35-mlx COMMAND ...\n\nCommands:\n{rows}\n\n`COMMAND --help` tells its options."
    )


if __name__ == "__main__":
    main()
