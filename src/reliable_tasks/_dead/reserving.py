"""Who sends the task of a dead letter: one of all that ask for it, and that is noted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import redis
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import after_task_publish
from kombu.exceptions import OperationalError

from reliable_tasks._places import DeadPlace
from reliable_tasks._store.dead import Reservation, Sent
from reliable_tasks._store.letters import DeadLetter
from reliable_tasks.errors import (
    ConfigError,
    DeadLetterNotFound,
    DuplicateTaskError,
    ReplayRefused,
    StoreError,
)

__all__ = ["refusing", "release_each", "releasing", "reserve", "reserve_each", "sending"]

logger = logging.getLogger("reliable_tasks")

#: What says nothing of the one task that is sent: who sends many stops there.
_OF_ALL = (
    *(OperationalError, StoreError, ConfigError, redis.exceptions.RedisError, OSError),
    SoftTimeLimitExceeded,
)
#: How often it is looked whether somebody else has sent it (s).
_LOOK = 0.05
#: How soon it is noted again that it was sent, where Redis does not answer (s).
_AGAIN = (0.1, 0.5)


def reserve(place: DeadPlace, id_: str, token: str) -> tuple[Reservation, str]:
    """Return whether it is ours to send, or was sent, and under which id.

    Raises:
        DeadLetterNotFound: It was removed meanwhile.
    """
    while True:
        code, new_id = place.store.reserve(place.server, id_, token)
        if code is Reservation.NOT_FOUND:
            raise DeadLetterNotFound(id_)
        if code is not Reservation.OTHERS:
            return code, new_id
        # Until that one has sent it, or its time is over.
        time.sleep(_LOOK)


def reserve_each(
    place: DeadPlace, ids: Iterable[str], token: str
) -> dict[str, tuple[Reservation, str]]:
    """Reserve some that are sent together; none of them stays reserved if that fails.

    Raises:
        DeadLetterNotFound: One was removed meanwhile.
    """
    answers: dict[str, tuple[Reservation, str]] = {}
    asked: list[str] = []
    try:
        for id_ in ids:
            asked.append(id_)
            answers[id_] = reserve(place, id_, token)
    except BaseException:
        # What failed is what the caller has to know. The last answer may have been lost.
        with suppress(Exception):
            release_each(place, dict.fromkeys(asked, ""), token, Sent.REFUSED)
        raise
    return answers


@contextmanager
def refusing(app: Celery, letter: DeadLetter) -> Iterator[None]:
    """Say in other words that a task cannot be called, whatever of the user's code says so."""
    try:
        yield
    except DuplicateTaskError as error:
        raise ReplayRefused(letter.id, f"its @once key is taken: {error}") from error
    except (ReplayRefused, *_OF_ALL):
        raise
    except Exception as error:
        if isinstance(error, app.connection_for_write().connection_errors):
            raise
        raise ReplayRefused(letter.id, f"it cannot be called any more: {_said(error)}") from error


def _said(error: Exception) -> str:
    try:
        return repr(error)
    except Exception:  # noqa: BLE001 - of the user's own class
        return type(error).__name__


@contextmanager
def sending(app: Celery, letter: DeadLetter, last_id: str) -> Iterator[set[str]]:
    """Have a task sent; what fails when its message is queued already has not kept it from that.

    Args:
        app: The app.
        letter: The dead letter whose task it is.
        last_id: Id of the task that is sent last.

    Yields:
        The ids of the tasks whose messages are known to be queued.

    Raises:
        ReplayRefused: It cannot be called.
    """
    queued: set[str] = set()
    thread = threading.get_ident()

    def note(headers: Any = None, **_: Any) -> None:
        # Other threads send other tasks.
        if threading.get_ident() == thread and isinstance(headers, Mapping):
            queued.add(str(headers.get("id")))

    after_task_publish.connect(note, weak=False)
    try:
        with refusing(app, letter):
            yield queued
    except Exception:
        if last_id not in queued:
            raise
        logger.exception("Dead letter %s is sent, and its call failed after that", letter.id)
    finally:
        after_task_publish.disconnect(note)


@contextmanager
def releasing(
    app: Celery,
    place: DeadPlace,
    letter: DeadLetter,
    new_ids: Mapping[str, str],
    token: str,
    last_id: str,
) -> Iterator[set[str]]:
    """Have the task of a letter sent, and note how that went, and of those sent with it.

    Yields:
        As `sending` does.

    Raises:
        ReplayRefused: As in `sending`.
    """
    how, queued = Sent.IN_DOUBT, set[str]()
    try:
        with sending(app, letter, last_id) as queued:
            yield queued
        how = Sent.SENT
    except ReplayRefused:
        # Who has sent a part of a chord has not sent nothing.
        how = Sent.IN_DOUBT if queued else Sent.REFUSED
        raise
    finally:
        if last_id in queued:
            how = Sent.SENT
        # What failed is what the caller has to know.
        with nullcontext() if how is Sent.SENT else suppress(Exception):
            release_each(place, new_ids, token, how)


def release_each(place: DeadPlace, new_ids: Mapping[str, str], token: str, how: Sent) -> None:
    """Note how some replays went, by their letters' ids; what is not noted is in doubt."""
    for id_, new_id in new_ids.items():
        _release(place, id_, token, how, new_id)


def _release(place: DeadPlace, id_: str, token: str, how: Sent, new_id: str) -> None:
    for pause in (*_AGAIN, None):
        try:
            place.store.release(place.server, id_, token, how, new_id)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return
