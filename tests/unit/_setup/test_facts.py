"""What is known of an app before its settings are chosen."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from reliable_tasks._setup.facts import Facts


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery reads URLs from the environment too."""
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "kind", "scheme"),
    [
        (None, "amqp", "amqp"),
        ("amqp://h//", "amqp", "amqp"),
        ("pyamqp://h//", "amqp", "pyamqp"),
        ("amqps://h//", "amqp", "amqps"),
        ("redis://h", "redis", "redis"),
        ("rediss://h", "redis", "rediss"),
        ("sentinel://a;sentinel://b", "redis", "sentinel"),
        ("redis+socket:///s", "redis", "redis"),
        (["redis://a", "redis://b"], "redis", "redis"),
        ("memory://", "other", "memory"),
        ("sqs://", "other", "sqs"),
    ],
)
def test_the_kind_of_broker(url: Any, kind: str, scheme: str) -> None:
    """All ways to write a broker's URL."""
    facts = Facts.of(Celery(broker=url, set_as_current=False))
    assert (facts.broker, facts.broker_scheme) == (kind, scheme)


@pytest.mark.parametrize(
    ("url", "has_one", "is_redis"),
    [
        (None, False, False),
        ("disabled", False, False),
        ("rpc", True, False),
        ("rpc://", True, False),
        ("cache+memory://", True, False),
        ("db+sqlite:///x", True, False),
        ("redis://h", True, True),
        ("rediss://h", True, True),
        ("sentinel://h", True, True),
    ],
)
def test_the_kind_of_result_backend(url: Any, has_one: bool, is_redis: bool) -> None:
    """No backend at all is a fact too."""
    facts = Facts.of(Celery(backend=url, set_as_current=False))
    assert (facts.has_backend, facts.backend_is_redis) == (has_one, is_redis)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel", "redis+socket"])
@pytest.mark.parametrize(("setting", "is_own"), [("reliable", True), ("stock", False)])
def test_the_librarys_transport_is_used_where_it_can_be(
    scheme: str, setting: str, is_own: bool
) -> None:
    """For each kind of Redis, unless the user wants kombu's."""
    app = Celery(broker=f"{scheme}://h", set_as_current=False)
    app.conf.reliable_broker = setting
    facts = Facts.of(app)
    assert facts.config.broker == setting
    assert facts.has_own_transport is facts.carries is is_own


@pytest.mark.parametrize("url", ["amqp://h", "memory://", "sqs://"])
def test_the_librarys_transport_is_not_used_elsewhere(url: str) -> None:
    """Other brokers have transports of their own."""
    assert not Facts.of(Celery(broker=url, set_as_current=False)).has_own_transport


@pytest.mark.parametrize(
    ("broker", "backend", "redis_url", "has_one"),
    [
        ("amqp://h", "redis://h", None, True),
        ("amqp://h", None, "redis://h", True),
        ("amqp://h", "rpc://", None, False),
        ("amqp://h", None, None, False),
        ("redis://h", "redis://h", "redis://h", False),
    ],
)
def test_a_redis_beside_rabbitmq_guards(
    broker: str, backend: str | None, redis_url: str | None, has_one: bool
) -> None:
    """The result backend will do; a broker that is a Redis needs no other."""
    app = Celery(broker=broker, backend=backend, set_as_current=False)
    app.conf.reliable_redis_url = redis_url
    facts = Facts.of(app)
    assert facts.has_guard_beside is has_one
    assert facts.carries is (has_one or facts.has_own_transport)
