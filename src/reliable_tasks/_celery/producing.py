"""Celery's producer, with what this library has to know of its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu.exceptions import EncodeError

__all__ = ["Producer", "producer_for"]

#: Errors of a message that could not be made.
_OF_THE_MESSAGE = (EncodeError, TypeError, ValueError, LookupError, AttributeError)


class Producer:
    """A producer of kombu's that knows whether it was handed a message.

    Args:
        producer: Kombu's own.
        is_passed_by: Whether Celery uses another one, of which nothing is known.

    Attributes:
        has_begun: Whether a message was handed on since the last `forget`, or may have been.
    """

    def __init__(self, producer: Any, *, is_passed_by: bool = False) -> None:
        self._producer = producer
        self._is_passed_by = is_passed_by
        self._puts_off = self._sends_many = False
        self.forget()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, *, declare: Any = None, **options: Any) -> Any:
        """Publish a message; takes what kombu's does."""
        entities = _Undeclared(self._producer, declare or (), self._begin)
        if self._puts_off and not options.get("exchange") and not entities.left():
            # It only puts the message off, and cannot fail on the way.
            return self._producer.publish(body, **{**options, "retry": False})
        return self._producer.publish(body, declare=entities, **options)

    def forget(self) -> None:
        """Know nothing of the messages before."""
        self.has_begun = self._is_passed_by

    def _begin(self) -> None:
        self.has_begun = True

    @contextmanager
    def putting_off(self) -> Iterator[bool]:
        """Say whether what is published meanwhile can be put off, to be queued at once."""
        self._puts_off = not self._is_passed_by and hasattr(
            self._producer.channel, "publish_put_off"
        )
        try:
            yield self._puts_off
        finally:
            self._puts_off = False

    def publish_put_off(self, messages: list[Any], policy: Mapping[str, Any] | None) -> list[Any]:
        """Queue messages that were put off; with a policy, as Celery has them, with retries."""
        self.has_begun = self._sends_many = True
        connection = self._producer.connection

        def send() -> list[Any]:
            published: list[Any] = self._producer.channel.publish_put_off(messages)
            return published

        if policy is None:
            with connection._reraise_as_library_errors():
                return send()
        sent: list[Any] = connection.ensure(self._producer, send, **policy)()
        return sent

    def may_have_queued(self, error: BaseException) -> bool:
        """Say whether a message may be queued all the same whose publish raised this."""
        if self._sends_many:
            # What is said of one message says nothing of the others.
            return True
        if not self.has_begun or isinstance(error, _OF_THE_MESSAGE):
            return False
        # What the broker itself refused is not in doubt; a lost connection is.
        refusals = self._producer.connection.channel_errors
        return not isinstance(error.__cause__ or error, refusals)


class _Undeclared(list[Any]):
    """Those of some queues that a connection has not declared, whenever kombu goes through them.

    It binds each to a channel before it finds that it has been, which is a good part of what a
    publish costs. A publish that is tried again has another connection.

    It does so when it has that connection, and just before it hands the message on.
    """

    def __init__(
        self, producer: Any, entities: Iterable[Any], on_declared: Callable[[], None]
    ) -> None:
        super().__init__(entities)
        self._producer = producer
        self._on_declared = on_declared

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        yield from self.left()
        self._on_declared()

    def left(self) -> list[Any]:
        """Return those that are not declared."""
        declared = self._producer.connection.declared_entities
        return [
            entity
            for entity in super().__iter__()
            if not (entity.can_cache_declaration and hash(entity) in declared)
        ]


@contextmanager
def producer_for(app: Celery, given: Any = None, connection: Any = None) -> Iterator[Producer]:
    """Give a producer of the app's, or the one that the caller has.

    Kombu closes the connection of one that an exception leaves.

    Args:
        app: The app.
        given: A producer of the caller's, if any.
        connection: A connection of the caller's, if any: Celery makes a producer of its own for it.
    """
    with app.producer_or_acquire(given) as producer:
        yield Producer(producer, is_passed_by=connection is not None)
