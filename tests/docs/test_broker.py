"""What the page on the Redis transport says of keys, rights and log lines is what the code has."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache

import pytest

from reliable_tasks._store import keys
from tests.docs.fences import ROOT, fences_of

PAGE = ROOT / "docs" / "broker.md"
_SOURCE = ROOT / "src" / "reliable_tasks"


def _rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    below = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table is not None
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@cache
def _messages() -> str:
    """Return all texts of the code, one a line, where ``…`` stands for what is filled in."""
    texts = (
        node.value
        for path in sorted(_SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return "\n".join(re.sub(r"%(?:\.\d)?[a-z]", "…", text) for text in texts)


def test_every_key_is_explained() -> None:
    """A key that the library writes stands in the table."""
    page = "\n".join(row[0] for row in _rows("What is in Redis"))
    assert keys.__doc__ is not None
    written = re.findall(r"^``(<prefix>.+?)``  ", keys.__doc__, re.MULTILINE)
    assert len(written) > 8
    assert [key for key in written if f"`{key}`" not in page] == []


def _quoted_lines() -> Iterator[str]:
    for cell, *_ in _rows("What the log says"):
        yield from re.findall("`([^`]+)`", cell)


@pytest.mark.parametrize("line", list(_quoted_lines()))
def test_every_log_line_is_one_of_ours(line: str) -> None:
    """Somebody who looks for a line of the log finds it in the page, in the same words."""
    # A reason is put into a line that another module writes.
    for part in line.split(" aside: "):
        assert part.removesuffix(" set") in _messages()


def test_the_rights_are_enough_for_the_scripts() -> None:
    """A command that a script calls is among the rights that the page gives."""
    given: set[str] = set()
    for fence in fences_of(PAGE):
        for command in fence.code.splitlines() if "ACL SETUSER" in fence.code else ():
            given |= {word[1:] for word in shlex.split(command) if word.startswith("+")}
    called: set[str] = set()
    for path in (_SOURCE / "_store" / "lua").rglob("*.lua"):
        called |= set(re.findall(r"redis\.call\('(\w+)'", path.read_text("utf-8")))
    assert len(called) > 20
    assert {name.lower() for name in called} - given == set()
