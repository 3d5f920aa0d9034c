"""Dead letters that are dropped, and that will be, are told of."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from reliable_tasks._store.dead import Pruned
from reliable_tasks.instrumentation import dropping, signals
from reliable_tasks.instrumentation.dropping import tell_pruned

NOTHING = Pruned(0, 0, 0, 0, 100)


@pytest.fixture
def dropped() -> Iterator[list[tuple[Any, int, str]]]:
    """What the signal's receivers were told: sender, count and reason."""
    told: list[tuple[Any, int, str]] = []

    def receive(sender: Any, count: int, reason: str, **_: Any) -> None:
        told.append((sender, count, reason))

    signals.dead_letters_dropped.connect(receive)
    yield told
    assert signals.dead_letters_dropped.disconnect(receive)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock of those who warn, in its only item; no warning was given yet."""
    now = [100_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dropping, "_warned_at", 0.0)
    return now


def test_what_is_dropped_is_told_with_its_reason(
    dropped: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As an error, for tasks are lost by it; the line names the setting."""
    tell_pruned(Pruned(aged=3, many=2, soon=0, count=100, max_count=100))
    assert dropped == [(None, 3, "age"), (None, 2, "count")]
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("ERROR", "3 dead letters were dropped for their age (reliable_dead_letter_max_age)"),
        ("ERROR", "2 dead letters were dropped for their count (reliable_dead_letter_max_count)"),
    ]


@pytest.mark.usefixtures("clock")
def test_where_nothing_is_dropped_nothing_is_said(
    dropped: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked often."""
    tell_pruned(NOTHING)
    assert (dropped, caplog.records) == ([], [])


def test_those_that_get_old_are_told_of_once_an_hour(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """There is time left to replay them, and none of them is dropped yet."""
    caplog.set_level(logging.WARNING, logger="reliable_tasks")
    tell_pruned(Pruned(0, 0, 4, 10, 100))
    (line,) = caplog.records
    assert line.levelname == "WARNING"
    assert line.message.startswith("4 dead letters are in the last tenth of the time")
    assert "replay or discard them" in line.message
    clock[0] += 3600
    tell_pruned(Pruned(0, 0, 5, 10, 100))
    assert len(caplog.records) == 1
    clock[0] += 1
    tell_pruned(Pruned(0, 0, 6, 10, 100))
    assert [one.message[0] for one in caplog.records] == ["4", "6"]
