"""A task that publishes its own continuation: no copy of it must run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore, Retry

from reliable_tasks._broker.beside import is_beside
from reliable_tasks._celery.headers import DELIVERY
from reliable_tasks._store.publication import Publication, publishing

__all__ = ["continuing", "note_continued"]


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
    publication = Publication(continues=str(tag), task_id=str(task.request.id))
    with publishing(publication, published_id):
        yield


def note_continued(app: Celery, task: Task[..., Any], note_done: Callable[[], None]) -> None:
    """Note that a task has published all of a continuation of more than one message."""
    tag = task.request.get(DELIVERY)
    if not tag or task.request.is_eager:
        return
    if is_beside(str(tag)):
        note_done()
        return
    with app.producer_or_acquire() as producer:
        channel: Any = producer.channel
        held = getattr(channel, "held", None)
        if held is not None:
            with channel.conn_or_acquire() as client:
                held.messages.note_continued(client, str(task.request.id), str(tag))
