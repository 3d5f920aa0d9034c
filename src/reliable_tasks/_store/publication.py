"""What a publish does besides queueing its message, in the same script.

The caller is many frames of Celery and kombu away from the channel that runs the script. What it
wishes stands in a context variable meanwhile, and applies to one task's message alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from reliable_tasks._store.scripts import Call

__all__ = [
    "ClaimTaken",
    "How",
    "Publication",
    "Published",
    "PutOff",
    "Queued",
    "Superseded",
    "Taking",
    "batching",
    "note_answer",
    "publication_of",
    "publishing",
    "publishing_each",
    "put_off",
]


#: How a call takes its claim, as in ``claim_acquire.lua``; ...
Taking = Literal["acquire", "window", "replace"]
#: ... or keeps it, as a retry does.
How = Taking | Literal["continue"]


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
        how: How it is taken, as `Claims.acquire` says; or ``"continue"``, where it is kept.
        owner: The task's id.
        claim_attempt: The attempt that the claim is for.
        ttl: How long the message may wait (s).
        task: The task's name.
        holder: Token of the run that continues its claim, or hands it on.
        token: By which a repetition is recognised, where it is another caller's, or ``""``.
        replaces: Whether a call may take another one's place, where its task says so.
    """

    continues: str = ""
    task_id: str = ""
    is_only: bool = False
    claim: str = ""
    how: How = "acquire"
    owner: str = ""
    claim_attempt: int = 0
    ttl: float = 0.0
    task: str = ""
    holder: str = ""
    token: str = ""
    replaces: bool = True


@dataclass(frozen=True, slots=True)
class Published:
    """How a publish ended.

    Attributes:
        code: The outcome.
        owner: Id of the task that has the claim, where it was taken; of the one that had it
            before, where the message is queued in its place.
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


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What is wished for while tasks are published, and what came of it."""

    by_id: Mapping[str | None, Publication]
    answers: list[Published]

    def of(self, headers: Mapping[str, Any] | None) -> Publication | None:
        """Return what is wished for a message with these headers."""
        sent = (headers or {}).get("id")
        if not isinstance(sent, str):
            return None
        return self.by_id.get(sent) or self.by_id.get(None)


_current: ContextVar[_Wishes | None] = ContextVar("reliable_publication", default=None)


@contextmanager
def publishing(publication: Publication, task_id: str | None) -> Iterator[list[Published]]:
    """Have the message of a task published with more than itself.

    Args:
        publication: What to do besides.
        task_id: Id of the task, or ``None`` where any task's message is meant.

    Yields:
        The answers, one for each queue that the message went to.
    """
    with publishing_each({task_id: publication}) as answers:
        yield answers


@contextmanager
def publishing_each(by_id: Mapping[str | None, Publication]) -> Iterator[list[Published]]:
    """Have the messages of some tasks, by their ids, published with more than themselves.

    Yields:
        The answers.
    """
    answers: list[Published] = []
    token = _current.set(_Wishes(by_id, answers))
    try:
        yield answers
    finally:
        _current.reset(token)


def publication_of(headers: Mapping[str, Any] | None) -> Publication | None:
    """Return what the publish of a message with these headers does besides."""
    wish = _current.get()
    return None if wish is None else wish.of(headers)


def note_answer(headers: Mapping[str, Any] | None, published: Published) -> None:
    """Tell whoever publishes a message with these headers how it went.

    Raises:
        ClaimTaken: Another task has the claim.
        Superseded: The delivery that would continue itself is over.
    """
    published.check()
    wish = _current.get()
    if wish is not None and wish.of(headers) is not None:
        wish.answers.append(published)


@dataclass(frozen=True, slots=True)
class PutOff:
    """A message of a batch, which is queued when all of them are made.

    Attributes:
        task_id: Id of its task.
        call: The keys and the arguments of the script that queues it.
    """

    task_id: str
    call: Call

    @property
    def size(self) -> int:
        """How long the message is, about (bytes)."""
        return len(str(self.call[1][0]))


@dataclass(frozen=True, slots=True)
class _Batch:
    ids: Collection[str]
    messages: list[PutOff]


_batch: ContextVar[_Batch | None] = ContextVar("reliable_batch", default=None)


@contextmanager
def batching(ids: Collection[str]) -> Iterator[list[PutOff]]:
    """Have the messages of some tasks put off that are published meanwhile.

    Args:
        ids: Of the tasks. What others publish besides, a handler of signals perhaps, is none of
            them.

    Yields:
        Those that were.
    """
    batch = _Batch(ids, [])
    token = _batch.set(batch)
    try:
        yield batch.messages
    finally:
        _batch.reset(token)


def put_off(headers: Mapping[str, Any] | None, call: Call) -> bool:
    """Put a message off, if there is a batch that it is a part of."""
    batch, task_id = _batch.get(), (headers or {}).get("id")
    if batch is None or not isinstance(task_id, str) or task_id not in batch.ids:
        return False
    batch.messages.append(PutOff(task_id, call))
    return True
