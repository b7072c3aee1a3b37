"""What a conversion says on the way, on stderr."""

import sys
from pathlib import Path

from qwen35_mlx import terminal
from qwen35_mlx.errors import shown
from qwen35_mlx.terminal import note


class Told:
    """One bar on a terminal, elsewhere one line for each stage.

    partial: the unfinished folder of the model at work, for the line that Ctrl-C leaves.
    """

    def __init__(self) -> None:
        self.bar = terminal.Bar(sys.stderr.isatty(), in_bytes=True)
        self.stage = terminal.Stage(self.bar)
        self.partial: Path | None = None
        self._name = ""

    @property
    def is_converting(self) -> bool:
        return self._name in ("convert", "finish")

    def enter(self, name: str, figures: str, always: bool = False) -> None:
        """From now on it is `name`, a key of terminal.TITLES. always: on a terminal, too."""
        if name == self._name:
            return
        self._name = name
        self.stage.enter(name)
        if always or not self.bar.shown:
            note(f"{terminal.TITLES[name]}: {figures}")

    def end(self, line: str) -> None:
        """One line that ends what was done; the next stage is a new one whatever its name."""
        self._name = ""
        self.bar.close()
        note(line)

    def interrupted(self) -> str:
        """The line that Ctrl-C leaves."""
        line = self.stage.interrupted()
        if self.partial is None or not self.partial.is_dir():
            return line
        kept = f"finished files stay in {shown(self.partial)}"
        return f"{line}; {kept}, and the same command goes on from there"
