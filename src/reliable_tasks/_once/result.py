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
        duplicate: Another task owns the key. Nothing was queued, and this is its result; or, where
            somebody waits for this one, it was queued to end as that one does.
        followed_id: Id of that other task, where this one was queued all the same.
        replaced_id: Id of the task whose place this one has taken: of a call that was replaced
            (``on_conflict="replace"``), or of the task that called itself.
        ignored_id: The ``task_id`` that the caller of a duplicate asked for, which no task has.
    """

    duplicate: bool = False
    followed_id: str | None = None
    replaced_id: str | None = None
    ignored_id: str | None = None
