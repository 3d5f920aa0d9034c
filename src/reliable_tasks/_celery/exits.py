"""Which exceptions end more than the task that they pass through."""

from __future__ import annotations

import sys
from typing import Any, cast

from billiard import common
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker import state

from reliable_tasks._celery.threads import is_patched

__all__ = ["ends_more_than_the_task", "is_stopping", "is_told_to_end", "quiet_exit"]


def ends_more_than_the_task(
    error: BaseException, *, is_limited: bool, is_told_to_end: bool
) -> bool:
    """Say whether somebody else threw this into a task and waits for it to come out.

    Args:
        error: What came out of the task's body, and is no `Exception`.
        is_limited: Whether the task has a hard time limit.
        is_told_to_end: Whether its worker has told it to end, as far as that is known.
    """
    # A pool child that got SIGTERM. Only its handler's word tells this SystemExit from the
    # task's own.
    if common.terminate_handler_fired():  # type: ignore[attr-defined]
        return True
    # In solo the worker's signal handlers run in the midst of the task.
    if isinstance(error, (WorkerShutdown, WorkerTerminate)):
        return True
    if not is_patched():
        return False
    # Revoked, or the worker shuts down: the pool kills the task's greenlet.
    if isinstance(error, _known("greenlet", "GreenletExit")):
        return is_told_to_end
    # Celery's hard limit in gevent.
    return is_limited and isinstance(error, _known("gevent", "Timeout"))


def is_told_to_end(task_id: str) -> bool:
    """Say whether the worker of this process has revoked or cancelled a task that runs here."""
    if is_stopping(state.should_stop) or is_stopping(state.should_terminate):
        return True
    request: Any = state.requests.get(task_id)
    return bool(getattr(request, "is_told_to_end", True))


def is_stopping(flag: Any) -> bool:
    """Read ``should_stop`` or ``should_terminate``: an exit code, and 0 is one."""
    return flag is not None and flag is not False


def quiet_exit() -> BaseException:
    """Return what ends a run without a word, raised in a pool's green or other thread."""
    kind = _known("greenlet", "GreenletExit") if is_patched() else None
    return cast(BaseException, (kind or SystemExit)())


def _known(module: str, name: str) -> Any:
    """Return a class if its module was imported, else what nothing is an instance of."""
    return getattr(sys.modules.get(module), name, ())
