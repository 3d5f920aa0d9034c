"""Ending a task unrun, with a final state."""

from __future__ import annotations

from typing import Any

from celery import Task, signals, states
from celery.exceptions import TaskRevokedError

__all__ = ["end_as_revoked"]


def end_as_revoked(task: Task[..., Any], reason: str) -> None:
    """Give the task that is about to run the state ``REVOKED``, and what waits for it as well."""
    request: Any = task.request
    task.backend.mark_as_failure(
        request.id,
        TaskRevokedError(reason),
        request=request,
        # As Celery decides it for an error.
        store_result=not request.ignore_result or task.store_errors_even_if_ignored,
        state=states.REVOKED,
    )
    signals.task_revoked.send(
        sender=task, request=request, terminated=False, signum=None, expired=False
    )
