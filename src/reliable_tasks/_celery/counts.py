"""The crashes of a task where RabbitMQ alone counts: with each message it begins anew.

So what a task goes on with, a retry or a replacement, says what was counted until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery import chord
from celery.canvas import Signature, _chain

from reliable_tasks._celery.headers import COUNTED, DELIVERY

__all__ = ["carried_count", "counted", "give_count"]

#: The count of a quorum queue.
_DELIVERY_COUNT = "x-delivery-count"


def counted(headers: Mapping[str, Any]) -> int:
    """Return how often a message came back, and those of the task before it did.

    An upper bound, for it counts all that comes back. What puts itself back does not, for it is
    sent again.
    """
    counts = (headers.get(name) for name in (_DELIVERY_COUNT, COUNTED))
    return sum(count for count in counts if isinstance(count, int))


def carried_count(task: Any) -> dict[str, Any]:
    """Return the headers by which the count goes on with the task that runs, none if it has none.

    Where a Redis counts, that count is its id's; and early acks are not counted.
    """
    request = task.request
    if request.get(DELIVERY) or not task.acks_late:
        return {}
    count = counted(request.headers or {})
    return {COUNTED: count} if count else {}


def give_count(task: Any, replacement: Signature[Any]) -> None:
    """Have the count go on with what replaces the task that runs: the task of the same id."""
    carried = carried_count(task)
    if not carried:
        return
    for step in _steps(replacement):
        if step.options.get("task_id") == task.request.id:
            step.set(headers={**(step.options.get("headers") or {}), **carried})


def _steps(replacement: Signature[Any]) -> Iterator[Signature[Any]]:
    """Return the tasks of which one has the id of what is replaced."""
    if isinstance(replacement, _chain):
        for step in replacement.tasks:
            yield from _steps(step)
    elif isinstance(replacement, chord):
        yield from _steps(replacement.body)
    else:
        yield replacement
