"""What was called in a canvas, to be called anew: without its ids, and as nobody's child."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from celery import Celery
from celery.canvas import Signature

__all__ = ["apart", "thawed"]

#: Options of what was called: its own ids, who was to be told, and the chord that waited for it.
_OF_ONE_CALL = frozenset(
    (
        *("task_id", "group_id", "group_index", "root_id", "parent_id"),
        *("reply_to", "chord"),
    )
)
#: Options that are signatures.
_CALLED_AFTER = ("link", "link_error", "chain")
#: Arguments that are signatures, by the kind of canvas. All others are the user's: they can look
#: like signatures, or be some, and stay as they are.
_MEMBERS = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}


def apart(app: Celery, send: Callable[[], Any]) -> Any:
    """Send where no task is running: what a task sends is its child, and has its stamps."""
    if app.current_worker_task is None:
        return send()
    with ThreadPoolExecutor(max_workers=1) as thread:
        # What is wished for of the message is said in the context.
        return thread.submit(copy_context().run, send).result()


def thawed(app: Celery, called: Mapping[str, Any]) -> Signature[Any]:
    """Return a part of a canvas that was called, without the ids that it and its parts had.

    Raises:
        TypeError, ValueError, LookupError, AttributeError, RecursionError: It is none.
    """
    made: Signature[Any] = app.signature(_without_ids(called))
    return made


def _without_ids(called: Mapping[str, Any]) -> dict[str, Any]:
    options = {k: v for k, v in called["options"].items() if k not in _OF_ONE_CALL}
    kwargs = dict(called["kwargs"])
    for names, found in (
        (_CALLED_AFTER, options),
        (_MEMBERS.get(called["subtask_type"], ()), kwargs),
    ):
        for name in names:
            if found.get(name) is not None:
                found[name] = _each_without_ids(found[name])
    return {**called, "kwargs": kwargs, "options": options}


def _each_without_ids(found: Any) -> Any:
    """Thaw one of them, or several."""
    if isinstance(found, Mapping):
        return _without_ids(found)
    return [_without_ids(one) for one in found]
