"""What a publish does besides queueing its message, in the same script.

The caller is many frames of Celery and kombu away from the channel that runs the script. What it
wishes stands in a context variable meanwhile, and applies to one task's message alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = [
    "ClaimTaken",
    "Publication",
    "Published",
    "Queued",
    "Superseded",
    "publication_of",
    "publishing",
]


class Queued(IntEnum):
    """Answers to a publish; the numbers are those of ``message_publish.lua``."""

    CLAIM_TAKEN = 0
    QUEUED = 1
    REPEATED = 2
    SUPERSEDED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What a publish does besides queueing a message.

    Attributes:
        continues: Tag of the delivery whose continuation this is, or ``""``.
        task_id: Id of the task that is continued.
        is_only: Whether nothing is queued where that delivery has another continuation.
        claim: Name of the claim to take or to keep, or ``""``.
        keeps: Whether the claim is kept for a continuation, rather than taken.
        owner: The task's id.
        claim_attempt: The attempt that the claim is for.
        ttl: How long the message may wait (s).
        task: The task's name.
        holder: Token of the run that continues its claim.
    """

    continues: str = ""
    task_id: str = ""
    is_only: bool = False
    claim: str = ""
    keeps: bool = False
    owner: str = ""
    claim_attempt: int = 0
    ttl: float = 0.0
    task: str = ""
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """How a publish ended.

    Attributes:
        code: The outcome.
        owner: Id of the task that has the claim, where it was taken.
        seconds: Until that claim lapses.
        fence: The fence of that claim.
    """

    code: Queued
    owner: str
    seconds: float
    fence: int

    def check(self) -> None:
        """Raise what the caller must know, past kombu.

        Raises:
            ClaimTaken: Another task has the claim.
            Superseded: The delivery that would continue itself is over.
        """
        if self.code is Queued.CLAIM_TAKEN:
            raise ClaimTaken(self)
        if self.code is Queued.SUPERSEDED:
            raise Superseded


class ClaimTaken(Exception):
    """Raised through kombu: the message is not queued, for another task has its claim.

    Attributes:
        published: The answer.
    """

    def __init__(self, published: Published) -> None:
        super().__init__(published)
        self.published = published


class Superseded(Exception):
    """Raised through kombu: the message is not queued, for its task was taken over."""


#: The wish, and the id of the task whose message it is about; ``None`` for the first to come.
_current: ContextVar[tuple[Publication, str | None] | None] = ContextVar(
    "reliable_publication", default=None
)


@contextmanager
def publishing(publication: Publication, task_id: str | None) -> Iterator[None]:
    """Have the message of a task published with more than itself.

    Args:
        publication: What to do besides.
        task_id: Id of the task, or ``None`` where any task's message is meant.
    """
    token = _current.set((publication, task_id))
    try:
        yield
    finally:
        _current.reset(token)


def publication_of(headers: Mapping[str, Any] | None) -> Publication | None:
    """Return what the publish of a message with these headers does besides."""
    current = _current.get()
    sent = (headers or {}).get("id")
    if current is None or sent is None:
        return None
    publication, task_id = current
    return publication if task_id is None or task_id == sent else None
