"""The worker's side of a task: what its main process does about a message.

Celery's ``Request`` lives in the worker's main process, where it sees what a pool child cannot
report: that it was killed, timed out, revoked or cancelled. ``create_request_cls`` overrides
``execute_using_pool`` and ``on_success`` in a subclass of ours, so those two stay untouched.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback  # type: ignore[attr-defined]
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from celery.signals import task_failure
from celery.worker import state
from celery.worker.request import Request
from celery.worker.state import (
    active_requests,
    requests,
    reserved_requests,
    successful_requests,
    task_ready,
    task_reserved,
)

from reliable_tasks._celery.consumer import held_by, is_lost
from reliable_tasks._celery.exits import quiet_exit
from reliable_tasks._celery.registry import hard_limit
from reliable_tasks._celery.versions import ENDS_EXITS_AND_REJECTS

__all__ = [
    "DELIVERY",
    "IS_COPY",
    "OF_ONE_COPY",
    "GuardedTask",
    "ReliableRequest",
    "SetAside",
    "remember_consumer",
]

logger = logging.getLogger("reliable_tasks")

#: billiard reports a hard time limit first and kills the child afterwards, within 0.2 s.
_KILL_GRACE = 1.0

#: Enough for any pause to reach its longest, and few enough for a float.
_MOST_DOUBLINGS = 20

#: So many copies may wait in a worker beyond its prefetch.
_MOST_WAITING = 100

#: A copy looks so often at least whether the other one is still alive (s).
_WHILE_HELD_ELSEWHERE = 5.0

#: Where it cannot wait in the worker, it looks more often at first: the other one may be dead.
_MOST_LOOKS = 12
_AT_FIRST = 1.0

#: A run that outlives its hard limit by so much has hung (s): its lease is left to end.
_HUNG_AFTER = 30.0

#: Header, of one delivery: its tag.
DELIVERY = "reliable_delivery"
#: Headers of a copy that waits in the broker: its message was delivered before, ...
IS_COPY = "reliable_copy"
#: ... and so many times it was set aside.
_TIMES = "reliable_set_aside"
OF_ONE_COPY = (IS_COPY, _TIMES)

_waiting: weakref.WeakSet[Any] = weakref.WeakSet()
_consumers: WeakKeyDictionary[Celery, weakref.ref[Any]] = WeakKeyDictionary()


def remember_consumer(app: Celery, consumer: Any) -> None:
    """Note who runs an app's tasks in this process: it has the timer and the prefetch count."""
    _consumers[app] = weakref.ref(consumer)


class SetAside(Reject, Ignore):
    """Raised in a child: run this copy later, after a pause that holds no slot.

    A `Reject` with requeue, should nobody understand it; an `Ignore`, which ``autoretry_for``
    leaves alone.

    Attributes:
        first: The first pause (s); it doubles each time that the same copy is set aside.
        longest: The longest pause (s).
    """

    def __init__(self, reason: str, first: float, longest: float) -> None:
        super().__init__(reason, requeue=True)
        self.args = (reason, first, longest)
        self.first = first
        self.longest = longest

    def __repr__(self) -> str:
        return f"set aside: {self.args[0]}"

    __str__ = __repr__


class GuardedTask(Protocol):
    """What a `ReliableRequest` asks of its task; each is called in the main process."""

    def _reliable_reserved(self, headers: dict[str, Any]) -> None:
        """A message was received: its headers can still be added to."""

    def _reliable_unfinished(self, headers: dict[str, Any], *, requeued: bool) -> None:
        """A copy ended without its child having said so, or before it could start."""

    def _reliable_repeated(self, headers: dict[str, Any]) -> None:
        """A redelivered copy is about to be acknowledged; perhaps it did not run."""

    def _reliable_slack(self, visibility_timeout: float) -> float:
        """How many seconds of a visibility timeout must not be counted on."""


