"""A consumer that keeps what its worker holds when the connection is lost.

Celery's forgets its requests then, for the broker would hand them out again. Where messages are
held on lease, by the process and not by the connection, nobody else gets them: the tasks run
on, those that wait go on waiting, and all are acknowledged by the next connection.

RabbitMQ does hand them out again. With a Redis beside it nobody runs the second copy while the
first one runs here: so what runs runs on, and what does not run yet is forgotten.
"""

# mypy: disable-error-code="attr-defined, has-type, misc, valid-type"

from __future__ import annotations

import logging
from typing import Any

from celery import bootsteps
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.loops import asynloop
from celery.worker.state import active_requests, requests, reserved_requests

from reliable_tasks._celery.channels import held_by
from reliable_tasks._celery.escaping import contain_escapes
from reliable_tasks._celery.receiving import carefully, set_apart
from reliable_tasks._celery.transfers import Transfers
from reliable_tasks._celery.versions import CLEARS_TIMERS

__all__ = ["CarryingConsumer", "copy_of", "is_amqp"]


logger = logging.getLogger("reliable_tasks")


def is_amqp(consumer: Any) -> bool:
    """Say whether a consumer's broker is RabbitMQ, or another one that speaks AMQP."""
    transport = getattr(getattr(consumer, "connection", None), "transport", None)
    return getattr(transport, "driver_type", None) == "amqp"


def _is_guarded(request: Any) -> bool:
    return bool(getattr(request, "is_guarded", False))


def copy_of(requests_: Any) -> list[Any]:
    """Copy one of Celery's sets of requests, which pool threads may be changing."""
    while True:
        try:
            return list(requests_)
        except RuntimeError:
            continue


class Adopt(bootsteps.StartStopStep):
    """Hands what is held to the channel of a new connection."""

    requires = (Tasks,)

    def start(self, parent: Any) -> None:
        """Take over; Celery calls it each time the consumer has connected."""
        if isinstance(parent, CarryingConsumer):
            parent.adopt()


