"""The connection is lost while the main process is in the midst of a word with its child."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import termios
from pathlib import Path

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import adverse
from tests.integration.conftest import StartScene, lose_connections, other_database
from tests.integration.scene import Scene
from tests.support import WorkerProcess, wait_until

#: More than any pipe takes at once.
LENGTH = 2_000_000
#: What a pipe holds that is full, or nearly (bytes).
FULL = 60_000


@pytest.fixture
def scene(redis_server: EmbeddedServer, module_redis: EmbeddedServer, scenes: StartScene) -> Scene:
    """One worker with one child, whose broker alone is cut off."""
    scene = scenes(
        redis_server.url,
        other_database(module_redis),
        settings={"reliable_lease": 15.0},
        limit=adverse.LIMIT,
        module=adverse,
    )
    scene.worker(concurrency=1)
    return scene


def test_a_task_half_written_to_its_child_runs(scene: Scene, redis_client: redis.Redis) -> None:
    """A large argument goes on where it stopped, once the worker has connected again."""
    (worker,) = scene.workers
    (child,) = worker.child_pids()
    assert scene.call("sleep", "before").get(timeout=10) == "before"
    # Its child has told the main process, too, and not only the backend.
    wait_until(lambda: not redis_client.exists("unacked"), 10, "the first task acknowledged")
    os.kill(child, signal.SIGSTOP)
    result = scene.call("measure", "large", "x" * LENGTH)
    wait_until(lambda: _in_pipes_of(child) > FULL, 10, lambda: f"a full pipe\n{_short(worker)}")
    lose_connections(worker, redis_client)
    os.kill(child, signal.SIGCONT)
    assert result.get(timeout=15) == LENGTH
    _all_is_well(scene, redis_client)
    assert scene.starts("large") == 1


def test_a_failure_half_read_from_its_child_ends_its_task(
    scene: Scene, redis_client: redis.Redis
) -> None:
    """A large error is read to its end, once the worker has connected again."""
    (worker,) = scene.workers
    (child,) = worker.child_pids()
    result = scene.call("fail_at_length", "large", LENGTH)
    scene.wait_starts("large")
    worker.send_signal(signal.SIGSTOP)
    scene.journal.open("large")
    wait_until(lambda: _in_pipes_of(child) > FULL, 10, "a child that cannot go on")
    os.kill(child, signal.SIGSTOP)
    worker.send_signal(signal.SIGCONT)
    wait_until(lambda: _in_pipes_of(child) == 0, 10, "the first part read")
    lose_connections(worker, redis_client)
    os.kill(child, signal.SIGCONT)
    with pytest.raises(ValueError, match=r"^x+$"):
        result.get(timeout=15)
    _all_is_well(scene, redis_client)
    assert scene.starts("large") == 1


def _in_pipes_of(pid: int) -> int:
    """Return how many bytes wait in the fullest of a process's pipes."""
    most = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("pipe:"):
                continue
            handle = os.open(entry, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        waiting = array.array("i", [0])
        try:
            fcntl.ioctl(handle, termios.FIONREAD, waiting)
        finally:
            os.close(handle)
        most = max(most, waiting[0])
    return most


def _all_is_well(scene: Scene, broker: redis.Redis) -> None:
    (worker,) = scene.workers
    assert scene.call("sleep", "after").get(timeout=10) == "after"
    wait_until(
        lambda: not broker.exists("unacked", "celery", "reliable:leases"),
        10,
        lambda: f"nothing held\n{_short(worker)}",
    )
    assert worker.running


def _short(worker: WorkerProcess) -> str:
    """Return the end of a worker's log, without the large words in it."""
    return "\n".join(line[:300] for line in worker.log.splitlines()[-30:])
