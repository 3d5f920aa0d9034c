"""Claims under the keys of celery-once, so that its workers and ours respect each other's."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from reliable_tasks._store.claims import (
    Claims,
    Code,
    Entry,
    Follow,
    Following,
    Publish,
    Release,
    Ticket,
)
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.scripts import load
from reliable_tasks.errors import StoreError

__all__ = ["THEIRS", "SharedClaims"]

#: Who owns a key that celery-once has locked: its value is a token that nobody keeps.
THEIRS = "celery-once"

T = TypeVar("T")


class _SharedKeys(Keys):
    """Keys of claims that are celery-once's own."""

    def claim(self, name: str) -> str:
        """Return the key of a lock."""
        return name


class SharedClaims(Claims):
    """The claims in one Redis, whose keys may be locked by celery-once too.

    A claim of ours is a hash, and celery-once's a string. It finds its key taken by ours, frees it
    at the end of its tasks, and reads the time to live; our scripts find a string where they
    look for a hash, which is another task's lock.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.keys = _SharedKeys(self.keys.prefix)

    def adopt(self, name: str, *, owner: str, attempt: int, task: str) -> bool:
        """Make a claim of celery-once's lock, for the task that it was taken for."""
        args: list[str | int] = [owner, attempt, task]
        return bool(load("claim_adopt")(self.client, [self.keys.claim(name)], args))

    def acquire(self, name: str, **asked: Any) -> Ticket[Publish]:
        """Take a claim for a new call."""
        ask = partial(super().acquire, name, **asked)
        return _unless_theirs(ask, lambda: self._taken(Publish.DUPLICATE, name))

    def continue_(self, name: str, **asked: Any) -> Ticket[Publish]:
        """Keep the claim for the owner's own retry or replacement."""
        ask = partial(super().continue_, name, **asked)
        return _unless_theirs(ask, lambda: self._taken(Publish.DUPLICATE, name))

    def enter(self, name: str, **asked: Any) -> Ticket[Entry]:
        """Start a copy of the task, or learn why it must not run."""
        ask = partial(super().enter, name, **asked)
        return _unless_theirs(ask, lambda: self._taken(Entry.DUPLICATE, name))

    def start(self, name: str, **asked: Any) -> Ticket[Entry]:
        """Free the claim of a copy that starts, or learn why it must not start."""
        ask = partial(super().start, name, **asked)
        return _unless_theirs(ask, lambda: self._taken(Entry.DUPLICATE, name))

    def release(self, name: str, **asked: Any) -> tuple[Release, str]:
        """End a run."""
        ask = partial(super().release, name, **asked)
        return _unless_theirs(ask, lambda: (Release.NOT_OURS, THEIRS))

    def abandon(self, name: str, **asked: Any) -> bool:
        """Take back a publish that failed."""
        return _unless_theirs(partial(super().abandon, name, **asked), lambda: False)

    def uncover(self, name: str, **asked: Any) -> bool:
        """Cover a run by its own lease alone."""
        return _unless_theirs(partial(super().uncover, name, **asked), lambda: False)

    def read(self, name: str) -> dict[str, str]:
        """Return the claim's record, empty where nobody of ours holds the key."""
        return _unless_theirs(partial(super().read, name), dict)

    def follow(
        self, name: str, *, task_id: str, followed: str, until: int | None, ttl: float
    ) -> Following:
        """Have a task follow another one, or learn how that one ended."""

        def answer() -> Following:
            if not followed:
                return Following(Follow.FREE, "", ttl, 0, "")
            # Not by the server's clock; but when a task may give up waiting is all it decides.
            now = time.time() * 1000
            ends = now + ttl * 1000 if until is None else until
            return Following(Follow.WAITS, THEIRS, (ends - now) / 1000, round(ends), "")

        ask = partial(
            super().follow, name, task_id=task_id, followed=followed, until=until, ttl=ttl
        )
        return _unless_theirs(ask, answer)

    def delete(self, name: str) -> None:
        """Free a key by hand, whoever has it."""
        with self.reading("free") as server:
            server.delete(self.keys.claim(name))

    def _taken(self, code: Code, name: str) -> Ticket[Code]:
        with self.reading("read") as server:
            lives = int(server.pttl(self.keys.claim(name)))
        return Ticket(code, THEIRS, max(lives, 0) / 1000, 0)


def _unless_theirs(ask: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """Ask the server, or answer what holds if the key turns out to be celery-once's."""
    try:
        return ask()
    except StoreError as error:
        if "WRONGTYPE" not in str(error):
            raise
        return otherwise()
