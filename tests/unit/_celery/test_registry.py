"""Looking at an app without changing it."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, Task

from reliable_tasks._celery.registry import (
    check_arguments,
    hard_limit,
    is_configured,
    is_finalized,
    known_tasks,
)


def body() -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("options", "of_call", "seconds"),
    [
        ({}, None, 0),
        ({"time_limit": 9}, None, 9),
        ({"time_limit": 9}, (3, None), 3),
        ({"time_limit": 9, "soft_time_limit": 7}, (1, None), 7),
        ({"soft_time_limit": 7}, None, 0),
    ],
)
def test_a_run_is_killed_at_the_later_of_its_limits(
    options: dict[str, Any], of_call: Any, seconds: float
) -> None:
    """Celery starts the timer of the hard limit when the soft one has struck."""
    with Celery("limits", set_as_current=False) as app:
        task = app.task(shared=False, **options)(body)
        assert hard_limit(task, of_call) == seconds


def test_arguments_are_checked_as_a_call_does() -> None:
    """A task without ``typing`` is not asked, nor one that is a class."""

    class Loose(Task):  # type: ignore[type-arg]
        name = "loose"

    with Celery("arguments", set_as_current=False) as app:
        check_arguments(app.task(shared=False)(body), (), {})
        with pytest.raises(TypeError):
            check_arguments(app.task(shared=False, name="strict")(body), (1,), {})
        check_arguments(app.task(shared=False, name="untyped", typing=False)(body), (1,), {})
        check_arguments(app.register_task(Loose()), (1,), {})


def test_looking_changes_nothing() -> None:
    """Neither the configuration is read nor a task is made."""
    app = Celery(set_as_current=False)

    @app.task(shared=False)
    def lazy() -> None:
        pass

    assert known_tasks(app) == []
    assert not is_configured(app)
    assert not is_finalized(app)
    app.finalize()
    assert [task.name for task in known_tasks(app)] == [lazy.name]
    assert is_finalized(app)
    app.conf.get("broker_url")
    assert is_configured(app)
