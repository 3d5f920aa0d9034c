"""What the commands have in common: their options, how they write, and how they fail."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain, islice
from typing import TextIO

import click
from kombu.exceptions import OperationalError

from reliable_tasks.errors import ReliableError

__all__ = [
    "duration",
    "errors_told",
    "json_option",
    "moment",
    "one_line",
    "perhaps",
    "plain",
    "progress",
    "table",
    "yes_option",
]

#: A table is as wide as its first so many rows.
_MEASURED = 500
#: So many names are given where a wrong one was.
_SUGGESTED = 5
#: A progress bar is drawn at most so often.
_STEPS = 200

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@contextmanager
def errors_told() -> Iterator[None]:
    """End a command with the text of an error, and no traceback."""
    try:
        yield
    except (ReliableError, OperationalError) as error:
        raise click.ClickException(str(error)) from error


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> Iterator[str]:
    """Yield the lines of a table, or what is said if it has no rows."""
    rest = iter(rows)
    first = [headings, *islice(rest, _MEASURED)]
    if len(first) == 1:
        yield empty
        return
    widths = [max(map(len, column)) for column in zip(*first, strict=True)]
    for row in chain(first, rest):
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def duration(seconds: float) -> str:
    """Say how long something is, in the two largest units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    first = next((n for n, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2])


def moment(seconds: float) -> str:
    """Say when something was (s since the epoch), in the time zone of this host."""
    when = datetime.fromtimestamp(seconds, UTC).astimezone()
    return when.isoformat(sep=" ", timespec="seconds")


def plain(text: str) -> str:
    """Return a text without what a terminal takes for a command, or cannot write at all."""
    return "\n".join(
        "".join("?" if c != "\t" and unicodedata.category(c)[0] == "C" else c for c in line)
        for line in text.splitlines()
    )


def one_line(text: str, width: int | None = None) -> str:
    """Return a text as one line, cut to a width."""
    line = plain(" ".join(text.split()))
    return line if width is None or len(line) <= width else f"{line[: width - 3]}..."


def perhaps(similar: Iterable[str]) -> str:
    """Return what is said behind a name that is not found: those that are like it."""
    names = "".join(f"\n  {one_line(name)}" for name in islice(similar, _SUGGESTED))
    return f"; perhaps you mean{names}" if names else ""


@contextmanager
def progress(count: int, label: str, *, is_hidden: bool = False) -> Iterator[Callable[[], None]]:
    """Show on a terminal how much of something is done; yields what is called for each step."""
    where = _stderr()
    with click.progressbar(
        length=count,
        label=label,
        show_pos=True,
        file=where,
        hidden=is_hidden or not where.isatty(),
        update_min_steps=max(count // _STEPS, 1),
    ) as bar:
        yield lambda: bar.update(1)


def _stderr() -> TextIO:
    return sys.stderr
