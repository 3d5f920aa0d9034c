"""The worker's signal handlers in green pools: they block, so they need a green thread."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from celery import platforms

from reliable_tasks._celery.threads import is_patched

__all__ = ["handle_signals_in_green_threads"]


class GreenSignals(platforms.Signals):
    """Celery's table of signal handlers, each run in a green thread of its own.

    A signal interrupts whatever runs, which in an idle worker is the hub. Celery's handler of a
    cold shutdown sleeps, kills tasks and waits for them: the hub refuses all that, so that the
    soft shutdown ends before it began and a running task goes on for as long as it likes.
    """

    def __setitem__(self, name: int | str, handler: Any) -> None:
        if callable(handler):
            handler = _in_green_thread(handler)
        super().__setitem__(name, handler)


def handle_signals_in_green_threads() -> None:
    """Do so from now on, where gevent or eventlet run this process."""
    if is_patched() and not isinstance(platforms.signals, GreenSignals):
        platforms.signals = GreenSignals()


def _in_green_thread(handler: Callable[..., Any]) -> Callable[..., None]:
    patched = is_patched()

    def handle(*args: Any) -> None:
        if patched == "gevent":
            sys.modules["gevent"].spawn(handler, *args)
        else:
            sys.modules["eventlet"].spawn(handler, *args)

    return handle
