"""A message in the hands of one worker: what is known of it, and how it goes back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from uuid import uuid4

import redis

from reliable_tasks._store.crashes import Starter
from reliable_tasks._store.keys import BESIDE, Keys
from reliable_tasks._store.letters import Letter
from reliable_tasks._store.scripts import Argument, Call, load

__all__ = [
    "UNREADABLE",
    "Copy",
    "Delivery",
    "FetchPlan",
    "Guard",
    "Layout",
    "Thrown",
    "is_beside",
    "redelivered",
    "with_header",
]

#: Header of a message: the claim of its task.
_CLAIM = "reliable_claim"
#: What a message raises that is none.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def is_beside(tag: str) -> bool:
    """Say whether a delivery's tag is of another broker's."""
    return tag.endswith(f":0:{BESIDE}")


class Guard(IntEnum):
    """What the guard says of a copy; the numbers are those of the scripts."""

    UNKNOWN = 0
    MAY_RUN = 1
    OVER = 2
    HELD_ELSEWHERE = 3
    CONTINUED = 4


@dataclass(frozen=True, slots=True)
class Copy:
    """What is known of a copy before it runs.

    Attributes:
        guard: Whether it may run.
        crashes: How many times the task was started before and ended by no word of its own.
        seconds: How long the lease of the copy lasts that runs elsewhere.
    """

    guard: Guard
    crashes: int
    seconds: float

    @property
    def may_run(self) -> bool:
        """Whether no other copy is alive."""
        return self.guard is Guard.MAY_RUN

    @property
    def has_continued(self) -> bool:
        """Whether this copy has published its task's continuation already."""
        return self.guard is Guard.CONTINUED

    @property
    def is_over(self) -> bool:
        """Whether another copy has ended, or was continued."""
        return self.guard is Guard.OVER

    @property
    def is_unknown(self) -> bool:
        """Whether nobody could say."""
        return self.guard is Guard.UNKNOWN

    @classmethod
    def of(cls, answer: Sequence[Any]) -> Copy:
        """Read what `hold_run` returned."""
        guard, crashes, milliseconds = answer
        return cls(Guard(int(guard)), int(crashes), max(int(milliseconds), 0) / 1000)


@dataclass(slots=True)
class Delivery:
    """One message in the hands of one worker.

    Attributes:
        tag: Its own, never used again: ``<worker>:<fetch>:<number>:<list>``.
        list: The list it came from, without kombu's prefix.
        queue: The queue of that list.
        raw: The message as it was in the list.
        copy: What the guard said when it was taken.
        task_id: Id of the task, or ``""``.
        is_redelivered: Whether the task may have had other copies.
        is_started: Whether a crash was counted ahead.
        has_crashed: Whether that crash stands, for the child that ran it is dead.
        starter: Who starts it; after a crash, with what is known of that.
        letter: What is to be kept of it when it ends, if it is a dead letter then.
        when_buried: Called with the letter's id and how many there are, when it is kept. It must
            not raise.
        is_received: Whether a request of ours was made of it.
        is_ended: Whether its acknowledgement or rejection is under way.
        was_aside: Whether it waited in the broker for its turn when it was put back.
        renew_until: When to stop renewing its lease (monotonic s): the run has hung.
        is_carried: Whether it has outlived the connection that it came by.
        when_heard_late: Called when the broker has heard of its end, if that could not be told at
            once. It must not raise.
    """

    tag: str
    list: str
    queue: str
    raw: bytes
    copy: Copy
    task_id: str = ""
    is_redelivered: bool = False
    is_started: bool = False
    has_crashed: bool = False
    starter: Starter | None = None
    letter: Letter | None = None
    when_buried: Callable[[str, int], None] | None = None
    is_received: bool = False
    is_ended: bool = False
    was_aside: bool = False
    renew_until: float = math.inf
    is_carried: bool = False
    when_heard_late: Callable[[], None] | None = None

    @property
    def crash(self) -> str:
        """What is known of its crash, as the scripts take it; ``""`` if it has not crashed."""
        return str(self.starter or "") if self.has_crashed else ""

    def describe(self, message: Mapping[str, Any]) -> None:
        """Take over what the decoded message says of its task."""
        headers = _mapping(message.get("headers"))
        task_id = str(headers.get("id") or "")
        # What UTF-8 cannot say is no key: the scripts do not guard it, either.
        self.task_id = task_id if _is_utf8(task_id) else ""
        self.is_redelivered = bool(headers.get("redelivered"))


