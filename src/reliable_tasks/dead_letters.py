"""Dead letters: tasks that will not run again by themselves, kept whole, to be read and replayed.

The functions are about the current app, or the one that they are given::

    from reliable_tasks import dead_letters

    for letter in dead_letters.list(task="shop.pay", limit=10):
        print(letter.id, letter.cause, letter.error)
    dead_letters.replay(letter.id)

Each raises ``StoreUnavailable`` where the Redis of the dead letters does not answer, and
``DeadLetterError`` where there is none and it cannot be done without.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import cast

import redis
from celery import Celery, current_app
from celery.local import maybe_evaluate

from reliable_tasks._celery.queues import DEAD
from reliable_tasks._dead.original import Original, text_of
from reliable_tasks._dead.queue import count_queue, purge_queue, replay_queue, walk_queue
from reliable_tasks._dead.replaying import check as check_replay
from reliable_tasks._dead.replaying import replay as replay_one
from reliable_tasks._dead.replaying import send_from_queue
from reliable_tasks._places import DeadPlace, dead_place, is_amqp_url
from reliable_tasks._store.client import as_text
from reliable_tasks._store.dead import Cause, DeadLetter
from reliable_tasks.config import nearest
from reliable_tasks.errors import (
    DeadLetterError,
    DeadLetterNotFound,
    ReplayRefused,
    StoreError,
    StoreUnavailable,
)

__all__ = [
    "Cause",
    "DeadLetter",
    "Replayed",
    "check",
    "count",
    "discard",
    "get",
    "list",
    "message",
    "purge",
    "replay",
    "replay_all",
]

#: Since when: a moment, or how long ago, also in seconds.
Since = datetime | timedelta | float


@dataclass(slots=True)
class Replayed:
    """What came of replaying many dead letters.

    Attributes:
        sent: Ids of the new tasks by those of the dead letters.
        refused: Why the others were not sent, by their ids.
    """

    sent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def count(
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Since | None = None,
    app: Celery | None = None,
) -> int:
    """Count the dead letters that were not replayed.

    Args:
        task: Only those of the task of this name.
        cause: Only those that are here for this.
        since: Only those that were kept since then: a ``datetime``, or a ``timedelta`` or seconds
            ago.
        app: The app; the current one by default.
    """
    chosen, moment = _cause(cause), _moment(since)
    if (queue_app := _without_redis(app)) is not None:
        if (task, chosen, moment) != (None, None, None):
            raise DeadLetterError(f"{_IN_ORDER}: count has no task, cause and since there")
        return count_queue(queue_app)
    with _place(app) as place:
        return place.store.count(place.server, task=task, cause=chosen, since=moment)


def list(  # noqa: A001 - what everybody calls it
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Since | None = None,
    limit: int | None = None,
    oldest_first: bool = False,
    replayed: bool = False,
    app: Celery | None = None,
) -> Iterator[DeadLetter]:
    """Yield dead letters, the newest first, without their tracebacks and messages.

    They are read some at a time, when they are asked for, so that Redis is blocked for nobody. One
    that comes or goes meanwhile may be among them or not.

    Args:
        task: Only those of the task of this name.
        cause: Only those that are here for this.
        since: As in `count`.
        limit: At most so many.
        oldest_first: The other way round.
        replayed: Those that were replayed instead, with ``replayed_as``.
        app: As in `count`.

    Raises:
        ValueError: ``limit`` is less than 0, or there is no such cause.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit = {limit!r}: give a number of dead letters, 0 or more")
    return _list(task, _cause(cause), _moment(since), limit, oldest_first, replayed, app)


def _list(
    task: str | None,
    cause: str | None,
    since: float | None,
    limit: int | None,
    oldest_first: bool,
    replayed: bool,
    app: Celery | None,
) -> Iterator[DeadLetter]:
    if limit == 0:
        return
    if (queue_app := _without_redis(app)) is not None:
        if replayed:
            raise DeadLetterError(f"{_IN_ORDER}: what was replayed is not kept there")
        matches = _filter(task, cause, since)
        yield from islice(filter(matches, walk_queue(queue_app)), limit)
        return
    with _place(app) as place:
        found = place.store.walk(
            place.server,
            task=task,
            cause=cause,
            since=since,
            oldest_first=oldest_first,
            replayed=replayed,
            **({} if limit is None else {"page": min(limit, 200)}),
        )
        yield from islice(found, limit)


def get(id: str, *, app: Celery | None = None) -> DeadLetter:  # noqa: A002 - what it is called
    """Return a dead letter with its traceback.

    Args:
        id: Its id, which is that of the task.
        app: As in `count`.

    Raises:
        DeadLetterNotFound: There is none.
    """
    with _place(app) as place:
        letter = place.store.get(place.server, id)
    if letter is None:
        raise DeadLetterNotFound(id)
    return letter


