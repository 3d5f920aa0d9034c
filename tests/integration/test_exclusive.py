"""A task marked exclusive is dead before anybody else can have its lease."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from reliable_tasks._store.scripts import load
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import alone
from tests.integration.scene import Scene
from tests.support import Proxy, death_of, is_alive, wait_until

LEASE = 4.0
#: Longer than any of these tests lasts: whatever ends such a task, it is not its own end (s).
LONG = 60.0

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def results() -> Iterator[EmbeddedServer]:
    """A server for results that nothing happens to."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def scene(tmp_path: Path, redis_server: EmbeddedServer, results: EmbeddedServer) -> Iterator[Scene]:
    """The app with exclusive tasks."""
    settings = {"reliable_lease": LEASE}
    options = {"settings": settings, "limit": 2 * int(LONG), "module": alone}
    with Scene(tmp_path, redis_server.url, results.url, **options) as scene:
        yield scene
        # What they still run is of no interest, and takes long.
        for worker in scene.workers:
            if worker.running:
                worker.kill_group()


def _child_of(scene: Scene, name: str) -> int:
    return scene.journal.events("start", name=name)[0].pid


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _just_renewed(client: redis.Redis) -> float:
    """Return when all leases end, at a moment when the next renewal is as far as can be (s)."""
    before = set(_lease_ends(client))

    def renewed() -> list[float]:
        ends = _lease_ends(client)
        return ends if len(set(ends)) == 1 and not before.intersection(ends) else []

    return wait_until(renewed, 2 * LEASE, "a renewal")[0]


def _lease_ends(client: redis.Redis) -> list[float]:
    return [end / 1000 for _, end in client.zrange("reliable:leases", 0, -1, withscores=True)]


def _lets_go_in_time(died: float, lease_end: float) -> bool:
    """Whether something died because its lease was about to end, and not of the fault itself.

    It counts from when the last renewal that it knows was sent. The fault, which comes a lease
    before the end, can swallow the reply to the one that set the end.
    """
    return lease_end - LEASE / 2 < died < lease_end


@pytest.mark.parametrize("task", ["exclusive", "exclusive_hog"])
@pytest.mark.parametrize("warm", [False, True], ids=["started by itself", "forked with the other"])
def test_it_dies_with_its_main_process_stopped(
    scene: Scene, redis_client: redis.Redis, task: str, warm: bool
) -> None:
    """The child ends itself, also while its task keeps Python's lock; then another one runs it."""
    worker = scene.worker(concurrency=1, warm=warm)
    scene.call(task, "alone", LONG)
    scene.wait_starts("alone")
    death = death_of(_child_of(scene, "alone"))
    with _stopped(worker.pid):
        # What it sent before is done when the server has answered twice.
        redis_client.ping()
        redis_client.ping()
        (lease_end,) = _lease_ends(redis_client)
        scene.worker(concurrency=1, warm=warm)
        second = scene.wait_starts("alone", 2, timeout=4 * LEASE)
        died = death.result(timeout=0)
    assert _lets_go_in_time(died, lease_end), (died, lease_end, scene.logs)
    assert lease_end <= second


@contextmanager
def _network_cut(proxy: Proxy, server: EmbeddedServer) -> Iterator[None]:
    proxy.black_hole()
    yield
    proxy.heal()


@contextmanager
def _server_stopped(proxy: Proxy, server: EmbeddedServer) -> Iterator[None]:
    with _stopped(server.pid):
        yield


@pytest.mark.parametrize("fault", [_network_cut, _server_stopped])
def test_it_dies_when_its_worker_can_renew_nothing(
    scene: Scene,
    redis_server: EmbeddedServer,
    redis_proxy: Proxy,
    redis_client: redis.Redis,
    fault: Callable[..., contextmanager[None]],
) -> None:
    """An ordinary task beside it runs on and is acknowledged; the exclusive one starts again."""
    scene.worker(concurrency=2, broker_url=redis_proxy.url())
    scene.call("exclusive", "alone", LONG)
    ordinary = scene.call("bare", "ordinary", "wait")
    scene.wait_starts("alone")
    scene.wait_starts("ordinary")
    death = death_of(_child_of(scene, "alone"))
    lease_end = _just_renewed(redis_client)
    with fault(redis_proxy, redis_server):
        died = death.result(timeout=3 * LEASE)
        assert _lets_go_in_time(died, lease_end), (died, lease_end, scene.logs)
        wait_until(lambda: time.time() > lease_end + 1, 2 * LEASE)
        assert is_alive(_child_of(scene, "ordinary"))
        assert scene.starts("alone") == 1
    scene.wait_starts("alone", 2, timeout=5 * LEASE)
    scene.journal.open("ordinary")
    assert ordinary.get(timeout=10) == "ordinary"
    wait_until(lambda: redis_client.hlen("unacked") == 1, 10, lambda: f"one is left\n{scene.logs}")
    assert (scene.starts("ordinary"), scene.starts("alone")) == (1, 2)


def test_it_does_not_start_where_no_renewal_was_confirmed(scene: Scene, redis_proxy: Proxy) -> None:
    """Its lease may be over in the next moment: it is set aside, and runs when leases are sure."""
    worker = scene.worker(concurrency=1, broker_url=redis_proxy.url())
    result = scene.call("exclusive", "alone", 0.1, countdown=LEASE + 3)
    worker.wait_log(f"{result.id}.* received")
    # All but the keeper reach the server, and even the keeper's renewals take effect.
    redis_proxy.lose_replies(load("message_renew").sha.encode(), times=1000)
    worker.wait_log(
        f"{result.id}.* is set aside: its worker could not renew its lease", timeout=4 * LEASE
    )
    assert scene.starts("alone") == 0
    redis_proxy.heal()
    assert result.get(timeout=4 * LEASE) == "alone"
    assert scene.starts("alone") == 1


def test_it_runs_on_while_its_lease_is_renewed(scene: Scene) -> None:
    """A task of three leases ends, and is started once."""
    scene.crew(2, concurrency=1)
    result = scene.call("exclusive", "long", 3 * LEASE)
    assert result.get(timeout=40) == "long"
    assert scene.starts("long") == 1


def test_a_worker_of_another_pool_refuses_it(scene: Scene) -> None:
    """Threads cannot be ended one by one: the worker says so and does not start."""
    worker = scene.worker(pool="threads", waits=False)
    wait_until(lambda: not worker.running, 30, lambda: f"the worker's end\n{worker.log}")
    assert "needs the prefork pool" in worker.log
