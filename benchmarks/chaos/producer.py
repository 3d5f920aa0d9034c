"""Threads that publish tasks, whatever becomes of the broker."""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Self
from uuid import uuid4

from celery import Celery
from kombu.exceptions import OperationalError

from benchmarks.chaos.app import STEP

__all__ = ["Producers"]


class Producers:
    """Publishes from a few threads until told to stop, or until enough is sent.

    Args:
        app: Whose task.
        total: How many to publish; ``None`` for as many as there is time for.
        threads: How many threads.
        pause: Seconds between two publishes of one thread.
        seconds: How long each task runs.

    Attributes:
        sent: Ids of tasks whose publish returned.
        refused: Ids of tasks whose publish raised: they may be queued or not.
        allowed: How many may be sent so far, where something has to happen before the rest.
        slowest: The longest that a publish took (s).
        odd: How many of those raised were no word about the broker.
    """

    def __init__(
        self,
        app: Celery,
        *,
        total: int | None = None,
        threads: int = 2,
        pause: float = 0.0,
        seconds: float = 0.0,
    ) -> None:
        self._task: Any = app.tasks[STEP]
        self._left = total
        self._pause = pause
        self._seconds = seconds
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self.sent: list[str] = []
        self.refused: dict[str, str] = {}
        self.allowed: float = math.inf
        self.slowest = 0.0
        self.odd = 0

    def stop(self) -> None:
        """End, after the publishes under way."""
        self._is_stopped.set()
        for thread in self._threads:
            thread.join()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be sent."""
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while not self._is_stopped.is_set() and self._may_send():
            while len(self.sent) >= self.allowed and not self._is_stopped.wait(0.01):
                pass
            task_id = str(uuid4())
            began = time.monotonic()
            try:
                self._task.apply_async((self._seconds,), task_id=task_id)
            except (OperationalError, OSError) as error:
                self.refused[task_id] = repr(error)
            except AttributeError as error:
                # kombu goes on with a channel that it closed itself when the connection was lost
                # in the declaration of the queue.
                self.refused[task_id] = repr(error)
                self.odd += 1
            else:
                self.sent.append(task_id)
            self.slowest = max(self.slowest, time.monotonic() - began)
            if self._pause:
                time.sleep(self._pause)

    def _may_send(self) -> bool:
        with self._lock:
            if self._left is None:
                return True
            self._left -= 1
            return self._left >= 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
