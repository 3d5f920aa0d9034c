"""The load: which files the tasks are given, and what each task must return."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Item", "Load", "expected_seconds", "fingerprint", "gather"]

#: So many files fit into the time, on two cores too.
MOST_FILES = 1200
#: What lies among the standard library's sources and is none of them.
_INSTALLED = frozenset({"site-packages", "dist-packages"})
#: So many are looked at before the choice is made, so that ``--input /`` ends as well.
_MOST_FOUND = 20_000
_LARGEST = 4 * 1024 * 1024
#: How long the tasks of a whole load wait, all together, and how long one of them does (s). Those
#: that wait are the ones that a kill is likely to hit.
_PAUSES = 115.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.3, 0.9

Fingerprint = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """One file, and its task.

    Attributes:
        path: The file.
        pause: How long its task waits, as if for a server that it had asked (s).
        expected: What the task must return.
    """

    path: str
    pause: float
    expected: Fingerprint


@dataclass(frozen=True, slots=True)
class Load:
    """The files of a run, in the order in which they are queued.

    Attributes:
        root: Where they come from.
        items: The files.
        left_out: How many more there are, which do not fit into the time.
        skipped: How many can not be used, by reason.
    """

    root: Path
    items: tuple[Item, ...]
    left_out: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


def fingerprint(path: str) -> dict[str, Any]:
    """Hash a file and count its words: what the task does, and what it is checked against."""
    content = Path(path).read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "words": len(content.split())}


def gather(root: Path | None, seed: int, check: Callable[[], None]) -> Load:
    """Choose files and say what is expected of their tasks.

    Args:
        root: The directory; by default the standard library's sources.
        seed: The choice, the order and the pauses follow from it.
        check: Called again and again; raises where the user wants to leave.
    """
    draw = random.Random(f"load {seed}")
    if root is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [path for path in _files(root, check, _INSTALLED) if path.endswith(".py")]
    else:
        found = [*itertools.islice(_files(root.absolute(), check), _MOST_FOUND)]
    draw.shuffle(found)
    chosen: list[tuple[str, Fingerprint]] = []
    skipped: Counter[str] = Counter()
    looked_at = 0
    for path in found:
        if len(chosen) == MOST_FILES:
            break
        check()
        looked_at += 1
        try:
            if problem := _problem(path):
                skipped[problem] += 1
            else:
                chosen.append((path, fingerprint(path)))
        except OSError:
            skipped["unreadable"] += 1
    pauses = _pauses(len(chosen), draw)
    items = tuple(
        Item(path, pause, expected) for (path, expected), pause in zip(chosen, pauses, strict=True)
    )
    return Load(root, items, len(found) - looked_at, dict(skipped))


def expected_seconds(load: Load, slots: int) -> float:
    """Return how long the load takes at the least."""
    return sum(item.pause for item in load.items) / slots


def _pauses(count: int, draw: random.Random) -> list[float]:
    waiting = min(count, round(_PAUSES / ((_SHORTEST_PAUSE + _LONGEST_PAUSE) / 2)))
    pauses = [draw.uniform(_SHORTEST_PAUSE, _LONGEST_PAUSE) for _ in range(waiting)]
    pauses += [0.0] * (count - waiting)
    draw.shuffle(pauses)
    return [round(pause, 3) for pause in pauses]


def _files(
    root: Path, check: Callable[[], None], left_out: frozenset[str] = frozenset()
) -> Iterator[str]:
    for directory, below, names in os.walk(root):
        check()
        below[:] = sorted({*below} - left_out)
        yield from (str(Path(directory, name)) for name in sorted(names))


def _problem(path: str) -> str | None:
    """Say why a file can not be used, if so."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "named in another encoding than UTF-8"
    # Opening a pipe or a device could wait for ever.
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return f"larger than {_LARGEST >> 20} MiB" if status.st_size > _LARGEST else None
