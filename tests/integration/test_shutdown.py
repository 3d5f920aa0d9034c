"""Workers that are told to stop: what they hold goes back at once, whole and uncounted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import WorkerProcess


class Busy(NamedTuple):
    """A worker that runs the first of three tasks, and holds the others and a later one."""

    scene: Scene
    worker: WorkerProcess
    results: list[Any]
    later: Any


StartBusy = Callable[..., Busy]

NAMES = ("first", "second", "third")

#: No lease ends while a test waits: what is back was put back.
LEASE = 60.0
#: A worker that stops need not wait for its tasks; Celery takes up to 4 s, a busy machine more.
SOON = 15.0


@pytest.fixture
def broker(redis_server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client of the broker, to look at what is left there."""
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def start_busy(scenes: StartScene, redis_server: EmbeddedServer) -> StartBusy:
    """Start a worker that runs a task, holds two more, and waits for the ETA of a fourth."""

    def start(pool: str, *, soft: float = 0.0) -> Busy:
        settings = {
            "reliable_lease": LEASE,
            "worker_prefetch_multiplier": 3,
            "worker_soft_shutdown_timeout": soft,
        }
        database = other_database(redis_server)
        scene = scenes(redis_server.url, database, settings=settings, limit=60)
        worker = scene.worker(pool=pool)
        later = scene.call("act", "later", countdown=100)
        worker.wait_log(f"{later.id}.* received")
        busy = Busy(scene, worker, [scene.call("act", name, "wait") for name in NAMES], later)
        scene.wait_starts("first")
        return busy

    return start


def _left(broker: redis.Redis) -> dict[str, Any]:
    """Return what the broker knows of a worker that has ended, and of its messages."""
    crashes = {key: broker.hget(key, "crashes") for key in broker.scan_iter("reliable:run:*")}
    return {
        "waiting": broker.llen("celery"),
        "held": broker.hlen("unacked") + broker.zcard("unacked_index"),
        "leases": broker.zcard("reliable:leases"),
        "alive": broker.zcard("reliable:beats") + broker.hlen("reliable:keepers"),
        "crashes": [value for value in crashes.values() if value not in (None, "0")],
    }


def _nothing_held(waiting: int) -> dict[str, Any]:
    return {"waiting": waiting, "held": 0, "leases": 0, "alive": 0, "crashes": []}


def _ended(busy: Busy) -> set[str]:
    """Return the names of the tasks whose result is stored."""
    return {result.get(timeout=5) for result in busy.results if result.state == "SUCCESS"}


def _tracebacks(worker: WorkerProcess) -> int:
    """Count what a worker could not handle.

    Not what Celery's pool says in its finalizer when it reads from a pipe whose child was killed
    in the midst of a word.
    """
    return worker.log.count("Traceback") - worker.log.count("in _help_stuff_finish")


def _run_the_rest(busy: Busy) -> dict[str, int]:
    """Let another worker run what is left, and return how often each task was started.

    It must find messages, guards and claims as if nobody had had them.
    """
    for name in NAMES:
        busy.scene.journal.open(name)
    busy.scene.worker()
    for result in busy.results:
        assert result.get(timeout=20)
    assert busy.later.state == "PENDING"
    return {name: busy.scene.starts(name) for name in NAMES}


@pytest.mark.parametrize("soft", [0, 1], ids=["cold", "soft"])
@pytest.mark.parametrize("pool", ["prefork", "gevent", "eventlet"])
def test_a_cold_shutdown_hands_back_what_it_kills(
    start_busy: StartBusy, broker: redis.Redis, pool: str, soft: int
) -> None:
    """The running task is killed and not acknowledged; all is back when the worker ends."""
    busy = start_busy(pool, soft=soft)
    scene, worker = busy.scene, busy.worker
    began = time.monotonic()
    worker.send_signal(signal.SIGQUIT)
    worker.wait(SOON + soft)
    assert time.monotonic() - began >= soft
    assert _left(broker) == _nothing_held(4), scene.logs
    assert _ended(busy) == set()
    assert not _tracebacks(worker), scene.logs
    assert _run_the_rest(busy) == {"first": 2, "second": 1, "third": 1}


def test_a_warm_shutdown_of_the_whole_group_is_no_crash(
    start_busy: StartBusy, broker: redis.Redis
) -> None:
    """A process manager sends SIGTERM to the children, too: what they ran goes back, uncounted."""
    busy = start_busy("prefork")
    os.killpg(busy.worker.pid, signal.SIGTERM)
    busy.worker.wait(SOON)
    assert _left(broker) == _nothing_held(4), busy.scene.logs
    assert _run_the_rest(busy) == {"first": 2, "second": 1, "third": 1}


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_cold_shutdown_waits_for_what_it_cannot_kill(
    start_busy: StartBusy, broker: redis.Redis, pool: str
) -> None:
    """A thread runs to its end, which counts; the tasks behind it go back unrun."""
    busy = start_busy(pool)
    scene, worker = busy.scene, busy.worker
    worker.send_signal(signal.SIGQUIT)
    worker.wait_log("Cold shutdown" if pool == "solo" else "Hitting Ctrl")
    assert worker.running
    scene.journal.open("first")
    worker.wait(SOON)
    assert _left(broker) == _nothing_held(3), scene.logs
    assert _ended(busy) == {"first"}
    assert not _tracebacks(worker), scene.logs
    assert _run_the_rest(busy) == {"first": 1, "second": 1, "third": 1}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_what_ends_during_a_soft_shutdown_has_ended(
    start_busy: StartBusy, broker: redis.Redis, pool: str
) -> None:
    """A task that ends in the time that it is given is acknowledged and does not run again."""
    busy = start_busy(pool, soft=3)
    scene, worker = busy.scene, busy.worker
    worker.send_signal(signal.SIGQUIT)
    worker.wait_log("Initiating Soft Shutdown")
    for name in NAMES:
        scene.journal.open(name)
    worker.wait(SOON + 3)
    ended = _ended(busy)
    assert "first" in ended
    assert _left(broker) == _nothing_held(4 - len(ended)), scene.logs
    assert not _tracebacks(worker), scene.logs
    assert _run_the_rest(busy) == {"first": 1, "second": 1, "third": 1}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_a_warm_shutdown_ends_what_runs_and_hands_back_the_rest(
    start_busy: StartBusy, broker: redis.Redis, pool: str
) -> None:
    """What was started ends and is acknowledged; what was not is back in the queue."""
    busy = start_busy(pool)
    scene, worker = busy.scene, busy.worker
    worker.send_signal(signal.SIGTERM)
    worker.wait_log("Warm shutdown")
    for name in NAMES:
        scene.journal.open(name)
    worker.wait(SOON)
    ended = _ended(busy)
    assert "first" in ended
    assert _left(broker) == _nothing_held(4 - len(ended)), scene.logs
    assert not _tracebacks(worker), scene.logs
    assert _run_the_rest(busy) == {"first": 1, "second": 1, "third": 1}
