"""Keeping dead letters, and telling of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import redis
from celery import Celery

from reliable_tasks._dead.letters import raw_of
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import Letter
from reliable_tasks.instrumentation.signals import (
    dead_letter_kept,
    dead_letters_dropped,
    task_crashed,
)

__all__ = ["bury", "keep_part", "tell_buried", "tell_crash"]

logger = logging.getLogger("reliable_tasks")

#: From so much of their number on it is said that there are many, each so many seconds.
_MANY, _SAY_AGAIN = 0.8, 600.0
_said_at = -_SAY_AGAIN
#: How long a part of a chord is kept when no other one dies (s): as a run is.
_PART_TTL = 7 * 86400.0


def tell_crash(
    task: Any, task_id: str, crashes: int, limit: int | None, crash: Mapping[str, Any]
) -> None:
    """Tell that a task has crashed, and how often by now."""
    logger.warning(
        "Task %s[%s] has crashed (%d%s): on %s, process %s%s",
        task.name,
        task_id,
        crashes,
        "" if limit is None else f" of {limit} times",
        crash["host"],
        crash["pid"],
        f" ({crash['signal']})" if crash["signal"] else ", whose end nobody saw",
    )
    task_crashed.send(sender=task, task_id=task_id, crashes=crashes, limit=limit, **crash)


def keep_part(app: Celery, request: Any) -> None:
    """Keep the message of a part of a chord that has succeeded: another part may die."""
    place, group_id = dead_place(app), request.request_dict.get("group")
    size = (request.chord or {}).get("chord_size")
    if place is None or not group_id or not size:
        return
    delivery = request._delivery  # noqa: SLF001 - of our own request
    raw = delivery.raw if delivery is not None and delivery.raw else raw_of(request.message)
    try:
        place.store.keep_part(place.server, str(group_id), request.id, raw, int(size), _PART_TTL)
    except (redis.exceptions.RedisError, OSError, ValueError) as error:
        logger.warning("Chord %s could not be replayed as a whole: %s", group_id, error)


def bury(app: Celery, task: Any, letter: Letter, event: str) -> bool:
    """Keep a letter whose message is acknowledged in a step of its own.

    Args:
        app: The app.
        task: The task, or ``None``.
        letter: What is kept.
        event: The same where the same is kept again, for it is not known whether it was.

    Returns:
        Whether it is kept. If not, it is said in the log, with all that there is of it.
    """
    place = dead_place(app)
    try:
        if place is None:
            raise redis.exceptions.ConnectionError("no Redis is configured")
        id_, count = place.store.bury(place.server, letter, event)
    except (redis.exceptions.RedisError, OSError) as error:
        logger.critical(
            "Task %s[%s] will not run again, and cannot be kept as a dead letter (%s): %r",
            letter.about.task,
            letter.about.task_id,
            error,
            letter.message,
        )
        return False
    tell_buried(app, task, letter, id_, count)
    return True


def tell_buried(app: Celery, task: Any, letter: Letter, id_: str, count: int) -> None:
    """Tell of a letter that is kept; drop the oldest if there are too many by now."""
    about = letter.about
    logger.error(
        "Task %s[%s] will not run again by itself (%s: %s); it is dead letter %s",
        about.task or "?",
        about.task_id or "?",
        about.cause,
        about.error[:200],
        id_,
    )
    if letter.is_too_large:
        logger.error(
            "The message of dead letter %s is not kept, for it has %d bytes "
            "(reliable_dead_letter_max_body is %d): it cannot be replayed",
            id_,
            len(letter.message),
            letter.bounds.max_body,
        )
    dead_letter_kept.send(sender=task, letter=letter.kept_as(id_))
    if count > letter.bounds.max_count:
        _prune(app)
    _warn_of_many(count, letter.bounds.max_count)


def _warn_of_many(count: int, max_count: int) -> None:
    global _said_at
    if count < _MANY * max_count or time.monotonic() - _said_at < _SAY_AGAIN:
        return
    _said_at = time.monotonic()
    logger.warning(
        "There are %d dead letters, and may be %d (reliable_dead_letter_max_count): replay or "
        "discard some, or the oldest are dropped",
        count,
        max_count,
    )


def _prune(app: Celery) -> None:
    place = dead_place(app)
    if place is None:
        return
    try:
        pruned = place.store.prune(place.server)
    except (redis.exceptions.RedisError, OSError) as error:
        logger.warning("There are too many dead letters, and none can be dropped: %s", error)
        return
    if pruned.many:
        logger.error(
            "%d dead letters were dropped: there may be %d (reliable_dead_letter_max_count)",
            pruned.many,
            pruned.max_count,
        )
        dead_letters_dropped.send(sender=None, count=pruned.many, reason="count")
