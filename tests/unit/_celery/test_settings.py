"""What the user set, as opposed to what anybody else put into the configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from reliable_tasks._celery.settings import explicit, put, reliable_settings

KEY = "task_acks_late"


def new_app() -> Celery:
    """An app that was told nothing."""
    return Celery(set_as_current=False)


def test_what_nobody_set_is_not_explicit() -> None:
    """Celery's default is nobody's wish."""
    assert explicit(new_app(), KEY) == (False, False)


def by_attribute(app: Celery) -> None:
    """Set it by attribute, before the configuration is read."""
    app.conf.task_acks_late = False


def by_update(app: Celery) -> None:
    """Set it by update, after the configuration was read."""
    assert app.conf.task_acks_late is False
    app.conf.update(task_acks_late=False)


def by_argument(app: Celery) -> None:
    """Set it when the app is made."""
    app.__init__(changes={KEY: False}, set_as_current=False)  # type: ignore[misc]


def by_object(app: Celery) -> None:
    """Set it by an object."""
    app.config_from_object(SimpleNamespace(task_acks_late=False))


def by_old_name(app: Celery) -> None:
    """Set it by its name of before Celery 4."""
    app.config_from_object({"CELERY_ACKS_LATE": False})


def by_namespace(app: Celery) -> None:
    """Set it as Django projects do."""
    app.config_from_object(SimpleNamespace(CELERY_TASK_ACKS_LATE=False), namespace="CELERY")


@pytest.mark.parametrize(
    "how", [by_attribute, by_update, by_argument, by_object, by_old_name, by_namespace]
)
def test_every_way_of_setting_is_noticed(how: Any) -> None:
    """Also where the value is Celery's default: somebody wanted it."""
    app = new_app()
    how(app)
    assert explicit(app, KEY) == (True, False)


def test_what_the_library_wrote_is_not_the_users() -> None:
    """The value of before is still known."""
    app = new_app()
    put(app, KEY, True)
    assert app.conf.task_acks_late is True
    assert explicit(app, KEY) == (False, False)


def test_what_the_library_filled_up_is_still_the_users() -> None:
    """A mapping that the user began and the library completed."""
    app = new_app()
    app.conf.broker_transport_options = {"a": 1}
    put(app, "broker_transport_options", {"a": 1, "b": 2})
    put(app, "broker_transport_options", {"a": 1, "b": 3})
    assert explicit(app, "broker_transport_options") == (True, {"a": 1})


def test_what_the_user_writes_over_it_counts() -> None:
    """The last word is the user's."""
    app = new_app()
    put(app, KEY, True)
    app.conf.task_acks_late = None
    assert explicit(app, KEY) == (True, None)


def test_our_settings_are_found_under_every_name() -> None:
    """With and without a namespace, in capitals and in small letters."""
    app = new_app()
    app.conf.reliable_once_ttl = 5
    assert reliable_settings(app) == {"reliable_once_ttl": 5}
    app = new_app()
    app.config_from_object(
        SimpleNamespace(CELERY_RELIABLE_ONCE_TTL=5, RELIABLE_REDIS_URL="redis://h", OTHER=1),
        namespace="CELERY",
    )
    assert reliable_settings(app)["reliable_once_ttl"] == 5


def test_a_later_setting_wins() -> None:
    """What was set on the app comes before what was loaded."""
    app = new_app()
    app.config_from_object({"reliable_once_ttl": 5})
    assert reliable_settings(app) == {"reliable_once_ttl": 5}
    app.conf.reliable_once_ttl = 6
    assert reliable_settings(app) == {"reliable_once_ttl": 6}
