"""What a channel says of the messages that came by it."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["held_by", "is_lost", "queue_of"]


def held_by(channel: Any) -> Any:
    """Return what this process holds of a channel's broker, or ``None`` on other transports."""
    return getattr(channel, "held", None)


def is_lost(channel: Any) -> bool:
    """Say whether an AMQP channel is closed, so that its messages are the broker's again."""
    return getattr(channel, "connection", None) is None


def queue_of(message: Any) -> str:
    """Return the queue that a message came by, as far as its transport says."""
    held = held_by(message.channel)
    delivery = held.get(message.delivery_tag) if held is not None else None
    if delivery is not None:
        return str(delivery.queue)
    info = message.delivery_info or {}
    routing_key = str(info.get("routing_key") or "")
    # Behind a delay of RabbitMQ's the queue is what is left of the digits.
    return re.sub(r"^(?:[01]\.)+", "", routing_key)
