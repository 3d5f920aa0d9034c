"""Celery's producer, with what this library has to know of its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu.exceptions import EncodeError

from reliable_tasks._store.publication import Published, PutOff, batching

__all__ = ["Producer", "producer_for"]

#: Errors of a message that could not be made.
_OF_THE_MESSAGE = (EncodeError, TypeError, ValueError, LookupError, AttributeError)
_NO_RETRY = {"max_retries": 0}


class Producer:
    """A producer of kombu's that knows whether it was handed a message.

    Kombu binds a queue to a channel each time that it is to be declared, and then finds that it
    has been; that is a good part of what a publish costs.

    Args:
        producer: Kombu's own.

    Attributes:
        has_begun: Whether a message was handed on.
    """

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.has_begun = False
        self._puts_off = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, *, declare: Any = None, **options: Any) -> Any:
        """Publish a message; takes what kombu's does."""
        self.has_begun = True
        if declare:
            declared = self._producer.connection.declared_entities
            declare = [
                entity
                for entity in declare
                if not (entity.can_cache_declaration and hash(entity) in declared)
            ]
        if self._puts_off and not declare:
            # It only puts the message off, and cannot fail on the way.
            options["retry"] = False
        return self._producer.publish(body, declare=declare, **options)

    @contextmanager
    def batch(self) -> Iterator[list[PutOff]]:
        """Put messages off that are published meanwhile, where the transport can do so."""
        self._puts_off = hasattr(self._producer.channel, "publish_put_off")
        try:
            with batching() as messages:
                yield messages
        finally:
            self._puts_off = False

    def publish_put_off(self, messages: list[PutOff], conf: Any) -> list[Published]:
        """Queue messages that were put off, with retries as the app's settings say."""
        policy = dict(conf.task_publish_retry_policy if conf.task_publish_retry else _NO_RETRY)

        def send() -> list[Published]:
            published: list[Published] = self._producer.channel.publish_put_off(messages)
            return published

        sent: list[Published] = self._producer.connection.ensure(self._producer, send, **policy)()
        return sent

    def may_have_queued(self, error: BaseException) -> bool:
        """Say whether a message may be queued all the same whose publish raised this."""
        if not self.has_begun or isinstance(error, _OF_THE_MESSAGE):
            return False
        # What the broker itself refused is not in doubt; a lost connection is.
        refusals = self._producer.connection.channel_errors
        return not isinstance(error.__cause__ or error, refusals)


@contextmanager
def producer_for(app: Celery, given: Any = None) -> Iterator[Producer]:
    """Give a producer of the app's, or the one that the caller has.

    Kombu closes the connection of one that an exception leaves.
    """
    with app.producer_or_acquire(given) as producer:
        yield Producer(producer)
