"""A task marked exclusive is dead before anybody else can have its lease."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import alone
from tests.integration.conftest import other_database
from tests.integration.scene import Scene
from tests.support import is_alive, wait_until

LEASE = 3.0

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def scene(tmp_path: Path, redis_server: EmbeddedServer) -> Iterator[Scene]:
    """The app with exclusive tasks."""
    backend = other_database(redis_server)
    options = {"settings": {"reliable_lease": LEASE}, "limit": 30, "module": alone}
    with Scene(tmp_path, redis_server.url, backend, **options) as scene:
        yield scene


def _child_of(scene: Scene, name: str) -> int:
    return scene.journal.events("start", name=name)[0].pid


@pytest.mark.parametrize("task", ["exclusive", "exclusive_hog"])
def test_it_dies_with_its_main_process_stopped(scene: Scene, task: str) -> None:
    """The child ends itself, also while its task keeps Python's lock; another worker takes over."""
    worker = scene.worker(concurrency=1)
    scene.call(task, "alone", 20.0)
    scene.wait_starts("alone")
    child = _child_of(scene, "alone")
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        scene.worker(concurrency=1)
        second = scene.wait_starts("alone", 2, timeout=4 * LEASE)
        assert not is_alive(child)
        first_ends = scene.journal.events("end", name="alone")
        assert not [event for event in first_ends if event.pid == child and event.at > second]
    finally:
        os.kill(worker.pid, signal.SIGCONT)


def test_it_runs_on_while_its_lease_is_renewed(
    scene: Scene,
) -> None:
    """A task of three leases ends, and is started once."""
    scene.crew(2, concurrency=1)
    result = scene.call("exclusive", "long", 3 * LEASE)
    assert result.get(timeout=40) == "long"
    assert scene.starts("long") == 1


def test_a_worker_of_another_pool_refuses_it(
    scene: Scene,
) -> None:
    """Threads cannot be ended one by one: the worker says so and does not start."""
    worker = scene.worker(pool="threads", waits=False)
    wait_until(lambda: not worker.running, 30, lambda: f"the worker's end\n{worker.log}")
    assert "needs the prefork pool" in worker.log
