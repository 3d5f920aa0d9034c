"""The result backend is away when the main process has to store the end of a task."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from celery import Celery

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import adverse
from tests.integration.conftest import StartScene
from tests.integration.scene import Scene
from tests.support import death_of, wait_until

#: Celery gives up soon, and this library begins again.
SETTINGS = {
    "reliable_lease": 60.0,
    "result_backend_max_retries": 1,
    "result_backend_transport_options": {
        "retry_policy": {"max_retries": 1, "interval_start": 0.0, "interval_max": 0.1}
    },
}

LIMIT = 2


@pytest.fixture
def results() -> Iterator[EmbeddedServer]:
    """A result backend that keeps what it has when it is killed."""
    with EmbeddedServer(args=["--appendonly", "yes", "--appendfsync", "always"]) as server:
        yield server


@pytest.fixture
def scene(results: EmbeddedServer, redis_server: EmbeddedServer, scenes: StartScene) -> Scene:
    """The app on a broker that stays, and on that backend."""
    return scenes(redis_server.url, results.url, settings=SETTINGS, limit=LIMIT, module=adverse)


@pytest.fixture
def caller(redis_server: EmbeddedServer) -> Iterator[Celery]:
    """A client that waits for no backend."""
    with adverse.build(redis_server.url) as app:
        yield app


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "at its ETA"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_that_has_expired_waits_for_the_backend_without_a_slot(
    scene: Scene,
    results: EmbeddedServer,
    caller: Celery,
    redis_client: redis.Redis,
    pool: str,
    waits: bool,
) -> None:
    """The worker lives and runs others; the task is revoked when the backend is back."""
    worker = scene.worker(pool=pool, concurrency=1)
    now = datetime.now(UTC)
    times: dict[str, Any] = {"expires": now - timedelta(seconds=1)}
    results.kill()
    if waits:
        times = {"expires": now + timedelta(seconds=2), "eta": now + timedelta(seconds=2.5)}
    task_id = str(caller.send_task("sleep", ("late",), **times).id)
    worker.wait_log(rf"{task_id}\].*cannot be stored", timeout=15)
    caller.send_task("silent", ("meanwhile",))
    scene.wait_starts("meanwhile", timeout=5)
    results.start()
    _ends_as(scene, task_id, "REVOKED")
    _nothing_is_held(scene, redis_client)
    assert scene.call("sleep", "after").get(timeout=5) == "after"
    assert scene.starts("late") == 0
    assert worker.running


def test_a_task_over_its_hard_limit_fails_when_the_backend_is_back(
    scene: Scene, results: EmbeddedServer, redis_client: redis.Redis
) -> None:
    """Its child is killed in time, its failure is stored later, and it is not run again."""
    worker = scene.worker(concurrency=1)
    result = scene.call("wait", "long")
    scene.wait_starts("long")
    (child,) = worker.child_pids()
    death = death_of(child)
    results.kill()
    death.result(timeout=LIMIT + 6)
    worker.wait_log(rf"{result.id}\] cannot be stored", timeout=10)
    results.start()
    _ends_as(scene, str(result.id), "FAILURE")
    _nothing_is_held(scene, redis_client)
    assert scene.call("sleep", "after").get(timeout=8) == "after"
    assert scene.starts("long") == 1, scene.logs
    assert worker.running


def _ends_as(scene: Scene, task_id: str, state: str) -> None:
    result = scene.app.AsyncResult(task_id)
    wait_until(
        lambda: result.state == state,
        15,
        lambda: f"{state}; it is {result.state}\n{scene.logs}",
    )


def _nothing_is_held(scene: Scene, broker: redis.Redis) -> None:
    wait_until(
        lambda: not broker.exists("unacked", "celery", "reliable:leases"),
        10,
        lambda: f"nothing held\n{scene.logs}",
    )
