"""The worker's side of a task: what its main process does about a message.

Celery's ``Request`` lives in the worker's main process, where it sees what a pool child cannot
report: that it was killed, timed out, revoked or cancelled. ``create_request_cls`` overrides
``execute_using_pool`` and ``on_success`` in a subclass of ours, so those two stay untouched.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback  # type: ignore[attr-defined]
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery
from celery.exceptions import Reject
from celery.signals import task_failure, worker_ready
from celery.worker.request import Request
from celery.worker.state import task_ready

from reliable_tasks._celery.versions import ENDS_EXITS_AND_REJECTS

__all__ = ["GuardedTask", "ReliableRequest", "SetAside"]

logger = logging.getLogger("reliable_tasks")

#: billiard reports a hard time limit first and kills the child afterwards, within 0.2 s.
_KILL_GRACE = 1.0

_consumers: WeakKeyDictionary[Celery, Any] = WeakKeyDictionary()


@worker_ready.connect(weak=False)
def _remember_consumer(sender: Any, **_: Any) -> None:
    _consumers[sender.app] = sender


class SetAside(Reject):
    """Raised in a child: give the message back to the broker, after a pause that holds no slot.

    Attributes:
        seconds: The pause.
    """

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason, requeue=True)
        self.args = (reason, seconds)
        self.seconds = seconds

    def __repr__(self) -> str:
        return f"set aside for {self.seconds:g} s: {self.args[0]}"

    __str__ = __repr__


class GuardedTask(Protocol):
    """What a `ReliableRequest` asks of its task; each is called in the main process."""

    def reserved(self, headers: dict[str, Any]) -> None:
        """A message was received: its headers can still be added to."""

    def unfinished(self, headers: dict[str, Any], *, requeued: bool) -> None:
        """A copy ended without its child having said so, or before it could start."""

    def longest_hold(self, visibility_timeout: float, hard_limit: float) -> float:
        """How many seconds a message may be held before it must not be started any more."""


class ReliableRequest(Request):
    """Celery's request, with nothing lost between a child's death and its message's end."""

    _already_cancelled: bool
    _already_revoked: bool
    _context: Any

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self._received_at = time.monotonic()
        self._child_is_gone = False
        self._is_requeued = False
        self._guard.reserved(self.request_dict)

    def revoked(self) -> bool:
        """Say whether the task must not be started: revoked, expired, or held for too long."""
        was_revoked = self._already_revoked
        if super().revoked():
            if not was_revoked:
                self._settle(requeued=False)
            return True
        return self._was_held_too_long()

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """Handle a task that failed, was set aside, or whose child is gone."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, SetAside):
            self._give_back_in(error.seconds)
            return
        if isinstance(error, TimeLimitExceeded) and _has_exited(self.worker_pid):
            # billiard looks for dead children every 5 s; the limit's timer can be quicker.
            exc_info = _lost_worker(f"died before its hard time limit of {error}")
        if not ENDS_EXITS_AND_REJECTS:
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                exc_info = _lost_worker(repr(error))
            elif isinstance(error, Reject) and not error.requeue:  # type: ignore[attr-defined]
                self._fail(error, exc_info)
        # With return_ok the child itself reported: its claim is released already.
        self._child_is_gone = not return_ok
        super().on_failure(exc_info, send_failed_event, return_ok)
        if not self._child_is_gone or self._is_requeued:
            return
        if isinstance(error, TimeLimitExceeded):
            self._call_in(_KILL_GRACE, lambda: self._settle(requeued=False))
        else:
            # A cancelled request's message went back with the connection that was lost.
            self._settle(requeued=self._already_cancelled)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Handle a time limit; a task that went back to the queue before it has not failed."""
        if soft or not self._is_requeued:
            super().on_timeout(soft, timeout)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message; a requeued one finds its claim free to enter."""
        if requeue and self._child_is_gone and not self.acknowledged:
            self._is_requeued = True
            self._settle(requeued=True)
        super().reject(requeue)

    @property
    def _guard(self) -> GuardedTask:
        return cast(GuardedTask, self.task)

    @property
    def _consumer(self) -> Any:
        return _consumers.get(cast(Celery, self.app))

    def _settle(self, *, requeued: bool) -> None:
        self._guard.unfinished(self.request_dict, requeued=requeued)

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

    def _was_held_too_long(self) -> bool:
        """Keep a message from starting that the broker may hand to somebody else meanwhile.

        Stock kombu redelivers a message a `visibility_timeout` after it was *fetched*, wherever
        it waited since: behind other tasks, for its ETA, for its rate limit.
        """
        timeout = _visibility_timeout(self.message)
        if timeout is None or not self.task.acks_late or self.acknowledged:
            return False
        hard_limit = self.time_limits[0] or self.task.time_limit or 0
        held = time.monotonic() - self._received_at
        if held <= self._guard.longest_hold(timeout, hard_limit):
            return False
        task_ready(self)
        # Past the longest hold of a task without a run, the broker may have passed it on: a
        # requeue would take its successor's entry away. The broker brings it back by itself.
        passed_on = held > self._guard.longest_hold(timeout, 0)
        logger.warning(
            "Task %s[%s] was held for %.1f s and can not be finished before the broker's "
            "visibility_timeout of %g s: %s",
            self.name,
            self.id,
            held,
            timeout,
            "left to its redelivery" if passed_on else "given back unrun",
        )
        if passed_on:
            _forget(self.message)
            self.acknowledged = True
        else:
            self.reject(requeue=True)
        return True

    def _give_back_in(self, seconds: float) -> None:
        task_ready(self)
        consumer = self._consumer
        if consumer is None or self.acknowledged:
            self.reject(requeue=True)
            return
        # As Celery does for an ETA: a message that waits must not use up the prefetch.
        consumer.qos.increment_eventually()

        def give_back() -> None:
            self.reject(requeue=True)
            consumer.qos.decrement_eventually()

        consumer.timer.call_after(seconds, give_back)

    def _call_in(self, seconds: float, function: Callable[[], None]) -> None:
        consumer = self._consumer
        if consumer is None:
            function()
        else:
            consumer.timer.call_after(seconds, function)


def _has_exited(pid: Any) -> bool:
    """Say whether a pool child is dead; leaves it for billiard to reap."""
    if not pid or pid == os.getpid():
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _lost_worker(reason: str) -> ExceptionInfo:
    try:
        raise WorkerLostError(f"Worker exited prematurely: {reason}.")
    except WorkerLostError:
        return ExceptionInfo()


def _visibility_timeout(message: Any) -> float | None:
    """Return the broker's timeout where the message came from kombu's Redis transport."""
    if not hasattr(message.channel, "unacked_key"):
        return None
    return float(message.channel.visibility_timeout)


def _forget(message: Any) -> None:
    """Drop a message from this process without a word to the broker."""
    message.channel.qos._quick_ack(message.delivery_tag)
