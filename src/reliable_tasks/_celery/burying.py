"""A task that has failed for good, and whose message is kept: a dead letter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from billiard.exceptions import Terminated
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError
from celery.worker.request import Request

from reliable_tasks._celery.channels import is_lost, queue_of
from reliable_tasks._celery.delivery import NotYetKept
from reliable_tasks._celery.guarding import GuardedRequest
from reliable_tasks._celery.queues import is_kept_by_rabbitmq
from reliable_tasks._celery.setting_aside import growing

__all__ = ["BuriedRequest"]

logger = logging.getLogger("reliable_tasks")

#: How often it is looked whether a message is kept by now (s).
_UNTIL_KEPT = 0.5
#: When it is tried again to keep what the broker did not, the first time and at most (s).
_UNTIL_TAKEN = (1.0, 60.0)


class BuriedRequest(GuardedRequest):
    """A request whose message becomes a dead letter when its task has failed for good."""

    #: The error that it has failed with, and its traceback, until the message is ended.
    _failure: tuple[BaseException, str] | None = None
    _is_expired = False
    #: Whether the pool has told of more than a success.
    _is_reported = False
    _has_succeeded = False
    #: Whether it is a dead letter, or will be when its message is ended.
    _is_kept = False
    #: Whether its message must not be acknowledged, for it could not be kept as a dead letter.
    _is_unkept = False
    #: The dead letter that is yet to be kept, in a step of its own: how often that was tried, and
    #: when it is tried again (s).
    _owed_letter: Any = None
    _times_untaken = 0
    _until_next_try = 0.0
    _is_tried_again = False

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._failure = None
        self._is_expired = self._is_reported = self._has_succeeded = False
        self._is_kept = self._is_unkept = False
        self._owed_letter, self._times_untaken = None, 0

    def _note_failure(
        self,
        error: BaseException,
        traceback: Any,
        *,
        kind: type[BaseException] | None = None,
        is_ignored: bool = False,
    ) -> None:
        """Note what the task fails with, if that is its end; it may go back to its queue yet.

        Args:
            error: The error.
            traceback: Its traceback.
            kind: What it was for the child, which hands on another one where it cannot be pickled.
            is_ignored: Whether an `Ignore` is the word of the task, not of a handler of its
                failure.
        """
        self._is_reported = True
        goes_on = (
            isinstance(error, (Retry, Terminated))
            or (isinstance(error, Ignore) and is_ignored)
            or (isinstance(error, Reject) and bool(error.requeue))  # type: ignore[attr-defined]
        )
        is_expected = kind not in (None, type(error)) and issubclass(kind, tuple(self.task.throws))
        self._failure = None if goes_on or is_expected else (error, str(traceback or ""))

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's
        """Tell an event, and note that a lost child had stored its result before."""
        if type == "task-succeeded":
            self._has_succeeded = True
        super().send_event(type, **fields)

    def _bury(self) -> None:
        """Keep the message of a task that has failed, at the latest when that is acknowledged."""
        failure, self._failure = self._failure, None
        if failure is None or self._has_succeeded:
            return
        with self._waiting():
            self._keep(failure)

    def _keep(self, failure: tuple[BaseException, str]) -> None:
        letter = self._guard._reliable_letter(self, *failure, is_expired=self._is_expired)
        if letter is None:
            return
        self._is_kept = True
        if self._is_ended_by_letter:
            self._delivery.letter = letter
            self._delivery.when_buried = partial(self._guard._reliable_buried, letter)
        else:
            self._keep_alone(letter)

    def _keep_alone(self, letter: Any) -> None:
        """Keep a letter in a step of its own; if that has to wait, its message does."""
        self._owed_letter = None
        # With an early ack nobody ends the message afterwards, unless its task has expired.
        is_ended_afterwards = self.task.acks_late or self._is_expired
        is_held = is_ended_afterwards and not self.acknowledged and self._consumer is not None
        try:
            is_kept = self._guard._reliable_bury(letter, is_held=is_held)
        except NotYetKept as error:
            self._until_next_try = growing(*_UNTIL_TAKEN, self._times_untaken)
            self._owed_letter, self._times_untaken = letter, self._times_untaken + 1
            logger.error(
                "Task %s[%s] cannot be kept as a dead letter yet, trying again in %g s: %s",
                self.name,
                self.id,
                self._until_next_try,
                error,
            )
            return
        if not is_kept and not self.acknowledged:
            # RabbitMQ has a place for what is rejected.
            self._is_kept, self._is_unkept = False, True

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        if expired:
            self._failure, self._is_expired = (TaskRevokedError(reason), ""), True
        super()._announce_revoked(reason, terminated, signum, expired)  # type: ignore[misc]

    @property
    def _is_ended_by_letter(self) -> bool:
        """Whether the step that ends its delivery keeps the letter."""
        if self._delivery is None or self.acknowledged:
            return False
        # One that was let in unguarded is unknown there.
        return self._beside is None or bool(self._beside.is_open(self._delivery.tag))

    def _reject_for_good(self) -> None:
        """Reject the message when it is kept, unless RabbitMQ would keep it beside the letter."""
        if self.acknowledged:
            return
        queue = queue_of(self.app, self.message)
        if self._is_kept and is_kept_by_rabbitmq(self.app, queue):
            self._end_when_kept(partial(Request.acknowledge, self))
            self.send_event("task-rejected", requeue=False)
        else:
            self._end_when_kept(partial(Request.reject, self, requeue=False))

    def _acknowledge_when_kept(self) -> None:
        """Acknowledge the message when it is kept, or reject what cannot be."""
        self._end_when_kept(partial(Request.acknowledge, self))

    def _end_when_kept(self, end: Callable[[], None]) -> None:
        """End the message, but not before it is kept: should this worker die, the broker has it."""
        timer = self._consumer.timer if self._consumer is not None else None
        if self._is_unkept:
            Request.reject(self, requeue=False)
        elif timer is not None and self._owed_letter is not None:
            # The end of a task can be told twice, as that by a time limit is.
            if not self._is_tried_again:
                self._is_tried_again = True
                timer.call_after(self._until_next_try, partial(self._keep_again, end))
        elif timer is not None and self._is_yet_to_be_kept:
            timer.call_after(_UNTIL_KEPT, partial(self._end_when_kept, end))
        else:
            end()

    def _keep_again(self, end: Callable[[], None]) -> None:
        """Keep a letter that was not taken before, and end its message when it is."""
        self._is_tried_again = False
        if is_lost(self.message.channel):
            # The broker has the message again, and whoever gets it runs the task.
            self.acknowledged = True
            return
        self._keep_alone(self._owed_letter)
        self._end_when_kept(end)

    @property
    def _is_yet_to_be_kept(self) -> bool:
        """Whether it becomes a dead letter when the Redis answers that its broker is beside."""
        if self._beside is None or self._delivery.letter is None:
            return False
        return self._beside.get(self._delivery.tag) is not None

    def _keep_part(self) -> None:
        """Keep the message of a part of a chord that has succeeded: another one may die."""
        is_told = self._is_reported or self._ends_here or self._is_cancelled
        # A copy that is acknowledged unrun says nothing of how its task ends.
        is_success = self._is_accepted and (self._has_succeeded or not is_told)
        if is_success and self.task.acks_late and not self.acknowledged and self.chord:
            with self._waiting():
                self._guard._reliable_keep_part(self)
