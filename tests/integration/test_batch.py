"""Many calls at once, with real brokers."""

from __future__ import annotations

import time
from uuid import uuid4

import pytest
import redis
from kombu.exceptions import OperationalError

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import Proxy


@pytest.fixture
def name() -> str:
    """What all keys of a test begin with."""
    return uuid4().hex[:8]


def calls(name: str, numbers: range) -> list[tuple[tuple[str], None]]:
    """Return calls with these keys."""
    return [((f"{name} {number}",), None) for number in numbers]


def near(proxy: Proxy, server: EmbeddedServer, scenes: StartScene, *, locks: str = "") -> Scene:
    """An app whose callers reach the broker, and its claims, by a connection that can be broken."""
    settings = {"reliable_redis_url": locks} if locks else {}
    scene = scenes(proxy.url(), other_database(server), settings=settings, limit=60)
    scene.call("act", "warm-up")
    return scene


@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis", "beside RabbitMQ"])
def test_each_of_many_runs_once(
    request: pytest.FixtureRequest,
    redis_server: EmbeddedServer,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    name: str,
    where: str,
) -> None:
    """Those whose keys were taken are told whose they are."""
    broker = redis_server.url
    if where == "beside RabbitMQ":
        broker = request.getfixturevalue("rabbitmq_url")
    locks = broker if where == "the broker's Redis" else other_database(module_redis, 2)
    settings = {"reliable_redis_url": locks}
    scene = scenes(broker, other_database(module_redis, 3), settings=settings, limit=60)
    act = scene.app.tasks["act"]
    before = scene.call("act", f"{name} 7")
    results = act.apply_many([*calls(name, range(300)), *calls(name, range(10))])
    assert [n for n, result in enumerate(results) if result.duplicate] == [7, *range(300, 310)]
    assert results[7].id == results[307].id == before.id
    assert [result.id for result in results[300:307]] == [result.id for result in results[:7]]
    scene.worker(concurrency=4)
    expected = [f"{name} {number}" for number in (*range(300), *range(10))]
    assert [result.get(timeout=60) for result in results] == expected
    assert {scene.starts(key) for key in expected} == {1}
    for number in range(300):
        scene.wait_free(f"{name} {number}")


@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis"])
def test_a_handful_of_round_trips(
    redis_server: EmbeddedServer,
    redis_proxy: Proxy,
    scenes: StartScene,
    name: str,
    where: str,
) -> None:
    """Where each takes 50 ms and there are 1,000 calls."""
    locks = "" if where == "the broker's Redis" else redis_proxy.url(2)
    scene = near(redis_proxy, redis_server, scenes, locks=locks)
    redis_proxy.latency = 0.025
    begun = time.monotonic()
    results = scene.app.tasks["act"].apply_many(calls(name, range(1000)))
    assert time.monotonic() - begun < 10
    assert not any(result.duplicate for result in results)
    assert len(scene.claims.names()) == 1001


@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis"])
def test_a_lost_reply(
    redis_server: EmbeddedServer,
    redis_proxy: Proxy,
    redis_client: redis.Redis,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    name: str,
    where: str,
) -> None:
    """What was queued is queued once, and is nobody's duplicate."""
    locks = "" if where == "the broker's Redis" else module_redis.url
    scene = near(redis_proxy, redis_server, scenes, locks=locks)
    redis_proxy.lose_replies(f"{name} 3".encode())
    results = scene.app.tasks["act"].apply_many(calls(name, range(500)))
    assert not redis_proxy.replies_to_lose
    assert not any(result.duplicate for result in results)
    assert redis_client.llen("celery") == 501


@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis"])
def test_a_broker_that_goes_away(
    redis_server: EmbeddedServer,
    redis_proxy: Proxy,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    name: str,
    where: str,
) -> None:
    """All can be called again, and each runs once."""
    locks = "" if where == "the broker's Redis" else module_redis.url
    scene = near(redis_proxy, redis_server, scenes, locks=locks)
    act = scene.app.tasks["act"]
    redis_proxy.lose_replies(f"{name} 3".encode(), times=100)
    with pytest.raises(OperationalError):
        act.apply_many(calls(name, range(500)))
    redis_proxy.heal()
    results = act.apply_many(calls(name, range(500)))
    scene.worker(broker_url=redis_server.url, concurrency=4)
    assert len({result.get(timeout=60) for result in results}) == 500
    assert {scene.starts(f"{name} {number}") for number in range(500)} == {1}
