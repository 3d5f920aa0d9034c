"""Dead letters of an app without any Redis: in a quorum queue, to be worked off in order.

What RabbitMQ dropped by itself is there, too, as it was: it knows no more than why.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from celery import Celery

from reliable_tasks._celery.queues import DEAD, dead_queue
from reliable_tasks._dead.letters import raw_of
from reliable_tasks._dead.original import Original
from reliable_tasks._store.dead import Cause, DeadLetter, Letter
from reliable_tasks.errors import ReplayRefused

__all__ = ["bury_in_queue", "count_queue", "purge_queue", "replay_queue", "walk_queue"]

#: Header: the message is a dead letter of ours, and has this id.
_LETTER = "reliable-dead-letter"
#: Why RabbitMQ dropped a message.
_REASONS = {
    "delivery_limit": Cause.POISON,
    "rejected": Cause.REJECTED,
    "expired": Cause.EXPIRED,
}
_KNOWN = frozenset(one.name for one in fields(DeadLetter))

#: A dead letter, and the message that it was.
Found = tuple[DeadLetter, bytes]


def bury_in_queue(app: Celery, letter: Letter) -> None:
    """Keep a letter; its message is to be acknowledged afterwards.

    Raises:
        kombu.exceptions.OperationalError: The broker cannot be reached.
    """
    about = {**letter.about.as_dict(), "at": time.time()}
    message = b"" if letter.is_too_large else letter.message
    queue = dead_queue()
    with app.producer_or_acquire() as producer:
        producer.publish(
            {"about": about, "message": message.decode("utf-8", "surrogateescape")},
            serializer="json",
            exchange=queue.exchange,
            routing_key=DEAD,
            headers={_LETTER: letter.about.id},
            declare=[queue],
            delivery_mode="persistent",
            retry=True,
        )


def count_queue(app: Celery) -> int:
    """Count the letters, those that are just looked at left out."""
    with app.connection_for_read() as connection:
        queue: Any = dead_queue()(connection.default_channel)
        queue.declare()
        return int(queue.queue_declare(passive=True).message_count)


def walk_queue(app: Celery) -> Iterator[DeadLetter]:
    """Yield the letters in their order, and leave them where they are."""
    with _taking(app) as messages:
        for message in messages:
            yield _read(message)[0]


def replay_queue(
    app: Celery,
    where: Callable[[DeadLetter], bool],
    send: Callable[[DeadLetter, Original, str], None],
    *,
    limit: int | None,
    tell: Callable[[DeadLetter, str, str], None],
) -> None:
    """Replay letters in their order, and take those away that were.

    Args:
        app: The app.
        where: Only those for which this is true.
        send: Sends a task under an id.
        limit: At most so many, sent or refused.
        tell: Called with each, and the new task's id, or with why there is none.
    """
    # The same letter twice is one that was kept, and not acknowledged: its worker died in between.
    sent: dict[str, str] = {}
    tried = 0
    with _taking(app) as messages:
        while (limit is None or tried < limit) and (message := next(messages, None)) is not None:
            letter, raw = _read(message)
            if not where(letter):
                continue
            tried += 1
            # The same for the same letter, should it not be taken away now.
            new_id = sent.get(letter.id) or str(uuid.uuid5(uuid.NAMESPACE_OID, letter.id))
            try:
                if letter.id not in sent:
                    send(letter, Original.read(app, letter.id, raw), new_id)
            except ReplayRefused as refusal:
                tell(letter, "", refusal.reason)
                continue
            sent[letter.id] = new_id
            message.ack()
            tell(letter, new_id, "")


def purge_queue(
    app: Celery, where: Callable[[DeadLetter], bool], tell: Callable[[DeadLetter], None]
) -> int:
    """Remove letters for good; return how many."""
    removed = 0
    with _taking(app) as messages:
        for message in messages:
            letter, _ = _read(message)
            if where(letter):
                message.ack()
                removed += 1
                tell(letter)
    return removed


@contextmanager
def _taking(app: Celery) -> Iterator[Iterator[Any]]:
    """Take the messages that are there by now; those that are not acknowledged go back."""
    with app.connection_for_read() as connection:
        queue: Any = dead_queue()(connection.default_channel)
        queue.declare()
        count = int(queue.queue_declare(passive=True).message_count)

        taken: list[Any] = []

        def messages() -> Iterator[Any]:
            for _ in range(count):
                message = queue.get(no_ack=False)
                if message is None:
                    return
                taken.append(message)
                yield message

        rest = messages()
        try:
            yield rest
        finally:
            # RabbitMQ puts what comes back behind all others: so all go back, in their order.
            if not all(message.acknowledged for message in taken):
                deque(rest, maxlen=0)
            for message in taken:
                if not message.acknowledged:
                    message.requeue()


def _read(message: Any) -> Found:
    headers = message.headers or {}
    if _LETTER in headers:
        body = json.loads(message.body)
        raw = str(body["message"]).encode("utf-8", "surrogateescape")
        known = {k: v for k, v in body["about"].items() if k in _KNOWN}
        known |= {"cause": Cause(known["cause"]), "size": len(raw)}
        return DeadLetter(**known), raw
    deaths = headers.get("x-death") or [{}]
    death, raw = deaths[0], raw_of(message)
    died_at = death.get("time")
    task_id = str(headers.get("id") or "")
    return (
        DeadLetter(
            id=task_id or str(uuid.uuid5(uuid.NAMESPACE_OID, repr(raw))),
            task=str(headers.get("task") or ""),
            task_id=task_id,
            cause=_REASONS.get(str(death.get("reason")), Cause.REJECTED),
            error=f"dropped by RabbitMQ: {death.get('reason')}",
            queue=str(death.get("queue") or ""),
            retries=int(headers.get("retries") or 0),
            deliveries=int(headers.get("x-delivery-count") or 0),
            at=died_at.timestamp() if died_at is not None else 0.0,
            argsrepr=str(headers.get("argsrepr") or ""),
            kwargsrepr=str(headers.get("kwargsrepr") or ""),
            root_id=str(headers.get("root_id") or ""),
            size=len(raw),
        ),
        raw,
    )
