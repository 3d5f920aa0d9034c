"""Real workers with the library's defaults, and what becomes of their tasks when one is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

Record = Callable[[str, object], None]

#: In so long a worker's death is known, also where it was the one that looks for the dead (s).
FOUND = 5.0
#: What the sweep, the restart and a busy machine may add (s).
GRACE = 5.0


@pytest.fixture
def shop(scenes: StartScene, redis_server: EmbeddedServer) -> Scene:
    """One worker that runs two tasks, one of them with a claim, and then another worker."""
    scene = scenes(redis_server.url, other_database(redis_server), limit=8)
    scene.worker(concurrency=2)
    scene.call("act", "claimed", "wait")
    scene.call("sleep", "bare", 5)
    scene.wait_starts("claimed")
    scene.wait_starts("bare")
    scene.worker(concurrency=2)
    return scene


def _restarted(scene: Scene, name: str, killed: float, within: float, record: Record) -> None:
    """Check that a task is started exactly once more in time, and knows of the crash."""
    seconds = scene.wait_starts(name, 2, timeout=within + 10) - killed
    record(f"seconds to restart of {name}", round(seconds, 2))
    assert seconds < within, scene.logs
    crashes = [event.data["crashes"] for event in scene.journal.events("start", name=name)]
    assert crashes == [0, 1]


def _nothing_left(scene: Scene, starts: dict[str, int]) -> None:
    """Check that both tasks are over and done with, and that the key is free again."""
    redis = scene.claims.client.redis
    scene.journal.open("claimed")
    wait_until(lambda: not scene.claims.names(), message="no claim left")
    wait_until(lambda: not redis.exists("unacked"), 10, lambda: f"no message left {scene.logs}")
    assert {name: scene.starts(name) for name in starts} == starts
    again = scene.call("act", "claimed")
    assert not again.duplicate
    assert again.get(timeout=10) == "claimed"


@pytest.mark.parametrize("name", ["bare", "claimed"])
def test_a_task_whose_child_is_killed_runs_once_more(
    shop: Scene, name: str, record_testsuite_property: Record
) -> None:
    """A pool child killed mid-task: the worker notices at once, and the task runs again."""
    (started,) = shop.journal.events("start", name=name)
    killed = time.time()
    os.kill(started.pid, signal.SIGKILL)
    _restarted(shop, name, killed, GRACE, record_testsuite_property)
    _nothing_left(shop, {"bare": 1, "claimed": 1, name: 2})


def test_the_death_of_a_child_is_never_left_to_the_next_round(
    scenes: StartScene, redis_server: EmbeddedServer
) -> None:
    """Of many that die, none is noticed only when Celery looks at its pool, each 5 s."""
    worker = scenes(redis_server.url, other_database(redis_server)).worker(concurrency=2)
    for _ in range(12):
        child = worker.child_pids()[0]
        os.kill(child, signal.SIGKILL)
        noticed = f"pid:{child} exited with"
        wait_until(lambda line=noticed: line in worker.log, 2.5, lambda: worker.log)
        wait_until(lambda: len(worker.child_pids()) == 2, message="another child")


def test_a_task_whose_worker_is_killed_runs_once_more(
    shop: Scene, record_testsuite_property: Record
) -> None:
    """A whole worker killed mid-task: a survivor finds out within seconds, and takes over."""
    killed = time.time()
    shop.workers[0].kill_group()
    _restarted(shop, "bare", killed, FOUND + GRACE, record_testsuite_property)
    _restarted(shop, "claimed", killed, FOUND + GRACE, record_testsuite_property)
    _nothing_left(shop, {"bare": 2, "claimed": 2})


@pytest.mark.parametrize("task", ["act", "bare"])
def test_an_attempt_that_was_continued_is_not_run_again_when_its_retry_has_ended(
    scenes: StartScene, redis_server: EmbeddedServer, task: str
) -> None:
    """A worker killed between publishing a retry and its ack leaves an attempt that is over.

    Its message comes back when the worker is found dead, when its retry may have ended already.
    """
    shop = scenes(redis_server.url, other_database(redis_server), limit=2)
    shop.worker()
    shop.worker()
    result = shop.call(task, "order", "retry_and_take_worker_down")
    shop.wait_starts("order", 2, timeout=20)
    with pytest.raises(ValueError, match="order"):
        result.get(timeout=10)
    redis = shop.claims.client.redis
    wait_until(lambda: not redis.exists("unacked"), 20, lambda: f"no message left\n{shop.logs}")
    attempts = [event.data["attempt"] for event in shop.journal.events("start", name="order")]
    assert attempts == [0, 1]


@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis"])
def test_a_claim_is_freed_whose_task_another_one_has_replaced(
    scenes: StartScene, redis_server: EmbeddedServer, module_redis: EmbeddedServer, where: str
) -> None:
    """The worker died before it could: nobody comes for the message, which was continued."""
    locks = redis_server.url if where == "the broker's Redis" else other_database(module_redis)
    results = other_database(redis_server)
    scene = scenes(redis_server.url, results, limit=2, settings={"reliable_redis_url": locks})
    scene.worker()
    scene.worker()
    result = scene.call("act", "order", "replace_other_and_take_worker_down")
    assert result.get(timeout=20) == "order, again"
    scene.wait_free("order")
    scene.wait_free("order, again")
    assert scene.starts("order") == 1
