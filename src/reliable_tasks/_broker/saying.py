"""What the keeper's thread has to say: it must wait for nobody, for it renews leases.

Its log lines it writes itself. Who listens to signals can take any time, so what they are told,
a thread of its own tells. Where gevent or eventlet have patched the locks of logging, a native
thread that waits for one can wait for ever: there the worker's main loop does both.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from reliable_tasks._celery.threads import is_patched

__all__ = ["finish_telling", "say", "say_what_waits", "speak_later", "tell"]

logger = logging.getLogger("reliable_tasks")

#: So many log lines wait for the main loop, and no more.
_MOST_LINES = 1000
#: So long a worker that stops waits for those who are told something (s).
_LAST_WORDS = 5.0

#: The numbers of the threads that must not wait.
_hurried: set[int] = set()
#: What the main loop is to do for them.
_waiting: deque[Callable[[], Any]] = deque()


def speak_later() -> None:
    """Have nothing that this thread says keep it waiting."""
    _hurried.add(threading.get_native_id())


def say(level: int, message: str, *args: Any, **options: Any) -> None:
    """Log a line, now or when the main loop turns."""
    if not (_is_hurried() and is_patched()):
        logger.log(level, message, *args, **options)
    elif len(_waiting) < _MOST_LINES:
        # Without its options: the traceback is this moment's.
        _waiting.append(partial(logger.log, level, message, *args))


def tell(telling: Callable[[], Any]) -> None:
    """Call what may log, or keep somebody waiting: now, or where it keeps no keeper."""
    if not _is_hurried():
        telling()
    elif is_patched():
        _waiting.append(telling)
    else:
        _teller.tell(telling)


def say_what_waits() -> None:
    """Say what was kept; the main loop calls it."""
    while _waiting:
        _waiting.popleft()()


def finish_telling() -> None:
    """Wait a little until all is told; a worker that stops calls it."""
    say_what_waits()
    _teller.finish(_LAST_WORDS)


def _is_hurried() -> bool:
    return threading.get_native_id() in _hurried


class _Teller:
    """A thread that makes calls, one after the other; it begins with the first."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        # A thread that has not begun: as dead as one that a fork has left behind.
        self._thread = threading.Thread(name="reliable-tasks-teller")

    def tell(self, telling: Callable[[], Any]) -> None:
        """Make a call, after those before."""
        self._calls.put(telling)
        if not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._run, name="reliable-tasks-teller", daemon=True
            )
            self._thread.start()

    def finish(self, timeout: float) -> None:
        """Wait until all calls are made, but not for longer (s)."""
        if self._thread.is_alive():
            are_made = threading.Event()
            self._calls.put(are_made.set)
            are_made.wait(timeout)

    def _run(self) -> None:
        while True:
            try:
                self._calls.get()()
            except Exception:
                logger.exception("What has happened cannot be told")


_teller = _Teller()
