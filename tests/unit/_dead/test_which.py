"""Which dead letters somebody asks for."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
import time_machine

from reliable_tasks._dead.which import Which
from reliable_tasks._store.letters import Cause, DeadLetter

#: Sunday noon, in 2026.
NOON = 1_772_366_400.0


@pytest.fixture(autouse=True)
def at_noon() -> Iterator[None]:
    """Stop the clock."""
    with time_machine.travel(NOON, tick=False):
        yield


def letter(**about: Any) -> DeadLetter:
    """A letter."""
    known = {"id": "one", "task": "shop.pay", "task_id": "one", "cause": Cause.FAILED, "error": ""}
    return DeadLetter(**{**known, "at": NOON, **about})


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (None, None),
        (datetime(2026, 3, 1, 11, tzinfo=UTC), NOON - 3600),
        (datetime(2026, 3, 1, 11, tzinfo=timezone(timedelta(hours=1))), NOON - 7200),
        (timedelta(minutes=5), NOON - 300),
        (30, NOON - 30),
        (0.5, NOON - 0.5),
        (0, NOON),
    ],
    ids=repr,
)
def test_a_moment_is_one_or_how_long_ago(moment: Any, seconds: float | None) -> None:
    """Both bounds are read alike."""
    which = Which.of(None, None, moment, moment)
    assert (which.since, which.before) == (seconds, seconds)


def test_a_moment_without_a_time_zone_is_one_of_here() -> None:
    """As Python takes it."""
    moment = datetime(2026, 3, 1, 11)  # noqa: DTZ001 - no time zone is meant
    assert Which.of(None, None, moment, None).since == moment.timestamp()


@pytest.mark.parametrize("cause", ["poison", Cause.POISON])
def test_a_cause_is_one_or_its_name(cause: Any) -> None:
    """The store is asked for its name."""
    which = Which.of("shop.pay", cause, None, None)
    assert which.as_options() == {
        "task": "shop.pay",
        "cause": "poison",
        "since": None,
        "before": None,
    }


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        ("posion", r"cause = 'posion'; did you mean 'poison'"),
        ("", "cause = ''; known are expired, failed, lost"),
        (7, "cause = 7; known are expired, failed, lost"),
    ],
)
def test_a_cause_that_does_not_exist(cause: Any, text: str) -> None:
    """The error names it and the nearest one; nothing is not found instead."""
    with pytest.raises(ValueError, match=f"^{text}"):
        Which.of(None, cause, None, None)


@pytest.mark.parametrize(
    ("given", "is_all"),
    [
        ((None, None, None, None), True),
        (("shop.pay", None, None, None), False),
        ((None, "poison", None, None), False),
        ((None, None, 30, None), False),
        ((None, None, None, 30), False),
    ],
    ids=repr,
)
def test_all_are_meant_where_nothing_is_said(given: Any, is_all: bool) -> None:
    """Each filter leaves something out."""
    assert Which.of(*given).is_all is is_all


@pytest.mark.parametrize(
    ("given", "is_found"),
    [
        ((None, None, None, None), True),
        (("shop.pay", "failed", 60, 0), True),
        (("shop.other", None, None, None), False),
        ((None, "poison", None, None), False),
        ((None, None, 30, None), True),
        ((None, None, 29, None), False),
        ((None, None, None, 29), True),
        ((None, None, None, 30), False),
    ],
    ids=repr,
)
def test_a_letter_is_one_of_them_or_not(given: Any, is_found: bool) -> None:
    """One that was kept 30 s ago: since then is with it, before then is without."""
    assert Which.of(*given).has(letter(at=NOON - 30)) is is_found


@pytest.mark.parametrize(
    ("filters", "kind", "named"),
    [
        (("shop.pay", None, "1h", None), TypeError, "since = '1h': give a datetime"),
        (("shop.pay", None, None, date(2026, 3, 1)), TypeError, r"before = datetime.date\(2026"),
        (("shop.pay", None, float("nan"), None), ValueError, "since = nan: give a datetime"),
        ((len, None, None, None), TypeError, r"task = <built-in function len>: give its name"),
    ],
)
def test_what_is_none_is_named(filters: Any, kind: type[Exception], named: str) -> None:
    """With what is wanted."""
    with pytest.raises(kind, match=named):
        Which.of(*filters)
