"""Which Redis holds an app's claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from reliable_tasks import ConfigError
from reliable_tasks._once.locks import locks_of
from reliable_tasks._places import read_config
from reliable_tasks._store.client import ServerAddress


def app_with(**settings: Any) -> Celery:
    """An app with these settings."""
    app = Celery("locks", set_as_current=False)
    app.conf.update(settings)
    return app


def address(app: Celery) -> ServerAddress:
    """Where its claims are."""
    return locks_of(app).claims._address


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Celery reads URLs from the environment too."""
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    return


def test_a_setting_of_its_own_comes_first() -> None:
    """A lock Redis can stand apart from everything else."""
    app = app_with(
        reliable_redis_url="redis://locks/1",
        broker_url="redis://broker/0",
        result_backend="redis://results/0",
        broker_transport_options={"global_keyprefix": "b:"},
    )
    assert address(app) == ServerAddress("redis://locks/1", 5.0, {})
    assert not locks_of(app).are_at_broker


def test_the_broker_comes_second() -> None:
    """A broker that is a Redis serves, with the options that it is reached by."""
    app = app_with(
        broker_url="rediss://broker/0",
        result_backend="redis://results/0",
        broker_transport_options={
            "global_keyprefix": "b:",
            "visibility_timeout": 5,
            "master_name": "",
        },
        broker_use_ssl={"ssl_cert_reqs": "none"},
    )
    options = {"global_keyprefix": "b:", "ssl": {"ssl_cert_reqs": "none"}}
    assert address(app) == ServerAddress("rediss://broker/0", 5.0, options)
    assert address(app).key_prefix == "b:"
    assert locks_of(app).are_at_broker


def test_the_result_backend_comes_third() -> None:
    """With another kind of broker the result backend serves, with its own options."""
    app = app_with(
        broker_url="amqp://broker//",
        result_backend="rediss://results/0",
        broker_transport_options={"global_keyprefix": "b:"},
        result_backend_transport_options={"global_keyprefix": "r:"},
        redis_backend_use_ssl={"ssl_cert_reqs": "none"},
    )
    options = {"global_keyprefix": "r:", "ssl": {"ssl_cert_reqs": "none"}}
    assert address(app) == ServerAddress("rediss://results/0", 5.0, options)
    assert not locks_of(app).are_at_broker


def test_without_a_redis_it_says_what_to_set() -> None:
    """The message shows what was found, without passwords."""
    app = app_with(broker_url="amqp://u:secret@broker//", result_backend="db+sqlite://")
    with pytest.raises(ConfigError, match="set reliable_redis_url") as caught:
        locks_of(app)
    assert "amqp://u:**@broker//" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery prefers CELERY_BROKER_URL, so claims do."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://from-env/0")
    app = app_with(broker_url="redis://from-settings/0")
    assert address(app).url == "redis://from-env/0"
    assert locks_of(app).are_at_broker


def test_a_write_url_is_where_claims_go() -> None:
    """Who publishes to another URL than workers read from has the claims where it publishes."""
    app = app_with(broker_url="redis://read/0", broker_write_url="redis://write/0")
    assert address(app).url == "redis://write/0"


@pytest.mark.parametrize("urls", ["redis://a/0;redis://b/0", ["redis://a/0", "redis://b/0"]])
def test_of_several_brokers_the_first_holds_the_claims(urls: Any) -> None:
    """Celery takes failover URLs as one text or as a list."""
    app = app_with(broker_url=urls, result_backend="redis://results/0")
    found = locks_of(app)
    assert found.claims.client.redis.connection_pool.connection_kwargs["host"] == "a"
    assert found.are_at_broker


@pytest.mark.parametrize(
    ("same_as", "prefix"), [("redis://broker/0", "b:"), ("redis://results/0", "r:")]
)
def test_a_url_that_is_named_twice_keeps_its_options(same_as: str, prefix: str) -> None:
    """Naming the broker or the backend as lock Redis changes nothing about how it is reached."""
    app = app_with(
        reliable_redis_url=same_as,
        broker_url="redis://broker/0",
        result_backend="redis://results/0",
        broker_transport_options={"global_keyprefix": "b:"},
        result_backend_transport_options={"global_keyprefix": "r:"},
    )
    assert address(app).key_prefix == prefix
    assert locks_of(app).are_at_broker is (prefix == "b:")


def test_options_of_its_own_are_taken_whole() -> None:
    """``reliable_redis_options`` belongs to ``reliable_redis_url`` alone."""
    app = app_with(
        reliable_redis_url="sentinel://s1",
        reliable_redis_options={"master_name": "m"},
        broker_url="sentinel://s1",
        broker_transport_options={"master_name": "other", "global_keyprefix": "b:"},
    )
    assert address(app).options == {"master_name": "m"}


def test_two_apps_have_two_stores() -> None:
    """Apps in one process do not share what they were configured with."""
    one = app_with(broker_url="redis://one/0", reliable_store_timeout=1)
    two = app_with(broker_url="redis://two/0", reliable_key_prefix="two:")
    assert (address(one).url, address(two).url) == ("redis://one/0", "redis://two/0")
    assert (address(one).timeout, address(two).timeout) == (1, 5.0)
    assert locks_of(two).config.key_prefix == "two:"
    assert locks_of(one) is locks_of(one)


def test_another_configuration_is_noticed() -> None:
    """Settings are read once, and again when an app is configured anew."""
    app = Celery(set_as_current=False)
    app.config_from_object({"broker_url": "redis://one/0"})
    first = locks_of(app)
    assert locks_of(app) is first
    app.config_from_object({"broker_url": "redis://two/0"}, force=True)
    assert address(app).url == "redis://two/0"


def test_settings_are_read_from_the_app() -> None:
    """An unknown one is refused wherever settings are read."""
    assert read_config(app_with(reliable_once_ttl=7)).once_ttl == 7
    app = app_with(broker_url="redis://h", reliable_once_tll=7)
    with pytest.raises(ConfigError, match="did you mean 'reliable_once_ttl'"):
        locks_of(app)


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("redis://u:p@h", True),
        ("redis://u:p@h:6379/0", True),
        ("redis://u:p@h:6379/", True),
        ("redis://u:p@H/0", True),
        ("redis://u:p@h/1", False),
        ("redis://u:p@h:6380/0", False),
        ("redis://u:other@h/0", False),
        ("rediss://u:p@h/0", False),
    ],
)
def test_the_broker_is_known_however_its_url_is_written(url: str, same: bool) -> None:
    """Then the claim is made in the script that queues the message, with the broker's options."""
    options = {"global_keyprefix": "b:"}
    app = app_with(
        broker_url="redis://u:p@h/0", reliable_redis_url=url, broker_transport_options=options
    )
    assert locks_of(app).are_at_broker is same
    assert address(app).options == (options if same else {})
