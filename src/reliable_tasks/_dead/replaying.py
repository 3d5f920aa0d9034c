"""Sending the task of a dead letter again, once, whoever asks for it and how often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from typing import Any
from uuid import uuid4

import redis
from celery import Celery, chain, chord, states
from celery.canvas import Signature

from reliable_tasks._celery.chords import counts_any_part
from reliable_tasks._celery.headers import IS_COPY, REPLAY_OF
from reliable_tasks._dead.canvas import thawed
from reliable_tasks._dead.original import UNREADABLE, Original
from reliable_tasks._places import DeadPlace
from reliable_tasks._store.dead import Reservation, Sent
from reliable_tasks._store.letters import Cause, DeadLetter
from reliable_tasks._store.publication import Publication, publishing
from reliable_tasks.errors import (
    DeadLetterNotFound,
    DuplicateTaskError,
    ReplayRefused,
)
from reliable_tasks.instrumentation.signals import dead_letter_replayed

__all__ = ["check", "replay", "send_from_queue"]

#: How often it is looked whether somebody else has sent it (s).
_LOOK = 0.05
#: How soon it is noted again that it was sent, where Redis does not answer (s).
_AGAIN = (0.1, 0.5)


def replay(
    app: Celery,
    place: DeadPlace,
    letter: DeadLetter,
    *,
    queue: str | None = None,
    whole_chord: bool = False,
) -> str:
    """Send the task of a dead letter under a new id, unless somebody has, and return that id."""
    if letter.replayed_as is not None:
        return letter.replayed_as
    try:
        original = check(app, place, letter, whole_chord=whole_chord)
    except ReplayRefused:
        # Somebody else may have sent it since the letter was read.
        found = place.store.get(place.server, letter.id)
        if found is None or found.replayed_as is None:
            raise
        return found.replayed_as
    if whole_chord:
        return _replay_chord(app, place, letter, original, queue=queue)
    token = str(uuid4())
    code, new_id = _reserve(place, letter.id, token)
    if code is not Reservation.SENT:
        with _releasing(place, letter, [letter.id], token):
            _send(app, letter, original, new_id, queue=queue)
        dead_letter_replayed.send(sender=app.tasks.get(letter.task), letter=letter, task_id=new_id)
    return new_id


def send_from_queue(
    app: Celery, letter: DeadLetter, original: Original, new_id: str, *, queue: str | None
) -> None:
    """Send the task of a dead letter that was kept without a Redis, under an id.

    Raises:
        ReplayRefused: It cannot be replayed.
    """
    # What RabbitMQ dropped for another reason no chord has counted.
    may_be_counted = original.chord is not None and letter.cause is Cause.REJECTED
    if letter.chord_id is not None or may_be_counted:
        raise ReplayRefused(letter.id, "its chord has counted its failure")
    _check_part(app, letter, original)
    with _refusing(letter):
        _send(app, letter, original, new_id, queue=queue)
    dead_letter_replayed.send(sender=app.tasks.get(letter.task), letter=letter, task_id=new_id)


def check(app: Celery, place: DeadPlace, letter: DeadLetter, *, whole_chord: bool) -> Original:
    """Say whether a dead letter can be replayed, and return its message.

    Raises:
        ReplayRefused: It cannot.
        DeadLetterNotFound: It was removed meanwhile.
    """
    raw = place.store.message(place.server, letter.id)
    if not raw and letter.size:
        raise DeadLetterNotFound(letter.id)
    original = Original.read(app, letter.id, raw)
    if whole_chord:
        if letter.chord_id is None:
            raise ReplayRefused(letter.id, "it is no part of a chord: leave out whole_chord")
        parts = _parts(app, place, letter, original)
        _canvas(app, letter, original, parts, queue=None)
    elif letter.chord_id is not None:
        raise ReplayRefused(
            letter.id,
            f"chord {letter.chord_id} has counted its failure, and would not be called for a "
            "success of it: replay(..., whole_chord=True) sends the whole chord anew",
        )
    else:
        _check_part(app, letter, original)
    return original


def _check_part(app: Celery, letter: DeadLetter, original: Original) -> None:
    """Check that the chord would hear of it that a part waits for which it has not counted."""
    if original.chord is not None and not counts_any_part(app):
        raise ReplayRefused(
            letter.id,
            f"it is a part of a chord, which waits for task {letter.task_id} itself: only with a "
            "Redis for a result backend it would hear of another one",
        )


def _reserve(place: DeadPlace, id_: str, token: str) -> tuple[Reservation, str]:
    """Return whether it is ours to send, or was sent, and under which id."""
    while True:
        code, new_id = place.store.reserve(place.server, id_, token)
        if code is Reservation.NOT_FOUND:
            raise DeadLetterNotFound(id_)
        if code is not Reservation.OTHERS:
            return code, new_id
        # Until that one has sent it, or its time is over.
        time.sleep(_LOOK)


@contextmanager
def _refusing(letter: DeadLetter) -> Iterator[None]:
    """Say in other words that a task cannot be called."""
    try:
        yield
    except DuplicateTaskError as error:
        raise ReplayRefused(letter.id, f"its @once key is taken: {error}") from error
    except (TypeError, ValueError, LookupError) as error:
        raise ReplayRefused(letter.id, f"it cannot be called any more: {error!r}") from error


@contextmanager
def _releasing(
    place: DeadPlace, letter: DeadLetter, ids: Iterable[str], token: str
) -> Iterator[None]:
    """Note how the replay of a letter went, and of those that are sent with it."""
    how = Sent.IN_DOUBT
    try:
        with _refusing(letter):
            yield
        how = Sent.SENT
    except ReplayRefused:
        how = Sent.REFUSED
        raise
    finally:
        # What failed is what the caller has to know.
        with nullcontext() if how is Sent.SENT else suppress(Exception):
            for id_ in ids:
                _release(place, id_, token, how)


def _release(place: DeadPlace, id_: str, token: str, how: Sent) -> None:
    """Note how a replay went; what is not noted is in doubt."""
    for pause in (*_AGAIN, None):
        try:
            place.store.release(place.server, id_, token, how)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return


def _send(
    app: Celery,
    letter: DeadLetter,
    original: Original,
    new_id: str,
    *,
    queue: str | None,
) -> None:
    options = {**original.options(), **original.place(), "add_to_parent": False}
    # Who is in doubt may send it twice. Where the broker cannot tell that it had it, the guard can:
    # a copy is not run when another one has ended.
    ours = {REPLAY_OF: letter.id, IS_COPY: True}
    options["headers"] = {**(options.get("headers") or {}), **ours}
    options |= original.destination(app, letter.queue, queue)
    task: Any = app.tasks.get(original.task)
    called = (original.args, original.kwargs)

    def send() -> Any:
        if task is None:
            return app.send_task(original.task, *called, task_id=new_id, **options)
        return task.apply_async(*called, task_id=new_id, **options)

    token = f"replay:{letter.id}:{new_id}"
    with publishing(Publication(token=token), new_id):
        result = _apart(app, send)
    if getattr(result, "duplicate", False) and result.id != new_id:
        reason = f"task {result.id} has its @once key: replay it when that has ended"
        raise ReplayRefused(letter.id, reason)


def _apart(app: Celery, send: Callable[[], Any]) -> Any:
    """Send where no task is running: what a task sends is its child, and has its stamps."""
    if app.current_worker_task is None:
        return send()
    with ThreadPoolExecutor(max_workers=1) as apart:
        # What is wished for of the message is said in the context.
        return apart.submit(copy_context().run, send).result()


# -- a chord ---------------------------------------------------------------------------------


def _parts(
    app: Celery, place: DeadPlace, letter: DeadLetter, original: Original
) -> dict[str, tuple[Original, DeadLetter | None]]:
    """Return the parts of a chord's header by their ids, with the dead letters of the dead."""
    assert letter.chord_id is not None
    with _reading(letter):
        is_in_chord = bool((original.chord or {})["options"].get("chord"))
    if is_in_chord:
        reason = f"chord {letter.chord_id} is itself a part of a chord, which has counted its end"
        raise ReplayRefused(letter.id, reason)
    found: dict[str, tuple[Original, DeadLetter | None]] = {}
    size, parts = place.store.parts(place.server, letter.chord_id)
    for task_id, kept in parts.items():
        if not kept.startswith(b"@"):
            found[task_id] = Original.read(app, letter.id, kept), None
            continue
        id_ = kept[1:].decode()
        other = place.store.get(place.server, id_)
        raw = place.store.message(place.server, id_)
        if other is not None:
            found[task_id] = Original.read(app, letter.id, raw), other
    if not size or len(found) < size:
        raise ReplayRefused(
            letter.id,
            f"of {size or 'nobody knows how many'} parts of chord {letter.chord_id} {len(found)} "
            "are known: the others have not ended, or are no late-ack ReliableTask; or it was "
            "called by an app without apply_reliable_config",
        )
    if letter.id not in (one.id for _, one in found.values() if one is not None):
        raise ReplayRefused(
            letter.id,
            f"chord {letter.chord_id} has noted another end of task {letter.task_id} since: look "
            "for its result, and call the chord anew yourself",
        )
    return found


