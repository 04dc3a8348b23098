"""The `kvortex` command; it installs the Ctrl-C handler before it imports anything large."""

import sys
from collections.abc import Sequence

from kvortex.cli.interrupt import ends_on_interrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 if all bytes were right, 1 if not, 2 for bad arguments."""
    with ends_on_interrupt():
        from kvortex.cli import commands

        return commands.run(sys.argv[1:] if argv is None else argv)
