"""What a worker's main process does when the lock Redis is silent."""

from __future__ import annotations

import time

__all__ = ["Silence"]


class Silence:
    """A while in which the lock Redis is asked nothing, for it did not answer.

    The main process cannot wait for it at each message: it has heartbeats to send.

    Args:
        seconds: How long that is.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = 0.0

    def __bool__(self) -> bool:
        return time.monotonic() < self._until

    def begin(self) -> None:
        """Ask nothing from now on."""
        self._until = time.monotonic() + self._seconds

    def end(self) -> None:
        """Ask again."""
        self._until = 0.0
