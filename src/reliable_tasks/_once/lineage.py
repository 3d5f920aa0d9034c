"""Which runs have led to a call: what those called that own a key does not wait for itself."""

from __future__ import annotations

from typing import Any

from celery import Celery

from reliable_tasks._once.claim import Run

__all__ = ["LINEAGE", "lineage_of", "lineage_of_call"]

#: Header: the ids of the tasks whose runs have led to a message, the latest last.
LINEAGE = "reliable_lineage"
#: So many are known of a message. Who is further away is as good as a stranger.
_LONGEST = 16


def lineage_of(request: Any) -> list[str]:
    """Return the ids of the tasks whose runs have led to one, as its request has them."""
    found = request.get(LINEAGE)
    return [str(task_id) for task_id in found] if isinstance(found, list) else []


def lineage_of_call(app: Celery, task_id: str | None) -> list[str]:
    """Return the ids of the tasks whose runs lead to a call that is made now.

    It begins with the run of a once-task: nobody else is waited for.

    Args:
        app: The app.
        task_id: Id of the task that is called: a retry has the lineage of what it retries.
    """
    caller: Any = app.current_worker_task
    if caller is None:
        return []
    before = lineage_of(caller.request)
    if caller.request.id == task_id or not (before or Run.of(caller)):
        return before
    return [*before, str(caller.request.id)][-_LONGEST:]