def _replay_chord(
    app: Celery,
    place: DeadPlace,
    letter: DeadLetter,
    original: Original,
    *,
    queue: str | None,
) -> str:
    parts = _parts(app, place, letter, original)
    header, body = _canvas(app, letter, original, parts, queue=queue)
    # In one order, so that two who replay parts of the same chord meet at the first one.
    dead = sorted((one for _, one in parts.values() if one is not None), key=lambda one: one.id)
    token = str(uuid4())
    answers = _reserve_each(place, dead, token)
    new_ids = {id_: new_id for id_, (_, new_id) in answers.items()}
    codes = {code for code, _ in answers.values()}
    # Whoever has sent one of them has sent all.
    is_sent = Reservation.SENT in codes
    # All are reserved before any is sent: where one was not yet, nothing was sent.
    if codes == {Reservation.IN_DOUBT}:
        is_sent = _is_begun(app, new_ids.values())
        if not is_sent:
            for id_ in new_ids:
                _release(place, id_, token, Sent.IN_DOUBT)
            raise ReplayRefused(
                letter.id,
                f"chord {letter.chord_id} may have been sent already, and none of "
                f"{', '.join(new_ids.values())} has ended yet: look for them, and when you know "
                "that none of them runs or waits, call the chord anew yourself",
            )
    if is_sent:
        for id_ in new_ids:
            _release(place, id_, token, Sent.SENT)
        place.store.forget_parts(place.server, str(letter.chord_id))
        return new_ids[letter.id]
    with _releasing(place, letter, new_ids, token):
        for steps, died in header:
            if died is not None:
                steps[0].set(task_id=new_ids[died.id])
        called = [chain(*steps) if len(steps) > 1 else steps[0] for steps, _ in header]
        _apart(app, lambda: chord(called, app=app)(body))
    place.store.forget_parts(place.server, str(letter.chord_id))
    for one in dead:
        dead_letter_replayed.send(
            sender=app.tasks.get(one.task), letter=one, task_id=new_ids[one.id]
        )
    return new_ids[letter.id]


