"""Claims under the keys of celery-once, so that its workers and ours respect each other's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from reliable_tasks._store.claims import Claims, Follow, Following, Release
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.scripts import NO_REPLICAS, Argument, Call, Key, Replicas
from reliable_tasks.errors import ScriptError, StoreError

__all__ = ["THEIRS", "SharedClaims"]

#: Who owns a key that celery-once has locked: its value is a token that nobody keeps.
THEIRS = "celery-once"
#: What holds of such a key, by the script that was to change it.
_DUPLICATE, _NOT_OURS = 0, [int(Release.NOT_OURS), THEIRS]
_ANSWERS: dict[str, Any] = {
    "claim_release": _NOT_OURS,
    "claim_abandon": 0,
    "claim_discard": 0,
    "claim_uncover": 0,
    "claim_free": 0,
}
_TICKETS = ("claim_acquire", "claim_continue", "claim_enter", "claim_keep", "claim_start")
#: A lock that never lapses is asked about as one that lives for an hour (ms).
_NEVER = 3_600_000
_WRONG_TYPE = "WRONGTYPE"


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
        return bool(self._ask("claim_adopt", [self.keys.claim(name)], [owner, attempt, task]))

    def lock(self, name: str, *, token: str, ttl: float) -> float | None:
        """Lock a key as celery-once does; return ``None``, or for how long it is taken (s)."""
        with self.reading("take") as server:
            if server.set(self.keys.claim(name), token, nx=True, px=round(ttl * 1000)):
                return None
        return self._lives(name) / 1000

    def delete(self, name: str) -> int:
        """Free a key by hand, whoever has it; return how many that were."""
        with self.reading("free") as server:
            return int(server.delete(self.keys.claim(name)))

    def read(self, name: str) -> dict[str, str]:
        """Return the claim's record, empty where nobody of ours holds the key."""
        try:
            return super().read(name)
        except StoreError as error:
            if _WRONG_TYPE not in str(error):
                raise
            return {}

    def follow(
        self, name: str, *, task_id: str, followed: str, until: int | None, ttl: float
    ) -> Following:
        """Have a task follow another one, or learn how that one ended."""
        ask = partial(super().follow, name, task_id=task_id, until=until, ttl=ttl)
        try:
            if followed != THEIRS:
                return ask(followed=followed)
            # Nobody knows the task that has such a lock: whoever owns the key is followed.
            known = ask(followed="")
            is_new = known.code is Follow.FREE and known.followed == task_id
            return ask(followed=task_id) if is_new else known
        except ScriptError as error:
            if _WRONG_TYPE not in error.reason:
                raise
        if not followed:
            return Following(Follow.FREE, task_id, ttl, 0, "")
        # Not by the server's clock; but when a task may give up waiting is all it decides.
        now = time.time() * 1000
        ends = now + ttl * 1000 if until is None else until
        return Following(Follow.WAITS, THEIRS, (ends - now) / 1000, round(ends), "")

    def _ask(
        self,
        script: str,
        keys: Sequence[Key],
        args: Sequence[Argument],
        replicas: Replicas = NO_REPLICAS,
    ) -> Any:
        try:
            return super()._ask(script, keys, args, replicas)
        except ScriptError as error:
            if _WRONG_TYPE not in error.reason:
                raise
            if script in _TICKETS:
                return [_DUPLICATE, THEIRS, self._lives(keys[0]), 0]
            if script not in _ANSWERS:
                raise
            return _ANSWERS[script]

    def _ask_each(
        self, script: str, calls: Sequence[Call], replicas: Replicas = NO_REPLICAS
    ) -> list[Any]:
        try:
            return super()._ask_each(script, calls, replicas)
        except ScriptError as error:
            if _WRONG_TYPE not in error.reason:
                raise
        # One of the keys is locked by celery-once. All can be asked again.
        return [self._ask(script, *call, replicas) for call in calls]

    def _lives(self, key: Key) -> int:
        """Return how long a key lives (ms)."""
        with self.reading("read") as server:
            lives = int(server.pttl(key))
        return _NEVER if lives == -1 else max(lives, 0)
