"""Many calls at once, with real brokers."""

from __future__ import annotations

import time
from uuid import uuid4

import pytest
import redis
from celery.signals import before_task_publish
from kombu import Exchange, Queue
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


@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis"])
def test_what_others_publish_meanwhile_is_no_part_of_it(
    redis_server: EmbeddedServer,
    redis_client: redis.Redis,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    name: str,
    where: str,
) -> None:
    """A handler of Celery's signals calls a task for each message."""
    locks = redis_server.url if where == "the broker's Redis" else module_redis.url
    scene = scenes(redis_server.url, None, settings={"reliable_redis_url": locks})

    def note(**_: object) -> None:
        scene.call("sleep", "noted")

    before_task_publish.connect(note, sender="act")
    try:
        results = scene.app.tasks["act"].apply_many(calls(name, range(3)))
    finally:
        before_task_publish.disconnect(note, sender="act")
    assert not any(result.duplicate for result in results)
    assert redis_client.llen("celery") == 6


def test_a_connection_of_the_callers_own(
    redis_server: EmbeddedServer, module_redis: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """The messages go where that leads, as those of single calls do."""
    settings = {"reliable_redis_url": other_database(module_redis, 5)}
    scene = scenes(redis_server.url, None, settings=settings)
    there = other_database(module_redis, 4)
    with redis.Redis.from_url(there) as server, scene.app.connection_for_write(there) as connection:
        for task in ("act", "sleep"):
            server.delete("celery")
            made = scene.app.tasks[task].apply_many(calls(name, range(3)), connection=connection)
            assert [result.duplicate for result in made] == [False] * 3
            assert server.llen("celery") == 3


def test_memory_that_fills_up_half_way(
    redis_server: EmbeddedServer,
    redis_client: redis.Redis,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    name: str,
) -> None:
    """What was queued by then does not run beside what is called again."""
    locks = other_database(module_redis, 6)
    scene = scenes(
        redis_server.url,
        other_database(module_redis, 7),
        settings={"reliable_redis_url": locks},
        limit=60,
    )
    scene.call("act", "warm-up")
    act, many = scene.app.tasks["act"], calls(name, range(200))
    used = redis_client.info("memory")["used_memory"]
    redis_client.config_set("maxmemory", used + 200_000)
    with pytest.raises(OperationalError):
        act.apply_many(many)
    assert 1 < redis_client.llen("celery") < 200, "half-way"
    redis_client.config_set("maxmemory", 0)
    results = act.apply_many(many)
    scene.worker(concurrency=4)
    assert len({result.get(timeout=60) for result in results}) == 200
    assert {scene.starts(f"{name} {number}") for number in range(200)} == {1}


def test_a_broker_of_two_hosts_one_of_which_dies(scenes: StartScene, name: str) -> None:
    """What leads to the queue is declared on the other one, when a publish is tried again there."""
    queue = {
        "task_queues": [Queue("q", Exchange("ex", type="topic"), routing_key="q.#")],
        "task_default_queue": "q",
        "task_default_exchange": "ex",
        "task_default_exchange_type": "topic",
        "task_default_routing_key": "q.1",
    }
    with EmbeddedServer() as first, EmbeddedServer() as second, EmbeddedServer() as locks:
        settings = {"reliable_redis_url": locks.url, **queue}
        scene = scenes(f"{first.url};{second.url}", None, settings=settings)
        scene.call("act", f"{name} 1")
        first.stop()
        scene.call("act", f"{name} 2")
        scene.app.tasks["act"].apply_many(calls(name, range(3, 6)))
        with redis.Redis.from_url(second.url) as server:
            assert server.llen("q") == 4
