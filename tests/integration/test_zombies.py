"""A worker that was stopped or taken for dead, and lives, starts nothing that others have."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import other_database
from tests.integration.scene import Scene, reading
from tests.support import Proxy, wait_until

LEASE = 4.0
#: When the task is due that waits (s): after the worker was taken for dead and woken.
DUE = 14.0

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def scene(tmp_path: Path, redis_server: EmbeddedServer) -> Iterator[Scene]:
    """The app, with a short lease, and workers that fetch ahead."""
    settings = {"reliable_lease": LEASE, "worker_prefetch_multiplier": 4}
    backend = other_database(redis_server)
    with Scene(tmp_path, redis_server.url, backend, settings=settings, limit=60) as scene:
        yield scene


def _one_waits_for_its_time(scene: Scene, worker: Any) -> str:
    task_id = str(scene.call("act", "due", countdown=DUE).id)
    worker.wait_log(f"{task_id}.* received")
    return task_id


def _once_each(scene: Scene, *names: str) -> None:
    for name in names:
        wait_until(
            lambda name=name: scene.journal.events("end", name=name),
            30,
            lambda name=name: f"the end of {name}\n{scene.logs}",
        )
    for name in names:
        assert scene.starts(name) == 1, scene.logs


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet"])
def test_what_waited_in_a_stopped_worker_starts_where_it_is_now(scene: Scene, pool: str) -> None:
    """Woken after its lease, it neither runs what was due later nor what waited behind a task."""
    stopped = scene.worker(pool=pool, concurrency=1)
    due = _one_waits_for_its_time(scene, stopped)
    scene.call("act", "runs", "wait")
    scene.wait_starts("runs")
    # A green pool that is full stops its main loop with this one in its hands.
    behind = scene.call("act", "behind").id
    stopped.wait_log(f"{behind}.* received")
    os.killpg(stopped.pid, signal.SIGSTOP)
    other = scene.worker(concurrency=2)
    other.wait_log(f"{due}.* received", timeout=5 * LEASE)
    scene.wait_starts("runs", 2)
    os.killpg(stopped.pid, signal.SIGCONT)
    scene.journal.open("runs")
    _once_each(scene, "behind", "due")


def test_a_worker_taken_for_dead_that_lives(scene: Scene, redis_client: redis.Redis) -> None:
    """Stopped for a moment while its keeper's connection was cut, it knows what it lost."""
    taken = scene.worker(concurrency=1)
    due = _one_waits_for_its_time(scene, taken)
    other = scene.worker(concurrency=1)
    (tag,) = redis_client.zrange("reliable:leases", 0, -1)
    connection = redis_client.hget("reliable:keepers", tag.split(":")[0]).split()[1]
    os.kill(taken.pid, signal.SIGSTOP)
    redis_client.client_kill_filter(_id=connection)
    other.wait_log(f"{due}.* received", timeout=2 * LEASE)
    os.kill(taken.pid, signal.SIGCONT)
    _once_each(scene, "due")
    other.wait_log("is dead; it held 1 messages")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_is_handed_what_it_runs(
    scene: Scene, redis_server: EmbeddedServer, redis_client: redis.Redis, pool: str
) -> None:
    """Cut off for more than a lease, it gets the message again, and runs the task once."""
    with Proxy(redis_server.port) as proxy:
        cut = scene.worker(pool=pool, concurrency=2, broker_url=proxy.url())
        # It sweeps, and has no use for the message.
        sweeper = scene.worker(args=reading("other"))
        scene.call("act", "order", "wait")
        scene.wait_starts("order")
        proxy.black_hole()
        sweeper.wait_log("is put back into celery", timeout=4 * LEASE)
        proxy.heal()
        cut.wait_log("runs here: its message is its own again", timeout=20)
        scene.journal.open("order")
        _once_each(scene, "order")
        wait_until(lambda: not redis_client.exists("unacked", "celery"), 20)
        scene.stop_workers()
