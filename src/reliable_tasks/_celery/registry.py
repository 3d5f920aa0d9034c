"""An app's tasks."""

from __future__ import annotations

from typing import Any

from celery import Celery

__all__ = ["known_tasks"]


def known_tasks(app: Celery) -> list[Any]:
    """Return the tasks that exist so far, without Celery's own.

    ``app.tasks`` would finalize the app, that is make all of its tasks, in the middle of
    reading its configuration.
    """
    return [
        task for name, task in sorted(app._tasks.items()) if not name.startswith("celery.")
    ]
