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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import redis
from celery import Celery, current_app

from reliable_tasks._celery.registry import behind_proxy
from reliable_tasks._dead.original import text_of
from reliable_tasks._dead.queue import IN_ORDER, Pace, Queued, is_in_queue
from reliable_tasks._dead.replaying import check as check_replay
from reliable_tasks._dead.replaying import replay as replay_one
from reliable_tasks._dead.which import Moment, Which
from reliable_tasks._places import DeadPlace, dead_place
from reliable_tasks._store.letters import Cause, DeadLetter
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

#: Takes a dead letter, the id of the task that was sent or ``None``, and why it was not or ``""``.
OnReplayed = Callable[[DeadLetter, str | None, str], None]
#: So many are read in one go.
_PAGE = 200
#: So many are removed in one go.
_REMOVED_AT_ONCE = 100


@dataclass(slots=True)
class Replayed:
    """What came of replaying many dead letters.

    Attributes:
        sent: Ids of the new tasks by those of the dead letters. Of two letters with one id, which
            RabbitMQ's queue can have, that of the later; ``on_each`` is called with both.
        refused: Why the others were not sent, by their ids.
    """

    sent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def count(
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Moment | None = None,
    before: Moment | None = None,
    app: Celery | None = None,
) -> int:
    """Count the dead letters that were not replayed.

    Args:
        task: Only those of the task of this name.
        cause: Only those that are here for this.
        since: Only those that were kept since then: a ``datetime``, or a ``timedelta`` or seconds
            ago.
        before: Only those that were kept before; the same.
        app: The app; the current one by default.

    Raises:
        ValueError: There is no such cause.
    """
    which = Which.of(task, cause, since, before)
    if is_in_queue(known := _app(app)):
        if not which.is_all:
            raise DeadLetterError(f"{IN_ORDER}: there all are counted, or none")
        return Queued(known).count()
    with _place(known) as place:
        return place.store.count(place.server, **which.as_options())


def list(  # noqa: A001 - what everybody calls it
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Moment | None = None,
    before: Moment | None = None,
    limit: int | None = None,
    oldest_first: bool = False,
    replayed: bool = False,
    app: Celery | None = None,
) -> Iterator[DeadLetter]:
    """Yield dead letters, the newest first, without their tracebacks and messages.

    They are read some at a time, when they are asked for, so that Redis is blocked for nobody. One
    that comes or goes meanwhile may be among them or not.

    Args:
        task: As in `count`.
        cause: As in `count`.
        since: As in `count`; with ``replayed`` it is about when that was.
        before: The same.
        limit: At most so many.
        oldest_first: The other way round. Without a Redis it always is.
        replayed: Those that were replayed instead, with ``replayed_as``.
        app: As in `count`.

    Raises:
        ValueError: ``limit`` is less than 0, or there is no such cause.
    """
    _check_limit(limit)
    which = Which.of(task, cause, since, before)
    return _list(_app(app), which, limit, oldest_first=oldest_first, replayed=replayed)