def message(id: str, *, app: Celery | None = None) -> str:  # noqa: A002
    """Return the whole message of a dead letter as text, with the task's arguments.

    They can hold secrets; `list` and `get` show no more than ``argsrepr`` and ``kwargsrepr``.

    Args:
        id: As in `get`.
        app: As in `count`.

    Raises:
        DeadLetterNotFound: There is none.
    """
    get(id, app=app)
    with _place(app) as place:
        return text_of(place.store.message(place.server, id))


def replay(
    id: str,  # noqa: A002
    *,
    queue: str | None = None,
    whole_chord: bool = False,
    app: Celery | None = None,
) -> str:
    """Send the task of a dead letter again, with its chain and its callbacks, under a new id.

    Its ``expires``, ETA, retries and crashes begin anew, and its `@once` key is claimed as by a new
    call. Its result stays ``FAILURE``; `ReliableResult.replayed_id` of it is the new id. A dead
    letter is replayed once, however often and by how many it is asked for.

    Args:
        id: As in `get`.
        queue: The queue to send it to; by default the one that it came by.
        whole_chord: Send the whole chord anew that it is a part of, under a new group id: the parts
            that have succeeded, too, and those that are dead letters.
        app: As in `count`.

    Returns:
        The new task's id; that of the first replay, if it was replayed before.

    Raises:
        DeadLetterNotFound: There is none.
        ReplayRefused: It cannot be replayed: its chord has counted its failure, another task has
            its `@once` key, or its message was not kept or cannot be read.
        kombu.exceptions.OperationalError: The broker cannot be reached. It can be replayed again.
    """
    app = _app(app)
    letter = get(id, app=app)
    with _place(app) as place:
        return replay_one(app, place, letter, queue=queue, whole_chord=whole_chord)


def check(id: str, *, whole_chord: bool = False, app: Celery | None = None) -> DeadLetter:  # noqa: A002
    """Say whether a dead letter can be replayed, and return it. Nothing is sent.

    Whether its `@once` key is free is seen only when it is sent.

    Args:
        id: As in `get`.
        whole_chord: As in `replay`.
        app: As in `count`.

    Raises:
        DeadLetterNotFound: There is none.
        ReplayRefused: It cannot.
    """
    app = _app(app)
    letter = get(id, app=app)
    with _place(app) as place:
        check_replay(app, place, letter, whole_chord=whole_chord)
    return letter


def replay_all(
    where: Callable[[DeadLetter], bool] | None = None,
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Since | None = None,
    limit: int | None = None,
    rate: float | None = None,
    queue: str | None = None,
    on_each: Callable[[DeadLetter], None] | None = None,
    app: Celery | None = None,
) -> Replayed:
    """Replay many dead letters, the oldest first.

    Those that cannot be replayed stay, and are named with the reason. Those that die meanwhile are
    not among them.

    Args:
        where: Only those for which this is true.
        task: As in `count`.
        cause: As in `count`.
        since: As in `count`.
        limit: At most so many, replayed or refused.
        rate: At most so many a second.
        queue: As in `replay`.
        on_each: Called with each when it was replayed or refused.
        app: As in `count`.

    Raises:
        ValueError: ``rate`` is not more than 0.
        kombu.exceptions.OperationalError: As in `replay`; those before are sent.
    """
    if rate is not None and rate <= 0:
        raise ValueError(f"rate = {rate!r}: give a number of dead letters per second, more than 0")
    app = _app(app)
    outcome, begun = Replayed(), time.time()
    if _without_redis(app) is not None:
        matches = _filter(task, _cause(cause), _moment(since), where)
        _replay_in_order(app, matches, outcome, limit=limit, rate=rate, queue=queue, tell=on_each)
        return outcome
    found = list(task=task, cause=cause, since=since, oldest_first=True, app=app)
    chosen = (one for one in found if one.at <= begun and (where is None or where(one)))
    pace = _Pace(rate)
    for letter in islice(chosen, limit):
        pace.wait()
        try:
            outcome.sent[letter.id] = replay(letter.id, queue=queue, app=app)
        except (ReplayRefused, DeadLetterNotFound) as refusal:
            outcome.refused[letter.id] = getattr(refusal, "reason", str(refusal))
        if on_each is not None:
            on_each(letter)
    return outcome


def discard(id: str, *, app: Celery | None = None) -> None:  # noqa: A002
    """Remove a dead letter for good.

    Args:
        id: As in `get`.
        app: As in `count`.

    Raises:
        DeadLetterNotFound: There is none.
    """
    with _place(app) as place:
        if not place.store.discard(place.server, id):
            raise DeadLetterNotFound(id)


