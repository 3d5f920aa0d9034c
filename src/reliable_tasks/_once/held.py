"""What a running task can ask about its own claim."""

from __future__ import annotations

from typing import Any

from celery import Task

from reliable_tasks._once.claim import Claim, Run
from reliable_tasks._store.claims import Claims
from reliable_tasks.errors import LockLost

__all__ = ["HeldClaim", "held_claim"]


class HeldClaim:
    """The claim that a running task holds.

    Attributes:
        key: Its key.
        fence: A number that is greater than that of every task that held the key before. Have
            what the task writes to refuse lower ones, and a task that was stopped for too long
            cannot overwrite its successor's work.
    """

    def __init__(self, claims: Claims, held: Claim, holder: str, fence: int) -> None:
        self.key = held.name
        self.fence = fence
        self._claims = claims
        self._owner = held.owner
        self._holder = holder

    def __repr__(self) -> str:
        return f"<HeldClaim {self.key} of {self._owner}, fence {self.fence}>"

    def check(self) -> None:
        """Make sure that the task still holds its claim: one round trip to the lock Redis.

        Raises:
            LockLost: Another run holds it, another call has replaced this one
                (``on_conflict="replace"``), or it has lapsed.
            StoreUnavailable: The lock Redis cannot be reached.
        """
        claims = self._claims
        record = claims.read(self.key)
        owner = record.get("owner")
        if record.get("holder") != self._holder:
            raise LockLost(self.key, self._owner, owner)
        # One that has called itself, and so handed its claim on, runs on in peace.
        if owner != self._owner and claims.replaced_by(self.key, self._owner) is not None:
            raise LockLost(self.key, self._owner, owner)


def held_claim(task: Task[..., Any]) -> HeldClaim | None:
    """Return what a running task holds, or ``None``."""
    run = Run.of(task)
    if run is None or run.held is None:
        return None
    return HeldClaim(run.once.locks(task).claims, run.held, run.holder, run.fence)
