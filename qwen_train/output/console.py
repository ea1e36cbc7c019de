"""The console that tools print their tables on."""

import sys

from rich.console import Console

PIPE_WIDTH = 200
"""Columns where standard output is no terminal, which would say its own."""


def stdout_console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
