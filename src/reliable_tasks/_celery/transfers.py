"""What the main process and its pool children were telling each other when the loop ended.

A lost connection ends Celery's event loop, and with it the generators that write a large task to
a child or read a large result. The child would wait for the rest for ever.
"""

from __future__ import annotations

from types import GeneratorType
from typing import Any

__all__ = ["Transfers"]


class Transfers:
    """The transfers of one event loop; they go on in the next one.

    Args:
        hub: kombu's event loop.
        pool: Celery's pool.
    """

    def __init__(self, hub: Any, pool: Any) -> None:
        self._hub = hub
        self._pool = pool
        self._readers: dict[int, Any] = {}
        reset = hub.reset

        def remember_and_reset() -> None:
            self._remember()
            reset()

        hub.reset = remember_and_reset

    def go_on(self) -> None:
        """Take up what was not finished; called when the next loop is about to begin."""
        readers, self._readers = self._readers, {}
        children = getattr(getattr(self._pool, "_pool", None), "_fileno_to_outq", {})
        for fd, reader in readers.items():
            if fd in children:
                self._hub.add_reader(fd, reader)
        for job in list(getattr(getattr(self._pool, "_pool", None), "_cache", {}).values()):
            writer = getattr(job, "_writer", None)
            child = getattr(job, "_write_to", None)
            unfinished = writer() if writer else None
            if unfinished is not None and child is not None:
                self._hub.add_writer(child.inqW_fd, unfinished)

    def _remember(self) -> None:
        for fd, (callback, _) in list(self._hub.readers.items()):
            if isinstance(callback, GeneratorType):
                self._readers[fd] = callback
