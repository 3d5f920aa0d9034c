"""Delays of less than a second."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from reliable_tasks._celery.delays import delay_of, with_short_delay

APP = Celery("delays", set_as_current=False)


@pytest.mark.parametrize("options", [{}, {"countdown": 0}, {"countdown": 1}, {"countdown": 1.5}])
def test_other_delays_stay_as_they_are(options: dict[str, Any]) -> None:
    """Celery carries whole seconds itself."""
    assert with_short_delay(APP, options) is options


def test_a_short_countdown_becomes_the_header_that_celery_would_write() -> None:
    """The broker has the message at once, and the worker waits."""
    options = with_short_delay(APP, {"countdown": 0.5, "headers": {"x": 1}, "queue": "q"})
    assert options.keys() == {"headers", "queue"}
    assert options["headers"]["x"] == 1
    ahead = datetime.fromisoformat(options["headers"]["eta"]) - datetime.now(UTC)
    assert timedelta(0) < ahead <= timedelta(seconds=0.5)


@pytest.mark.parametrize("as_text", [False, True])
def test_so_does_an_eta_that_is_near(as_text: bool) -> None:
    """Also one that went through a message already."""
    eta = datetime.now(UTC) + timedelta(seconds=0.5)
    options = with_short_delay(APP, {"eta": eta.isoformat() if as_text else eta})
    assert options.keys() == {"headers"}


@pytest.mark.parametrize(
    ("ahead", "low", "high"), [(timedelta(minutes=1), 59, 60), (timedelta(minutes=-1), 0, 0)]
)
def test_an_eta_is_a_delay(ahead: timedelta, low: float, high: float) -> None:
    """A time without a zone is in the app's; one in the past is no delay."""
    naive = (datetime.now(UTC) + ahead).replace(tzinfo=None)
    assert low <= delay_of(APP, {"eta": naive}) <= high
