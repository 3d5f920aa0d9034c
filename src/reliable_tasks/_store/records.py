"""Claims as people see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis

from reliable_tasks._store.claims import Claims
from reliable_tasks._store.scripts import checked, execute, pipelined

__all__ = ["Record", "State", "look_at", "walk"]

#: How many keys the server looks at in one go.
_AT_ONCE = 500


class State(StrEnum):
    """What becomes of a key that is taken."""

    QUEUED = "queued"
    UNCONFIRMED = "unconfirmed"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    WINDOW = "window"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Record:
    """A claim, as people see it.

    Attributes:
        name: Its key.
        task: Name of the task that took it.
        owner: Id of the task that has it.
        state: Whether that waits in the queue or for its turn, runs, or was interrupted (its
            worker is gone, and its message comes back); or the key is taken for a window of time.
            Of one that is unconfirmed nobody knows whether its message was queued: the next call
            takes its place. One that is unreadable was written by somebody else.
        attempt: The latest one that is known.
        age: Since when it has it (s).
        expires_in: Until it lapses if nobody renews or releases it (s).
        fence: A number that grows each time it changes hands.
    """

    name: str
    task: str
    owner: str
    state: State
    attempt: int
    age: float
    expires_in: float
    fence: str

    @classmethod
    def of(
        cls,
        name: str,
        fields: Mapping[str, str],
        expires_in: float,
        *,
        lease_end: float | None,
        now: float,
    ) -> Record:
        """Read a claim's fields, by the lease (ms) of the delivery that its holder runs."""
        state = State.WINDOW if "window" in fields else State.QUEUED
        if fields.get("unconfirmed") == fields["owner"]:
            state = State.UNCONFIRMED
        # The holder of another task's run says nothing of the one that waits for its end.
        if "holder" in fields and "holder_owner" not in fields:
            # As covered_until.lua has it.
            ends = float(fields["lease_end"])
            if "delivery" in fields:
                ends = max(ends, lease_end or 0) if (lease_end or 0) / 1000 > now else 0
            state = State.RUNNING if ends / 1000 > now else State.INTERRUPTED
        return cls(
            name=name,
            task=fields["task"],
            owner=fields["owner"],
            state=state,
            attempt=int(fields["attempt"]),
            age=max(now - int(fields["since"]) / 1000, 0.0),
            expires_in=max(expires_in, 0.0),
            fence=fields["fence"],
        )


def walk(claims: Claims) -> Iterator[Record]:
    """Yield all claims, some at a time, so that Redis is blocked for nobody.

    One that is taken or freed meanwhile may be there, or not, or twice, as SCAN says.
    """
    begins = len(claims.keys.claim("")) - 1
    cursor: Any = None
    while cursor != 0:
        with claims.reading("list") as server:
            cursor, keys = execute(
                server,
                "SCAN",
                cursor or 0,
                "MATCH",
                claims.keys.claims_pattern(),
                "COUNT",
                _AT_ONCE,
            )
            found = _read(claims, server, [key[begins:-1] for key in keys])
        yield from found


def look_at(claims: Claims, name: str) -> Record | None:
    """Return one claim, or ``None`` where nobody has the key."""
    with claims.reading("read") as server:
        return next(iter(_read(claims, server, [name])), None)


def _read(claims: Claims, server: redis.Redis, names: Sequence[str]) -> list[Record]:
    seconds, micros = execute(server, "TIME")
    now = int(seconds) + int(micros) / 1_000_000
    keys = [claims.keys.claim(name) for name in names]
    # One that is no hash must not hide the others.
    fields = pipelined(server, [("HGETALL", key) for key in keys])
    lapses = checked(pipelined(server, [("PTTL", key) for key in keys]))
    tags = ["" if isinstance(found, Exception) else found.get("delivery", "") for found in fields]
    leases = checked(pipelined(server, [("ZSCORE", claims.leases, tag) for tag in tags]))
    return [
        _record(name, found, int(lapse) / 1000, lease_end=lease, now=now)
        for name, found, lapse, lease in zip(names, fields, lapses, leases, strict=True)
        if found
    ]


def _record(
    name: str, found: Any, expires_in: float, *, lease_end: float | None, now: float
) -> Record:
    if isinstance(found, Exception) and not str(found).startswith("WRONGTYPE"):
        raise found
    try:
        return Record.of(name, found, expires_in, lease_end=lease_end, now=now)
    except (TypeError, LookupError, ValueError):
        return Record(name, "", "", State.UNREADABLE, 0, 0.0, max(expires_in, 0.0), "")
