"""``celery -A proj reliable``: what this library knows of a project, and what one may do to it."""

from __future__ import annotations

import click

from reliable_tasks._cli.dead import dead
from reliable_tasks._cli.locks import locks

__all__ = ["reliable"]


@click.group()
def reliable() -> None:
    """Reliable tasks: look at what they hold, and at those that have died."""


reliable.add_command(dead)
reliable.add_command(locks)
