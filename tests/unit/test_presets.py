"""Presets: immutable, merged and spread, and strict about numbers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import tenacity

from reliable_tasks import ConfigError, presets
from reliable_tasks.presets import Preset

READY_MADE = [presets.QUICK, presets.STANDARD, presets.LONG, presets.BATCH]


@pytest.mark.parametrize("preset", READY_MADE, ids=["QUICK", "STANDARD", "LONG", "BATCH"])
def test_a_preset_bounds_time_and_retries(preset: Any) -> None:
    """Every preset can clean up before it is killed, and gives up in the end."""
    assert 0 < preset["soft_time_limit"] < preset["time_limit"]
    retrying = preset["retrying"]
    assert isinstance(retrying.stop, tenacity.stop_after_attempt)
    assert isinstance(retrying.wait, tenacity.wait_random_exponential)


def test_only_what_a_user_waits_for_expires() -> None:
    """An expiry drops tasks, so it stands only where a late one is worthless."""
    assert [preset.get("expires") for preset in READY_MADE] == [3600.0, None, None, None]


def test_a_preset_cannot_be_changed() -> None:
    """What one task does with a preset never reaches another task."""
    preset: Any = presets.QUICK
    with pytest.raises(TypeError):
        preset["time_limit"] = 1
    with pytest.raises(TypeError):
        del preset["time_limit"]
    with pytest.raises(AttributeError):
        preset.extra = 1
    assert not hasattr(preset, "update")


def test_a_preset_is_spread() -> None:
    """Two stars make keyword arguments of it."""
    assert dict(**presets.time_limit(hard=20, soft=5)) == {"time_limit": 20, "soft_time_limit": 5}


def test_the_right_side_of_a_merge_wins() -> None:
    """A merge makes a new preset and leaves both of its sides alone."""
    merged: Any = presets.QUICK | presets.time_limit(hard=20)
    assert isinstance(merged, Preset)
    assert (merged["time_limit"], merged["soft_time_limit"]) == (20, 18)
    assert merged["expires"] == 3600.0
    assert presets.QUICK["time_limit"] == 15


def test_a_preset_merges_with_a_plain_mapping_on_either_side() -> None:
    """A dict of one's own can stand left and right of it."""
    limit: Any = presets.time_limit(hard=20)
    assert dict(limit | {"time_limit": 7}) == {"time_limit": 7, "soft_time_limit": 18}
    assert dict({"time_limit": 7, "queue": "q"} | limit) == {
        "time_limit": 20,
        "soft_time_limit": 18,
        "queue": "q",
    }


def test_presets_compare_by_content() -> None:
    """Equal options are an equal preset, also after pickling."""
    assert presets.rate_limit("10/m") == presets.rate_limit("10/m")
    assert len(presets.rate_limit("10/m")) == 1
    assert dict(pickle.loads(pickle.dumps(presets.rate_limit("3/h")))) == {"rate_limit": "3/h"}


def test_a_preset_shows_its_options() -> None:
    """What is printed is what one would write."""
    assert repr(presets.time_limit(hard=1)) == "Preset(time_limit=1)"


@pytest.mark.parametrize(
    ("hard", "soft"), [(100, 90), (10, 9), (5, 4), (2, 1), (1, None), (0.5, None), (1.5, None)]
)
def test_a_soft_limit_comes_before_the_hard_one(hard: Any, soft: int | None) -> None:
    """Left open, it is a tenth or a second less; where there is no room, there is none."""
    assert presets.time_limit(hard=hard).get("soft_time_limit") == soft


@pytest.mark.parametrize("value", [0, -1, True, "10", float("nan"), float("inf"), [1]])
def test_a_limit_that_is_no_duration_is_refused(value: Any) -> None:
    """The message names the limit and its value."""
    with pytest.raises(ConfigError, match="hard = "):
        presets.time_limit(hard=value)
    with pytest.raises(ConfigError, match="soft = "):
        presets.time_limit(hard=10, soft=value)


def test_a_hard_limit_is_needed() -> None:
    """None is no hard limit."""
    with pytest.raises(ConfigError, match="hard = None"):
        presets.time_limit(hard=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("soft", [10, 11])
def test_a_soft_limit_not_below_its_hard_one_is_refused(soft: int) -> None:
    """Such a task would be killed before it could clean up."""
    with pytest.raises(ConfigError, match=f"soft = {soft} is not below hard = 10"):
        presets.time_limit(hard=10, soft=soft)


@pytest.mark.parametrize("limit", ["100/s", "10/m", "3/h", "0.5/s"])
def test_a_rate_is_taken_as_it_is(limit: str) -> None:
    """Celery reads it later; here it is only checked."""
    assert presets.rate_limit(limit)["rate_limit"] == limit


@pytest.mark.parametrize(
    "limit", ["", "10", "10/d", "/s", "x/s", "0/s", "-1/m", "nan/s", "inf/h", "10/ m", 10, None]
)
def test_what_is_no_rate_is_refused(limit: Any) -> None:
    """The message shows what was given and what to write."""
    with pytest.raises(ConfigError, match="is not a rate: write '100/s'"):
        presets.rate_limit(limit)