class ReliableRequest(Request):
    """Celery's request, with nothing lost between a child's death and its message's end."""

    _already_revoked: bool
    _context: Any
    _message: Any
    _on_ack: Any
    _on_reject: Any

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self._received_at = time.monotonic()
        self._ends_here = False
        self._is_cancelled = False
        self._is_requeued = False
        self._times_set_aside = 0
        self._held = held_by(message.channel)
        self._delivery: Any = None if self._held is None else self._held.get(message.delivery_tag)
        self._beside: Any = None
        if self._held is None and self.task.acks_late:
            self._held = self._beside = getattr(self._consumer, "beside", None)
        if self._beside is not None:
            self._times_set_aside = int(self.request_dict.get(_TIMES) or 0)
            self._delivery = self._expect()
        if self._delivery is not None:
            # Of this delivery; a retry must not inherit them. With an early ack it is over
            # before the task could continue itself.
            if self.task.acks_late:
                self.request_dict[DELIVERY] = self._delivery.tag
            self.request_dict["crashes"] = self._delivery.copy.crashes
        self._guard._reliable_reserved(self.request_dict)

    def revoked(self) -> bool:
        """Say whether the task must not be started: revoked, expired, or held for too long."""
        if self._already_revoked:
            return True
        self._ends_here = True
        if super().revoked():
            self._settle(requeued=False)
            return True
        self._ends_here = False
        # A task that can expire is asked about when it is received, too.
        return self in reserved_requests and not self._may_start()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Kill a task that was revoked while it runs; its claim is released when it is dead."""
        self._ends_here = bool(self.time_start)
        super().terminate(pool, signal)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """Handle a task that failed, was set aside, or whose child is gone."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, SetAside):
            self._set_aside(error)
            return
        if isinstance(error, TimeLimitExceeded) and _has_exited(self.worker_pid):
            # billiard looks for dead children every 5 s; the limit's timer can be quicker.
            exc_info = _lost_worker(f"died before its hard time limit of {error}")
        if isinstance(error, MemoryError):
            # Celery would end the worker for it.
            exc_info = _without_memory_error(exc_info)
        if not ENDS_EXITS_AND_REJECTS:
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                exc_info = _lost_worker(repr(error))
            elif isinstance(error, Reject) and not error.requeue:  # type: ignore[attr-defined]
                self._fail(error, exc_info)
        # With return_ok the child itself reported, and released its claim.
        self._ends_here = not return_ok
        super().on_failure(exc_info, send_failed_event, return_ok)
        if self._is_cancelled and self._held is not None and self._beside is None:
            # Nobody else gives it back: it was not the connection's.
            super().reject(requeue=True)
        if not self._ends_here or self._is_requeued:
            return
        if isinstance(error, TimeLimitExceeded):
            self._call_in(_KILL_GRACE, lambda: self._settle(requeued=False))
        else:
            # A cancelled request's message went back with the connection that was lost.
            self._settle(requeued=self._is_cancelled)

    def on_accepted(self, pid: Any, time_accepted: float) -> None:
        """Note that a child, a thread or a greenlet is about to run the task."""
        delivery = self._delivery
        if should_terminate() and not self._has_free_slot:
            # It waited for the slot of one that was killed just now, or on Celery 5.6 that ended
            # in its thread. Nobody would kill it; its message goes back with the prefetched.
            raise quiet_exit()
        if delivery is not None and self.task.acks_late and not delivery.is_started:
            self._note_start()
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
        if should_terminate() and not self._is_green:
            # A child that is killed acknowledges nothing: this one ended in the time that a soft
            # shutdown gave it, and was cancelled before the main process came to know.
            self._is_cancelled = False
        if not self._is_cancelled:
            is_repetition = self.task.acks_late and self.delivery_info["redelivered"]
            if is_repetition and not self.acknowledged and not self._ends_here:
                # A copy whose result was stored already is not run, so its child ends nothing.
                self._guard._reliable_repeated(self.request_dict)
            self._leave(goes_back=False)
            if not self._is_left_to_broker():
                super().acknowledge()
            return
        # A killed greenlet counts as a success; its copy must not be taken for a repetition.
        successful_requests.discard(self.id)
        self._settle(requeued=True)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Handle a time limit; a task that went back to the queue before it has not failed."""
        if self._is_requeued and not soft:
            return
        super().on_timeout(soft, timeout)
        if not soft and not self._ends_here:
            # gevent says no more than this; in prefork on_failure came before.
            self._settle(requeued=False)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message; a requeued one finds its claim free to enter."""
        if requeue and self._ends_here and not self.acknowledged:
            self._is_requeued = True
            if self._delivery is not None:
                # The child is dead, not asked to stop: the crash stands.
                self._delivery.has_crashed = not should_terminate()
            self._settle(requeued=True)
        self._leave(goes_back=requeue)
        if not self._is_left_to_broker():
            super().reject(requeue)

    @property
    def _guard(self) -> GuardedTask:
        return cast(GuardedTask, self.task)

    @property
    def _consumer(self) -> Any:
        found = _consumers.get(cast(Celery, self.app))
        return found() if found is not None else None

    @property
    def _is_green(self) -> bool:
        consumer = self._consumer
        return consumer is not None and bool(getattr(consumer.pool, "is_green", False))

    @property
    def _has_free_slot(self) -> bool:
        """Whether the task runs as soon as it is handed to the pool, and not in its turn.

        It does in prefork, whose child cannot tell before its user's code runs. In the other
        pools a task that waits there has not been started; `on_accepted` says when it is.
        """
        consumer = self._consumer
        return consumer is None or bool(getattr(consumer.pool, "uses_semaphore", True))

    @property
    def is_guarded(self) -> bool:
        """Whether no copy of the task is let in elsewhere until this one has ended."""
        return self._beside is not None and bool(self._beside.is_open(self._delivery.tag))

    def _expect(self) -> Any:
        """Return the run that begins when this copy is let in."""
        is_redelivered = bool(self.delivery_info["redelivered"])
        return self._beside.expect(self.request_dict, is_redelivered=is_redelivered)

    def _leave(self, *, goes_back: bool) -> None:
        """End the run, where it is kept beside the broker; before the message is ended."""
        if self._beside is None:
            return
        self._delivery.is_lost = is_lost(self.message.channel)
        end = self._beside.requeue if goes_back else self._beside.settle
        end(self._delivery.tag)

    def _is_left_to_broker(self) -> bool:
        """Say whether nothing can be said of the message: its connection was lost."""
        if self._beside is None or self.acknowledged or not is_lost(self.message.channel):
            return False
        # The copy that the broker made of it will be.
        self.acknowledged = True
        return True

    def _settle(self, *, requeued: bool) -> None:
        self._leave(goes_back=requeued)
        self._guard._reliable_unfinished(self.request_dict, requeued=requeued)

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

    def _may_start(self) -> bool:
        """Keep a message from starting that the broker may hand to somebody else meanwhile.

        Stock kombu redelivers a message a `visibility_timeout` after it was *fetched*, wherever
        it waited since: behind other tasks, for its ETA, for its rate limit. So where the rest
        of the timeout does not cover the run, it is started anew; once it is used up, the
        message belongs to the copy that the broker has made or is about to make.
        """
        if self._delivery is not None:
            return self._may_start_on_lease()
        timeout = _visibility_timeout(self.message)
        if timeout is None or self.acknowledged:
            return True
        limit = hard_limit(self.task, self.time_limits)
        slack = self._guard._reliable_slack(timeout)
        held = time.monotonic() - self._received_at
        if held + limit <= timeout - slack:
            return True
        restarted_at = time.monotonic()
        if held < timeout - slack and _restart_timeout(self.message):
            self._received_at = restarted_at
            return True
        task_ready(self)
        logger.warning(
            "Task %s[%s] was held for %.1f s, as long as the broker's visibility_timeout: it is "
            "left to its redelivery",
            self.name,
            self.id,
            held,
        )
        _forget(self.message)
        self.acknowledged = True
        return False

    def _may_start_on_lease(self) -> bool:
        """Keep a copy from starting while another one of the same task is alive."""
        delivery = self._delivery
        if not self.task.acks_late or self.acknowledged:
            return True
        if self._is_left_to_broker():
            task_ready(self)
            return False
        if not delivery.copy.may_run or self._held.may_be_over():
            self._held.hold(delivery)
            self.request_dict["crashes"] = delivery.copy.crashes
        if self._beside is not None and not delivery.copy.may_run:
            self._refuse(delivery.copy)
            return False
        if delivery.copy.is_over:
            task_ready(self)
            logger.warning(
                "Task %s[%s] is not started here: its lease ended, and others have it",
                self.name,
                self.id,
            )
            self._held.forget(delivery.tag)
            _forget(self.message)
            self.acknowledged = True
            return False
        if not delivery.copy.may_run:
            seconds = min(delivery.copy.seconds, _WHILE_HELD_ELSEWHERE)
            self._set_aside(SetAside("another copy of it is alive", 0.05, max(seconds, 0.05)))
            return False
        if self._has_free_slot:
            self._note_start()
        return True

    def _refuse(self, copy: Any) -> None:
        """Keep a copy from starting that another broker delivered."""
        runner = self._other_here()
        if copy.is_over:
            task_ready(self)
            logger.warning(
                "Task %s[%s] is not run again: another copy of it has ended", self.name, self.id
            )
            self.acknowledge()
        elif copy.is_unknown:
            reason = "the lock Redis does not say whether it runs elsewhere"
            self._set_aside(SetAside(reason, 0.05, copy.seconds))
        elif runner is not None and runner.take_over(self):
            task_ready(self)
            logger.info("Task %s[%s] runs here: its message is its own again", self.name, self.id)
        else:
            longest = _AT_FIRST if self._times_set_aside < _MOST_LOOKS else _WHILE_HELD_ELSEWHERE
            self._set_aside(SetAside("another copy of it is alive", 0.05, longest))
        if runner is not None:
            # Celery knows but one request of an id: that by which a run can be revoked.
            requests[self.id] = runner

    def _other_here(self) -> ReliableRequest | None:
        """Return the request of the copy that runs, if it runs in this worker."""
        for other in (*active_requests, *reserved_requests):
            if other.id == self.id and other is not self and getattr(other, "is_guarded", False):
                return cast(ReliableRequest, other)
        return None

    def take_over(self, copy: ReliableRequest) -> bool:
        """Take the message of a copy for the one that was lost with its connection."""
        if copy._delivery.order != self._delivery.order or not is_lost(self.message.channel):
            return False
        self._message = copy._message
        self._on_ack, self._on_reject = copy._on_ack, copy._on_reject
        self._delivery.is_copy = copy.acknowledged = True
        return True

    def _note_start(self) -> None:
        self._held.count_start(self._delivery)
        limit = hard_limit(self.task, self.time_limits)
        # Other pools do not end what outlives its limit, and it must not be run beside itself.
        if limit and self._has_free_slot:
            self._delivery.renew_until = time.monotonic() + limit + _HUNG_AFTER

    def _set_aside(self, answer: SetAside) -> None:
        """Run this copy again after a pause that holds no slot."""
        task_ready(self)
        # Of the run that is over: a revoke with terminate must not kill that child again.
        self.time_start = self.worker_pid = self._apply_result = None
        doublings = min(self._times_set_aside, _MOST_DOUBLINGS)
        pause = min(answer.first * 2**doublings, answer.longest)
        if self._delivery is not None:
            self._held.uncount_start(self._delivery)
        if self.is_guarded:
            # It may come back by another worker, which could not wait for this one's lease.
            self._leave(goes_back=True)
            self._delivery = self._expect()
            self.request_dict[DELIVERY] = self._delivery.tag
        if self._is_left_to_broker():
            return
        self._times_set_aside += 1
        logger.info("Task %s[%s] is %s (%.1f s)", self.name, self.id, answer, pause)
        consumer = self._consumer
        if consumer is None:
            self.reject(requeue=True)
        elif self._can_wait_here(pause) or not self._send_again(pause):
            self._wait_here(consumer, pause)

    def _can_wait_here(self, pause: float) -> bool:
        if self._beside is not None:
            # The prefetch of a quorum queue stands, so not for long. Without an answer from the
            # lock Redis no other message could be run, either.
            return pause < _AT_FIRST or self._delivery.copy.is_unknown
        return self._held is not None or _visibility_timeout(self.message) is not None

    def _wait_here(self, consumer: Any, pause: float) -> None:
        """Keep the message for a pause, as Celery does with an ETA: nothing is requeued."""
        channel = self.message.channel
        # Not without bound: with the lock Redis away each copy in the queue would come to wait.
        raises_prefetch = self._beside is None and len(_waiting) < _MOST_WAITING
        if raises_prefetch:
            _waiting.add(self)
            consumer.qos.increment_eventually()

        def run_again() -> None:
            _waiting.discard(self)
            tasks = consumer.task_consumer
            if self._held is not None and self._beside is None:
                if not self._held.is_open(self.message.delivery_tag):
                    return
            elif tasks is None or tasks.channel is not channel:
                # After a reconnection the broker has the message, and perhaps somebody else.
                return
            task_reserved(self)
            consumer.on_task_request(self)
            if raises_prefetch:
                consumer.qos.decrement_eventually()

        consumer.timer.call_after(pause, run_again)

    def _send_again(self, pause: float) -> bool:
        """Publish the same copy with a delay and acknowledge this one.

        With quorum queues a worker cannot raise its prefetch, so a copy that waits in it would
        stop it; and a requeue counts towards the queue's delivery limit.
        """
        request = self._context
        # Native delayed delivery knows whole seconds.
        copy = self.task.signature_from_request(
            request, countdown=max(round(pause), 1), retries=request.retries
        )
        if self._beside is not None:
            headers = copy.options.get("headers") or {}
            copy.options["headers"] = {
                **{k: v for k, v in headers.items() if k not in (DELIVERY, "crashes")},
                IS_COPY: self._delivery.is_copy,
                _TIMES: self._times_set_aside,
            }
        try:
            Task.apply_async(self.task, copy.args, copy.kwargs, **copy.options)
        except Exception:
            logger.warning("Task %s[%s] waits in the worker", self.name, self.id, exc_info=True)
            return False
        super().acknowledge()
        return True

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


