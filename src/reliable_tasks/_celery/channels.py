"""What a channel says of the messages that came by it."""

from __future__ import annotations

from typing import Any

__all__ = ["held_by", "is_lost"]


def held_by(channel: Any) -> Any:
    """Return what this process holds of a channel's broker, or ``None`` on other transports."""
    return getattr(channel, "held", None)


def is_lost(channel: Any) -> bool:
    """Say whether an AMQP channel is closed, so that its messages are the broker's again."""
    return getattr(channel, "connection", None) is None
