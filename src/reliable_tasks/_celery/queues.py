"""Queues as the broker has them, and where RabbitMQ puts what it would drop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP, Queues
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from reliable_tasks.errors import ConfigError

__all__ = [
    "DEAD",
    "check_queues",
    "dead_queue",
    "find_queue",
    "is_kept_by_rabbitmq",
    "keep_what_is_dropped",
]

#: The exchange, and the quorum queue behind it, of what RabbitMQ would drop.
DEAD = "reliable.dead"
#: How often a quorum queue hands a message out again before it drops it, for it counts what was
#: merely fetched, too: so often that the crash budget comes first. RabbitMQ 4 has 20 by default.
_DELIVERY_LIMIT = 1000
_PRECONDITION_FAILED = 406
#: What a delay of RabbitMQ's puts before a routing key: its digits.
_DELAY = re.compile(r"^(?:[01]\.)+")


class KeepingQueues(Queues):
    """Queues of which RabbitMQ drops nothing."""

    def __setitem__(self, name: str, queue: Any) -> None:
        arguments = dict(queue.queue_arguments or {})
        if arguments.get("x-queue-type") == "quorum":
            # What the user has declared stays.
            arguments.setdefault("x-dead-letter-exchange", DEAD)
            arguments.setdefault("x-delivery-limit", _DELIVERY_LIMIT)
            queue.queue_arguments = arguments
        super().__setitem__(name, queue)


class KeepingAMQP(AMQP):
    """An app's queues and messages, with such queues."""

    queues_cls = KeepingQueues


def keep_what_is_dropped(app: Celery) -> None:
    """Have an app's quorum queues declared with a dead-letter exchange."""
    known: Any = app
    known.amqp_cls = KeepingAMQP
    # What is reading the configuration right now can have made one, and goes on with it.
    made = vars(app).get("amqp")
    if made is not None and made.queues_cls is not KeepingQueues:
        made.queues_cls = KeepingQueues
        for of_other_queues in ("queues", "router"):
            vars(made).pop(of_other_queues, None)


def is_kept_by_rabbitmq(app: Any, name: str) -> bool:
    """Say whether what is rejected of a queue goes to `DEAD`."""
    queues = app.amqp.queues
    arguments = (queues[name].queue_arguments or {}) if name in queues else {}
    return bool(arguments.get("x-dead-letter-exchange") == DEAD)


def find_queue(app: Any, exchange: str, routing_key: str) -> str:
    """Return the queue that a message came by, from where it was sent; else the routing key.

    Of queues that got a copy each, it is one that this process consumes, if it is a worker.
    """
    key = _DELAY.sub("", routing_key)
    if not exchange:
        return key
    found = _bound(app, exchange, routing_key)
    if not found and key != routing_key:
        # The exchange behind a delay is not that of the queue, but routes by its key.
        found = _bound(app, None, key)
    return found[0] if found and key not in found else key


def _bound(app: Any, exchange: str | None, key: str) -> list[str]:
    """Return the queues that a message gets into by its routing key, of an exchange or of any."""
    return [
        name
        for name, queue in app.amqp.queues.consume_from.items()
        if any(_takes(one, exchange, key) for one in (queue, *(queue.bindings or ())))
    ]


def _takes(binding: Any, exchange: str | None, key: str) -> bool:
    if binding.exchange is None or exchange not in (None, binding.exchange.name):
        return False
    pattern = str(binding.routing_key or "")
    kind = binding.exchange.type if exchange is not None else "topic"
    if kind == "direct":
        return pattern == key
    return kind != "topic" or _is_like(pattern.split("."), key.split("."))


def _is_like(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """Say whether the words of a routing key are those of a pattern, as a topic exchange does."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_is_like(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _is_like(pattern[1:], words[1:])


def dead_queue() -> Queue:
    """Return the queue of what RabbitMQ would drop."""
    exchange = Exchange(DEAD, type="fanout", durable=True)
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": _MOST_LOOKS}
    return Queue(DEAD, exchange, durable=True, queue_arguments=arguments)


#: Whoever looks at the queue gives back what it took; each time counts.
_MOST_LOOKS = 1_000_000


def check_queues(app: Celery) -> None:
    """Refuse to start a worker whose queues RabbitMQ knows as something else.

    RabbitMQ cannot change the type of a queue or an exchange. Left alone, the worker would
    connect, be refused and connect again, for ever.

    Raises:
        ConfigError: A queue or its exchange exists with other arguments.
    """
    with app.connection_for_read() as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=5)
        except OperationalError:
            return  # a worker waits for a broker that is not there yet
        # First, for what is dropped before it is there is gone.
        _declare(connection, dead_queue())
        for queue in app.amqp.queues.values():
            _declare(connection, queue)


def _declare(connection: Any, queue: Any) -> None:
    channel = connection.channel()
    try:
        queue(channel).declare()
    except connection.channel_errors as error:
        if getattr(error, "reply_code", None) != _PRECONDITION_FAILED:
            raise
        raise ConfigError(
            f"queue {queue.name!r} or its exchange exists already, of another type or with other "
            f"arguments, which RabbitMQ cannot change ({error}). Let it run empty and delete it; "
            "or give the new one another name (task_default_queue); or keep the old: "
            "reliable_dead_letter_exchange = False if it is a quorum queue, else "
            "task_default_queue_type = task_create_missing_queue_type = 'classic' and "
            "task_default_exchange_type = 'direct'"
        ) from None
    else:
        channel.close()