def should_terminate() -> bool:
    """Say whether a cold shutdown goes on."""
    return state.should_terminate not in (None, False)


def _without_memory_error(exc_info: Any) -> Any:
    """Return the same failure under another type."""
    try:
        raise TaskOutOfMemory(str(exc_info.exception)) from None
    except TaskOutOfMemory:
        replaced = ExceptionInfo()
    replaced.traceback = exc_info.traceback
    return replaced


class TaskOutOfMemory(Exception):
    """A task's MemoryError, as the worker's main process handles it."""


def _lost_worker(reason: str) -> ExceptionInfo:
    try:
        raise WorkerLostError(f"Worker exited prematurely: {reason}.")
    except WorkerLostError:
        return ExceptionInfo()


def _visibility_timeout(message: Any) -> float | None:
    """Return the broker's timeout where the message came from stock kombu's Redis transport."""
    if held_by(message.channel) is not None or not hasattr(message.channel, "unacked_key"):
        return None
    return float(message.channel.visibility_timeout)


def _restart_timeout(message: Any) -> bool:
    """Let a message's visibility timeout begin now, if the broker still counts it as ours."""
    channel = message.channel
    try:
        with channel.conn_or_acquire() as client:
            changed = client.zadd(
                channel.unacked_index_key, {message.delivery_tag: time.time()}, xx=True, ch=True
            )
    except Exception:
        logger.warning("The broker does not answer", exc_info=True)
        return False
    return bool(changed)


def _forget(message: Any) -> None:
    """Drop a message from this process without a word to the broker."""
    message.channel.qos._quick_ack(message.delivery_tag)