def _list(
    app: Celery, which: Which, limit: int | None, *, oldest_first: bool, replayed: bool
) -> Iterator[DeadLetter]:
    if limit == 0:
        return
    if is_in_queue(app):
        _refuse_replayed(replayed)
        yield from islice(filter(which.has, Queued(app).walk()), limit)
        return
    with _place(app) as place:
        found = place.store.walk(
            place.server,
            **which.as_options(),
            oldest_first=oldest_first,
            replayed=replayed,
            page=_PAGE if limit is None else min(limit, _PAGE),
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
    with _place(_app(app)) as place:
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
    with _place(_app(app)) as place:
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

    Import the task before: one that this process does not know is sent by its name, and takes its
    `@once` key when it starts.

    Args:
        id: As in `get`.
        queue: The queue to send it to; by default the one that it came by. With ``whole_chord`` it
            is that of all parts of the header; by default each goes to its own.
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
    known = _app(app)
    letter = get(id, app=known)
    with _place(known) as place:
        return replay_one(known, place, letter, queue=queue, whole_chord=whole_chord)


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
    known = _app(app)
    letter = get(id, app=known)
    if letter.replayed_as is None:
        with _place(known) as place:
            check_replay(known, place, letter, whole_chord=whole_chord)
    return letter


def replay_all(
    where: Callable[[DeadLetter], bool] | None = None,
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Moment | None = None,
    before: Moment | None = None,
    limit: int | None = None,
    rate: float | None = None,
    queue: str | None = None,
    on_each: OnReplayed | None = None,
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
        before: As in `count`.
        limit: At most so many that are sent.
        rate: At most so many a second.
        queue: As in `replay`.
        on_each: Called with each, and the new task's id, or ``None`` and why it was refused.
        app: As in `count`.

    Raises:
        ValueError: ``rate`` or ``limit`` is no such number, or there is no such cause.
        kombu.exceptions.OperationalError: As in `replay`; those before are sent.
    """
    _check_limit(limit)
    if rate is not None and not rate > 0:
        raise ValueError(f"rate = {rate!r}: give a number of dead letters per second, more than 0")
    known, outcome, pace = _app(app), Replayed(), Pace(rate)
    which = _until_now(known, Which.of(task, cause, since, before))

    def note(letter: DeadLetter, new_id: str | None, reason: str) -> None:
        if new_id is None:
            outcome.refused[letter.id] = reason
        else:
            outcome.sent[letter.id] = new_id
        if on_each is not None:
            on_each(letter, new_id, reason)

    if is_in_queue(known):
        Queued(known).replay(_both(which, where), note, limit=limit, pace=pace, queue=queue)
        return outcome
    found = filter(where, _list(known, which, None, oldest_first=True, replayed=False))
    while limit is None or len(outcome.sent) < limit:
        letter = next(found, None)
        if letter is None:
            break
        pace.wait()
        new_id, reason = None, ""
        try:
            new_id = replay(letter.id, queue=queue, app=known)
        except (ReplayRefused, DeadLetterNotFound) as refusal:
            reason = getattr(refusal, "reason", str(refusal))
        note(letter, new_id, reason)
    return outcome


def discard(id: str, *, app: Celery | None = None) -> None:  # noqa: A002
    """Remove a dead letter for good.

    Args:
        id: As in `get`.
        app: As in `count`.

    Raises:
        DeadLetterNotFound: There is none.
    """
    with _place(_app(app)) as place:
        if not place.store.discard(place.server, id):
            raise DeadLetterNotFound(id)


def purge(
    where: Callable[[DeadLetter], bool] | None = None,
    *,
    task: str | None = None,
    cause: Cause | str | None = None,
    since: Moment | None = None,
    before: Moment | None = None,
    replayed: bool = False,
    on_each: Callable[[DeadLetter], None] | None = None,
    app: Celery | None = None,
) -> int:
    """Remove many dead letters for good, but for those that come meanwhile; return how many.

    Args:
        where: Only those for which this is true.
        task: As in `count`.
        cause: As in `count`.
        since: As in `list`.
        before: As in `list`.
        replayed: Those that were replayed instead.
        on_each: Called with each when it was removed.
        app: As in `count`.

    Raises:
        ValueError: There is no such cause.
    """
    known, tell = _app(app), on_each or (lambda _: None)
    which = _until_now(known, Which.of(task, cause, since, before))
    if is_in_queue(known):
        _refuse_replayed(replayed)
        return Queued(known).purge(_both(which, where), tell)
    removed = 0
    found = filter(where, _list(known, which, None, oldest_first=True, replayed=replayed))
    while some := builtins.list(islice(found, _REMOVED_AT_ONCE)):
        with _place(known) as place:
            removed += place.store.discard_each(place.server, [one.id for one in some])
        for one in some:
            tell(one)
    return removed


def _app(app: Celery | None) -> Celery:
    return behind_proxy(current_app if app is None else app)


def _both(which: Which, where: Callable[[DeadLetter], bool] | None) -> Callable[[DeadLetter], bool]:
    return lambda letter: which.has(letter) and (where is None or where(letter))


def now_of(app: Celery) -> float | None:
    """Return the time by the clock that dead letters are kept by (s since the epoch).

    It is not public, and for the commands.

    Returns:
        The time of their Redis; ``None`` without one, where each bears that of another host.
    """
    if is_in_queue(app):
        return None
    with _place(app) as place:
        return place.store.now(place.server)


def _until_now(app: Celery, which: Which) -> Which:
    """Leave out those that come later."""
    if (now := now_of(app)) is None:
        return which
    # That of this millisecond, too.
    until = now + 0.001
    return replace(which, before=until if which.before is None else min(until, which.before))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 0:
        raise ValueError(f"limit = {limit!r}: give a number of dead letters, 0 or more")


def _refuse_replayed(replayed: bool) -> None:
    if replayed:
        raise DeadLetterError(f"{IN_ORDER}: what was replayed is not kept there")


@contextmanager
def _place(app: Celery) -> Iterator[DeadPlace]:
    place = dead_place(app)
    if place is None:
        reason = IN_ORDER if is_in_queue(app) else "this app has no Redis for its dead letters"
        raise DeadLetterError(f"{reason}: set reliable_redis_url, or a Redis as the result_backend")
    try:
        yield place
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise StoreUnavailable(place.shown_url, str(error)) from error
    except redis.RedisError as error:
        raise StoreError(f"the Redis of the dead letters refused: {error}") from error
