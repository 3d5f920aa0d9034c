"""The harness on real servers: workers start, die and leave nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.support import RabbitMQServer, WorkerProcess, is_alive, wait_until
from tests.support.forkserver import ForkServer

APP = "tests.integration.apps.plain"
ROOT = Path(__file__).resolve().parents[2]

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture(params=[False, True], ids=["plain", "warm"])
def warm(request: pytest.FixtureRequest) -> bool:
    """Whether workers are forked from a process that has imported Celery."""
    return bool(request.param)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_worker_runs_a_task(
    start_worker: StartWorker, redis_url: str, result_url: str, pool: str, warm: bool
) -> None:
    """A worker of every pool is ready when it says so, and stops in an orderly way.

    A green one is started plainly whatever it is asked.
    """
    worker = start_worker(APP, pool=pool, warm=warm)
    with Celery(broker=redis_url, backend=result_url) as client:
        assert client.send_task(f"{APP}.add", (1, 2)).get(timeout=10) == 3
    worker.stop()
    assert worker.returncode == 0
    assert "ready." in worker.log


def test_a_killed_child_is_replaced(start_worker: StartWorker) -> None:
    """The pool's children can be found, and killed one by one."""
    worker = start_worker(APP, concurrency=2)
    before = wait_until(lambda: len(found := worker.child_pids()) == 2 and found)
    os.kill(before[0], 9)
    wait_until(
        lambda: len(found := worker.child_pids()) == 2 and before[0] not in found,
        message="another child",
    )
    assert worker.running


def test_a_killed_worker_leaves_no_process(
    start_worker: StartWorker, redis_url: str, warm: bool
) -> None:
    """A busy child dies with its main process, or at the latest when the worker is stopped."""
    worker = start_worker(APP, warm=warm)
    with Celery(broker=redis_url) as client:
        client.send_task(f"{APP}.work", (60,))
    worker.wait_log("working for 60")
    (child,) = worker.child_pids()
    worker.kill()
    assert worker.returncode == -9
    worker.stop()
    assert not is_alive(child)


def test_a_worker_that_cannot_start_shows_its_log(start_worker: StartWorker, warm: bool) -> None:
    """A worker that ends at start fails the test with its own words."""
    with pytest.raises(AssertionError, match=r"module tests\.missing was not found"):
        start_worker("tests.missing", warm=warm)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties them on Linux alone")
def test_what_a_fork_server_forked_does_not_outlive_it(redis_url: str, result_url: str) -> None:
    """Its workers end with it, as it ends with the test process, and are known to have ended."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    server = ForkServer(path)
    urls = {"RT_BROKER_URL": redis_url, "RT_RESULT_URL": result_url}
    command = ["-A", APP, "worker", "--pool", "solo", "--loglevel", "INFO"]
    with tempfile.NamedTemporaryFile("r") as log:
        worker = server.start(command, {**os.environ, **urls}, ROOT, Path(log.name))
        wait_until(
            lambda: " ready." in Path(log.name).read_text(), 20, lambda: Path(log.name).read_text()
        )
        assert worker.poll() is None
        server.kill()
        assert worker.wait(10) == -signal.SIGKILL
        wait_until(lambda: not is_alive(worker.pid))


def test_a_worker_on_rabbitmq_runs_a_task(
    start_worker: StartWorker,
    rabbitmq_server: RabbitMQServer,
    rabbitmq_url: str,
    result_url: str,
) -> None:
    """A virtual host of its own serves a worker like any other."""
    start_worker(APP, broker_url=rabbitmq_url)
    with Celery(broker=rabbitmq_url, backend=result_url) as client:
        assert client.send_task(f"{APP}.add", (1, 2)).get(timeout=10) == 3
    vhost = rabbitmq_url.rpartition("/")[2]
    assert "celery" in {queue["name"] for queue in rabbitmq_server.queues(vhost)}
