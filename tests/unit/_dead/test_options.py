"""Which tasks become dead letters, as a setting and an attribute of a task say it."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from reliable_tasks import ConfigError, ReliableTask, dead_letters
from reliable_tasks._dead.options import bounds_of, causes_of, read_options
from reliable_tasks._store.letters import Bounds
from reliable_tasks.config import ReliableConfig
from reliable_tasks.dead_letters import Cause

ALL_BUT_EXPIRED = set(Cause) - {Cause.EXPIRED}


def shout(letter: Any) -> Any:
    """Stand for a function that redacts."""
    return letter


NO_FUNCTION = 7


def make(app: Celery, **options: Any) -> Any:
    """A task with options of its own."""

    @app.task(base=ReliableTask, name="shop.pay", **options)
    def pay() -> None:
        pass

    return app.tasks["shop.pay"]


# -- causes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "causes"),
    [
        (True, ALL_BUT_EXPIRED),
        (False, set()),
        ("poison", {"poison"}),
        (Cause.LOST, {"lost"}),
        ((), set()),
        (["poison", "expired"], {"poison", "expired"}),
        ({Cause.POISON, "lost"}, {"poison", "lost"}),
        ({}, ALL_BUT_EXPIRED),
        ({"expired": True}, set(Cause)),
        ({"failed": False, "retries": False}, ALL_BUT_EXPIRED - {"failed", "retries"}),
        ({"failed": False, Cause.EXPIRED: True}, set(Cause) - {"failed"}),
        ({"poison": True, "expired": False}, ALL_BUT_EXPIRED),
    ],
)
def test_every_form_names_causes(option: Any, causes: set[str]) -> None:
    """A mapping changes what is kept by default, all others say it anew."""
    assert causes_of("dead_letter", option) == causes


@pytest.mark.parametrize("option", ["posion", ["failed", "posion"], {"posion": False}], ids=repr)
def test_a_cause_that_does_not_exist_is_refused(option: Any) -> None:
    """The error names it, and the one that was meant."""
    with pytest.raises(ConfigError, match=r"^dead_letter = 'posion'; did you mean 'poison'"):
        causes_of("dead_letter", option)


def test_a_cause_that_is_like_none_is_answered_with_all() -> None:
    """So that one can be chosen."""
    with pytest.raises(ConfigError) as caught:
        causes_of("dead_letter", [7])
    assert str(caught.value) == "dead_letter = 7; known are " + ", ".join(sorted(Cause))


@pytest.mark.parametrize("option", [None, 1, 0.5, object], ids=repr)
def test_another_kind_of_option_is_refused(option: Any) -> None:
    """The error names it, and what to give."""
    with pytest.raises(ConfigError) as caught:
        causes_of("dead_letter", option)
    assert str(caught.value).startswith(f"dead_letter = {option!r}: give True, False, names of")


# -- of a task and of its app --------------------------------------------------------------------


def test_without_a_word_all_is_as_documented(app: Celery) -> None:
    """Three crashes, a hundred requeues, all causes but one, and nothing redacted."""
    options = read_options(app, make(app))
    assert (options.max_crashes, options.max_requeues) == (3, 100)
    assert options.causes == ALL_BUT_EXPIRED
    assert options.bounds == Bounds(90 * 86400.0, 100_000, 1_000_000)
    assert options.redact is None


def test_the_settings_of_the_app_are_for_all(app: Celery) -> None:
    """For its tasks, and for messages that are no task's."""
    app.conf.update(
        reliable_max_crashes=None,
        reliable_max_requeues=0,
        reliable_dead_letter=["lost"],
        reliable_dead_letter_max_age=60,
        reliable_dead_letter_max_count=5,
        reliable_dead_letter_max_body=0,
    )
    of_app, of_task = read_options(app), read_options(app, make(app))
    assert of_app == of_task
    assert (of_app.max_crashes, of_app.max_requeues, of_app.causes) == (None, 0, {"lost"})
    assert of_app.bounds == Bounds(60, 5, 0)


def test_what_a_task_says_is_the_most_specific(app: Celery) -> None:
    """Also where it says that nothing stops it."""
    app.conf.update(reliable_max_crashes=7, reliable_max_requeues=7, reliable_dead_letter=False)
    task = make(app, max_crashes=1, max_requeues=None, dead_letter="poison")
    options = read_options(app, task)
    assert (options.max_crashes, options.max_requeues) == (1, None)
    assert options.causes == {"poison"}
    assert read_options(app).causes == set()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("max_crashes", 0, "give a number of crashes, 1 or more, or None for no bound"),
        ("max_crashes", True, "give a number of crashes, 1 or more, or None for no bound"),
        ("max_crashes", "3", "give a number of crashes, 1 or more, or None for no bound"),
        ("max_requeues", -1, "give a number of requeues, 0 or more, or None for no bound"),
        ("max_requeues", 1.5, "give a number of requeues, 0 or more, or None for no bound"),
        ("dead_letter", None, "give True, False, names of causes, or a mapping"),
    ],
)
def test_an_option_of_a_task_that_is_no_good(
    app: Celery, option: str, value: Any, text: str
) -> None:
    """It is refused when the task is made, and the error names the task."""
    with pytest.raises(ConfigError) as caught:
        make(app, **{option: value})
    assert f"{option} of shop.pay = {value!r}: {text}" in str(caught.value)


def test_a_misspelt_cause_of_the_app_names_the_setting(app: Celery) -> None:
    """Nobody has to look for it in all tasks."""
    app.conf.reliable_dead_letter = "failled"
    with pytest.raises(ConfigError, match=r"reliable_dead_letter = 'failled'; did .*'failed'"):
        read_options(app)


def test_the_bounds_are_those_of_the_settings() -> None:
    """All three of them."""
    config = ReliableConfig(
        dead_letter_max_age=1.5, dead_letter_max_count=2, dead_letter_max_body=3
    )
    assert bounds_of(config) == Bounds(max_age=1.5, max_count=2, max_body=3)


# -- redaction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [shout, f"{__name__}:shout", f"{__name__}.shout"])
def test_who_redacts_is_a_function_or_its_name(app: Celery, setting: Any) -> None:
    """A name, for settings that are read from a file."""
    app.conf.reliable_dead_letter_redact = setting
    found = read_options(app).redact
    assert found is not None
    assert found.__name__ == "shout"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("shop_that_is_not_there:redact", "No module named 'shop_that_is_not_there'"),
        (f"{__name__}:missing", "has no attribute 'missing'"),
        (":", "give a function, or its name as 'module:function'"),
        ("", "give a function, or its name as 'module:function'"),
    ],
)
def test_a_function_that_is_not_found(app: Celery, setting: str, text: str) -> None:
    """The error names the setting, and why."""
    app.conf.reliable_dead_letter_redact = setting
    with pytest.raises(ConfigError) as caught:
        read_options(app)
    assert f"reliable_dead_letter_redact = {setting!r}: give a function" in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("setting", [7, f"{__name__}:NO_FUNCTION"], ids=repr)
def test_what_is_no_function_is_refused(app: Celery, setting: Any) -> None:
    """Not only when the first task has failed."""
    app.conf.reliable_dead_letter_redact = setting
    with pytest.raises(ConfigError, match=r"reliable_dead_letter_redact = .*: it is no function"):
        read_options(app)


def test_causes_have_one_name_each() -> None:
    """The public name is that of the store."""
    assert dead_letters.Cause is Cause
    assert [str(one) for one in Cause] == [one.value for one in Cause]
