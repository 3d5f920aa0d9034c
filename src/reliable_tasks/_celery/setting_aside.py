"""Setting a copy aside: it runs later, after a pause that holds no slot.

It waits in the worker where the prefetch can be raised for it, and else in the broker.
"""

from __future__ import annotations

import logging
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Reject
from celery.worker.state import task_ready, task_reserved

from reliable_tasks._celery import stock
from reliable_tasks._celery.delivery import DeliveredRequest
from reliable_tasks._celery.headers import (
    CONDEMNED,
    COUNTED,
    DELIVERY,
    IN_DOUBT,
    IS_COPY,
    REQUEUES,
    TIMES_SET_ASIDE,
    WAITS_FOR,
    without_brokers_own,
)
from reliable_tasks._celery.written import written_as

__all__ = ["PatientRequest", "SetAside", "growing"]

logger = logging.getLogger("reliable_tasks")

#: Enough for any pause to reach its longest, and few enough for a float.
_MOST_DOUBLINGS = 20

#: So many copies may wait in a worker beyond its prefetch.
_MOST_WAITING = 100

#: So long (s) a copy waits for its turn in the broker, when there are as many in the worker.
_ASIDE = (10.0, 20.0)

#: How long a copy waits that put itself back for the second time, and at most (s). The first time
#: it is behind all others at once.
_BEHIND = (1.0, 60.0)

#: So long (s) is too long to wait in a worker whose prefetch stands: the broker keeps the copy.
_SHORTEST_IN_BROKER = 1.0

_waiting: weakref.WeakSet[Any] = weakref.WeakSet()

_GOES_BACK = "Task %s[%s] goes back to its queue (%.0f s)"

#: How a `SetAside` is told.
_SAYS = "set aside: "


class SetAside(Reject, Ignore):
    """Raised in a child: run this copy later, after a pause that holds no slot.

    A `Reject` with requeue, should nobody understand it; an `Ignore`, which ``autoretry_for``
    leaves alone.

    Attributes:
        first: The first pause (s); it doubles each time that the same copy is set aside.
        longest: The longest pause (s).
        waits_for: What the copy waits for, if that can change: then it begins again with the
            first pause.
    """

    def __init__(self, reason: str, first: float, longest: float, waits_for: str = "") -> None:
        super().__init__(reason, requeue=True)
        self.args = (reason, first, longest, waits_for)
        self.first = first
        self.longest = longest
        self.waits_for = waits_for

    def __repr__(self) -> str:
        return f"{_SAYS}{self.args[0]}"

    __str__ = __repr__


def _is_news(record: logging.LogRecord) -> bool:
    """Say whether a line of Celery's is about more than a copy that waits.

    Celery warns of each `Reject`, and the main process says for how long the copy waits.
    """
    about = getattr(record, "data", None)
    return not isinstance(about, dict) or not str(about.get("exc")).startswith(_SAYS)


logging.getLogger("celery.app.trace").addFilter(_is_news)


def growing(first: float, longest: float, times: int) -> float:
    """Return a pause (s) that doubles each time, up to the longest."""
    return min(first * 2.0 ** min(times, _MOST_DOUBLINGS), longest)


def _call_after(consumer: Any, pause: float, function: Callable[[], None]) -> None:
    if consumer.hub is None or threading.current_thread() is threading.main_thread():
        consumer.timer.call_after(pause, function)
    else:
        # A timer that a pool's thread adds while the loop connects would end with the connection.
        consumer.hub.call_soon(lambda: consumer.timer.call_after(pause, function))


