"""One task's ``@once``, bound to its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from celery import Task

from reliable_tasks._celery.registry import wire_arguments
from reliable_tasks._once.keys import Key
from reliable_tasks._once.locks import Locks, locks_of
from reliable_tasks._once.options import OnceOptions
from reliable_tasks.config import ReliableConfig
from reliable_tasks.errors import DuplicateTaskError

__all__ = ["Once"]


class Once:
    """What a task class needs to name and time its claims.

    Args:
        options: What ``@once`` was told.
        function: The task's body.
        takes_self: Whether the body's first parameter is the task.
        task: The task's name, for messages.

    Attributes:
        waits_if_late: Whether a copy that finds its key taken when it starts waits until it is
            free, and then runs, whatever the conflict setting is.
        hands_on: Whether a task that calls itself from its body hands its claim on.

    Raises:
        ConfigError: The key template does not fit the function.
    """

    waits_if_late = False
    hands_on = True

    def __init__(
        self, options: OnceOptions, function: Callable[..., Any], *, takes_self: bool, task: str
    ) -> None:
        signature = inspect.signature(function)
        if takes_self:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.options = options
        self._key = Key(options.key, signature, task)

    def claim_name(self, task: Task[..., Any], args: Any, kwargs: Mapping[str, Any] | None) -> str:
        """Return the name of a call's claim."""
        return self._key.name(task.name, *wire_arguments(task, args or (), kwargs or {}))

    def locks(self, task: Task[..., Any]) -> Locks:
        """Return the claims that its own is one of.

        Raises:
            ConfigError: No Redis is configured, or a ``reliable_*`` setting is no good.
        """
        return locks_of(task.app)

    def adopt(
        self, task: Task[..., Any], locks: Locks, name: str, *, owner: str, attempt: int
    ) -> None:
        """Get ready for the start, or the end, of a message that carries no claim."""

    def refusal(self, name: str, owner: str, seconds: float) -> DuplicateTaskError:
        """Return the error of a call whose key is taken."""
        return DuplicateTaskError(name, owner, seconds)

    def ttl(self, config: ReliableConfig) -> float:
        """Return how long the claim may wait in the queue (s)."""
        return self.options.ttl_seconds(config.once_ttl)
