"""What is kept of a task that will not run again by itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from reliable_tasks._store.scripts import Argument
from reliable_tasks._store.values import ms, text

__all__ = [
    "BY_CONTENT",
    "Bounds",
    "Buried",
    "Cause",
    "DeadLetter",
    "Letter",
    "as_cause",
    "as_message",
    "read_letter",
    "undecodable",
]

#: A message that is no UTF-8 is kept behind this; no other begins so.
_BASE64 = b"base64:"


class Cause(StrEnum):
    """Why a task will not run again."""

    POISON = "poison"
    REQUEUES = "requeues"
    RETRIES = "retries"
    TIME_LIMIT = "time_limit"
    LOST = "lost"
    REJECTED = "rejected"
    FAILED = "failed"
    EXPIRED = "expired"
    UNKNOWN_TASK = "unknown_task"
    UNDECODABLE = "undecodable"


#: What the name of an event begins with that is told by what a message says: the same can be sent
#: again, and die again, when its letter was replayed.
BY_CONTENT = "content:"


def as_cause(name: str) -> Cause | str:
    """Return a cause by its name; one that a newer version knows stays that name."""
    try:
        return Cause(name)
    except ValueError:
        return name


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept.

    Attributes:
        max_age: For how long (s).
        max_count: How many dead letters.
        max_body: Up to how many bytes of a message.
    """

    max_age: float
    max_count: int
    max_body: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A task that will not run again by itself.

    Attributes:
        id: Its own: the task's id, with a number behind it where a task of this id died before. One
            of a message without an id has that of its delivery.
        task: The task's name, or ``""``.
        task_id: The task's id, or ``""``.
        cause: Why it is here; a text that is no `Cause` where a newer version has kept it.
        error: The error's type and text.
        traceback: Its traceback, or ``""``.
        worker: Name of the worker that kept it.
        queue: The queue that its message came by.
        priority: The message's priority, or ``None``.
        retries: How often the task was retried.
        crashes: How often it was started and ended by no word of its own.
        deliveries: How often its message was delivered again, as far as the broker counts.
        first_at: When it failed or crashed first, as far as that is known (s since the epoch).
        at: When it was kept (s since the epoch, by the clock of Redis).
        argsrepr: Its positional arguments, as text that people may read.
        kwargsrepr: Its keyword arguments, the same.
        claim: The `@once` key that its message owned, or ``""``.
        root_id: The task that it all began with.
        parent_id: The task that called it, or ``None``.
        group_id: The group that it is a part of, or ``None``.
        chord_id: The chord that has counted its failure, or ``None``.
        size: Size of its message (bytes); 0 if that was too large to be kept.
        replayed_as: Id of the task that was sent in its place, or ``None``.
    """

    id: str
    task: str
    task_id: str
    cause: Cause | str
    error: str
    traceback: str = ""
    worker: str = ""
    queue: str = ""
    priority: int | None = None
    retries: int = 0
    crashes: int = 0
    deliveries: int = 0
    first_at: float = 0.0
    at: float = 0.0
    argsrepr: str = ""
    kwargsrepr: str = ""
    claim: str = ""
    root_id: str = ""
    parent_id: str | None = None
    group_id: str | None = None
    chord_id: str | None = None
    size: int = 0
    replayed_as: str | None = None

    @property
    def kind(self) -> str:
        """Cause and task, by which they are found."""
        return f"{self.cause}:{self.task}"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON can have it."""
        return asdict(self)


#: What the server itself knows, or has in fields of its own.
_ELSEWHERE = ("id", "at", "size", "traceback", "replayed_as")
_KNOWN = frozenset(one.name for one in fields(DeadLetter))


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter that is to be kept.

    Attributes:
        about: What is known of it.
        message: The whole message, as kombu's Redis transport would write it.
        bounds: How much is kept.
    """

    about: DeadLetter
    message: bytes
    bounds: Bounds

    @property
    def is_too_large(self) -> bool:
        """Whether the message is left out."""
        return len(self.message) > self.bounds.max_body

    def kept_as(self, id_: str) -> DeadLetter:
        """Return it as it is kept under an id."""
        size = 0 if self.is_too_large else len(self.message)
        return replace(self.about, id=id_, size=size)

    def arguments(self, delivery: str) -> list[Argument]:
        """Return what ``dead_add.lua`` takes, for a delivery or another event with a name."""
        about = self.about
        meta: dict[str, Any] = {
            "id": _storable(about.id),
            "cause": about.cause,
            "task": _storable(about.task),
            "delivery": delivery,
            "max_age": ms(self.bounds.max_age),
            "max_count": self.bounds.max_count,
        }
        if about.chord_id:
            meta |= {"chord": _storable(about.chord_id), "member": _storable(about.task_id)}
        shown = {
            name: value
            for name, value in asdict(about).items()
            if name not in _ELSEWHERE and value not in (None, "")
        }
        shown["size"] = 0 if self.is_too_large else len(self.message)
        return [
            json.dumps(meta),
            json.dumps(shown),
            about.traceback.encode("utf-8", "replace"),
            b"" if self.is_too_large else _as_text(self.message),
        ]


def undecodable(raw: bytes, *, event: str, queue: str, bounds: Bounds) -> Letter:
    """Return the letter of a message that nobody can read.

    Args:
        raw: What there is of it.
        event: What tells it from others like it: its delivery.
        queue: The queue that it came by.
        bounds: How much is kept.
    """
    about = DeadLetter(
        id=hashlib.sha256(event.encode("utf-8", "surrogateescape")).hexdigest()[:32],
        task="",
        task_id="",
        cause=Cause.UNDECODABLE,
        # Without what it says, which perhaps must not be read.
        error="not a message of kombu's",
        queue=queue,
    )
    return Letter(about, raw, bounds)


@dataclass(frozen=True, slots=True)
class Buried:
    """What came of a delivery that was to end as a dead letter.

    Attributes:
        is_ended: Whether it was still held when it ended.
        id: Id of the letter; ``""`` if somebody else has the message, or the task goes on.
        count: How many letters there are.
    """

    is_ended: bool
    id: str
    count: int

    @classmethod
    def of(cls, answer: Sequence[Any]) -> Buried:
        """Read what ``message_bury.lua`` and ``run_bury.lua`` return."""
        if len(answer) == 1:
            return cls(bool(answer[0]), "", 0)
        ended, id_, count = answer
        return cls(bool(ended), text(id_), int(count))


def read_letter(id_: str, row: Sequence[Any], size: int) -> DeadLetter:
    about, at, replay_id, replayed = row
    known = {k: v for k, v in json.loads(text(about)).items() if k in _KNOWN}
    known["cause"] = as_cause(known["cause"])
    size = known.pop("size", size)
    return DeadLetter(
        **{"task": "", "task_id": "", "error": "", **known},
        id=id_,
        at=int(at) / 1000,
        size=size,
        replayed_as=text(replay_id) if replayed is not None else None,
    )


def _storable(name: str) -> str:
    """Return a name as Lua can read it in JSON, which knows no lone surrogates."""
    return name.encode("utf-8", "replace").decode()


def _as_text(message: bytes) -> bytes:
    """Return a message as a client can read it that takes all for UTF-8."""
    try:
        message.decode()
    except UnicodeDecodeError:
        return _BASE64 + base64.b64encode(message)
    return message


def as_message(value: Any) -> bytes:
    kept = value if isinstance(value, bytes) else str(value).encode()
    return base64.b64decode(kept.removeprefix(_BASE64)) if kept.startswith(_BASE64) else kept
