"""What the tests of replays share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import time_machine
from celery import Celery

from reliable_tasks import ReliableTask
from reliable_tasks._store.letters import DeadLetter
from reliable_tasks.instrumentation.signals import dead_letter_replayed

#: Sunday noon, in 2026.
NOON = 1_772_366_400.0


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    """The clock of the Redis and of those who wait for it."""
    with time_machine.travel(NOON, tick=False) as traveller:
        yield traveller


@pytest.fixture
def pay(app: Celery) -> Any:
    """A task."""

    @app.task(base=ReliableTask, name="shop.pay")
    def pay(n: int = 0) -> int:
        return n * 10

    @app.task(base=ReliableTask, name="shop.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(base=ReliableTask, name="shop.note")
    def note(*args: Any) -> str:
        return f"noted {args}"

    return app.tasks["shop.pay"]


@pytest.fixture
def replayed() -> Iterator[list[tuple[Any, str, str]]]:
    """What the signal's receivers were told: sender, letter's id and new id."""
    told: list[tuple[Any, str, str]] = []

    def receive(sender: Any, letter: DeadLetter, task_id: str, **_: Any) -> None:
        told.append((sender, letter.id, task_id))

    dead_letter_replayed.connect(receive)
    yield told
    assert dead_letter_replayed.disconnect(receive)
