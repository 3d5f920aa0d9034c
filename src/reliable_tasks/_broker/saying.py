"""Log lines of the keeper's thread.

Where gevent or eventlet have patched the locks of logging, a native thread that waits for one
can wait for ever. There its lines are kept until the worker's main loop writes them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from reliable_tasks._celery.threads import is_patched

__all__ = ["say", "say_what_waits", "speak_later", "tell"]

logger = logging.getLogger("reliable_tasks")

#: The numbers of the threads that must not log, and what they would have said.
_silent: set[int] = set()
_waiting: deque[Callable[[], Any]] = deque(maxlen=1000)


def speak_later() -> None:
    """Keep what this thread says, where it must not wait for a green lock."""
    if is_patched():
        _silent.add(threading.get_native_id())


def say(level: int, message: str, *args: Any, **options: Any) -> None:
    """Log a line, now or when the main loop turns."""
    if threading.get_native_id() in _silent:
        # Without its options: the traceback is this moment's.
        tell(partial(logger.log, level, message, *args))
    else:
        logger.log(level, message, *args, **options)


def tell(telling: Callable[[], Any]) -> None:
    """Call what may log, now or when the main loop turns."""
    if threading.get_native_id() in _silent:
        _waiting.append(telling)
    else:
        telling()


def say_what_waits() -> None:
    """Say what was kept; the main loop calls it."""
    while _waiting:
        _waiting.popleft()()
