"""An app's tasks, and how far the app is made."""

from __future__ import annotations

from typing import Any

from celery import Celery

__all__ = [
    "behind_proxy",
    "check_arguments",
    "hard_limit",
    "is_configured",
    "is_finalized",
    "known_tasks",
    "wire_arguments",
]


def behind_proxy(app: Any) -> Celery:
    """Return the app that a proxy like ``current_app`` stands for, or the app itself."""
    find = getattr(app, "_get_current_object", None)
    found: Celery = app if find is None else find()
    return found


def is_configured(app: Celery) -> bool:
    """Say whether the app's configuration was read; asking does not read it."""
    return bool(app.configured)  # type: ignore[attr-defined]


def is_finalized(app: Celery) -> bool:
    """Say whether all of the app's tasks were made; asking does not make them."""
    return bool(app.finalized)  # type: ignore[attr-defined]


def known_tasks(app: Celery) -> list[Any]:
    """Return the tasks that exist so far, without Celery's own.

    ``app.tasks`` would finalize the app, that is make all of its tasks, in the middle of
    reading its configuration.
    """
    registry: dict[str, Any] = app._tasks  # type: ignore[attr-defined]
    return [task for name, task in sorted(registry.items()) if not name.startswith("celery.")]


def wire_arguments(task: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a call's arguments as a worker receives them: models of pydantic as plain data."""
    dump = getattr(task, "_dump_pydantic_arguments", None)  # since 5.7, with pydantic=True
    return dump(args, kwargs) if dump is not None else (args, kwargs)


def check_arguments(task: Any, args: Any, kwargs: Any) -> None:
    """Check a call's arguments as ``apply_async`` does, which asks no task without ``typing``.

    Raises:
        TypeError: They do not fit the task.
    """
    check = getattr(task, "__header__", None)
    if task.typing and check is not None:
        check(*args, **kwargs)


def hard_limit(task: Any, of_call: Any = None) -> float:
    """Return after how many seconds a run is killed, 0 if it never is.

    Args:
        task: The task.
        of_call: The hard and the soft limit that the message carries, if any.
    """
    hard, soft = of_call or (None, None)
    # Before 5.7 a task does not take over the limits of its app, which its worker goes by.
    hard = hard or task.time_limit or task.app.conf.task_time_limit or 0
    soft = soft or task.soft_time_limit or task.app.conf.task_soft_time_limit or 0
    # The timer of the hard limit starts when the soft one has struck.
    return float(max(hard, soft)) if hard else 0.0
