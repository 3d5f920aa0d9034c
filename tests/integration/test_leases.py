"""Tasks that last many times longer than their lease, in every pool: each starts exactly once.

With ``RT_FULL_LENGTHS=1`` in the environment the times are those that the library is measured
by; without, they are shorter, the lease as short as it can be.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

import pytest

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene

Record = Callable[[str, object], None]

_FULL = bool(os.environ.get("RT_FULL_LENGTHS"))
#: Seconds: of a lease; that the tasks last or wait for; without the GIL being released; in which
#: a green thread lets nobody else run.
LEASE, LENGTH, HOLD, SPIN = (10, 60, 5, 20) if _FULL else (3, 10, 1, 5)
#: What starting another worker and a busy machine may add (s).
GRACE = 20.0
#: From the death of a worker to the restart of its task (s).
RESTART = 6.0


def _runs_once(scene: Scene, pool: str, *blocking: str) -> None:
    """Check that nothing is started twice while one worker is blocked and another one waits."""
    slots = 1 if pool == "solo" else 4
    worker = scene.worker(pool=pool, concurrency=slots)
    called = time.time()
    later = scene.call("act", "later", countdown=LENGTH)
    worker.wait_log(f"{later.id}.* received")
    results = [later, scene.call("sleep", "long", LENGTH)]
    scene.wait_starts("long")
    results += [scene.call("act", name, name.partition(" ")[0]) for name in blocking]
    scene.worker(pool=pool, concurrency=slots)
    for result in results:
        result.get(timeout=2 * LENGTH + GRACE)
    names = ["later", "long", *blocking]
    assert {name: scene.starts(name) for name in names} == dict.fromkeys(names, 1), scene.logs
    assert scene.wait_starts("later") - called >= LENGTH
    logs = "\n".join(worker.log for worker in scene.workers)
    assert not re.search("lost its lease|after its lease|no longer renews|No lease", logs)


@pytest.fixture
def shop(scenes: StartScene, redis_server: EmbeddedServer) -> Scene:
    """An app with a lease that is much shorter than its tasks."""
    settings = {"reliable_lease": LEASE}
    limit = 2 * LENGTH + 60
    return scenes(redis_server.url, other_database(redis_server), settings=settings, limit=limit)


@pytest.mark.timeout(3 * LENGTH + 120)
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_tasks_longer_than_their_lease_start_once(shop: Scene, pool: str) -> None:
    """A long task, a long countdown, and a task that does not release the GIL."""
    _runs_once(shop, pool, f"hold_gil {HOLD}")


@pytest.mark.timeout(3 * LENGTH + 120)
@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_tasks_beside_one_that_needs_the_whole_processor_start_once(shop: Scene, pool: str) -> None:
    """The keeper needs neither the hub nor the main thread, so neither can starve it."""
    _runs_once(shop, pool, f"spin {SPIN}")


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_an_idle_worker_takes_over_from_a_dead_one(
    scenes: StartScene, redis_server: EmbeddedServer, pool: str, record_testsuite_property: Record
) -> None:
    """A green worker sweeps although nothing wakes its hub."""
    scene = scenes(redis_server.url, other_database(redis_server), limit=60)
    first = scene.worker(pool=pool)
    result = scene.call("act", "order", "wait")
    scene.wait_starts("order")
    scene.worker(pool=pool)
    killed = time.time()
    first.kill_group()
    seconds = scene.wait_starts("order", 2, timeout=RESTART + 10) - killed
    record_testsuite_property(f"seconds to restart in an idle {pool} worker", round(seconds, 2))
    assert seconds < RESTART, scene.logs
    scene.journal.open("order")
    assert result.get(timeout=10) == "order"
