"""Which dead letters somebody asks for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import isfinite
from typing import Any, Self

from reliable_tasks._store.letters import Cause, DeadLetter
from reliable_tasks.config import nearest

__all__ = ["Moment", "Which"]

#: A moment, or how long ago, also in seconds.
Moment = datetime | timedelta | float


@dataclass(frozen=True, slots=True)
class Which:
    """Some dead letters, by what they are.

    Attributes:
        task: Name of the task, or ``None`` for any.
        cause: Why they are here, or ``None`` for any.
        since: Kept then or later (s since the epoch), or ``None``.
        before: Kept before then, or ``None``.
    """

    task: str | None
    cause: str | None
    since: float | None
    before: float | None

    @classmethod
    def of(
        cls,
        task: str | None,
        cause: Cause | str | None,
        since: Moment | None,
        before: Moment | None,
    ) -> Self:
        """Read what a caller gives.

        Raises:
            ValueError: There is no such cause or time.
            TypeError: The task is no name, or the time is none.
        """
        if cause is not None and cause not in [*Cause]:
            raise ValueError(
                f"cause = {cause!r}" + nearest(str(cause), [str(one) for one in Cause])
            )
        if task is not None and not isinstance(task, str):
            raise TypeError(f"task = {task!r}: give its name")
        known = None if cause is None else str(Cause(cause))
        return cls(task, known, _seconds("since", since), _seconds("before", before))

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return (self.task, self.cause, self.since, self.before) == (None, None, None, None)

    def as_options(self) -> dict[str, Any]:
        """Return them as the store takes them."""
        return {
            "task": self.task,
            "cause": self.cause,
            "since": self.since,
            "before": self.before,
        }

    def has(self, letter: DeadLetter) -> bool:
        """Say whether a letter is one of them."""
        return (
            self.task in (None, letter.task)
            and self.cause in (None, letter.cause)
            and (self.since is None or letter.at >= self.since)
            and (self.before is None or letter.at < self.before)
        )


def _seconds(name: str, moment: Moment | None) -> float | None:
    if moment is None:
        return None
    if isinstance(moment, datetime):
        return moment.timestamp()
    ago = moment.total_seconds() if isinstance(moment, timedelta) else moment
    needed = f"{name} = {moment!r}: give a datetime, a timedelta, or how many seconds ago"
    if not isinstance(ago, (int, float)):
        raise TypeError(needed)
    if not isfinite(ago):
        raise ValueError(needed)
    return time.time() - ago
