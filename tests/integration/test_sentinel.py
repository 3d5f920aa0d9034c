"""A broker behind Sentinels: its master changes, and what runs goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from kombu import Connection
from kombu.exceptions import OperationalError

from reliable_tasks._broker.channel import SentinelChannel
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene
from tests.integration.scene import Scene
from tests.support import wait_until
from tests.support.redis_variants import SentinelGroup

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[SentinelGroup]:
    """A master, a replica and one Sentinel."""
    with SentinelGroup(tmp_path) as started:
        yield started


@pytest.fixture
def results() -> Iterator[EmbeddedServer]:
    """A server for results that nothing happens to."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def shop(group: SentinelGroup, results: EmbeddedServer, scenes: StartScene) -> Callable[..., Scene]:
    """Make a scene whose broker is reached by Sentinel; its workers end before the servers."""

    def make(url: str = "", **settings: Any) -> Scene:
        return scenes(
            url or group.url(),
            results.url,
            settings={
                "broker_transport_options": {"master_name": group.name},
                "reliable_redis_url": results.url,
                **settings,
            },
            limit=120,
        )

    return make


@pytest.fixture
def name() -> str:
    """A name of a task that no other test has."""
    return uuid4().hex[:8]


def _held(group: SentinelGroup) -> int:
    with redis.Redis(port=group.master.port) as client:
        return int(client.zcard("reliable:leases"))


@pytest.mark.parametrize("how", ["failover", "killed"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_failover_while_a_task_runs(
    shop: Callable[..., Scene], group: SentinelGroup, name: str, how: str, pool: str
) -> None:
    """What runs and what waits for its time goes on, starts once, and is acknowledged."""
    scene = shop()
    worker, other = scene.crew(2, pool=pool)
    result = scene.call("show", name, 20)
    later = scene.call("show", f"{name} later", countdown=20)
    scene.wait_starts(name)
    wait_until(lambda: _held(group) == 2)
    # What was not copied yet would be lost with the master, as every Redis says.
    with redis.Redis(port=group.master.port) as client:
        client.execute_command("WAIT", 1, 5000)
    if how == "failover":
        group.failover()
    else:
        group.kill_master()
    assert result.get(timeout=60) == name
    assert later.get(timeout=60) == f"{name} later"
    assert scene.starts(name) == scene.starts(f"{name} later") == 1
    wait_until(lambda: _held(group) == 0, 30, lambda: scene.logs)
    for number in range(4):
        assert scene.call("show", f"{name} {number}").get(timeout=30) == f"{name} {number}"
    assert worker.running
    assert other.running


def test_a_worker_that_died_with_the_master(
    shop: Callable[..., Scene], group: SentinelGroup, name: str
) -> None:
    """A task whose worker died before the failover runs again at a worker that lived through it."""
    scene = shop()
    crew = scene.crew(2)
    scene.call("show", name, 10)
    scene.wait_starts(name)
    (started,) = scene.journal.events("start", name=name)
    first = next(worker for worker in crew if worker.hostname == started.data["worker"])
    with redis.Redis(port=group.master.port) as client:
        client.execute_command("WAIT", 1, 5000)
    first.kill_group()
    group.kill_master()
    # The server is another: for one lease nobody sweeps.
    scene.wait_starts(name, 2, timeout=60)
    wait_until(lambda: _held(group) == 0, 30)


def test_replicas_are_waited_for(
    shop: Callable[..., Scene], group: SentinelGroup, name: str
) -> None:
    """With reliable_wait_replicas a call returns when the replica has the message."""
    scene = shop(reliable_wait_replicas=1, reliable_store_timeout=2)
    scene.call("show", name)
    with redis.Redis(port=group.replica.port) as client:
        assert client.llen("celery") == 1


def test_no_replica_is_an_error(
    shop: Callable[..., Scene], group: SentinelGroup, name: str
) -> None:
    """Where the replica is gone a call says that it has not got the message."""
    scene = shop(reliable_wait_replicas=1, reliable_store_timeout=1)
    group.replica.kill()
    with redis.Redis(port=group.master.port) as client:
        wait_until(lambda: client.info("replication")["connected_slaves"] == 0, 30)
    with pytest.raises(OperationalError, match="reliable_wait_replicas"):
        scene.call("show", name)


def test_several_sentinels(
    scenes: StartScene, tmp_path: Path, results: EmbeddedServer, name: str
) -> None:
    """With several URLs, of which the first is dead, the transport stays ours."""
    with SentinelGroup(tmp_path) as group:
        dead = "sentinel://127.0.0.1:1/0"
        scene = scenes(
            f"{dead};{group.url()}",
            results.url,
            settings={"broker_transport_options": {"master_name": group.name}},
            # Each process tries the dead one first, as long as redis-py sees fit.
            limit=60,
        )
        worker = scene.worker()
        assert scene.call("act", name).get(timeout=60) == name
        with redis.Redis(port=group.master.port) as client:
            assert client.zcard("reliable:beats") == 1
        assert worker.running
        scene.stop_workers()


def test_switching_to_the_next_url_keeps_the_transport(
    shop: Callable[..., Scene], group: SentinelGroup
) -> None:
    """kombu's switch to another URL leads to this library's transport again."""
    connection: Connection = shop().app.connection_for_write()
    with connection:
        connection.switch(group.url())
        assert isinstance(connection.default_channel, SentinelChannel)
