"""Which runs have led to a call, and which one it comes after: nobody waits for himself."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task

from reliable_tasks._once.claim import Run

__all__ = ["comes_after", "lineage_headers", "lineage_of_call", "note_end"]

#: Header: the ids of the tasks whose runs have led to a message, the latest last.
LINEAGE = "reliable_lineage"
#: Header: id of the task whose end has called this one, as the next of a chain or in its place.
AFTER = "reliable_after"
#: So many are known of a message. Who is further away is as good as a stranger.
_LONGEST = 16


def note_end(task: Task[..., Any]) -> None:
    """Note that the body of a task is over, or that another one takes its place."""
    task.request.update(reliable_body=False)


def comes_after(task: Task[..., Any], task_id: str) -> bool:
    """Say whether it is the end of another task that has called this one."""
    return bool(task.request.get(AFTER) == task_id)


def lineage_headers(app: Celery, task_id: str | None) -> dict[str, Any]:
    """Return what a call that is made now carries of those that have led to it."""
    lineage = lineage_of_call(app, task_id)
    if not lineage:
        return {}
    caller: Any = app.current_worker_task
    if lineage[-1] == caller.request.id and caller.request.get("reliable_body") is False:
        return {LINEAGE: lineage, AFTER: lineage[-1]}
    return {LINEAGE: lineage}


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
    found = caller.request.get(LINEAGE)
    before = [str(known) for known in found] if isinstance(found, list) else []
    if caller.request.id == task_id or not (before or Run.of(caller)):
        return before
    return [*before, str(caller.request.id)][-_LONGEST:]
