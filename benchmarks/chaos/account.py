"""What became of the tasks."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from benchmarks.chaos.journal import Journal, Note

__all__ = ["Account", "Row", "settle"]

#: kombu's lists of the queue ``celery``, one for each priority.
_LISTS = ("celery", *(f"celery\x06\x16{step}" for step in (3, 6, 9)))


@dataclass
class Row:
    """One line of a scenario's table.

    Attributes:
        system: Whose.
        numbers: The columns.
        broken: What of the promise did not hold.
        details: What helps to find out why; for the JSON alone.
    """

    system: str
    numbers: dict[str, Any]
    broken: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Account:
    """The tasks of one run, counted.

    Attributes:
        sent: How many a publish had returned for.
        lost: Tasks that never ended and lie nowhere any more.
        stuck: Tasks that never ended and still lie in a queue or in ``unacked``.
        completions: How many runs ended.
        repeated: Completions beyond the first of a task.
        twice: Pairs of starts of one task without its worker's death in between.
        held: Entries of ``unacked`` left at the end.
    """

    sent: int
    done: int
    lost: list[str]
    stuck: list[str]
    completions: int
    repeated: int
    twice: list[tuple[Note, Note]]
    held: int

    @classmethod
    def of(
        cls,
        sent: Collection[str],
        journal: Journal,
        deaths: Mapping[str, float],
        server: redis.Redis,
    ) -> Account:
        """Count."""
        journal.read()
        waiting = _waiting(server)
        missing = [task_id for task_id in sent if task_id not in journal.ends]
        return cls(
            sent=len(sent),
            done=sum(task_id in journal.ends for task_id in sent),
            lost=[task_id for task_id in missing if task_id not in waiting],
            stuck=[task_id for task_id in missing if task_id in waiting],
            completions=journal.completions,
            repeated=journal.completions - journal.done,
            twice=_twice(journal, deaths),
            held=int(server.hlen("unacked")),
        )

    def numbers(self) -> dict[str, Any]:
        """Return the columns."""
        return {
            "sent": self.sent,
            "done": self.done,
            "lost": len(self.lost),
            "stuck": len(self.stuck),
            "completions": self.completions,
            "repeated": self.repeated,
            "started twice": len(self.twice),
        }

    def details(self) -> dict[str, Any]:
        """Return what a diagnosis begins with."""
        return {
            "lost": self.lost[:20],
            "stuck": self.stuck[:20],
            "twice": [[str(a), str(b)] for a, b in self.twice[:20]],
            "held": self.held,
        }

    def broken(self) -> list[str]:
        """Say what of "never lost, never twice at once" did not hold."""
        found = []
        if self.lost:
            found.append(f"{len(self.lost)} lost")
        if self.stuck:
            found.append(f"{len(self.stuck)} stuck")
        if self.twice:
            found.append(f"{len(self.twice)} started twice")
        if self.held:
            found.append(f"{self.held} left in unacked")
        return found


def settle(
    sent: Callable[[], Collection[str]],
    journal: Journal,
    server: redis.Redis,
    *,
    quiet: float,
    step: Callable[[], None],
) -> float:
    """Wait until all is done, or nothing has moved for so many seconds; return how long it took."""
    began = moved_at = time.monotonic()
    state: Any = None
    while True:
        step()
        lines = journal.read()
        seen = (lines, *(server.llen(name) for name in _LISTS), server.hlen("unacked"))
        now = time.monotonic()
        if seen != state:
            state, moved_at = seen, now
        is_empty = not any(seen[1:])
        if (is_empty and all(one in journal.ends for one in sent())) or now - moved_at > quiet:
            return now - began
        time.sleep(0.1)


def _waiting(server: redis.Redis) -> set[str]:
    messages = [one for name in _LISTS for one in server.lrange(name, 0, -1)]
    entries = [json.loads(one)[0] for one in server.hvals("unacked")]
    return {str(one["headers"]["id"]) for one in [*map(json.loads, messages), *entries]}


def _twice(journal: Journal, deaths: Mapping[str, float]) -> list[tuple[Note, Note]]:
    found = []
    for notes in journal.starts.values():
        ordered = sorted(notes, key=lambda note: note.at)
        found += [
            (before, after)
            for before, after in itertools.pairwise(ordered)
            if deaths.get(before.host, after.at) >= after.at
        ]
    return found
