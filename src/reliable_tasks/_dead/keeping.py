"""Keeping dead letters, and telling of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from reliable_tasks._celery.delivery import NotYetKept
from reliable_tasks._dead.letters import raw_of_request
from reliable_tasks._dead.queue import bury_in_queue
from reliable_tasks._places import DeadPlace, dead_place, is_amqp_url
from reliable_tasks._store.client import as_text
from reliable_tasks._store.letters import Buried, Letter
from reliable_tasks.instrumentation.dropping import tell_pruned
from reliable_tasks.instrumentation.signals import (
    dead_letter_kept,
    task_crashed,
)

__all__ = ["bury", "keep_part", "note_chord", "tell_buried", "tell_crash", "tell_set_apart"]

logger = logging.getLogger("reliable_tasks")

#: From so much of their number on it is said that there are many, each so many seconds.
_MANY, _SAY_AGAIN = 0.8, 600.0
_said_at = -_SAY_AGAIN
#: How long a part of a chord is kept when no other one dies (s): as a run is.
_PART_TTL = 7 * 86400.0
#: After an error nothing is noted of chords for so long (s).
_SILENCE = 5.0
_silent_until = 0.0


def tell_crash(
    task: Any, task_id: str, crashes: int | None, limit: int | None, crash: Mapping[str, Any]
) -> None:
    """Tell that a task has crashed, and how often by now if that is counted."""
    times = "" if crashes is None else f" {crashes}"
    if times and limit is not None:
        times += f" of {limit}"
    logger.warning(
        "Task %s[%s] has crashed%s: on %s, process %s%s",
        task.name,
        task_id,
        f" ({times.strip()} times)" if times else "",
        crash["host"],
        crash["pid"],
        f" ({crash['how']})" if crash["how"] else ", whose end nobody saw",
    )
    task_crashed.send(sender=task, task_id=task_id, crashes=crashes, limit=limit, **crash)


def keep_part(app: Celery, request: Any) -> None:
    """Keep the message of a part of a chord that has succeeded: another part may die."""
    group_id = request.request_dict.get("group")
    if not group_id:
        return
    raw = raw_of_request(request)
    _note_of_chord(
        app,
        group_id,
        lambda place: place.store.keep_part(
            place.server, str(group_id), request.id, raw, _PART_TTL
        ),
    )


def note_chord(app: Celery, group_id: str, size: int) -> None:
    """Note how many parts a chord has, of which one may die."""
    _note_of_chord(
        app,
        group_id,
        lambda place: place.store.note_chord(place.server, group_id, size, _PART_TTL),
    )


def _note_of_chord(app: Celery, group_id: str, note: Callable[[DeadPlace], None]) -> None:
    """Note what a replay of a whole chord needs; no task waits long for it, or is lost by it."""
    global _silent_until
    place = dead_place(app)
    if place is None or time.monotonic() < _silent_until:
        return
    try:
        note(place)
    except (redis.exceptions.RedisError, OSError) as error:
        _silent_until = time.monotonic() + _SILENCE
        logger.warning(
            "Chord %s, and others of the next %g s, cannot be replayed as a whole: %s",
            group_id,
            _SILENCE,
            error,
        )


def bury(app: Celery, task: Any, letter: Letter, event: str, *, is_held: bool = False) -> bool:
    """Keep a letter whose message is acknowledged in a step of its own.

    Args:
        app: The app.
        task: The task, or ``None``.
        letter: What is kept.
        event: The same where the same is kept again, for it is not known whether it was.
        is_held: Whether its message can wait until the broker keeps it.

    Returns:
        Whether it is kept. If not, it is said in the log, with all that there is of it.

    Raises:
        NotYetKept: The broker does not keep it now, and its message can wait.
    """
    place = dead_place(app)
    id_, count = letter.about.id, 0
    try:
        if place is not None:
            id_, count = place.store.bury(place.server, letter, event)
        elif is_amqp_url(as_text(app.conf.broker_read_url)):
            bury_in_queue(app, letter)
        else:
            raise LookupError("no Redis is configured")
    except Exception as error:
        if is_held and isinstance(error, OperationalError):
            raise NotYetKept(str(error)) from error
        # Whoever ends a task would not go on: its slot would stay taken.
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


def tell_set_apart(letter: Letter, buried: Buried) -> None:
    """Tell of a message that nobody can read, and that the broker's side has kept."""
    tell_buried(None, None, letter, buried.id, buried.count)


def tell_buried(app: Celery | None, task: Any, letter: Letter, id_: str, count: int) -> None:
    """Tell of a letter that is kept, and of it if there are many by now.

    Args:
        app: The app, to drop some if there are too many; without it that is left to the sweeper.
        task: The task, or ``None``.
        letter: What is kept.
        id_: The id that it is kept under.
        count: How many there are.
    """
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
    if app is not None and count > letter.bounds.max_count:
        _prune(app)
    _warn_of_many(count, letter.bounds.max_count)


def _prune(app: Celery) -> None:
    place = dead_place(app)
    try:
        if place is not None:
            tell_pruned(place.store.prune(place.server))
    except (redis.exceptions.RedisError, OSError) as error:
        logger.warning("There are too many dead letters, and none can be dropped: %s", error)


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
