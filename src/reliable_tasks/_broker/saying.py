"""Log lines of the keeper's thread.

Where gevent or eventlet have patched the locks of logging, a native thread that waits for one
can wait for ever. There its lines are kept until the worker's main loop writes them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

from reliable_tasks._celery.threads import is_patched

__all__ = ["say", "say_what_waits", "speak_later"]

logger = logging.getLogger("reliable_tasks")

#: The numbers of the threads that must not log, and what they would have said.
_silent: set[int] = set()
_waiting: deque[tuple[Any, ...]] = deque(maxlen=1000)


def speak_later() -> None:
    """Keep what this thread says, where it must not wait for a green lock."""
    if is_patched():
        _silent.add(threading.get_native_id())


def say(level: int, message: str, *args: Any, **options: Any) -> None:
    """Log a line, now or when the main loop turns."""
    if threading.get_native_id() in _silent:
        _waiting.append((level, message, *args))
    else:
        logger.log(level, message, *args, **options)


def say_what_waits() -> None:
    """Log what was kept; the main loop calls it."""
    while _waiting:
        logger.log(*_waiting.popleft())
