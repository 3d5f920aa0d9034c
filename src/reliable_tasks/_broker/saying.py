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

__all__ = ["do", "finish_telling", "say", "say_what_waits", "speak_later", "tell"]

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
    """Call who listens: now, or where no keeper waits for it."""
    _call(_teller, telling)


def do(doing: Callable[[], Any]) -> None:
    """Call what has to be done, and may take a while: now, or where no keeper waits for it."""
    _call(_doer, doing)


def _call(teller: _Teller, call: Callable[[], Any]) -> None:
    if not _is_hurried():
        call()
    elif is_patched():
        _waiting.append(call)
    else:
        teller.tell(call)


def say_what_waits() -> None:
    """Say what was kept; the main loop calls it."""
    while _waiting:
        _waiting.popleft()()


def finish_telling() -> None:
    """Wait a little until all is told; a worker that stops calls it."""
    say_what_waits()
    for teller in (_doer, _teller):
        teller.finish(_LAST_WORDS)


def _is_hurried() -> bool:
    return threading.get_native_id() in _hurried


class _Teller:
    """A thread that makes calls, one after the other; it begins with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        # A thread that has not begun: as dead as one that a fork has left behind.
        self._thread = threading.Thread(name=name)

    def tell(self, telling: Callable[[], Any]) -> None:
        """Make a call, after those before."""
        self._calls.put(telling)
        if not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def finish(self, timeout: float) -> None:
        """Wait until all calls are made, but not for longer (s)."""
        if self._thread.is_alive():
            are_made = threading.Event()
            self._calls.put(are_made.set)
            if not are_made.wait(timeout):
                logger.warning(
                    "%s: %d calls are not made before this worker ends, for one takes too long",
                    self._name,
                    # The last one is our own, and the one under way is none of them.
                    self._calls.qsize(),
                )

    def _run(self) -> None:
        while True:
            try:
                self._calls.get()()
            except Exception:
                logger.exception("What has happened cannot be told")


#: Whoever listens can take any time; what has to be done does not wait for it.
_doer, _teller = _Teller("reliable-tasks-doer"), _Teller("reliable-tasks-teller")