class PatientRequest(DeliveredRequest):
    """A request that can be set aside."""

    _crashes: Any

    def _set_aside(self, answer: SetAside) -> None:
        """Run this copy again after a pause that holds no slot."""
        task_ready(self)
        self._begin_anew()
        if answer.waits_for != self._waits_for:
            self._waits_for, self._times_set_aside = answer.waits_for, 0
        pause = growing(answer.first, answer.longest, self._times_set_aside)
        if self._delivery is not None:
            self._held.uncount_start(self._delivery)
        if self._beside is not None and self._delivery.is_started:
            is_copy = self._delivery.is_copy
            if self.is_guarded:
                # It may come back by another worker, which could not wait for this one's lease.
                self._leave(goes_back=True)
                # It was let in, so no call of the same id was under way: should its message come
                # back beside the copy that is sent again, one of them has run.
                is_copy = True
            self._expect_again(is_copy=is_copy)
        if self._is_left_to_broker():
            return
        # A copy that waits for its turn asks many times.
        is_known = bool(answer.waits_for and self._times_set_aside)
        level = logging.DEBUG if is_known else logging.INFO
        logger.log(level, "Task %s[%s] is %s (%.1f s)", self.name, self.id, answer, pause)
        self._times_set_aside += 1
        # Its child asks whether it was started before.
        self.request_dict[TIMES_SET_ASIDE] = self._times_set_aside
        consumer = self._consumer
        if consumer is None:
            self.reject(requeue=True)
        elif self._can_wait_here(pause) or not self._send_again(pause):
            self._wait_here(consumer, pause)

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self.request_dict.pop(IN_DOUBT, None)

    def _expect_again(self, *, is_copy: bool) -> None:
        """Expect this copy to be let in anew, for it is the same message that will run."""
        self._delivery = self._expect()
        self._delivery.is_copy = is_copy
        if self.task.acks_late:
            self.request_dict[DELIVERY] = self._delivery.tag

    def _can_wait_here(self, pause: float) -> bool:
        if self._beside is not None and self._is_amqp:
            # The prefetch of a quorum queue stands, so not for long. Without an answer from the
            # lock Redis no other message could be run, either.
            return pause < _SHORTEST_IN_BROKER or self._delivery.copy.is_unknown
        return self._held is not None or stock.visibility_timeout(self.message) is not None

    def _wait_here(self, consumer: Any, pause: float) -> None:
        """Keep the message for a pause, as Celery does with an ETA: nothing is requeued."""
        channel = self.message.channel
        # Not without bound: with the lock Redis away each copy in the queue would come to wait.
        is_fixed = self._beside is not None and self._is_amqp
        raises_prefetch = not is_fixed and len(_waiting) < _MOST_WAITING
        if raises_prefetch:
            _waiting.add(self)
            consumer.qos.increment_eventually()
        elif self._waits_for and self._lay_aside():
            return

        def run_again() -> None:
            _waiting.discard(self)
            tasks = consumer.task_consumer
            if not self.task.acks_late and self.acknowledged:
                # Nobody else has it.
                pass
            elif self._held is not None and self._beside is None:
                if not self._held.is_open(self.message.delivery_tag):
                    if raises_prefetch:
                        consumer.qos.decrement_eventually()
                    return
            elif tasks is None or tasks.channel is not channel:
                # After a reconnection the broker has the message, and perhaps somebody else.
                return
            task_reserved(self)
            consumer.on_task_request(self)
            if raises_prefetch:
                consumer.qos.decrement_eventually()

        _call_after(consumer, pause, run_again)

    def _put_behind(self) -> bool:
        """Put a copy back that asks for it, after a pause that grows each time.

        Returns:
            Whether it was; if not, it is to be rejected.
        """
        if self.acknowledged or self._is_left_to_broker():
            return False
        times = self._times_requeued + 1
        self.request_dict[REQUEUES] = times
        pause = growing(*_BEHIND, times - 2) if times > 1 else 0.0
        if self._is_amqp:
            self._send_behind(pause)
            return True
        delivery = self._delivery if self._beside is None else None
        if delivery is not None and not self._held.is_open(delivery.tag):
            return False
        logger.info(_GOES_BACK, self.name, self.id, pause)
        if delivery is not None:
            self._held.note_header(delivery, REQUEUES, times)
            if not pause:
                return False
            self._let_go(pause)
            self.acknowledged = True
            return True
        if stock.visibility_timeout(self.message) is not None:
            self._set_aside(SetAside("it goes back to its queue", *_BEHIND))
            return True
        return False

    def _send_behind(self, pause: float) -> None:
        """Put a copy back by sending it again.

        Where that fails it waits here: the broker would give it back at once, and of its count
        know nothing, or take it for one of crashes.
        """
        self._leave(goes_back=True)
        if self._beside is not None:
            self._delivery.is_copy = True
        if self._send_again(pause):
            logger.info(_GOES_BACK, self.name, self.id, pause)
            return
        task_ready(self)
        self._begin_anew()
        if self._beside is not None:
            self._expect_again(is_copy=True)
        if not self._is_left_to_broker():
            self._wait_here(self._consumer, max(pause, _SHORTEST_IN_BROKER))

    @property
    def _times_requeued(self) -> int:
        found = self.request_dict.get(REQUEUES)
        return found if isinstance(found, int) else 0

    def _let_go(self, seconds: float) -> None:
        """Have the broker keep the message for a while."""
        tag = self._delivery.tag
        self._delivery.is_ended = True
        self._held.lay_aside(tag, seconds)
        self.message.channel.qos._quick_ack(tag)

    def _lay_aside(self) -> bool:
        """Have the broker keep a copy that waits for its turn, where many wait here already.

        In the worker it would take the room of tasks that wait for nothing.
        """
        held, tag = self._held, self.message.delivery_tag
        if held is None or self._beside is not None or not held.is_open(tag):
            return False
        # Not all at the same time.
        seconds = random.uniform(*_ASIDE)
        logger.info("Task %s[%s] waits in the broker for %.0f s", self.name, self.id, seconds)
        self._let_go(seconds)
        return True

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
        given = copy.options.get("headers") or {}
        headers = without_brokers_own(given, DELIVERY, CONDEMNED, "crashes")
        if self._beside is not None:
            headers |= {
                IS_COPY: self._delivery.is_copy,
                TIMES_SET_ASIDE: self._times_set_aside,
                WAITS_FOR: self._waits_for,
            }
        if self._delivery is None and (crashes := self._crashes):
            headers[COUNTED] = crashes
        if self._times_requeued:
            headers[REQUEUES] = self._times_requeued
        copy.options.update(written_as(self), headers=headers)
        try:
            Task.apply_async(self.task, copy.args, copy.kwargs, **copy.options)
        except Exception:
            failed = "Task %s[%s] cannot be sent again, and waits in the worker"
            logger.warning(failed, self.name, self.id, exc_info=True)
            return False
        super().acknowledge()
        return True
