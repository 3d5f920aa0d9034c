"""What a channel says of the messages that came by it."""

from __future__ import annotations

from typing import Any

from reliable_tasks._celery.queues import find_queue

__all__ = ["held_by", "is_lost", "queue_of"]


def held_by(channel: Any) -> Any:
    """Return what this process holds of a channel's broker, or ``None`` on other transports."""
    return getattr(channel, "held", None)


def is_lost(channel: Any) -> bool:
    """Say whether an AMQP channel is closed, so that its messages are the broker's again."""
    return getattr(channel, "connection", None) is None


def queue_of(app: Any, message: Any) -> str:
    """Return the queue that a message came by, as far as its transport and the app say."""
    held = held_by(message.channel)
    delivery = held.get(message.delivery_tag) if held is not None else None
    if delivery is not None:
        return str(delivery.queue)
    info = message.delivery_info or {}
    return find_queue(app, str(info.get("exchange") or ""), str(info.get("routing_key") or ""))
