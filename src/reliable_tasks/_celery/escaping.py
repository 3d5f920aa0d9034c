"""What escapes Celery's tracer in a pool without child processes.

There nobody hears of it: the slot stays taken, and in solo the worker ends. A task's body is
protected already; its handlers, and receivers of Celery's signals, are not.
"""

from __future__ import annotations

import functools
from typing import Any

from billiard.einfo import ExceptionInfo

from reliable_tasks._celery.exits import ends_more_than_the_task
from reliable_tasks.errors import TaskExited

__all__ = ["contain_escapes", "has_escaped"]


def contain_escapes(pool: Any) -> None:
    """Have a pool report what escapes from a task as this task's failure."""
    apply_async = pool.apply_async

    def contained(target: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        return apply_async(_contained(target), args, kwargs, **options)

    pool.apply_async = contained


def has_escaped(exc_info: Any) -> bool:
    """Say whether a failure escaped the tracer, so that no result was stored."""
    return bool(getattr(exc_info, "has_escaped", False))


def _contained(target: Any) -> Any:
    @functools.wraps(target)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except BaseException as error:
            if ends_more_than_the_task(error, is_limited=True, is_told_to_end=True):
                raise
            return 1, _failure(error), 0.0

    return run


def _failure(error: BaseException) -> Any:
    try:
        raise TaskExited(repr(error)) from error
    except TaskExited:
        failure: Any = ExceptionInfo()
    failure.has_escaped = True
    return failure
