"""Who hears of the claims of messages that are thrown away."""

from __future__ import annotations

import logging
from collections.abc import Callable

from reliable_tasks._store.delivery import Thrown

__all__ = ["listen", "tell"]

logger = logging.getLogger("reliable_tasks")

_listeners: list[Callable[[list[Thrown]], None]] = []


def listen(listener: Callable[[list[Thrown]], None]) -> None:
    """Have somebody told of claims that are not kept where the messages were."""
    _listeners.append(listener)


def tell(thrown: list[Thrown]) -> None:
    """Tell of them. The messages are gone, whatever comes of it."""
    for listener in _listeners:
        try:
            listener(thrown)
        except Exception:
            logger.exception("The claims of purged messages may stay until they lapse")
