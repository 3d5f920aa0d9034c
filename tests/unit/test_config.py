"""The library's own settings: what is taken, what is refused, and with which words."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from reliable_tasks import ConfigError, ReliableConfig
from reliable_tasks.config import check_count, nearest

SECONDS = ["store_timeout", "once_ttl", "lease"]
OPTIONAL_SECONDS = ["longest_task", "longest_countdown"]
ZERO_ALLOWED = ["longest_countdown", "visibility_margin"]


def test_an_unknown_option_of_the_lock_redis_is_refused() -> None:
    """A misspelt master_name would show only when Sentinel is asked."""
    with pytest.raises(ConfigError, match="did you mean 'master_name'"):
        ReliableConfig(redis_options={"mastername": "shop"})


def test_defaults_need_no_setting() -> None:
    """An app without any setting of ours gets the documented defaults."""
    config = ReliableConfig.from_mapping({})
    assert config == ReliableConfig()
    assert (config.once_ttl, config.store_timeout, config.on_store_error) == (3600.0, 5.0, "raise")
    assert (config.broker, config.lease, config.death_detection) == ("reliable", 15.0, "connection")
    assert config.wait_replicas == 0


def test_every_setting_is_explained() -> None:
    """The reference page is made of these texts."""
    for setting in fields(ReliableConfig):
        assert setting.metadata["doc"].endswith("."), setting.name
        assert isinstance(setting.metadata["unit"], str)


def test_settings_are_read_by_their_full_names() -> None:
    """Names in app.conf have the prefix, attributes have not."""
    config = ReliableConfig.from_mapping({"reliable_once_ttl": 5, "reliable_key_prefix": "x:"})
    assert (config.once_ttl, config.key_prefix) == (5, "x:")


def test_settings_do_not_change() -> None:
    """Who holds the settings can rely on them."""
    with pytest.raises(FrozenInstanceError):
        ReliableConfig().once_ttl = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", [*SECONDS, *OPTIONAL_SECONDS, "visibility_margin"])
@pytest.mark.parametrize("value", [-1, -0.5, "5", True, float("nan"), float("inf"), [1]])
def test_what_is_no_time_is_refused(name: str, value: Any) -> None:
    """The message names the setting, its value and what to give."""
    with pytest.raises(ConfigError) as caught:
        ReliableConfig.from_mapping({f"reliable_{name}": value})
    assert f"reliable_{name} = {value!r}: give a number of seconds" in str(caught.value)


@pytest.mark.parametrize("name", [*SECONDS, "longest_task"])
def test_zero_is_no_duration(name: str) -> None:
    """Where no time at all makes no sense, zero is refused."""
    with pytest.raises(ConfigError, match="more than 0"):
        ReliableConfig(**{name: 0})


@pytest.mark.parametrize("name", ZERO_ALLOWED)
def test_zero_is_an_allowance(name: str) -> None:
    """No countdown and no margin are things one can say."""
    assert getattr(ReliableConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", [*SECONDS, "visibility_margin"])
def test_none_is_no_time(name: str) -> None:
    """Only what may be left open may be None."""
    with pytest.raises(ConfigError, match=name):
        ReliableConfig(**{name: None})


@pytest.mark.parametrize("name", OPTIONAL_SECONDS)
def test_what_may_be_left_open_is(name: str) -> None:
    """None says that the user has not stated it."""
    assert getattr(ReliableConfig(**{name: None}), name) is None


def test_an_unknown_choice_names_the_nearest() -> None:
    """A typing error in a value is answered with the value that was meant."""
    with pytest.raises(
        ConfigError, match=r"reliable_on_store_error = 'procede'; did you mean 'proceed'\?"
    ):
        ReliableConfig(on_store_error="procede")


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("broker", "stok", "stock"),
        ("broker", "Reliable", "reliable"),
        ("death_detection", "leases", "lease"),
        ("death_detection", "connections", "connection"),
    ],
)
def test_each_choice_has_its_names(name: str, value: str, meant: str) -> None:
    """What is written almost right is answered with what is right."""
    with pytest.raises(ConfigError, match=f"reliable_{name} = '{value}'; did you mean '{meant}'"):
        ReliableConfig.from_mapping({f"reliable_{name}": value})
    assert getattr(ReliableConfig.from_mapping({f"reliable_{name}": meant}), name) == meant


@pytest.mark.parametrize(
    ("name", "value", "longest"),
    [
        ("once_ttl", 1e20, "seconds, which are ten years"),
        ("dead_letter_max_age", sys.maxsize, "seconds, which are a hundred years"),
        ("dead_letter_max_count", sys.maxsize, "1000000000000"),
    ],
)
def test_for_ever_has_an_end(name: str, value: float, longest: str) -> None:
    """Redis could not count so far, and would refuse what is kept so long."""
    with pytest.raises(ConfigError, match=rf"reliable_{name} = .*: give at most .*{longest}"):
        ReliableConfig(**{name: value})  # type: ignore[arg-type]


def test_a_lease_has_a_longest_and_a_shortest() -> None:
    """A dead worker's tasks wait for it, and a living worker must come to renew it."""
    assert ReliableConfig(lease=3).lease == 3
    with pytest.raises(ConfigError, match=r"reliable_lease = 2\.9: give at least 3 seconds"):
        ReliableConfig(lease=2.9)
    assert ReliableConfig(lease=300).lease == 300
    with pytest.raises(ConfigError, match=r"reliable_lease = 300\.5: give at most 300 seconds"):
        ReliableConfig(lease=300.5)


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, None])
def test_replicas_are_counted(value: Any) -> None:
    """Only a whole number is one."""
    assert ReliableConfig(wait_replicas=2).wait_replicas == 2
    with pytest.raises(ConfigError, match=r"reliable_wait_replicas = .*: give a number of"):
        ReliableConfig(wait_replicas=value)


