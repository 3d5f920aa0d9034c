"""Messages that wait in a worker for longer than their claims live in the queue."""

from __future__ import annotations

import time
from uuid import uuid4

import pytest

from reliable_tasks import ReliableResult
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene

#: How long a claim may wait in the queue, and how long its message waits in the worker (s).
TTL, WAIT = 2.0, 6.0
SETTINGS = {"reliable_once_ttl": TTL, "worker_prefetch_multiplier": 4}


@pytest.fixture
def name() -> str:
    """A `@once` key of the test's own."""
    return uuid4().hex[:8]


def _waits_and_runs(scene: Scene, name: str, task: str = "act") -> None:
    """Have a message wait behind a task that runs; its key stays its own."""
    scene.call("bare", f"{name}, first", "wait")
    scene.wait_starts(f"{name}, first")
    waiting = scene.call(task, name)
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        assert scene.claim(name, task=task).get("owner") == waiting.id, scene.logs
        time.sleep(0.1)
    again: ReliableResult = scene.call(task, name)
    assert (again.id, again.duplicate) == (waiting.id, True)
    scene.journal.open(f"{name}, first")
    assert waiting.get(timeout=15) == name
    assert scene.starts(name) == 1
    scene.wait_free(name, task=task)


@pytest.mark.parametrize("task", ["act", "until_executing", "until_and_while_executing"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_behind_another_task(
    redis_server: EmbeddedServer, scenes: StartScene, name: str, pool: str, task: str
) -> None:
    """In the worker or in its pool."""
    results = other_database(redis_server)
    scene = scenes(redis_server.url, results, settings=SETTINGS, limit=60)
    scene.worker(pool=pool, concurrency=1)
    _waits_and_runs(scene, name, task)


def test_beside_rabbitmq(
    rabbitmq_url: str, redis_server: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """Where the claims are in another place than the messages."""
    settings = {**SETTINGS, "reliable_redis_url": redis_server.url}
    scene = scenes(rabbitmq_url, other_database(redis_server), settings=settings, limit=60)
    scene.worker(concurrency=1)
    _waits_and_runs(scene, name)


def test_on_stock_kombus_transport(
    redis_server: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """Where nothing is held on a lease."""
    settings = {**SETTINGS, "reliable_broker": "stock"}
    scene = scenes(redis_server.url, other_database(redis_server), settings=settings, limit=60)
    scene.worker(concurrency=1)
    _waits_and_runs(scene, name)


def test_a_window_is_not_prolonged(
    redis_server: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """It is over when it is over, wherever the message waits."""
    scene = scenes(redis_server.url, other_database(redis_server), settings=SETTINGS, limit=60)
    scene.worker(concurrency=1)
    scene.call("bare", f"{name}, first", "wait")
    scene.wait_starts(f"{name}, first")
    scene.call("until_expired", name)
    scene.wait_free(name, task="until_expired", timeout=10)
    scene.journal.open(f"{name}, first")
