"""What the commands for dead letters say of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from reliable_tasks._cli.output import duration, moment, one_line, table
from reliable_tasks._store.letters import DeadLetter

__all__ = ["age", "as_json", "fields", "listing", "named", "none", "plural"]

_HEADINGS = ("id", "task", "cause", "age", "retries", "error", "arguments")
#: So much of an error and of the arguments is in the list (characters).
_WIDTH = 60


def listing(letters: Iterable[DeadLetter], replayed: bool, empty: str) -> Iterator[str]:
    """Yield the lines of a table, or what is said where there is nothing to list."""
    headings = (*_HEADINGS[:5], *(("replayed as",) if replayed else ()), *_HEADINGS[5:])
    rows = (tuple(_row(letter)[name] for name in headings) for letter in letters)
    return table(headings, rows, empty=empty)


def _row(letter: DeadLetter) -> dict[str, str]:
    return {
        "id": one_line(letter.id),
        "task": one_line(letter.task) or "-",
        "cause": one_line(letter.cause),
        "age": age(letter),
        "retries": str(letter.retries),
        "replayed as": letter.replayed_as or "-",
        "error": one_line(letter.error, _WIDTH) or "-",
        "arguments": one_line(f"{letter.argsrepr} {letter.kwargsrepr}", _WIDTH),
    }


def fields(letter: DeadLetter) -> dict[str, str]:
    """Return what is known; what is not is left out."""
    replayed = letter.replayed_as and f"{letter.replayed_as} (it was replayed as this task)"
    found = {
        "id": letter.id,
        "task": letter.task,
        "task id": letter.task_id,
        "cause": letter.cause,
        "error": letter.error,
        "kept at": f"{moment(letter.at)} ({age(letter)} ago)",
        "first failed": moment(letter.first_at) if letter.first_at else "",
        "replayed as": replayed,
        "args": letter.argsrepr,
        "kwargs": letter.kwargsrepr,
        "retries": str(letter.retries),
        "crashes": str(letter.crashes),
        "redelivered": str(letter.deliveries),
        "queue": letter.queue,
        "priority": "" if letter.priority is None else str(letter.priority),
        "worker": letter.worker,
        "@once key": letter.claim,
        "root": letter.root_id,
        "parent": letter.parent_id,
        "group": letter.group_id,
        "chord": letter.chord_id,
        "message": f"{letter.size} bytes" if letter.size else "not kept: it was too large",
    }
    return {name: value for name, value in found.items() if value}


def named(
    count: int, filters: Mapping[str, Any], *, replayed: bool = False, of: int | None = None
) -> str:
    """Say which dead letters a question is about, and that it is all of them if it is."""
    said = {
        "task": "of task {}",
        "cause": "with cause {}",
        "since": "replayed since {}" if replayed else "kept since {}",
        "before": "replayed before {}" if replayed else "kept before {}",
    }
    given = {name: value for name, value in filters.items() if value is not None}
    for name in ("since", "before"):
        if name in given:
            given[name] = given[name].isoformat(sep=" ", timespec="seconds")
    parts = [said[name].format(value) for name, value in given.items()]
    if replayed and not {"since", "before"} & given.keys():
        parts.append("that were replayed")
    if of is not None and of > count:
        start = f"the oldest {count} of {plural(of)}"
    elif given:
        start = plural(count)
    else:
        start = "the only dead letter" if count == 1 else f"all {plural(count)}"
    return " ".join([start, *parts])


def none(filters: Mapping[str, Any], replayed: bool = False) -> str:
    """Say that there are no such dead letters."""
    such = any(value is not None for value in filters.values())
    that = " that were replayed" if replayed else ""
    return f"there are no {'such ' if such else ''}dead letters{that}"


def plural(count: int) -> str:
    """Say how many."""
    return f"{count} dead letter{'' if count == 1 else 's'}"


def age(letter: DeadLetter) -> str:
    """Say for how long one has been kept."""
    # Its time is that of Redis, which can be ahead.
    return duration(max(time.time() - letter.at, 0.0))


def as_json(letter: DeadLetter) -> str:
    """Return one for programs, in a line."""
    return json.dumps(letter.as_dict())
