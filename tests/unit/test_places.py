"""Which Redis keeps an app's dead letters."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from reliable_tasks._places import dead_place, is_amqp_url, lock_redis, read_config, scheme_of
from reliable_tasks.errors import ConfigError

AMQP = "amqp://guest@rabbit//"


def place_of(broker: str, backend: str | None = None, **settings: Any) -> Any:
    """The Redis of the dead letters of an app like this."""
    with Celery("shop", broker=broker, backend=backend, set_as_current=False) as app:
        app.conf.update(settings)
        return dead_place(app)


def test_with_this_librarys_transport_it_is_the_broker() -> None:
    """Whatever Redis the claims are in: a delivery is ended and kept in one step."""
    place = place_of("redis://broker/1", "redis://backend/2", reliable_redis_url="redis://locks/3")
    assert place.address.url == "redis://broker/1"


def test_it_is_the_broker_that_workers_read() -> None:
    """They keep letters where they end deliveries, and that need not be where tasks are sent."""
    place = place_of(
        "redis://broker/1",
        broker_read_url="redis://read/1",
        broker_write_url="redis://write/1",
        broker_transport_options={"global_keyprefix": "shop:"},
    )
    assert place.address.url == "redis://read/1"
    assert place.store.keys.dead.startswith("shop:")


@pytest.mark.parametrize(
    ("broker", "backend", "settings", "url"),
    [
        (AMQP, "redis://backend/2", {}, "redis://backend/2"),
        (AMQP, None, {"reliable_redis_url": "redis://locks/3"}, "redis://locks/3"),
        (
            "redis://broker/1",
            None,
            {"reliable_broker": "stock", "reliable_redis_url": "redis://locks/3"},
            "redis://locks/3",
        ),
        ("redis://broker/1", None, {"reliable_broker": "stock"}, "redis://broker/1"),
    ],
)
def test_with_another_transport_it_is_that_of_the_claims(
    broker: str, backend: str | None, settings: dict[str, Any], url: str
) -> None:
    """RabbitMQ, and kombu's own for Redis."""
    assert place_of(broker, backend, **settings).address.url == url


@pytest.mark.parametrize("backend", [None, "rpc://", "db+sqlite://"])
def test_without_a_redis_there_is_none(backend: str | None) -> None:
    """It is no error: RabbitMQ keeps them in a queue then."""
    assert place_of(AMQP, backend) is None


def test_claims_need_a_redis() -> None:
    """The error says which were looked at, and what to set."""
    with (
        Celery("shop", broker=AMQP, backend="rpc://", set_as_current=False) as app,
        pytest.raises(ConfigError, match=r"amqp.*rpc.*set reliable_redis_url"),
    ):
        lock_redis(app, read_config(app))


def test_a_bad_setting_is_no_missing_redis() -> None:
    """It is not hidden by what is done without one."""
    with pytest.raises(ConfigError, match="did you mean 'reliable_redis_url'"):
        place_of(AMQP, reliable_redis_ulr="redis://locks/3")


def test_its_keys_have_both_prefixes() -> None:
    """That of the broker's Redis in front, as for all keys that kombu writes."""
    place = place_of(
        "redis://broker/1",
        broker_transport_options={"global_keyprefix": "shop:"},
        reliable_key_prefix="ours:",
    )
    assert place.store.keys.dead.startswith("shop:ours:")


def test_its_password_is_not_shown() -> None:
    """Errors name the server."""
    assert place_of("redis://:secret@broker/1").shown_url == "redis://:**@broker/1"


def test_it_is_found_once_per_configuration() -> None:
    """It is asked for at each end of a task; another configuration is another place."""
    with Celery("shop", broker=AMQP, set_as_current=False) as app:
        app.config_from_object({"reliable_redis_url": "redis://one/0"})
        before = dead_place(app)
        assert before is not None
        assert dead_place(app) is before
        app.config_from_object({"reliable_redis_url": "redis://two/0"})
        after = dead_place(app)
        assert after is not None
        assert (before.address.url, after.address.url) == ("redis://one/0", "redis://two/0")


def test_its_client_is_this_process_own(app: Celery) -> None:
    """Letters are written with it."""
    place = dead_place(app)
    assert place is not None
    assert place.server.ping()
    assert place.server is place.server


@pytest.mark.parametrize(
    ("url", "is_amqp"),
    [
        (AMQP, True),
        ("amqps://rabbit", True),
        ("pyamqp://rabbit", True),
        ("amqp", True),
        ("amqp:", True),
        ("redis://amqp/0", False),
        ("memory://", False),
        ("", False),
    ],
)
def test_rabbitmq_is_known_by_its_url(url: str, is_amqp: bool) -> None:
    """A scheme alone is a URL, too."""
    assert is_amqp_url(url) is is_amqp


def test_a_scheme_is_without_its_transport() -> None:
    """kombu lets one name both."""
    assert scheme_of("sqla+postgresql://host/db") == "sqla"
    assert scheme_of("redis+socket:///tmp/x") == "redis"
