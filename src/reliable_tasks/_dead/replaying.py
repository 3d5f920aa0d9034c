"""Sending the task of a dead letter again, once, whoever asks for it and how often."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from celery import Celery

from reliable_tasks._celery.chords import counts_any_part
from reliable_tasks._celery.headers import IS_COPY, REPLAY_OF
from reliable_tasks._celery.registry import check_arguments
from reliable_tasks._dead.canvas import apart
from reliable_tasks._dead.original import Original
from reliable_tasks._dead.replaying_chords import check_chord, replay_chord
from reliable_tasks._dead.reserving import refusing, releasing, reserve, sending
from reliable_tasks._places import DeadPlace
from reliable_tasks._store.dead import Reservation
from reliable_tasks._store.letters import Cause, DeadLetter
from reliable_tasks._store.publication import Publication, publishing
from reliable_tasks.errors import DeadLetterNotFound, ReplayRefused
from reliable_tasks.instrumentation.signals import dead_letter_replayed

__all__ = ["check", "check_from_queue", "replay", "send_from_queue"]


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
        original = _original(app, place, letter)
        if whole_chord:
            return replay_chord(app, place, letter, original, queue=queue)
        _check_alone(app, letter, original)
    except ReplayRefused:
        # Somebody else may have sent it since the letter was read.
        found = place.store.get(place.server, letter.id)
        if found is None or found.replayed_as is None:
            raise
        return found.replayed_as
    token = str(uuid4())
    code, new_id = reserve(place, letter.id, token)
    if code is not Reservation.SENT:
        with releasing(app, place, letter, {letter.id: new_id}, token, new_id):
            _send(app, letter, original, new_id, queue=queue)
        dead_letter_replayed.send(sender=app.tasks.get(letter.task), letter=letter, task_id=new_id)
    return new_id


def check_from_queue(app: Celery, letter: DeadLetter, raw: bytes) -> Original:
    """Say whether a dead letter that was kept without a Redis can be replayed; return its message.

    Raises:
        ReplayRefused: It cannot.
    """
    original = Original.read(app, letter.id, raw)
    # What RabbitMQ dropped for another reason no chord has counted.
    may_be_counted = original.chord is not None and letter.cause is Cause.REJECTED
    if letter.chord_id is not None or may_be_counted:
        raise ReplayRefused(letter.id, "its chord has counted its failure")
    _check_part(app, letter, original)
    return original


def send_from_queue(
    app: Celery, letter: DeadLetter, original: Original, new_id: str, *, queue: str | None
) -> None:
    """Send the task of a dead letter that was kept without a Redis, under an id.

    Raises:
        ReplayRefused: It cannot be replayed.
    """
    with sending(app, letter, new_id):
        _send(app, letter, original, new_id, queue=queue)
    dead_letter_replayed.send(sender=app.tasks.get(letter.task), letter=letter, task_id=new_id)


def check(app: Celery, place: DeadPlace, letter: DeadLetter, *, whole_chord: bool) -> None:
    """Check that a dead letter can be replayed.

    Raises:
        ReplayRefused: It cannot.
        DeadLetterNotFound: It was removed meanwhile.
    """
    original = _original(app, place, letter)
    if whole_chord:
        check_chord(app, place, letter, original)
    else:
        _check_alone(app, letter, original)


def _original(app: Celery, place: DeadPlace, letter: DeadLetter) -> Original:
    """Return the message of a dead letter."""
    raw = place.store.message(place.server, letter.id)
    if not raw and letter.size:
        raise DeadLetterNotFound(letter.id)
    return Original.read(app, letter.id, raw)


def _check_alone(app: Celery, letter: DeadLetter, original: Original) -> None:
    """Check that the task can be sent without the others of its chord, if it is in one."""
    if letter.chord_id is not None:
        raise ReplayRefused(
            letter.id,
            f"chord {letter.chord_id} has counted its failure, and would not be called for a "
            "success of it: replay(..., whole_chord=True) sends the whole chord anew",
        )
    _check_part(app, letter, original)


def _check_part(app: Celery, letter: DeadLetter, original: Original) -> None:
    """Check that the chord would hear of it that a part waits for which it has not counted."""
    _check_call(app, letter, original)
    if original.chord is not None and not counts_any_part(app):
        raise ReplayRefused(
            letter.id,
            f"it is a part of a chord, which waits for task {letter.task_id} itself: only with a "
            "Redis for a result backend it would hear of another one",
        )


def _check_call(app: Celery, letter: DeadLetter, original: Original) -> None:
    """Check that the task can be called so, and has an `@once` key then."""
    task: Any = app.tasks.get(original.task)
    if task is None:
        return
    with refusing(app, letter):
        check_arguments(task, original.args, original.kwargs)
        once = getattr(task, "reliable_once", None)
        if once is not None:
            once.claim_name(task, original.args, original.kwargs)


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
    # The newer call is the one that counts.
    with publishing(Publication(token=token, replaces=False), new_id):
        result = apart(app, send)
    if getattr(result, "duplicate", False) and result.id != new_id:
        raise ReplayRefused(letter.id, _taken(letter, result.id))


def _taken(letter: DeadLetter, owner: str) -> str:
    """Say who has a replay's key."""
    if owner == letter.task_id:
        return "the window of its @once key is still open: replay it when that is over"
    return f"task {owner} has its @once key: replay it when that has ended"