@dataclass(frozen=True, slots=True)
class Thrown:
    """The claim of a message that is gone.

    Attributes:
        key: The claim's name.
        owner: Id of the task.
        attempt: That of the message.
        task: The task's name.
        is_run_over: Whether it is known that its run is over, if it had one.
    """

    key: str
    owner: str
    attempt: int
    task: str
    is_run_over: bool = False

    @classmethod
    def of_dead_run(cls, raw: bytes) -> Thrown | None:
        """Return the claim that the message of a dead run carries by its name, if any."""
        headers = _mapping(json.loads(raw).get("headers"))
        claim = _mapping(headers.get(_CLAIM))
        found = claim.get("key"), claim.get("owner"), claim.get("attempt"), headers.get("task")
        key, owner, attempt, task = found
        if isinstance(attempt, int) and all(isinstance(one, str) for one in (key, owner, task)):
            return cls(str(key), str(owner), attempt, str(task), is_run_over=True)
        return None

    def discarding(self, keys: Keys, leases: str) -> Call:
        """Return what `claim_discard` takes."""
        claim = [keys.claim(self.key), keys.replaced(self.key), leases]
        return claim, [self.owner, self.attempt, int(self.is_run_over)]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where kombu keeps its messages.

    Attributes:
        prefix: kombu's ``global_keyprefix``.
        unacked: Key of the messages that were delivered.
        index: Key of the times by which stock workers sweep.
        sep: What separates a queue's name from a priority.
    """

    prefix: str
    unacked: str
    index: str
    sep: str


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """The command that takes messages, and what is needed to read its answer."""

    prefix: str
    lists: Sequence[str]
    queues: Sequence[str]
    keys: Sequence[str]
    args: Sequence[Argument]
    count: int = field(default=1)

    @property
    def sha(self) -> str:
        """The hash of the script."""
        return load("message_fetch").sha

    @property
    def source(self) -> str:
        """The script, for a server that does not know it."""
        return load("message_fetch").source

    def repeated(self) -> FetchPlan:
        """Return the plan that asks again for what this one took."""
        args = [*self.args]
        args[5] = "1"
        return FetchPlan(self.prefix, self.lists, self.queues, self.keys, args, self.count)

    def run(self, server: redis.Redis) -> list[Any]:
        """Take messages now."""
        return list(load("message_fetch").on(server, self.keys, self.args))

    def read(self, answer: Iterable[Sequence[Any]]) -> Iterator[tuple[str, str, str, bytes, Copy]]:
        """Yield tag, list, queue, message and copy of each that was taken."""
        for place, message, *held, number in answer:
            list_ = self.lists[int(place) - 1]
            queue = self.queues[(int(place) - 1) % len(self.queues)]
            yield f"{self.prefix}{int(number)}:{list_}", list_, queue, message, Copy.of(held)


def with_header(raw: bytes, name: str, value: Any) -> bytes:
    """Return a message with one more header."""
    message: dict[str, Any] = json.loads(raw)
    headers = {**_mapping(message.get("headers")), name: value}
    return json.dumps({**message, "headers": headers}).encode()


def redelivered(raw: bytes) -> str:
    """Return a message as it goes back: marked as kombu does, its deliveries counted."""
    message: dict[str, Any] = json.loads(raw)
    headers = dict(_mapping(message.get("headers")))
    headers["redelivered"] = True
    count = headers.get("x-delivery-count")
    headers["x-delivery-count"] = (count if isinstance(count, int) else 0) + 1
    properties = dict(_mapping(message.get("properties")))
    # A tag is of one delivery: a stock worker takes the one that it finds here.
    properties["delivery_tag"] = str(uuid4())
    properties["delivery_info"] = {
        **_mapping(properties.get("delivery_info")),
        "redelivered": True,
    }
    return json.dumps({**message, "headers": headers, "properties": properties})


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return what is a mapping as it stands; producers of all kinds write messages."""
    return value if isinstance(value, Mapping) else {}
