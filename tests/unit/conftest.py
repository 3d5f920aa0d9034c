"""What keeps one test's tasks from the next, and what many of them need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kombu.transport
import pytest
from celery import Celery, _state
from celery._state import set_default_app
from celery.worker import state as worker_state
from kombu.transport import memory

from reliable_tasks._celery import delivery
from reliable_tasks._once import following, leaving
from reliable_tasks._store.client import forget_clients
from reliable_tasks.instrumentation import signals
from reliable_tasks.testing import fake_redis
from tests.unit._celery.bench import Bench
from tests.unit.harness import Heard


@pytest.fixture(autouse=True)
def own_celery() -> Iterator[None]:
    """Forget the apps, the shared tasks and the clients of a test.

    Celery keeps the function behind every ``@app.task`` for all apps to come.
    """
    finalizers, others = set(_state._on_app_finalizers), set(_state._apps)
    default, current = _state.default_app, _state._tls.current_app
    # An app that another test has left is given each shared task at once.
    for app in others:
        _state._deregister_app(app)
    yield
    _state._on_app_finalizers.intersection_update(finalizers)
    for app in set(_state._apps):
        _state._deregister_app(app)
    for app in others:
        _state._register_app(app)
    set_default_app(default)
    _state._tls.current_app = current
    leaving._silence.end()
    following._silence.end()
    memory.Channel.queues.clear()
    memory.Transport.global_state.clear()
    forget_clients()


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app of this test's own, with all that it needs in this process' memory."""
    with (
        fake_redis(),
        Celery("shop", broker="memory://", backend="cache+memory://") as app,
    ):
        app.conf.reliable_redis_url = "redis://fake/0"
        yield app


@pytest.fixture
def rabbit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """An app with RabbitMQ alone, as far as it knows: its queues are in this process' memory."""
    for scheme in ("amqp", "pyamqp"):
        monkeypatch.setitem(kombu.transport.TRANSPORT_ALIASES, scheme, memory.Transport)
        monkeypatch.setitem(kombu.transport._transport_cache, scheme, memory.Transport)
    with Celery("shop", broker="amqp://rabbit//") as app:
        yield app


@pytest.fixture
def bench(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A worker's main process."""
    bench = Bench(app, monkeypatch)
    bench.start_consumer()
    yield bench
    worker_state.reserved_requests.clear()
    worker_state.revoked.clear()
    worker_state.successful_requests.clear()
    delivery._consumers.clear()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What the receivers of all signals were told: name, sender, and the rest."""
    heard: Heard = []
    connected = []
    for name in signals.__all__:

        def receive(sender: Any = None, _name: str = name, **told: Any) -> None:
            heard.append((_name, sender, {k: v for k, v in told.items() if k != "signal"}))

        signal = getattr(signals, name)
        signal.connect(receive, weak=False)
        connected.append((signal, receive))
    yield heard
    for signal, receive in connected:
        assert signal.disconnect(receive)
