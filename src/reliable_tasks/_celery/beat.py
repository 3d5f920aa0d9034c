"""Which calls are those of beat: it waits for no result, and logs each error as its own."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from celery.signals import beat_init

__all__ = ["is_called_by_beat"]

_is_beat: ContextVar[bool] = ContextVar("reliable_beat", default=False)


def is_called_by_beat() -> bool:
    """Say whether it is a scheduler that calls a task just now."""
    return _is_beat.get()


@beat_init.connect(weak=False)
def _mark_calls(sender: Any = None, **_: Any) -> None:
    """Know the calls of a scheduler that starts; it may share its process with a worker."""
    scheduler = sender.scheduler
    send = scheduler.apply_async

    def apply_async(*args: Any, **options: Any) -> Any:
        token = _is_beat.set(True)
        try:
            return send(*args, **options)
        finally:
            _is_beat.reset(token)

    scheduler.apply_async = apply_async
