"""An app's tasks, and how far the app is made."""

from __future__ import annotations

from typing import Any

from celery import Celery

__all__ = ["is_configured", "is_finalized", "known_tasks", "wire_arguments"]


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
