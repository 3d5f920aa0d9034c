"""What keeps one test's tasks from the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, _state
from celery._state import set_default_app
from kombu.transport import memory

from reliable_tasks._once import following, leaving
from reliable_tasks._store.client import forget_clients
from reliable_tasks.testing import fake_redis


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