def test_an_unknown_setting_names_the_nearest() -> None:
    """A typing error in a name is answered with the name that was meant."""
    with pytest.raises(
        ConfigError, match=r"'reliable_once_tll'; did you mean 'reliable_once_ttl'\?"
    ):
        ReliableConfig.from_mapping({"reliable_once_tll": 5})


@pytest.mark.parametrize("prefix", ["a{b", "b}"])
def test_a_prefix_must_not_make_a_hash_tag(prefix: str) -> None:
    """Braces would move all keys of Redis Cluster into one slot."""
    with pytest.raises(ConfigError, match="reliable_key_prefix"):
        ReliableConfig(key_prefix=prefix)


def test_without_a_near_name_all_are_listed() -> None:
    """A name that resembles none is answered with all there are."""
    assert nearest("zzz", ["b", "a"]) == "; known are a, b"


COUNTS = {
    "max_crashes": (1, "crashes"),
    "max_requeues": (0, "requeues"),
    "dead_letter_max_count": (1, "dead letters"),
    "dead_letter_max_body": (0, "bytes"),
}
BOUNDLESS = ["max_crashes", "max_requeues"]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", ["3", 3.0, True, False, [3], float("inf")])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    """The message names the setting, its value, of what it is a number and the least one."""
    least, what = COUNTS[name]
    other = ", or None for no bound" if name in BOUNDLESS else ""
    with pytest.raises(ConfigError) as caught:
        ReliableConfig.from_mapping({f"reliable_{name}": value})
    assert str(caught.value) == (
        f"reliable_{name} = {value!r}: give a number of {what}, {least} or more{other}"
    )


@pytest.mark.parametrize("name", COUNTS)
def test_a_number_has_a_least(name: str) -> None:
    """A task starts once before it can crash, and needs not go back to its queue."""
    least, _ = COUNTS[name]
    assert getattr(ReliableConfig.from_mapping({f"reliable_{name}": least}), name) == least
    with pytest.raises(ConfigError, match=f"reliable_{name} = {least - 1}: give a number"):
        ReliableConfig.from_mapping({f"reliable_{name}": least - 1})


@pytest.mark.parametrize("name", COUNTS)
def test_only_a_budget_can_be_without_a_bound(name: str) -> None:
    """What is kept is always bounded, for a Redis is not endless."""
    if name in BOUNDLESS:
        assert getattr(ReliableConfig.from_mapping({f"reliable_{name}": None}), name) is None
    else:
        with pytest.raises(ConfigError, match=f"reliable_{name} = None: give a number"):
            ReliableConfig.from_mapping({f"reliable_{name}": None})


def test_the_budgets_and_the_bounds_have_defaults() -> None:
    """As the reference page has them."""
    config = ReliableConfig()
    assert (config.max_crashes, config.max_requeues) == (3, 100)
    assert (config.dead_letter, config.dead_letter_exchange) == (True, True)
    assert config.dead_letter_max_age == 90 * 86400
    assert (config.dead_letter_max_count, config.dead_letter_max_body) == (100_000, 1_000_000)
    assert config.dead_letter_redact is None


@pytest.mark.parametrize("value", [0, -1, None, True, "90d", float("nan"), float("inf")])
def test_dead_letters_are_kept_for_a_time(value: Any) -> None:
    """The message names the setting, its value and what to give."""
    assert ReliableConfig(dead_letter_max_age=0.5).dead_letter_max_age == 0.5
    with pytest.raises(ConfigError) as caught:
        ReliableConfig(dead_letter_max_age=value)
    assert str(caught.value) == (
        f"reliable_dead_letter_max_age = {value!r}: give a number of seconds, more than 0"
    )


def test_a_misspelt_budget_names_the_nearest() -> None:
    """As any other setting."""
    with pytest.raises(ConfigError, match=r"did you mean 'reliable_max_crashes'\?"):
        ReliableConfig.from_mapping({"reliable_max_crash": 5})


def test_a_number_of_ones_own_is_checked_by_the_same_words() -> None:
    """An option of a task is named as it is written there."""
    check_count("max_crashes of shop.pay", 3, 1, "crashes", is_optional=True)
    check_count("max_crashes of shop.pay", None, 1, "crashes", is_optional=True)
    with pytest.raises(ConfigError, match=r"^max_crashes of shop\.pay = 0: give a number of"):
        check_count("max_crashes of shop.pay", 0, 1, "crashes", is_optional=True)
    with pytest.raises(ConfigError, match=r"= None: give a number of crashes, 1 or more$"):
        check_count("x", None, 1, "crashes", is_optional=False)
