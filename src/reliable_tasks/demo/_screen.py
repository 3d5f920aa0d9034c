"""What the demo says while it runs: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

import click

__all__ = ["Screen"]

#: How often a line follows another (s): redrawn in place, or printed anew.
_REDRAWN, _PRINTED = 0.1, 5.0


class Screen:
    """Prints lines, and a status below them where there is a terminal."""

    def __init__(self) -> None:
        self._is_live = sys.stdout.isatty()
        self._next = 0.0
        self._drawn = False

    def say(self, text: str = "") -> None:
        """Print a line for good."""
        self.clear()
        click.echo(text)

    def status(self, text: str) -> None:
        """Show how things stand, as often as is useful."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_REDRAWN if self._is_live else _PRINTED)
        if not self._is_live:
            click.echo(text)
            return
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r{text[:width]}\x1b[K", nl=False)
        self._drawn = True

    def clear(self) -> None:
        """Take the status away."""
        if self._drawn:
            click.echo("\r\x1b[K", nl=False)
            self._drawn = False
