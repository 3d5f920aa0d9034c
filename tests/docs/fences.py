"""The fenced blocks of a Markdown page, and what a comment before one says about it.

A comment on the line before a fence that nobody sees in the rendered page:

``<!-- worker -->``
    The Python block runs while a worker works for its ``app``.
``<!-- warns -->``
    The Python block gives a ``ReliableWarning``.
``<!-- raises -->``
    The Python block raises; what it says is its output.
``<!-- output -->``
    The text block is what the block before it printed. A line ``...`` stands for any lines.
``<!-- output: print(report) -->``
    The text block is what this statement prints.
``<!-- output alike -->``
    The text block is what the block before it printed another day: ids, times, ages, sizes and the
    names of nodes are others now, of the same kind. An id of it that stands in a later command is
    the one that was printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Fence", "fences_of", "pages"]

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,}|:{3,})(?P<info>\S.*)?$")
_COMMENT = re.compile(r"^ *<!-- (?P<text>.*) -->$")


@dataclass(frozen=True)
class Fence:
    """One block.

    Attributes:
        language: What stands behind the opening mark.
        code: The block's text.
        line: The number of its first line in the page.
        note: What the comment before it says, or ``""``.
    """

    language: str
    code: str
    line: int
    note: str


def pages() -> list[Path]:
    """Return the README and the docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fences_of(page: Path) -> Iterator[Fence]:
    """Yield a page's blocks in order.

    Raises:
        ValueError: A block has no end.
    """
    lines = page.read_text("utf-8").splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if not opening:
            number += 1
            continue
        comment = _COMMENT.match(lines[number - 1]) if number else None
        end = number + 1
        while end < len(lines) and lines[end].strip() != opening["mark"]:
            end += 1
        if end == len(lines):
            raise ValueError(f"{page.name}:{number + 1}: a block without an end")
        indent = len(opening["indent"])
        yield Fence(
            language=(opening["info"] or "").strip(),
            code="".join(line[indent:] + "\n" for line in lines[number + 1 : end]),
            line=number + 2,
            note=comment["text"] if comment else "",
        )
        number = end + 1
