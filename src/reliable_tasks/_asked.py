"""What a worker's main process asks of a task: the answers to `GuardedTask`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

from celery import Task

from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._dead.keeping import bury, keep_part, tell_buried, tell_crash
from reliable_tasks._dead.letters import bare_letter, letter_of_request
from reliable_tasks._dead.options import Options
from reliable_tasks._once.following import pause_of
from reliable_tasks._once.leaving import end_late, end_unrun, uncover
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import mark_copy
from reliable_tasks._store.letters import Cause, Letter

if TYPE_CHECKING:
    _Task = Task[..., Any]
else:
    _Task = Task

__all__ = ["AskedTask"]

logger = logging.getLogger("reliable_tasks")


class AskedTask(_Task):
    """A task that answers its worker's main process.

    Attributes:
        reliable_once: What `@once` made of the task, or ``None``.
    """

    abstract = True

    reliable_once: ClassVar[Once | None] = None
    _end_options: ClassVar[Options]
    _visibility_margin: ClassVar[float] = 0.0

    def _reliable_reserved(self, headers: dict[str, Any]) -> None:
        if self.reliable_once is not None:
            mark_copy(headers)

    def _reliable_unfinished(
        self, headers: dict[str, Any], *, requeued: bool, has_started: bool
    ) -> None:
        once = self.reliable_once
        if once is not None:
            end_unrun(self, once, headers, requeued=requeued, has_started=has_started)

    def _reliable_uncovered(self, headers: dict[str, Any]) -> None:
        if self.reliable_once is not None:
            uncover(self, self.reliable_once, headers)

    def _reliable_repeated(self, headers: dict[str, Any]) -> None:
        once = self.reliable_once
        if once is not None:
            end_unrun(self, once, headers, requeued=False, has_started=True, is_routine=True)

    def _reliable_heard_late(self, headers: dict[str, Any]) -> None:
        if self.reliable_once is not None:
            end_late(self, self.reliable_once, headers)

    def _reliable_pause(self, headers: dict[str, Any]) -> SetAside | None:
        once = self.reliable_once
        return None if once is None else pause_of(self, once, headers)

    def _reliable_budgets(self) -> tuple[int | None, int | None]:
        return self._end_options.max_crashes, self._end_options.max_requeues

    def _reliable_crashed(self, task_id: str, crashes: int | None, crash: dict[str, Any]) -> None:
        tell_crash(self, task_id, crashes, self._end_options.max_crashes, crash)

    def _reliable_letter(
        self, request: Any, error: BaseException, traceback: str, *, is_expired: bool
    ) -> Letter | None:
        # An error here would end the worker, and lose the task.
        try:
            cause = Cause.EXPIRED if is_expired else None
            return letter_of_request(request, error, traceback, self._end_options, cause)
        except Exception:
            logger.exception("Task %s[%s] has failed, and little is kept", self.name, request.id)
            return bare_letter(request, error, self._end_options)

    def _reliable_bury(self, letter: Letter, *, is_held: bool) -> bool:
        return bury(self.app, self, letter, str(uuid4()), is_held=is_held)

    def _reliable_buried(self, letter: Letter, id: str, count: int) -> None:  # noqa: A002
        tell_buried(self.app, self, letter, id, count)

    def _reliable_keep_part(self, request: Any) -> None:
        if self._end_options.causes:
            keep_part(self.app, request)

    def _reliable_slack(self, visibility_timeout: float) -> float:
        # One half of the margin is for waiting, the other for clocks that differ.
        return min(self._visibility_margin, visibility_timeout) / 2
