"""The claim as it travels: in a message's headers, and beside a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from celery import Task

from reliable_tasks._celery.headers import DELIVERY
from reliable_tasks._once.once import Once

__all__ = ["CLAIM", "HOLDER", "OF_ONE_DELIVERY", "Claim", "Follows", "Run", "Then"]

#: Header: the claim that a message carries.
CLAIM = "reliable_claim"
#: Header, added by the worker that received the message: the token of this copy.
HOLDER = "reliable_holder"
#: Headers that a worker adds to what it received: a retry must not inherit them.
OF_ONE_DELIVERY = (HOLDER, DELIVERY, "crashes", "redelivered")
#: What becomes of a duplicate that somebody waits for: it ends as the task that it follows, runs
#: when that one has ended, or fails.
Then = Literal["join", "run", "fail"]
#: So many bytes of a key are sent. Keys of `@once` are shorter; those of celery-once hold whole
#: arguments, and a frame of AMQP has room for 128 KiB of headers.
_LONGEST_SENT = 32 * 1024


@dataclass(frozen=True, slots=True)
class Follows:
    """Whom a duplicate follows that was queued all the same, for somebody waits for it.

    Attributes:
        owner: Id of the task that owned the key when it was called.
        until: Until when it follows (ms by the clock of the lock Redis).
        then: What becomes of it.
        expires_in: In how many seconds the owner's claim would have lapsed.
    """

    owner: str
    until: int
    then: Then
    expires_in: float

    @classmethod
    def from_header(cls, header: Any) -> Follows | None:
        """Return what a message carries, or ``None``."""
        try:
            owner, until, then, expires_in = header
            return cls(str(owner), int(until), then, float(expires_in))
        except (TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Claim:
    """Which key a message owns, or would like to, and as which attempt.

    Attributes:
        name: The claim's name; ``""`` in the header of a message if it is too long for one.
        owner: The task's id.
        attempt: Which continuation of the task the message is, from 0.
        follows: Who had the key when the task was called, where it was queued all the same.
    """

    name: str
    owner: str
    attempt: int
    follows: Follows | None = None

    def as_header(self) -> dict[str, Any]:
        """Return what is known of it, as a header."""
        header: dict[str, Any] = {"key": self.name, "owner": self.owner, "attempt": self.attempt}
        if self.follows is not None:
            follows = self.follows
            header["follows"] = [follows.owner, follows.until, follows.then, follows.expires_in]
        return header

    def as_sent(self) -> dict[str, Any]:
        """Return what a message carries over the wire; its worker makes a very long key anew."""
        header = self.as_header()
        is_short = len(self.name.encode()) <= _LONGEST_SENT
        return header if is_short else {**header, "key": None}

    @property
    def as_owner(self) -> Claim:
        """The claim of a task that follows nobody, or nobody any more."""
        return replace(self, follows=None)

    @property
    def turn(self) -> Claim:
        """The claim of the one that runs, where tasks with the key wait for each other."""
        return replace(self.as_owner, name=f"{self.name}:turn")

    @classmethod
    def from_headers(cls, headers: dict[str, Any] | None, task_id: str | None) -> Claim | None:
        """Return the claim of the task ``task_id``, or ``None``.

        Headers that somebody handed on to a task of another id carry a claim that is not its.
        """
        header = (headers or {}).get(CLAIM)
        if not isinstance(header, dict) or not task_id or header.get("owner") != task_id:
            return None
        name, attempt = header.get("key"), header.get("attempt")
        if not isinstance(name, (str, type(None))) or not isinstance(attempt, int):
            return None
        return cls(name or "", task_id, attempt, Follows.from_header(header.get("follows")))


@dataclass(frozen=True, slots=True)
class Run:
    """A copy that was let in.

    Attributes:
        once: The task's ``@once``.
        claim: What its message carries, or would carry; a retry goes on with it.
        held: What it holds, or ``None`` where its key was freed when it started.
        holder: Its token.
        fence: Greater than that of every run before it that held the same.
    """

    once: Once
    claim: Claim
    held: Claim | None
    holder: str
    fence: int

    def begin(self, task: Task[..., Any]) -> None:
        """Remember this run for as long as the task's request lives."""
        task.request.update(reliable_run=self)

    @staticmethod
    def of(task: Task[..., Any]) -> Run | None:
        """Return the run that goes on in this task, or ``None``."""
        run = task.request.get("reliable_run")
        return run if isinstance(run, Run) else None
