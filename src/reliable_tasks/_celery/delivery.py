"""A request and its delivery: what this process holds of the message, and how it lets go of it.

The delivery is held on a lease, by our own transport or beside another broker. On stock kombu's
Redis transport there is none.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from celery import Celery
from celery.worker.request import Request

from reliable_tasks._celery.channels import held_by, is_lost
from reliable_tasks._celery.consumer import copy_of, is_amqp
from reliable_tasks._celery.headers import DELIVERY, TIMES_SET_ASIDE, WAITS_FOR
from reliable_tasks._celery.receiving import check_request
from reliable_tasks._celery.registry import hard_limit

__all__ = [
    "DeliveredRequest",
    "GuardedTask",
    "NotYetKept",
    "give_back_what_waits",
    "remember_consumer",
    "tell_events_to",
    "waiting_requests",
]

#: A run that outlives its hard limit by so much has hung (s): its lease is left to end.
_HUNG_AFTER = 30.0

_consumers: WeakKeyDictionary[Celery, weakref.ref[Any]] = WeakKeyDictionary()


#: All requests that somebody still has.
_known: WeakSet[DeliveredRequest] = WeakSet()
#: The request of each message that is held, by the tag of its delivery.
_received: WeakValueDictionary[str, DeliveredRequest] = WeakValueDictionary()


def give_back_what_waits(channel: Any) -> None:
    """Give back the messages of a channel whose tasks no pool has yet."""
    held = held_by(channel)
    if held is None:
        return
    for tag in reversed(list(channel.qos._delivered)):
        delivery, request = held.get(tag), _received.get(tag)
        if delivery is None or not delivery.is_received or delivery.is_ended:
            continue
        # Celery has forgotten those that wait for a slot or for their rate limit.
        if held.is_open(tag) and (request is None or request.waits):
            # First, for a green thread may be about to start it.
            delivery.is_ended = True
            held.requeue(tag)
            channel.qos._quick_ack(tag)


def tell_events_to(app: Celery, dispatcher: Any) -> None:
    """Let all requests of an app tell their events over a new connection.

    Celery does so for those alone that wait for nothing.
    """
    for request in list(_received.values()):
        if request.app is app:
            request.eventer = dispatcher


def waiting_requests(app: Celery) -> list[DeliveredRequest]:
    """Return the requests of an app's messages that wait in this worker."""
    return [request for request in copy_of(_known) if request.app is app and request.is_unstarted]


def remember_consumer(app: Celery, consumer: Any) -> None:
    """Note who runs an app's tasks in this process: it has the timer and the prefetch count."""
    _consumers[app] = weakref.ref(consumer)


class NotYetKept(Exception):
    """A dead letter is not kept, and may be at a later try."""


class GuardedTask(Protocol):
    """What a `ReliableRequest` asks of its task; each is called in the main process."""

    def _reliable_reserved(self, headers: dict[str, Any]) -> None:
        """A message was received: its headers can still be added to."""

    def _reliable_unfinished(
        self, headers: dict[str, Any], *, requeued: bool, has_started: bool
    ) -> None:
        """A copy ended without its child having said so, or before it could start."""

    def _reliable_uncovered(self, headers: dict[str, Any]) -> None:
        """The message of a run is about to be acknowledged whose child may be alive."""

    def _reliable_repeated(self, headers: dict[str, Any]) -> None:
        """A redelivered copy is about to be acknowledged; perhaps it did not run."""

    def _reliable_heard_late(self, headers: dict[str, Any]) -> None:
        """The end of a copy was told late, for nobody answered; perhaps its child met the same."""

    def _reliable_pause(self, headers: dict[str, Any]) -> Any:
        """Say why a copy must not take a slot yet, by a `SetAside`, or ``None``."""

    def _reliable_budgets(self) -> tuple[int | None, int | None]:
        """How often the task may crash, and how often it may go back to its queue."""

    def _reliable_crashed(self, task_id: str, crashes: int | None, crash: dict[str, Any]) -> None:
        """A task has crashed, so many times by now if that is counted."""

    def _reliable_letter(
        self, request: Any, error: BaseException, traceback: str, *, is_expired: bool
    ) -> Any:
        """Return the dead letter that a task becomes, or ``None``."""

    def _reliable_bury(self, letter: Any, *, is_held: bool) -> bool:
        """Keep a dead letter whose message is acknowledged already, or will be if it is kept.

        Raises:
            NotYetKept: Its message is held, and is to be until another try.
        """

    def _reliable_buried(self, letter: Any, id: str, count: int) -> None:  # noqa: A002
        """A dead letter is kept, and there are so many."""

    def _reliable_keep_part(self, request: Any) -> None:
        """A part of a chord has succeeded, of which another one may become a dead letter."""

    def _reliable_slack(self, visibility_timeout: float) -> float:
        """How many seconds of a visibility timeout must not be counted on."""


