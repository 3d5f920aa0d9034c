"""A consumer that keeps what its worker holds when the connection is lost.

Celery's forgets its requests then, for the broker would hand them out again. Where messages are
held on lease, by the process and not by the connection, nobody else gets them: the tasks run
on, those that wait go on waiting, and all are acknowledged by the next connection.
"""

# mypy: disable-error-code="attr-defined, has-type, misc, valid-type"

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks

__all__ = ["CarryingConsumer", "held_by"]


def held_by(channel: Any) -> Any:
    """Return what this process holds of a channel's broker, or ``None`` on other transports."""
    return getattr(channel, "held", None)


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
        self._waiting = 0
        super().__init__(*args, **options)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Take what is held out of the dead connection, before Celery closes it."""
        carried = self._take_deliveries()
        if carried is None:
            super().on_connection_error_after_connected(exc)
            return
        self._carried = {**(self._carried or {}), **carried}
        initial, restored = self.initial_prefetch_count, self._maximum_prefetch_restored
        if self.qos is not None and initial:
            # A message that waits for its ETA raised the prefetch count.
            self._waiting = max(self.qos.value - initial, 0)
        super().on_connection_error_after_connected(exc)
        # Celery fetches less while tasks run that it no longer counts; these are counted.
        self.initial_prefetch_count, self._maximum_prefetch_restored = initial, restored

    def on_close(self) -> None:
        """Forget what was received, unless it is still held."""
        if self._carried is None:
            super().on_close()

    def adopt(self) -> None:
        """Let the new channel hold what the lost one held."""
        carried, self._carried = self._carried, None
        if carried is None:
            return
        channel = self.task_consumer.channel
        held = held_by(channel)
        for tag, message in carried.items():
            if held.is_open(tag):
                message.channel = channel
                channel.qos.append(message, tag)
        waiting, self._waiting = self._waiting, 0
        if waiting:
            self.qos.increment_eventually(waiting)

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
