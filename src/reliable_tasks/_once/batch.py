"""Many calls at once: their claims and their messages, in a handful of round trips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from celery import Task

from reliable_tasks._celery.producing import producer_for
from reliable_tasks._once.call import Call, ask
from reliable_tasks._once.once import Once
from reliable_tasks._once.publish import refused
from reliable_tasks._once.queueing import (
    Way,
    in_two_steps,
    is_one_step,
    many_in_one_step,
    portions,
    putting_off,
    send,
)
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Ticket

__all__ = ["publish_many", "queue_many"]


def queue_many(task: Task[..., Any], calls: Sequence[Call]) -> list[ReliableResult]:
    """Queue some calls of a task that has no ``@once``."""
    if not calls:
        return []
    first = calls[0]
    ids = dict.fromkeys(str(uuid4()) for _ in calls)
    with producer_for(task.app, first.producer, first.options.get("connection")) as producer:
        with putting_off(producer, ids) as messages:
            results = [
                call.queue(task_id, None, producer)
                for call, task_id in zip(calls, ids, strict=True)
            ]
        for some in portions(messages):
            send(task, some, producer, first.options)
    return results


def publish_many(task: Task[..., Any], once: Once, calls: Sequence[Call]) -> list[ReliableResult]:
    """Claim the keys of some calls of one task and queue them, and answer each.

    None raises for its key is taken: its result says that it is a duplicate.

    Raises:
        StoreUnavailable: As one call does; some of them may be queued by then.
    """
    ways = [Way(ask(task, once, call)) for call in calls]
    if not ways:
        return []
    if is_one_step(ways[0].asked):
        many_in_one_step(ways)
    else:
        in_two_steps(ways)
    outcomes = [way.outcome() for way in ways]
    return [
        refused(way.asked, outcome, may_raise=False) if isinstance(outcome, Ticket) else outcome
        for way, outcome in zip(ways, outcomes, strict=True)
    ]