class DeliveredRequest(Request):
    """Celery's request, which knows its delivery, its consumer and its task's guard.

    Attributes:
        received_at: When its message came, or its timeout was started anew (monotonic s).
        kept_at: When its claim was kept last while it waits (monotonic s), or 0.
    """

    _context: Any
    _message: Any
    _on_ack: Any
    _on_reject: Any
    _apply_result: Any

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        check_request(self)
        self.received_at = time.monotonic()
        self.kept_at = 0.0
        _known.add(self)
        self._ends_here = False
        self._is_cancelled = False
        self._is_requeued = False
        self._was_told_to_end = False
        self._keeps_end = False
        #: What ends the message when its task's end is stored.
        self._owed_end: Callable[[], None] | None = None
        self._is_accepted = False
        self._times_set_aside = 0
        self._waits_for = ""
        self._held = held_by(message.channel)
        self._delivery: Any = None if self._held is None else self._held.get(message.delivery_tag)
        if self._delivery is not None:
            _received[message.delivery_tag] = self
            self._delivery.is_received = True
        self._beside: Any = None
        if self._held is None and self.task.acks_late:
            self._held = self._beside = getattr(self._consumer, "beside", None)
        if self._beside is not None:
            self._times_set_aside = int(self.request_dict.get(TIMES_SET_ASIDE) or 0)
            self._waits_for = str(self.request_dict.get(WAITS_FOR) or "")
            self._delivery = self._expect()
        if self._delivery is not None:
            # Of this delivery; a retry must not inherit them. With an early ack it is over
            # before the task could continue itself.
            if self.task.acks_late:
                self.request_dict[DELIVERY] = self._delivery.tag
            self.request_dict["crashes"] = self._delivery.copy.crashes
        self._guard._reliable_reserved(self.request_dict)

    @property
    def _guard(self) -> GuardedTask:
        return cast(GuardedTask, self.task)

    @property
    def _consumer(self) -> Any:
        found = _consumers.get(cast(Celery, self.app))
        return found() if found is not None else None

    @property
    def _is_amqp(self) -> bool:
        consumer = self._consumer
        return consumer is not None and is_amqp(consumer)

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

    @property
    def waits(self) -> bool:
        """Whether no pool has the task yet."""
        return not self._is_accepted and self._apply_result is None and not self.acknowledged

    @property
    def is_unstarted(self) -> bool:
        """Whether this worker has the message, and nobody runs its task."""
        is_ended = self._delivery is not None and bool(self._delivery.is_ended)
        return not (self._is_accepted or self.acknowledged or is_ended)

    @property
    def is_told_to_end(self) -> bool:
        """Whether the task was cancelled, or is killed for it was revoked."""
        return self._is_cancelled or self._ends_here

    def _begin_anew(self) -> None:
        """Forget all that is known of a run that is over, for the same copy will run again."""
        # A revoke with terminate must not kill that child again.
        self.time_start = self.worker_pid = self._apply_result = None
        self._is_accepted = self._ends_here = self._is_requeued = self._was_told_to_end = False

    def _waiting(self) -> AbstractContextManager[None]:
        """Wait for the result backend: it is not the main loop that hangs meanwhile."""
        found: AbstractContextManager[None] = (
            nullcontext() if self._held is None else self._held.waiting()
        )
        return found

    def _expect(self) -> Any:
        """Return the run that begins when this copy is let in."""
        is_redelivered = bool(self.delivery_info["redelivered"])
        return self._beside.expect(self.request_dict, is_redelivered=is_redelivered)

    def _leave(self, *, goes_back: bool) -> None:
        """End the run, where it is kept beside the broker; before the message is ended."""
        if self._delivery is not None and not goes_back:
            heard = partial(self._guard._reliable_heard_late, self.request_dict)
            self._delivery.when_heard_late = heard
            if self._delivery.is_carried and not self._held.is_silent:
                # The main loop heard of the end when it had connected again.
                heard()
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
        self._guard._reliable_unfinished(
            self.request_dict, requeued=requeued, has_started=self._is_accepted
        )

    def _note_start(self) -> None:
        self._held.count_start(self._delivery)

    def _expect_end(self) -> None:
        """Have the lease end with a run that hangs, counted from when its child accepted it."""
        limit = hard_limit(self.task, self.time_limits)
        # Other pools do not end what outlives its limit, and it must not be run beside itself.
        if limit and self._has_free_slot:
            self._delivery.renew_until = time.monotonic() + limit + _HUNG_AFTER
