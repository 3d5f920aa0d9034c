"""Queues as the broker has them."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from reliable_tasks.errors import ConfigError

__all__ = ["check_queues"]

_PRECONDITION_FAILED = 406


def check_queues(app: Celery) -> None:
    """Refuse to start a worker whose queues RabbitMQ knows as something else.

    RabbitMQ cannot change the type of a queue or an exchange. Left alone, the worker would
    connect, be refused and connect again, for ever.

    Raises:
        ConfigError: A queue or its exchange exists with other arguments.
    """
    with app.connection_for_write() as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=5)
        except OperationalError:
            return  # a worker waits for a broker that is not there yet
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
            f"queue {queue.name!r} or its exchange exists already and is of another type, which "
            f"RabbitMQ cannot change ({error}). Let it run empty and delete it; or give the new "
            "one another name (task_default_queue); or keep the old: task_default_queue_type = "
            "task_create_missing_queue_type = 'classic', task_default_exchange_type = 'direct'"
        ) from None
    else:
        channel.close()
