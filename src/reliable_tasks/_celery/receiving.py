"""What a worker does with a message that is no task's: it concerns this message alone.

Celery's handler lets most of what can be wrong with a message end the worker, and its message goes
back to the front of the queue, to end the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.exceptions import InvalidTaskError

from reliable_tasks._celery.channels import held_by
from reliable_tasks._celery.registry import hard_limit

__all__ = ["UNTREATABLE", "carefully", "check_request", "set_apart"]

logger = logging.getLogger("reliable_tasks")

#: What comes of reading a message that is not as it should be. For kombu a `KeyError` is a lost
#: connection.
UNTREATABLE = (TypeError, ValueError, LookupError, AttributeError, RecursionError)


def carefully(consumer: Any, handle: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap a consumer's handler of messages."""

    def on_task_received(message: Any) -> Any:
        try:
            return handle(message)
        except UNTREATABLE as error:
            if message.acknowledged:
                raise
            logger.critical("A message is not a task's: %r", error, exc_info=True)
            set_apart(consumer, message, error)
        except Exception:
            # No request knows of it, so a lost connection must not carry it.
            held = held_by(message.channel)
            if held is not None and held.is_open(message.delivery_tag):
                held.requeue(message.delivery_tag)
                message.channel.qos._quick_ack(message.delivery_tag)
            raise

    return on_task_received


def set_apart(consumer: Any, message: Any, error: Exception | None) -> None:
    """Keep a message that is no task's where somebody can look at it, or reject it."""
    if consumer.rejected.keep(message, error, is_unknown=False):
        message.ack_log_error(logger, consumer.connection_errors)
    else:
        message.reject_log_error(logger, consumer.connection_errors)
    signals.task_rejected.send(sender=consumer, message=message, exc=error)


def check_request(request: Any) -> None:
    """Check what Celery uses only when a slot has been taken for a task.

    Raises:
        InvalidTaskError: It is not as it should be.
    """
    try:
        _, _, embed = request._payload
        if not isinstance(embed or {}, dict):
            raise TypeError(f"what is embedded is {embed!r}")
        _, _ = request.time_limits
        hard_limit(request.task, request.time_limits)
        list(request.stamps)
        hash(request.id)
    except UNTREATABLE as error:
        raise InvalidTaskError(f"its headers or its body are not a task's: {error!r}") from error
