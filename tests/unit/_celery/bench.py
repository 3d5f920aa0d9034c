"""A worker's main process around one message, for the tests of its request."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.worker import state as worker_state

from reliable_tasks._celery.delivery import remember_consumer
from reliable_tasks._celery.request import ReliableRequest
from tests.unit.harness import take


class Timer:
    """A timer whose time is up when a test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def call_after(self, seconds: float, function: Callable[[], None]) -> None:
        """Remember a call."""
        self.calls.append((seconds, function))

    def fire(self) -> float:
        """Make the oldest call and return its delay."""
        seconds, function = self.calls.pop(0)
        function()
        return seconds


class Consumer:
    """A consumer that fetched its messages over one channel."""

    def __init__(self, bench: Bench) -> None:
        self.app = bench.app
        self.timer = bench.timer
        self.task_consumer: Any = None
        self.hub = None
        self.again: list[ReliableRequest] = []
        self.qos = SimpleNamespace(
            increment_eventually=lambda: bench.raise_prefetch(1),
            decrement_eventually=lambda: bench.raise_prefetch(-1),
        )

    def on_task_request(self, request: ReliableRequest) -> None:
        """Run a request whose time has come."""
        self.again.append(request)


class Bench:
    """A worker's main process around one message.

    Attributes:
        ended: What was done with the message, in order.
        prefetch: By how much the prefetch was raised.
    """

    def __init__(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.ended: list[str] = []
        self.prefetch = 0
        self.timer = Timer()
        self._monkeypatch = monkeypatch

    def start_consumer(self) -> None:
        """Let the worker be ready."""
        self.consumer = Consumer(self)
        remember_consumer(self.app, self.consumer)

    def raise_prefetch(self, number: int) -> None:
        """Change how many messages may be held."""
        self.prefetch += number

    def receive(self, **message_options: Any) -> ReliableRequest:
        """Receive the message in the queue."""
        message = take(self.app)
        for name, value in message_options.items():
            setattr(message, name, value)
        self.consumer.task_consumer = SimpleNamespace(channel=message.channel)
        request = ReliableRequest(
            message,
            app=self.app,
            hostname="bench@test",
            eventer=SimpleNamespace(enabled=False, send=lambda *a, **k: None),
            on_ack=lambda *a: self.ended.append("ack"),
            on_reject=lambda log, errors, requeue: self.ended.append(
                "requeue" if requeue else "reject"
            ),
            task=self.app.tasks[message.headers["task"]],
        )
        worker_state.reserved_requests.add(request)
        return request


def failure(error: BaseException) -> ExceptionInfo:
    """What a pool reports."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()
