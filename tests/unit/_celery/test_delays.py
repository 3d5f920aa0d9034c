"""Delays of a call, and those that RabbitMQ would lose."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine
from celery import Celery

from reliable_tasks._celery.delays import delay_of, with_short_delay


def in_seconds(seconds: float) -> datetime:
    """A moment to come."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 0),
        ({"countdown": None, "eta": None}, 0),
        ({"countdown": 0}, 0),
        ({"countdown": -5}, 0),
        ({"countdown": 7}, 7),
        ({"countdown": 0.25}, 0.25),
        ({"eta": in_seconds(1000)}, 1000),
        ({"eta": in_seconds(1000).isoformat()}, 1000),
        ({"eta": in_seconds(-1000)}, 0),
    ],
)
def test_a_delay_is_read_from_every_form(
    app: Celery, options: dict[str, Any], seconds: float
) -> None:
    """As Celery takes them."""
    assert delay_of(app, options) == pytest.approx(seconds, abs=100 if seconds > 10 else 0)


@pytest.mark.parametrize("options", [{}, {"countdown": 1}, {"countdown": 60, "queue": "q"}])
def test_whole_seconds_are_left_alone(app: Celery, options: dict[str, Any]) -> None:
    """Celery and RabbitMQ deal with those."""
    assert with_short_delay(app, options) is options


@pytest.mark.parametrize("kind", ["countdown", "eta"])
def test_a_short_delay_becomes_a_header(app: Celery, kind: str) -> None:
    """The worker waits for it; other headers stay."""
    with time_machine.travel(1_800_000_000, tick=False):
        expected = in_seconds(0.5)
        given: dict[str, Any] = {"countdown": 0.5} if kind == "countdown" else {"eta": expected}
        changed = with_short_delay(app, {**given, "headers": {"x": "y"}, "queue": "q"})
    assert changed == {"headers": {"x": "y", "eta": expected.isoformat()}, "queue": "q"}
