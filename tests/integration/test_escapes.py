"""What a task's handlers raise, and GreenletExit: one task's failure, in every pool."""

from __future__ import annotations

from uuid import uuid4

import pytest
import redis

from reliable_tasks import TaskExited
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, one_slot_in_each
from tests.integration.scene import Scene
from tests.support import wait_until

# In prefork a handler that exits takes its child with it: that is a crash.
POOLS = ["threads", "gevent", "eventlet", "solo"]


@pytest.fixture(scope="module", params=POOLS)
def scene(
    request: pytest.FixtureRequest, module_redis: EmbeddedServer, module_scenes: StartScene
) -> Scene:
    """One worker of each kind, with a single slot that must not leak."""
    return one_slot_in_each(POOLS, request.param, module_redis, module_scenes)


@pytest.fixture
def name() -> str:
    """A name of the test's own."""
    return uuid4().hex[:8]


@pytest.mark.parametrize("what", ["SystemExit", "MemoryError"])
@pytest.mark.parametrize(
    ("where", "state"),
    [
        ("before_start", "FAILURE"),
        ("on_failure", "FAILURE"),
        # The result was stored before.
        ("on_success", "SUCCESS"),
    ],
)
def test_what_a_handler_raises_costs_no_worker_and_no_slot(
    scene: Scene, name: str, where: str, state: str, what: str
) -> None:
    """The task has a final state, is not run again, and the next one runs."""
    result = scene.call("handled", name, where, what)
    wait_until(
        lambda: result.state == state or not scene.workers[0].running,
        15,
        lambda: f"{state}; it is {result.state}\n{scene.logs}",
    )
    _runs_the_next(scene)
    assert result.state == state, scene.logs
    assert scene.starts(name) == (0 if where == "before_start" else 1)


def test_a_task_that_raises_greenlet_exit_has_failed(scene: Scene, name: str) -> None:
    """Nobody told it to end, so it is neither a success nor run again, and the next one runs."""
    result = scene.call("leave", name, "GreenletExit")
    with pytest.raises(TaskExited, match="GreenletExit"):
        result.get(timeout=15)
    _runs_the_next(scene)
    assert result.state == "FAILURE"
    assert scene.starts(name) == 1


def _runs_the_next(scene: Scene) -> None:
    after = uuid4().hex[:8]
    result = scene.call("sleep", after)
    scene.wait_starts(after, timeout=8)
    assert result.get(timeout=5) == after
    with redis.Redis.from_url(scene.app.conf.broker_url) as broker:
        wait_until(
            lambda: not broker.exists("unacked", "celery", "reliable:leases"),
            8,
            lambda: f"nothing held\n{scene.logs}",
        )
    assert scene.workers[0].running, scene.logs
