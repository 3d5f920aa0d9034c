"""Real threads, also where gevent or eventlet have put green ones in their place."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["is_patched", "native_sleep", "start_native_thread"]


def is_patched() -> str | None:
    """Return ``"gevent"`` or ``"eventlet"`` where it has patched threads, else ``None``."""
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None


def start_native_thread(function: Callable[[], None], name: str) -> None:
    """Run a function in a thread of the operating system that ends with the process."""
    patched = is_patched()
    if patched == "gevent":
        start = sys.modules["gevent.monkey"].get_original("_thread", "start_new_thread")
        start(function, ())
    elif patched == "eventlet":
        start = sys.modules["eventlet.patcher"].original("_thread").start_new_thread
        start(function, ())
    else:
        threading.Thread(target=function, name=name, daemon=True).start()


def native_sleep(seconds: float) -> None:
    """Sleep without a word to any hub."""
    patched = is_patched()
    sleep: Callable[[float], None] = time.sleep
    if patched == "gevent":
        sleep = sys.modules["gevent.monkey"].get_original("time", "sleep")
    elif patched == "eventlet":
        sleep = sys.modules["eventlet.patcher"].original("time").sleep
    sleep(seconds)
