"""What the commands share: click's settings, and examples below the help."""

from collections.abc import Sequence
from typing import Any

import click

SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A click command whose help ends with examples.

    examples: what is typed behind the command's own name.
    """

    def __init__(self, name: str | None, *, examples: Sequence[str], **given: Any) -> None:
        super().__init__(name, context_settings=SETTINGS, **given)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        lines = "".join(f"  {ctx.command_path} {example}\n" for example in self.examples)
        formatter.write(f"\nExample{'s' if len(self.examples) > 1 else ''}:\n{lines}")