def _reserve_each(
    place: DeadPlace, letters: Iterable[DeadLetter], token: str
) -> dict[str, tuple[Reservation, str]]:
    """Ask to replay some letters; none of them stays reserved if that fails."""
    answers: dict[str, tuple[Reservation, str]] = {}
    asked: list[str] = []
    try:
        for one in letters:
            asked.append(one.id)
            answers[one.id] = _reserve(place, one.id, token)
    except BaseException:
        # What failed is what the caller has to know. The last answer may have been lost.
        with suppress(Exception):
            for id_ in asked:
                _release(place, id_, token, Sent.REFUSED)
        raise
    return answers


def _is_begun(app: Celery, ids: Iterable[str]) -> bool:
    """Say whether the result backend knows one of some tasks."""
    return any(app.AsyncResult(id_).state != states.PENDING for id_ in ids)


@contextmanager
def _reading(letter: DeadLetter) -> Iterator[None]:
    """Say in other words that a canvas is none; whoever wrote it may have put anything there."""
    try:
        yield
    except UNREADABLE as error:
        raise ReplayRefused(letter.id, f"it cannot be called any more: {error!r}") from error


def _canvas(
    app: Celery,
    letter: DeadLetter,
    original: Original,
    parts: Mapping[str, tuple[Original, DeadLetter | None]],
    *,
    queue: str | None,
) -> tuple[list[tuple[list[Signature[Any]], DeadLetter | None]], Signature[Any]]:
    """Return a chord to be called anew: the steps of each part of its header, and its body."""
    with _reading(letter):
        header = [
            (_steps(app, part, one, queue), one)
            for part, one in sorted(parts.values(), key=lambda found: found[0].index)
        ]
        return header, thawed(app, original.chord or {})


def _steps(
    app: Celery, part: Original, letter: DeadLetter | None, queue: str | None
) -> list[Signature[Any]]:
    """Return a part of a chord's header to be called anew, and the rest of its chain."""
    first = part.signature(app)
    for name in ("link", "link_error"):
        if name in first.options:
            first.options[name] = [thawed(app, one) for one in first.options[name]]
    if letter is not None:
        first.set(headers={**(first.options.get("headers") or {}), REPLAY_OF: letter.id})
    first.set(**part.destination(app, "" if letter is None else letter.queue, queue))
    return [first, *(thawed(app, step) for step in reversed(part.embed.get("chain") or ()))]
