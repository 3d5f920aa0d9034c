"""What a publish of a reliable task returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.result import AsyncResult

if TYPE_CHECKING:
    _AsyncResult = AsyncResult[Any]
else:
    _AsyncResult = AsyncResult

__all__ = ["ReliableResult"]


class ReliableResult(_AsyncResult):
    """Celery's result, which also says whether the call was a duplicate.

    Attributes:
        duplicate: Nothing was queued: this is the result of the task that owns the key.
        replaced_id: Id of the task whose place this one has taken: of a call that was replaced
            (``on_conflict="replace"``), or of the task that called itself.
        ignored_id: The ``task_id`` that the caller of a duplicate asked for, which no task has.
    """

    duplicate: bool = False
    replaced_id: str | None = None
    ignored_id: str | None = None
