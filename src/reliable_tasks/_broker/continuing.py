"""A task that publishes its own continuation: no copy of it must run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import Ignore, Retry
from kombu.exceptions import OperationalError

from reliable_tasks._broker.beside import say_unnoted
from reliable_tasks._celery.headers import DELIVERY
from reliable_tasks._store.delivery import is_beside
from reliable_tasks._store.messages import Messages
from reliable_tasks._store.publication import Publication, Superseded, publishing

__all__ = ["check_held", "continuing", "note_continued"]


@contextmanager
def continuing(
    task: Task[..., Any], published_id: str | None, note_done: Callable[[], None]
) -> Iterator[None]:
    """Have the next message of a task published as the continuation of the one that runs.

    Args:
        task: The task that runs.
        published_id: Id of the task whose message it is; ``None`` for whichever comes.
        note_done: Notes it afterwards, where the broker cannot do it in the same step.
    """
    tag = task.request.get(DELIVERY)
    if not tag or task.request.is_eager:
        yield
        return
    if is_beside(str(tag)):
        try:
            yield
        except (Retry, Ignore):
            # So Celery says that a continuation was published.
            note_done()
            raise
        note_done()
        return
    publication = Publication(
        continues=str(tag),
        task_id=str(task.request.id),
        # Where any message may be meant, what a handler of Celery's signals sends is one, too.
        is_only=published_id is not None,
    )
    with publishing(publication, published_id):
        yield


def check_held(app: Celery, task: Task[..., Any]) -> None:
    """Let a task begin to publish a continuation of more than one message.

    Raises:
        Superseded: Its delivery is over, and somebody else has the task.
    """
    tag = _tag_at_broker(task)
    if tag is None:
        return
    with _messages(app) as (messages, client):
        if not messages.runs.is_held(client, str(task.request.id), tag):
            raise Superseded


def note_continued(app: Celery, task: Task[..., Any], note_done: Callable[[], None]) -> None:
    """Note that a task has published all of a continuation of more than one message."""
    tag = _tag_at_broker(task)
    if tag is None:
        if task.request.get(DELIVERY) and not task.request.is_eager:
            note_done()
        return
    try:
        with _messages(app) as (messages, client):
            messages.runs.note_continued(client, str(task.request.id), tag)
    except (OperationalError, redis.exceptions.RedisError, OSError) as error:
        # All is published: that nobody could be told is no failure of the task.
        say_unnoted(task, error)


def _tag_at_broker(task: Task[..., Any]) -> str | None:
    """Return the tag of the delivery that a task runs, where the broker's scripts know it."""
    tag = str(task.request.get(DELIVERY) or "")
    return tag if tag and not task.request.is_eager and not is_beside(tag) else None


@contextmanager
def _messages(app: Celery) -> Iterator[tuple[Messages, redis.Redis]]:
    with app.producer_or_acquire() as producer:
        channel: Any = producer.channel
        with channel.conn_or_acquire() as client:
            yield channel.held.messages, client
