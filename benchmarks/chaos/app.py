"""The app of both systems, and the one task that they run: it writes down when it runs."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery

from reliable_tasks import ReliableTask, apply_reliable_config

__all__ = [
    "GIL",
    "JOURNAL",
    "OURS",
    "SETTINGS",
    "SPIN",
    "STEP",
    "STOCK",
    "STOCK_DEFAULTS",
    "STOCK_TIMEOUT",
    "SYSTEM",
    "make_app",
]

OURS = "reliable_tasks"
#: With the quickest look for a dead worker's messages that it can be told.
STOCK = "stock Celery"
#: At its own pace there: about once in 100 s.
STOCK_DEFAULTS = "stock Celery, defaults"
STEP = "chaos.step"

#: The environment variables of a worker.
SYSTEM = "RT_CHAOS_SYSTEM"
JOURNAL = "RT_CHAOS_JOURNAL"
SETTINGS = "RT_CHAOS_SETTINGS"

#: How long stock's messages stay with a dead worker (s); its default is an hour.
STOCK_TIMEOUT = 5

#: How a task passes its time, other than by sleeping.
GIL, SPIN = "hold GIL", "spin"


def make_app(system: str, broker: str | None, settings: Mapping[str, Any] | None = None) -> Celery:
    """Return the app of one system.

    Args:
        system: `OURS`, `STOCK` or `STOCK_DEFAULTS`.
        broker: The broker's URL.
        settings: What is not as by default; those of this library are nothing to stock Celery.
    """
    app = Celery("chaos", broker=broker, set_as_current=False)
    app.conf.update(
        settings or {}, task_ignore_result=True, broker_connection_retry_on_startup=True
    )
    options: dict[str, Any] = {"acks_late": True, "reject_on_worker_lost": True}
    if system == OURS:
        apply_reliable_config(app, longest_task=120)
        options = {"base": ReliableTask}
    else:
        pace = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}
        app.conf.broker_transport_options = {
            "visibility_timeout": STOCK_TIMEOUT,
            **(pace if system == STOCK else {}),
            **(app.conf.broker_transport_options or {}),
        }
        # For ever, as apply_reliable_config has it.
        app.conf.broker_connection_max_retries = None

    @app.task(name=STEP, bind=True, shared=False, **options)
    def step(
        task: Any, seconds: float = 0.0, again: float | None = None, how: str | None = None
    ) -> None:
        """Run for so long; a redelivered copy for ``again``, where given."""
        _note("start", task.request)
        is_copy = bool((task.request.delivery_info or {}).get("redelivered"))
        pause = seconds if again is None or not is_copy else again
        if pause:
            _WAYS.get(how, time.sleep)(pause)
        _note("end", task.request)

    return app


def _hold_gil(seconds: float) -> None:
    # Through PyDLL the call keeps what CDLL would release.
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))


def _spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


_WAYS: dict[str | None, Callable[[float], Any]] = {GIL: _hold_gil, SPIN: _spin}


def _note(what: str, request: Any) -> None:
    line = f"{what} {request.id} {request.hostname} {os.getpid()} {time.time():.6f}\n"
    # One write to a file that is only added to: it survives the process, and lines stay whole.
    file = os.open(os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
