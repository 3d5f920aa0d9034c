"""The options of ``@once``, checked where they are written."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from reliable_tasks import ConfigError, once
from reliable_tasks._once.options import OnceOptions


def test_a_time_is_seconds_or_a_timedelta() -> None:
    """Nothing given leaves the setting to decide."""
    assert OnceOptions(ttl=5).ttl_seconds(9) == 5.0
    assert OnceOptions(ttl=timedelta(minutes=1)).ttl_seconds(9) == 60.0
    assert OnceOptions().ttl_seconds(9) == 9


@pytest.mark.parametrize(
    "ttl",
    [
        0,
        -1,
        True,
        "5",
        [5],
        timedelta(0),
        timedelta(seconds=-1),
        float("nan"),
        float("inf"),
        0.0001,
        1e10,
        timedelta(days=4000),
    ],
)
def test_what_is_no_time_is_refused(ttl: Any) -> None:
    """The message shows the value and what to give."""
    with pytest.raises(ConfigError, match=r"@once\(ttl=.*give seconds or a timedelta"):
        once(ttl=ttl)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"lock": "until_execute"}, "did you mean 'until_executed'?"),
        ({"on_conflict": "rise"}, "did you mean 'raise'?"),
        ({"lock": ["until_executed"]}, "did you mean 'until_executed'?"),
        ({"lock": None}, "known are until_and_while_executing, until_executed"),
        ({"on_conflict": 7}, "known are drop, existing"),
        ({"on_conflict": {"publsh": "raise"}}, "'publsh'; did you mean 'publish'?"),
        ({"on_conflict": {"publish": "drop"}}, "known are existing, raise, replace"),
    ],
)
def test_an_unknown_choice_names_the_nearest(option: Any, words: str) -> None:
    """A typing error never means a default."""
    with pytest.raises(ConfigError) as caught:
        once(**option)
    assert words in str(caught.value)


def test_an_unknown_option_is_refused() -> None:
    """Python itself refuses a name that does not exist."""
    with pytest.raises(TypeError, match="timeout"):
        once(timeout=5)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_conflict": "drop"}, "met at publish, where there is existing, raise, replace"),
        (
            {"lock": "while_executing", "on_conflict": "existing"},
            "met at start, where there is reschedule, drop, raise",
        ),
        (
            {"lock": "while_executing", "on_conflict": {"publish": "raise"}},
            "no conflict at publish with this lock, only at start",
        ),
        ({"lock": "until_and_while_executing", "on_conflict": "raise"}, "{'publish': 'raise'}"),
        ({"lock": "while_executing", "ttl": 5}, "leave ttl out"),
        ({"lock": "until_expired", "on_conflict": "replace"}, "run twice in its window"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options: Any, words: str) -> None:
    """When the task is defined, with what to write instead."""
    with pytest.raises(ConfigError) as caught:
        once(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "actions"),
    [
        ({}, ("existing", "reschedule")),
        ({"on_conflict": "replace"}, ("replace", "reschedule")),
        ({"lock": "while_executing"}, ("existing", "reschedule")),
        ({"lock": "while_executing", "on_conflict": "raise"}, ("existing", "raise")),
        (
            {"lock": "until_and_while_executing", "on_conflict": "drop"},
            ("existing", "drop"),
        ),
        (
            {
                "lock": "until_and_while_executing",
                "on_conflict": {"publish": "raise", "start": "raise"},
            },
            ("raise", "raise"),
        ),
    ],
)
def test_an_action_goes_where_it_belongs(options: Any, actions: tuple[str, str]) -> None:
    """One that is met at publish, or at the start, needs no more words."""
    found = OnceOptions(**options)
    assert (found.at_publish, found.at_start) == actions
