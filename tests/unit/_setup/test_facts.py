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