def purge(
    where: Callable[[DeadLetter], bool] | None = None,
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Since | None = None,
    replayed: bool = False,
    on_each: Callable[[DeadLetter], None] | None = None,
    app: Celery | None = None,
) -> int:
    """Remove many dead letters for good; return how many that were.

    Args:
        where: Only those for which this is true.
        task: As in `count`.
        cause: As in `count`.
        since: As in `count`.
        replayed: Those that were replayed instead.
        on_each: Called with each when it was removed.
        app: As in `count`.
    """
    begun, removed = time.time(), 0
    if (queue_app := _without_redis(app)) is not None:
        if replayed:
            raise DeadLetterError(f"{_IN_ORDER}: what was replayed is not kept there")
        matches = _filter(task, _cause(cause), _moment(since), where)
        return purge_queue(queue_app, matches, on_each or (lambda _: None))
    found = list(task=task, cause=cause, since=since, oldest_first=True, replayed=replayed, app=app)
    chosen = (one for one in found if one.at <= begun and (where is None or where(one)))
    while some := builtins.list(islice(chosen, _PURGED_AT_ONCE)):
        with _place(app) as place:
            removed += place.store.discard_each(place.server, [one.id for one in some])
        for one in some if on_each is not None else ():
            on_each(one)  # type: ignore[misc]
    return removed


_PURGED_AT_ONCE = 100


#: What is said where there is no Redis.
_IN_ORDER = (
    f"without a Redis dead letters are kept in the queue {DEAD}, which can be read and worked "
    "off in its order alone (list, replay_all, purge)"
)


class _Pace:
    """So many a second, and no more at once after a pause."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._due = rate, time.monotonic()

    def wait(self) -> None:
        """Wait until the next one may go."""
        if self._rate is not None:
            time.sleep(max(self._due - time.monotonic(), 0.0))
            self._due = time.monotonic() + 1.0 / self._rate


def _replay_in_order(
    app: Celery,
    matches: Callable[[DeadLetter], bool],
    outcome: Replayed,
    *,
    limit: int | None,
    rate: float | None,
    queue: str | None,
    tell: Callable[[DeadLetter], None] | None,
) -> None:
    pace = _Pace(rate)

    def send(letter: DeadLetter, original: Original, new_id: str) -> None:
        pace.wait()
        send_from_queue(app, letter, original, new_id, queue=queue)

    def note(letter: DeadLetter, new_id: str, reason: str) -> None:
        if reason:
            outcome.refused[letter.id] = reason
        else:
            outcome.sent[letter.id] = new_id
        if tell is not None:
            tell(letter)

    replay_queue(app, matches, send, limit=limit, tell=note)


def _filter(
    task: str | None,
    cause: str | None,
    since: float | None,
    where: Callable[[DeadLetter], bool] | None = None,
) -> Callable[[DeadLetter], bool]:
    return lambda one: (
        task in (None, one.task)
        and cause in (None, one.cause)
        and (since is None or one.at >= since)
        and (where is None or where(one))
    )


def _without_redis(app: Celery | None) -> Celery | None:
    """Return the app if its dead letters are in RabbitMQ, for it has no Redis."""
    known = _app(app)
    is_amqp = is_amqp_url(as_text(known.conf.broker_read_url))
    return known if is_amqp and dead_place(known) is None else None


def _app(app: Celery | None) -> Celery:
    return cast(Celery, maybe_evaluate(current_app if app is None else app))


@contextmanager
def _place(app: Celery | None) -> Iterator[DeadPlace]:
    place = dead_place(_app(app))
    if place is None:
        is_in_order = _without_redis(app) is not None
        reason = _IN_ORDER if is_in_order else "this app has no Redis for its dead letters"
        raise DeadLetterError(f"{reason}: set reliable_redis_url, or a Redis as the result_backend")
    try:
        yield place
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise StoreUnavailable(place.shown_url, str(error)) from error
    except redis.RedisError as error:
        raise StoreError(f"the Redis of the dead letters refused: {error}") from error


def _cause(cause: Cause | str | None) -> str | None:
    if cause is None:
        return None
    try:
        return Cause(cause)
    except ValueError:
        raise ValueError(f"cause = {cause!r}" + nearest(str(cause), [*Cause])) from None


def _moment(since: Since | None) -> float | None:
    if since is None:
        return None
    if isinstance(since, datetime):
        return since.timestamp()
    ago = since.total_seconds() if isinstance(since, timedelta) else float(since)
    return time.time() - ago
