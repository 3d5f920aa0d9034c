"""Which exceptions end more than the task that they pass through."""

from __future__ import annotations

import sys
from typing import Any, cast

from billiard import common
from celery.exceptions import WorkerShutdown, WorkerTerminate

__all__ = ["ends_more_than_the_task", "quiet_exit"]


def ends_more_than_the_task(error: BaseException, *, is_limited: bool) -> bool:
    """Say whether somebody else threw this into a task and waits for it to come out.

    Args:
        error: What came out of the task's body, and is no `Exception`.
        is_limited: Whether the task has a hard time limit.
    """
    # A pool child that got SIGTERM. Only its handler's word tells this SystemExit from the
    # task's own.
    if common.terminate_handler_fired():  # type: ignore[attr-defined]
        return True
    # In solo the worker's signal handlers run in the midst of the task.
    if isinstance(error, (WorkerShutdown, WorkerTerminate)):
        return True
    # Revoked, or the worker shuts down: the pool kills the task's greenlet.
    if isinstance(error, _known("greenlet", "GreenletExit")):
        return True
    # Celery's hard limit in gevent.
    return is_limited and isinstance(error, _known("gevent", "Timeout"))


def quiet_exit() -> BaseException:
    """Return what ends a run without a word, raised in a pool's green or other thread."""
    return cast(BaseException, (_known("greenlet", "GreenletExit") or SystemExit)())


def _known(module: str, name: str) -> Any:
    """Return a class if its module was imported, else what nothing is an instance of."""
    return getattr(sys.modules.get(module), name, ())
