"""Messages of kombu's Redis transport: the visibility timeout of stock's, and letting one go."""

from __future__ import annotations

import logging
import time
from typing import Any

from reliable_tasks._celery.channels import held_by

__all__ = ["forget", "is_stock_redis", "restart_timeout", "visibility_timeout"]

logger = logging.getLogger("reliable_tasks")


def is_stock_redis(channel: Any) -> bool:
    """Say whether a channel is of stock kombu's Redis transport."""
    return held_by(channel) is None and hasattr(channel, "unacked_key")


def visibility_timeout(message: Any) -> float | None:
    """Return the broker's timeout where the message came from stock kombu's Redis transport."""
    if not is_stock_redis(message.channel):
        return None
    return float(message.channel.visibility_timeout)


def restart_timeout(message: Any) -> bool:
    """Let a message's visibility timeout begin now, if the broker still counts it as ours."""
    channel = message.channel
    try:
        with channel.conn_or_acquire() as client:
            changed = client.zadd(
                channel.unacked_index_key, {message.delivery_tag: time.time()}, xx=True, ch=True
            )
    except Exception:
        logger.warning("The broker does not answer", exc_info=True)
        return False
    return bool(changed)


def forget(message: Any) -> None:
    """Drop a message from this process without a word to the broker."""
    message.channel.qos._quick_ack(message.delivery_tag)
