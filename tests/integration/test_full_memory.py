"""A Redis whose memory is full refuses what is new, and nothing to a task that is queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import redis
from kombu.exceptions import OperationalError

from reliable_tasks import StoreError
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene
from tests.integration.scene import Scene

LOCKS = ["act", "until_executing", "while_executing", "until_and_while_executing", "until_expired"]


@pytest.fixture
def name() -> str:
    """A `@once` key of the test's own."""
    return uuid4().hex[:8]


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    """Let a server have no memory left meanwhile."""
    client.config_set("maxmemory", 1)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)


def _run_through(scene: Scene, client: redis.Redis, name: str) -> None:
    """Start a task of each lifetime, with one that waits behind each, while there is memory."""
    running = [scene.call(task, f"{name} {task}", "wait") for task in LOCKS]
    for task in LOCKS:
        scene.wait_starts(f"{name} {task}")
    waiting = [scene.call("act", f"{name} behind {task}") for task in LOCKS]
    with full(client):
        with pytest.raises((OperationalError, StoreError)):
            scene.call("act", f"{name} more")
        for task in LOCKS:
            scene.journal.open(f"{name} {task}")
        for result in (*running, *waiting):
            result.get(timeout=20)
        for task in LOCKS[:-1]:
            scene.wait_free(f"{name} {task}", task=task)
        for task in LOCKS:
            scene.wait_free(f"{name} behind {task}")
        turns = [one for one in scene.claims.names() if ":turn}" in one]
        assert turns == []
    assert not scene.call("act", f"{name} more").duplicate


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_of_the_broker(
    redis_server: EmbeddedServer,
    redis_client: redis.Redis,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    name: str,
    pool: str,
) -> None:
    """With the claims in it; the results are elsewhere."""
    scene = scenes(redis_server.url, module_redis.url, limit=60)
    scene.worker(pool=pool, concurrency=len(LOCKS))
    _run_through(scene, redis_client, name)


def test_of_the_claims_alone(
    redis_server: EmbeddedServer, module_redis: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """The broker has room for messages, and a call is refused all the same."""
    with EmbeddedServer() as locks, redis.Redis.from_url(locks.url) as client:
        settings = {"reliable_redis_url": locks.url}
        scene = scenes(redis_server.url, module_redis.url, settings=settings, limit=60)
        scene.worker(concurrency=len(LOCKS))
        _run_through(scene, client, name)
        retried = scene.call("act", f"{name} retried", "wait_and_retry")
        scene.wait_starts(f"{name} retried")
        with full(client):
            scene.journal.open(f"{name} retried")
            retried.get(timeout=20)
        assert scene.starts(f"{name} retried") == 2


def test_beside_rabbitmq(
    rabbitmq_url: str, module_redis: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """Where the runs are kept beside the claims."""
    with EmbeddedServer() as locks, redis.Redis.from_url(locks.url) as client:
        settings = {"reliable_redis_url": locks.url}
        scene = scenes(rabbitmq_url, module_redis.url, settings=settings, limit=60)
        scene.worker(concurrency=len(LOCKS))
        _run_through(scene, client, name)
