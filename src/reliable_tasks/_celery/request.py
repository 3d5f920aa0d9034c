"""The worker's side of a task: what its main process does about a message.

Celery's ``Request`` lives in the worker's main process, where it sees what a pool child cannot
report: that it was killed, timed out, revoked or cancelled. ``create_request_cls`` overrides
``execute_using_pool`` and ``on_success`` in a subclass of ours, so those two stay untouched.

Here are Celery's callbacks. `ReliableRequest` stands on `BuriedRequest` (keep what has failed),
that on `GuardedRequest` (may it start?), that on `BudgetedRequest` (has it crashed too often?),
that on `PatientRequest` (run it later), and that on `DeliveredRequest` (what is held of it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]
from billiard.exceptions import TimeLimitExceeded
from celery.exceptions import Reject
from celery.signals import task_failure
from celery.worker import state
from celery.worker.state import reserved_requests, successful_requests

from reliable_tasks._celery.budgets import condemned
from reliable_tasks._celery.burying import BuriedRequest
from reliable_tasks._celery.escaping import has_escaped
from reliable_tasks._celery.exits import is_stopping, quiet_exit
from reliable_tasks._celery.failures import (
    has_exited,
    how_lost,
    info_of,
    lost_worker,
    was_told_to_end,
    without_memory_error,
)
from reliable_tasks._celery.headers import IN_DOUBT
from reliable_tasks._celery.receiving import UNTREATABLE
from reliable_tasks._celery.setting_aside import SetAside, growing
from reliable_tasks._celery.versions import ENDS_EXITS_AND_REJECTS

__all__ = ["ReliableRequest"]

logger = logging.getLogger("reliable_tasks")

#: When it is tried again to store the end of a task, the first time and at most (s).
_UNTIL_STORED = (1.0, 30.0)
#: billiard reports a hard time limit first and kills the child afterwards, within 0.2 s.
_KILL_GRACE = 1.0


class ReliableRequest(BuriedRequest):
    """Celery's request, with nothing lost between a child's death and its message's end."""

    _already_revoked: bool
    _terminate_on_ack: Any
    _times_unstored = 0
    _puts_itself_back = False
    _is_end_stored = False

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._times_unstored = 0
        self._puts_itself_back = self._is_end_stored = False

    def revoked(self) -> bool:
        """Say whether the task must not be started: revoked, expired, or held for too long."""
        if self._already_revoked:
            return True
        self._ends_here = True
        try:
            with self._waiting():
                is_revoked = super().revoked()
        except Exception as error:  # noqa: BLE001 - a backend raises what its client raises
            # In Celery that is the worker's end; and the slot would stay taken.
            self._ends_here = False
            self._set_aside(SetAside(f"its end cannot be stored: {error}", *_UNTIL_STORED))
            return True
        if is_revoked:
            self._settle(requeued=False)
            return True
        self._ends_here = False
        # A task that can expire is asked about when it is received, too.
        if self not in reserved_requests:
            return False
        pause = self._guard._reliable_pause(self.request_dict)
        if pause is not None:
            if self._beside is not None:
                # Its message may come back beside the copy that is sent again.
                self._delivery.is_copy = True
            self._set_aside(pause)
            return True
        return not self._may_start()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Kill a task that was revoked while it runs; its claim is released when it is dead."""
        self._ends_here = bool(self.time_start)
        # Only gevent's and eventlet's pools have this.
        greenlet = getattr(pool, "_pool_map", {}).get(self.worker_pid) if self._ends_here else None
        try:
            super().terminate(pool, signal)
        finally:
            if greenlet is not None:
                # Its pool tells of it as of one that has ended by itself.
                greenlet.link(lambda _: self._settle(requeued=False))

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """Handle a task that failed, was set aside, or whose child is gone."""
        error = _error_of(exc_info)
        if isinstance(error, SetAside):
            self._set_aside(error)
            return
        # Asked once: when its end is stored at a later try, the child was killed for its limit.
        is_first = self._times_unstored == 0
        if is_first and isinstance(error, TimeLimitExceeded) and has_exited(self.worker_pid):
            # billiard looks for dead children every 5 s; the limit's timer can be quicker.
            exc_info = lost_worker(f"died before its hard time limit of {error}")
            error = _error_of(exc_info)
        # In a warm shutdown the child was asked to stop, and has not crashed.
        self._was_told_to_end = is_stopping(state.should_stop) and was_told_to_end(error)
        if isinstance(error, MemoryError):
            # Celery would end the worker for it.
            exc_info = without_memory_error(exc_info)
        if not ENDS_EXITS_AND_REJECTS and isinstance(error, (SystemExit, KeyboardInterrupt)):
            exc_info = lost_worker(repr(error))
            error = _error_of(exc_info)
        if has_escaped(exc_info):
            return_ok = False
        is_timeout = isinstance(error, TimeLimitExceeded)
        if is_timeout and (verdict := condemned(self.request_dict)) is not None:
            # Its handlers hang, and would again.
            error, exc_info, return_ok = verdict, info_of(verdict), False
        kind = exc_info.type
        self._note_failure(error, exc_info.traceback, kind=kind, is_ignored=return_ok)
        self._puts_itself_back = isinstance(error, Reject) and bool(error.requeue)  # type: ignore[attr-defined]
        # With return_ok the child itself reported, and released its claim.
        self._ends_here = not return_ok

        def end() -> None:
            is_rejected = isinstance(error, Reject) and not self._puts_itself_back
            if is_rejected and not ENDS_EXITS_AND_REJECTS:
                self._fail(error, exc_info)
            super(ReliableRequest, self).on_failure(exc_info, send_failed_event, return_ok)

        if not self._ends_in_order(
            end, lambda: self.on_failure(exc_info, send_failed_event, return_ok)
        ):
            return
        if self._is_cancelled and self._held is not None and self._beside is None:
            # Nobody else gives it back: it was not the connection's.
            super().reject(requeue=True)
        if not self._ends_here or self._is_requeued:
            return
        if is_timeout:
            self._call_in(_KILL_GRACE, lambda: self._settle(requeued=False))
        else:
            # A cancelled request's message went back with the connection that was lost.
            self._settle(requeued=self._is_cancelled)

    def _ends_in_order(self, end: Callable[[], None], again: Callable[[], None]) -> bool:
        """End a task whose end the main process stores, and its message when that is done.

        Returns:
            Whether it is stored; if not, it is tried again.
        """
        # It is afterwards, unless it is refused: in the course of it the same copy may begin anew.
        self._keeps_end = self._is_end_stored = True
        try:
            with self._waiting():
                end()
        except UNTREATABLE:
            # No backend could store it, ever.
            logger.exception("The end of task %s[%s] is not stored", self.name, self.id)
            if self._owed_end is None and not self.acknowledged:
                self._owed_end = self.acknowledge
        except Exception as error:  # noqa: BLE001 - a backend raises what its client raises
            self._is_end_stored = False
            self._times_unstored += 1
            pause = growing(*_UNTIL_STORED, self._times_unstored)
            logger.error(
                "The end of task %s[%s] cannot be stored, trying again in %g s: %s",
                self.name,
                self.id,
                pause,
                error,
            )
            self._call_in(pause, lambda: None if self._is_end_stored else again())
            return False
        finally:
            self._keeps_end = False
        if not self.task.acks_late:
            self._bury()
        end_message, self._owed_end = self._owed_end, None
        if end_message is not None:
            end_message()
        return True

    def on_accepted(self, pid: Any, time_accepted: float) -> None:
        """Note that a child, a thread or a greenlet is about to run the task."""
        delivery = self._delivery
        self._is_accepted = True
        if should_terminate() and not self._has_free_slot:
            # It waited for the slot of one that was killed just now, or on Celery 5.6 that ended
            # in its thread. Nobody would kill it; its message goes back with the prefetched.
            raise quiet_exit()
        if self._terminate_on_ack is not None and not self._has_free_slot and self.revoked():
            # Celery would kill what this runs in, and nobody would hear of it.
            raise quiet_exit()
        if delivery is not None and self.task.acks_late and not delivery.is_started:
            may_be_over = delivery.is_ended or self._held.may_be_over(delivery)
            if may_be_over and not self._has_free_slot:
                # It waited in the pool, where nobody asked; the task's body says no. No start is
                # counted, which would come between the message's hand-back and its answer.
                self.request_dict[IN_DOUBT] = True
            else:
                self._note_start()
        if delivery is not None and self.task.acks_late:
            self._expect_end()
        super().on_accepted(pid, time_accepted)

    def cancel(self, *args: Any, **options: Any) -> None:
        """Stop a task whose message goes back: the connection is lost, or the worker ends."""
        self._is_cancelled = True
        try:
            super().cancel(*args, **options)
        except NotImplementedError:
            # Nothing stops a thread. In solo this runs in the midst of the task. So it ends as
            # if nobody had asked.
            self._is_cancelled = False

    def acknowledge(self) -> None:
        """Acknowledge the message, unless it went back already."""
        if self._keeps_end:
            self._owed_end = self.acknowledge
            return
        if should_terminate() and not self._is_green:
            # A child that is killed acknowledges nothing: this one ended in the time that a soft
            # shutdown gave it, and was cancelled before the main process came to know.
            self._is_cancelled = False
        if not self._is_cancelled:
            is_copy = self._beside is not None and self._delivery.is_copy
            is_repetition = self.task.acks_late and (self.delivery_info["redelivered"] or is_copy)
            if is_repetition and not self.acknowledged and not self._ends_here:
                # A copy whose result was stored already is not run, so its child ends nothing.
                self._guard._reliable_repeated(self.request_dict)
            if self._ends_here and self._is_accepted and not self.acknowledged:
                self._guard._reliable_uncovered(self.request_dict)
            if self.task.acks_late:
                self._keep_part()
            if self.task.acks_late or self._is_expired:
                self._bury()
            self._leave(goes_back=False)
            self._note_end()
            if not self._is_left_to_broker():
                self._acknowledge_when_kept()
            return
        # A killed greenlet counts as a success; its copy must not be taken for a repetition.
        successful_requests.discard(self.id)
        self._settle(requeued=True)
        if self._held is not None and self._beside is None and not self.acknowledged:
            # Nobody else gives it back: it was not the connection's.
            super().reject(requeue=True)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Handle a time limit; a task that went back to the queue before it has not failed."""
        # Where it waits here to run again, it was told of by on_failure.
        if not soft and (self._is_requeued or not self._is_accepted):
            return
        if soft:
            super().on_timeout(soft, timeout)
            return
        if (verdict := condemned(self.request_dict)) is not None:
            # In prefork on_failure has ended it.
            if not self._is_reported:
                self.on_failure(info_of(verdict))
            return
        if not self._is_reported:
            # gevent says no more than this; in prefork on_failure came before.
            self._note_failure(TimeLimitExceeded(timeout), None)
        if not self._ends_in_order(
            lambda: super(ReliableRequest, self).on_timeout(soft, timeout),
            lambda: self.on_timeout(soft, timeout),
        ):
            return
        if not self._ends_here:
            self._settle(requeued=False)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message; a requeued one finds its claim free to enter."""
        if self._keeps_end and not requeue:
            self._owed_end = self.reject
            return
        failed_with, _ = self._failure or (None, "")
        is_timeout = isinstance(failed_with, TimeLimitExceeded)
        if requeue and self._ends_here and not self.acknowledged:
            self._is_requeued = True
            # The child is dead, not asked to stop: the crash stands.
            is_asked_for = is_timeout or self._puts_itself_back
            if not (is_asked_for or should_terminate() or self._was_told_to_end):
                self._note_crash(how_lost(failed_with))
            self._settle(requeued=True)
        if not requeue:
            self._bury()
        elif (is_timeout or self._puts_itself_back) and self._put_behind():
            return
        self._leave(goes_back=requeue)
        self._note_end()
        if self._is_left_to_broker():
            return
        if requeue:
            super().reject(requeue)
        else:
            self._reject_for_good()

    def _retry_worker_lost(self, exc: Any, exc_info: Any) -> bool:
        """Put a task back whose child is lost, where Celery 5.7 would publish a retry.

        That would begin the count of its crashes anew.
        """
        if self.task.acks_late:
            self.reject(requeue=True)
            return True
        failure, self._failure = self._failure, None
        is_retried = bool(super()._retry_worker_lost(exc, exc_info))  # type: ignore[misc]
        if not is_retried:
            self._failure = failure
        return is_retried

    def _note_end(self) -> None:
        # The event loop says it to the broker later.
        if self._delivery is not None:
            self._delivery.is_ended = True

    def _fail(self, error: Reject, exc_info: Any) -> None:
        """Give a rejected task a final state, as Celery does since 5.7."""
        self.task.backend.mark_as_failure(
            self.id, error, request=self._context, store_result=self.store_errors
        )
        task_failure.send(
            sender=self.task,
            task_id=self.id,
            exception=error,
            args=self.args,
            kwargs=self.kwargs,
            traceback=exc_info.traceback,
            einfo=exc_info,
        )

    def _call_in(self, seconds: float, function: Callable[[], None]) -> None:
        consumer = self._consumer
        if consumer is None:
            function()
        else:
            consumer.timer.call_after(seconds, function)


def _error_of(exc_info: Any) -> Any:
    error = exc_info.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def should_terminate() -> bool:
    """Say whether a cold shutdown goes on."""
    return is_stopping(state.should_terminate)
