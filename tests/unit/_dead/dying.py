"""Tasks and chords that die, and what is in a queue then."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from celery import Celery, chord
from kombu import Queue

from reliable_tasks._dead.letters import raw_of
from reliable_tasks._places import DeadPlace, dead_place
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from tests.unit.harness import run, take


def place_of(app: Celery) -> DeadPlace:
    """Where the letters are."""
    place = dead_place(app)
    assert place is not None
    return place


def die(app: Celery, message: Any = None, **about: Any) -> str:
    """Have the task of a message die, of the next one by default; return its id."""
    message = message or take(app)
    headers = message.headers
    known: dict[str, Any] = {
        "id": headers["id"],
        "task": headers["task"],
        "task_id": headers["id"],
        "cause": Cause.FAILED,
        "error": "ValueError: no",
        "queue": "celery",
        **about,
    }
    place = place_of(app)
    letter = Letter(DeadLetter(**known), raw_of(message), Bounds(3600, 100, 100_000))
    return place.store.bury(place.server, letter, uuid4().hex)[0]


def succeed(app: Celery, message: Any) -> None:
    """Have a part of a chord succeed, as its worker notes it."""
    assert run(app, message).state == "SUCCESS"
    place = place_of(app)
    headers = message.headers
    place.store.keep_part(place.server, headers["group"], headers["id"], raw_of(message), 60)


def replace_body(message: Any, body: Any) -> Any:
    """Return a message that calls its task otherwise."""
    message.body = json.dumps(body)
    return message


def sent(app: Celery, queue: str = "celery") -> list[Any]:
    """The messages in a queue."""
    found = []
    with app.connection_for_read() as connection:
        known: Any = Queue(queue)(connection.default_channel)
        known.declare()
        while (message := known.get(no_ack=True)) is not None:
            found.append(message)
    return found


def start_chord(app: Celery, header: list[Any], body: Any) -> str:
    """Call a chord whose size is noted; return its group."""
    result = chord(header, body, app=app).apply_async()
    assert result.parent is not None
    group_id = str(result.parent.id)
    place = place_of(app)
    place.store.note_chord(place.server, group_id, len(header), 60)
    return group_id


def dead_chord(app: Celery, size: int = 2) -> list[str]:
    """Call a chord all of whose parts die; return the ids of their letters, in its order."""
    header = [app.tasks["shop.pay"].s(n) for n in range(1, size + 1)]
    group_id = start_chord(app, header, app.tasks["shop.total"].s())
    return [die(app, message, chord_id=group_id) for message in sent(app)]
