"""What a command prints, compared with a page that shows what it printed another day.

A page shows an output as it was: with ids, times and ages of that day. Another run's are others, of
the same kind. Everything else has to be the same, and one id of the page is one id here: the page
can name it again, in a command or in a later output.
"""

from __future__ import annotations

import re

__all__ = ["matches", "with_ids_of_now"]

#: What differs from run to run, and may be where the page has one of the same kind.
_KINDS = {
    "id": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "moment": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d",
    "node": r"[\w.-]+@[\w.-]+",
    "size": r"\b\d+ bytes\b",
    "age": r"\b\d+[dhms](?: \d+[dhms])?\b",
}
_DIFFERS = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()))
_ID = re.compile(_KINDS["id"])


def matches(printed: str, expected: str, ids: dict[str, str]) -> bool:
    """Say whether an output is like the page's; a line ``...`` there stands for any lines.

    Args:
        printed: The output.
        expected: What the page shows.
        ids: Which id of the page stands for which one here; those that are new are noted.
    """
    groups: dict[str, str] = {}
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else _pattern(_narrow(line), ids, groups) + "\n"
        for line in expected.splitlines()
    )
    found = re.fullmatch(pattern, "".join(f"{_narrow(line)}\n" for line in printed.splitlines()))
    if found is None:
        return False
    ids |= {of_page: found[group] for of_page, group in groups.items()}
    return True


def with_ids_of_now(command: str, ids: dict[str, str]) -> str:
    """Put the ids of this run into a command that a page shows.

    Raises:
        KeyError: No output had such an id.
    """
    return _ID.sub(lambda found: ids[found[0]], command)


def _narrow(line: str) -> str:
    """Return a line without the width of its columns, which depends on what is in them."""
    return re.sub(r"\s{2,}", "  ", line.rstrip())


def _pattern(line: str, ids: dict[str, str], groups: dict[str, str]) -> str:
    parts, end = [], 0
    for found in _DIFFERS.finditer(line):
        parts.append(re.escape(line[end : found.start()]))
        kind, shown, end = str(found.lastgroup), found[0], found.end()
        if kind != "id":
            parts.append(f"(?:{_KINDS[kind]})")
        elif shown in ids:
            parts.append(re.escape(ids[shown]))
        elif shown in groups:
            parts.append(f"(?P={groups[shown]})")
        else:
            groups[shown] = f"id{len(groups)}"
            parts.append(f"(?P<{groups[shown]}>{_KINDS['id']})")
    return "".join((*parts, re.escape(line[end:])))
