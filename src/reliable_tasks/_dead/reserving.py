"""Who sends the task of a dead letter: one of all that ask for it, and that is noted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress

import redis

from reliable_tasks._places import DeadPlace
from reliable_tasks._store.dead import Reservation, Sent
from reliable_tasks._store.letters import DeadLetter
from reliable_tasks.errors import DeadLetterNotFound, DuplicateTaskError, ReplayRefused

__all__ = ["refusing", "release_each", "releasing", "reserve", "reserve_each"]

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
def refusing(letter: DeadLetter) -> Iterator[None]:
    """Say in other words that a task cannot be called."""
    try:
        yield
    except DuplicateTaskError as error:
        raise ReplayRefused(letter.id, f"its @once key is taken: {error}") from error
    except (TypeError, ValueError, LookupError) as error:
        raise ReplayRefused(letter.id, f"it cannot be called any more: {error!r}") from error


@contextmanager
def releasing(
    place: DeadPlace, letter: DeadLetter, new_ids: Mapping[str, str], token: str
) -> Iterator[None]:
    """Note how the replay of a letter went, and of those that are sent with it."""
    how = Sent.IN_DOUBT
    try:
        with refusing(letter):
            yield
        how = Sent.SENT
    except ReplayRefused:
        how = Sent.REFUSED
        raise
    finally:
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
