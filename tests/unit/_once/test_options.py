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
        ({"on_conflict": None}, "known are existing, raise"),
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
