"""Who hears of the claims of messages that are gone, if they are not kept with the messages."""

from __future__ import annotations

from collections.abc import Callable

from reliable_tasks._store.delivery import Thrown

__all__ = ["listen", "tell_thrown"]

_listeners: list[Callable[[list[Thrown]], None]] = []


def listen(listener: Callable[[list[Thrown]], None]) -> None:
    """Have somebody told of claims that are not kept where the messages were."""
    _listeners.append(listener)


def tell_thrown(thrown: list[Thrown]) -> None:
    """Tell of them."""
    for listener in _listeners:
        listener(thrown)
