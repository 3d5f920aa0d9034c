"""What a publish of a reliable task returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.result import AsyncResult

from reliable_tasks._places import dead_place

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

    @property
    def replayed_id(self) -> str | None:
        """Id of the task that was sent in the place of this one, which had become a dead letter.

        ``None`` if it was not replayed, or its dead letter was dropped or discarded since.

        Raises:
            redis.RedisError: The Redis of the dead letters does not answer.
        """
        place = dead_place(self.app)
        letter = place.store.get(place.server, self.id) if place is not None else None
        return None if letter is None else letter.replayed_as
