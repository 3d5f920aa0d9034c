"""A publish that failed for its caller, and not for the broker."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import Proxy, wait_until


@pytest.fixture(params=["Redis", "RabbitMQ"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """A broker beside the lock Redis."""
    if request.param == "Redis":
        server: EmbeddedServer = request.getfixturevalue("redis_server")
        return server.url
    return str(request.getfixturevalue("rabbitmq_url"))


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    """A connection to it that can be broken."""
    port = urlsplit(broker_url).port
    assert port is not None
    with Proxy(port) as proxy:
        yield proxy


@pytest.fixture
def scene(broker_url: str, proxy: Proxy, module_redis: EmbeddedServer, scenes: StartScene) -> Scene:
    """An app whose callers reach the broker by that connection, and one message in the queue."""
    parts = urlsplit(broker_url)
    url = urlunsplit(parts._replace(netloc=parts.netloc.replace(str(parts.port), str(proxy.port))))
    settings = {"reliable_redis_url": module_redis.url}
    scene = scenes(url, other_database(module_redis), settings=settings, limit=60)
    scene.call("act", "warm-up")
    return scene


@pytest.fixture
def name() -> str:
    """A `@once` key of the test's own."""
    return uuid4().hex[:8]


@pytest.mark.parametrize(
    "task", ["act", "until_executing", "until_expired", "until_and_while_executing"]
)
def test_the_message_is_queued_all_the_same(
    scene: Scene, proxy: Proxy, broker_url: str, name: str, task: str
) -> None:
    """The next call takes its place, and one of the two runs."""
    proxy.lose_replies(name.encode())
    with pytest.raises(OperationalError):
        scene.call(task, name, retry=False)
    assert not proxy.replies_to_lose
    first = scene.claim(name, task=task)
    assert first["unconfirmed"] == first["owner"]
    second = scene.call(task, name)
    assert (second.duplicate, second.replaced_id) == (False, first["owner"])
    assert scene.call(task, name).id == second.id
    scene.worker(broker_url=broker_url)
    assert second.get(timeout=15) == name
    with pytest.raises(TaskRevokedError, match=second.id):
        scene.app.AsyncResult(first["owner"]).get(timeout=15)
    assert scene.starts(name) == 1
    if task != "until_expired":
        scene.wait_free(name, task=task)


def test_the_message_comes_before_the_next_call(
    scene: Scene, proxy: Proxy, broker_url: str, name: str
) -> None:
    """It was queued, for it is there: the next call is its duplicate."""
    proxy.lose_replies(name.encode())
    with pytest.raises(OperationalError):
        scene.call("act", name, "wait", retry=False)
    first = scene.claim(name)
    scene.worker(broker_url=broker_url)
    scene.wait_starts(name)
    assert "unconfirmed" not in scene.claim(name)
    again = scene.call("act", name)
    assert (again.duplicate, again.id) == (True, first["owner"])
    scene.journal.open(name)
    assert again.get(timeout=15) == name
    assert scene.starts(name) == 1


def test_it_waits_in_a_worker(scene: Scene, proxy: Proxy, broker_url: str, name: str) -> None:
    """That has seen it, too."""
    scene.worker(broker_url=broker_url, concurrency=1, settings={"worker_prefetch_multiplier": 4})
    scene.call("bare", f"{name}, first", "wait")
    scene.wait_starts(f"{name}, first")
    proxy.lose_replies(name.encode())
    with pytest.raises(OperationalError):
        scene.call("act", name, retry=False)
    first = scene.claim(name)["owner"]
    wait_until(lambda: "unconfirmed" not in scene.claim(name), 15, lambda: f"a look\n{scene.logs}")
    assert scene.call("act", name).id == first
    scene.journal.open(f"{name}, first")