class CarryingConsumer(Consumer):
    """Celery's consumer, for messages that belong to the process."""

    class Blueprint(Consumer.Blueprint):
        """The usual steps, and the one that takes over."""

        default_steps = (*Consumer.Blueprint.default_steps, Adopt)

    def __init__(self, *args: Any, **options: Any) -> None:
        self._carried: dict[str, Any] | None = None
        self._lost_qos: Any = None
        #: What is kept of an AMQP broker's messages in a Redis beside it.
        self.beside: Any = None
        #: What becomes of messages that are no task's; set before the first one comes.
        self.rejected: Any = None
        self._is_lost = False
        self._timers_before: set[Any] = set()
        self._timers_of_connection: set[Any] = set()
        super().__init__(*args, **options)
        if CLEARS_TIMERS and self.hub is not None:
            self.loop = self._loop_that_keeps_timers
        self._transfers = Transfers(self.hub, self.pool) if self.hub is not None else None
        if self.pool is not None and not self.pool.uses_semaphore:
            contain_escapes(self.pool)

    def create_task_handler(self, *args: Any, **options: Any) -> Any:
        """Make the handler of messages, which outlives whatever is wrong with one of them."""
        return carefully(self, super().create_task_handler(*args, **options))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keep a message whose body cannot be decoded; Celery would acknowledge it."""
        logger.critical("The body of a message cannot be decoded: %r", exc)
        set_apart(self, message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message that is not a valid task's; Celery would discard it."""
        logger.critical("A message is not a valid task's: %r", exc)
        set_apart(self, message, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Keep a message that is no task's; Celery would discard it."""
        logger.critical("A message is no task's: its headers are %r", message.headers)
        set_apart(self, message, None)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message that names an unknown task, and fail that; without a backend, too."""
        if self.rejected.keep(message, exc, is_unknown=True):
            # Rejected, RabbitMQ would keep it once more.
            message.reject_log_error = message.ack_log_error
        try:
            super().on_unknown_task(body, message, exc)
        except Exception as error:
            if not message.acknowledged:
                raise
            logger.error("An unknown task has no final state: %s", error)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Take what is held out of the dead connection, before Celery closes it."""
        self._is_lost = True
        carried = self._take_deliveries()
        if carried is None:
            self._lose_connection(exc)
            return
        self._carried = {**(self._carried or {}), **carried}
        initial, restored = self.initial_prefetch_count, self._maximum_prefetch_restored
        if self._lost_qos is None:
            self._lost_qos = self.qos
        super().on_connection_error_after_connected(exc)
        # Celery fetches less while tasks run that it no longer counts; these are counted.
        self.initial_prefetch_count, self._maximum_prefetch_restored = initial, restored

    def connect(self) -> Any:
        """Connect, and note which timers were there before."""
        self._timers_before = self._timers()
        return super().connect()

    def on_ready(self) -> None:
        """Note which timers the connection has brought, and go on talking to the children."""
        if self._transfers is not None:
            self._transfers.go_on()
        self._timers_of_connection = self._timers() - self._timers_before
        super().on_ready()

    def on_close(self) -> None:
        """Forget what was received, unless it is still held."""
        if self._carried is not None:
            return
        if self._is_lost and self.beside is not None:
            self._forget_what_waits()
        else:
            super().on_close()

    def adopt(self) -> None:
        """Let the new channel hold what the lost one held."""
        self._is_lost = False
        carried, self._carried = self._carried, None
        if carried is None:
            return
        channel = self.task_consumer.channel
        held = held_by(channel)
        for tag, message in carried.items():
            if held.is_open(tag):
                message.channel = channel
                channel.qos.append(message, tag)
                held.get(tag).is_carried = True
        lost, self._lost_qos = self._lost_qos, None
        # What waits for its ETA raised the prefetch count, and lowers it when it is due.
        waiting = lost.value - self.initial_prefetch_count if lost and lost.value else 0
        if waiting > 0:
            self.qos.increment_eventually(waiting)

    def _forget_what_waits(self) -> None:
        """Forget all that no pool has yet; Celery would also take back what it has."""
        if self.controller and self.controller.semaphore:
            # Those that run keep their slots.
            self.controller.semaphore._waiting.clear()
        for bucket in self.task_buckets.values():
            if bucket:
                bucket.clear_pending()
        # Before 5.7 there was no such set.
        scheduled: Any = getattr(state, "scheduled_requests", set())
        waiting: Any = (*reserved_requests, *scheduled)
        for request in waiting:
            if request in active_requests or _is_guarded(request):
                continue
            entry = getattr(request, "_eta_timer_entry", None)
            if entry is not None and self.timer is not None:
                self.timer.cancel(entry)
            task_id: str = request.id
            if requests.get(task_id) is request:
                del requests[task_id]
            reserved_requests.discard(request)
            scheduled.discard(request)
        for entry in self._timers():
            if entry.fun in (self.apply_eta_task, self._limit_post_eta):
                self.hub.timer.cancel(entry)

    def _lose_connection(self, exc: Exception) -> None:
        """Go on where nothing is held by the process, but perhaps guarded beside the broker."""
        initial, restored = self.initial_prefetch_count, self._maximum_prefetch_restored
        super().on_connection_error_after_connected(exc)
        if self.beside is not None:
            # What runs on takes a message again when its copy comes here. And the prefetch of a
            # quorum queue, once it is less, stays so on 5.6.
            self.initial_prefetch_count, self._maximum_prefetch_restored = initial, restored
            self._cancel_unguarded()

    def _cancel_unguarded(self) -> None:
        """Stop those that run and that somebody else will start, too."""
        if self.app.conf.worker_cancel_long_running_tasks_on_connection_loss:
            return
        for request in tuple(active_requests):
            if request.task.acks_late and not request.acknowledged and not _is_guarded(request):
                logger.warning("Task %s is stopped: its message went back", request)
                try:
                    request.cancel(self.pool)
                except Exception:
                    logger.warning("Task %s is not stopped", request, exc_info=True)

    def _timers(self) -> set[Any]:
        if self.hub is None:
            return set()
        return {scheduled.entry for scheduled in self.hub.timer.queue}

    def _loop_that_keeps_timers(self, *args: Any) -> None:
        """Run Celery's loop; when the connection is lost, only its own timers end with it.

        Before 5.7 the loop clears them all, and with them the ETA of what waits here and the
        time limits of what runs on.
        """
        timer = self.hub.timer
        timer.clear = lambda: None
        try:
            asynloop(*args)
        except Exception:
            for entry in self._timers_of_connection:
                timer.cancel(entry)
            raise
        finally:
            del timer.clear

    def _take_deliveries(self) -> dict[str, Any] | None:
        channels = getattr(getattr(self.connection, "transport", None), "channels", None) or ()
        found: dict[str, Any] | None = None
        for channel in channels:
            if held_by(channel) is None:
                continue
            found = {} if found is None else found
            qos = channel.qos
            qos._flush()
            found.update(qos._delivered)
            qos._delivered.clear()
        return found
