"""Workers that are told to stop: what they hold goes back at once, whole and uncounted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

Record = Callable[[str, object], None]

POOLS = ["prefork", "threads", "solo", "gevent", "eventlet"]
#: No lease ends while a test waits: what is back was put back.
LEASE = 60.0
#: A worker that stops need not wait for its tasks; Celery and a busy machine take some time (s).
SOON = 10.0


@pytest.fixture
def broker(redis_server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client of the broker, to look at what is left there."""
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        yield client


def _busy_worker(scenes: StartScene, server: EmbeddedServer, pool: str, **settings: Any) -> Scene:
    """Start a worker that runs a task, has fetched two more and waits for the ETA of a fourth."""
    scene = scenes(
        server.url,
        other_database(server),
        settings={"reliable_lease": LEASE, "worker_prefetch_multiplier": 3, **settings},
        limit=60,
    )
    worker = scene.worker(pool=pool)
    later = scene.call("act", "later", countdown=50)
    worker.wait_log(f"{later.id}.* received")
    scene.call("act", "first", "wait")
    scene.wait_starts("first")
    scene.call("act", "second")
    scene.call("act", "third")
    return scene


def _left(broker: redis.Redis) -> dict[str, Any]:
    """Return what the broker knows of a worker and its messages."""
    crashes = {key: broker.hget(key, "crashes") for key in broker.scan_iter("reliable:run:*")}
    return {
        "waiting": broker.llen("celery"),
        "unacked": broker.hlen("unacked") + broker.zcard("reliable:leases"),
        "alive": broker.zcard("reliable:beats") + broker.hlen("reliable:keepers"),
        "crashes": {key: value for key, value in crashes.items() if value not in (None, "0")},
    }


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("soft", [0, 1])
def test_probe(scenes, redis_server, broker, pool, soft):
    scene = _busy_worker(scenes, redis_server, pool, worker_soft_shutdown_timeout=soft)
    (worker,) = scene.workers
    print("before", _left(broker))
    told = time.monotonic()
    worker.send_signal(signal.SIGQUIT)
    try:
        worker.wait(12)
    except Exception:
        print("still runs; opening")
        scene.journal.open("first")
        worker.wait(20)
    print("exit", worker.returncode, round(time.monotonic() - told, 2), _left(broker))
    for key in broker.scan_iter("reliable:run:*"):
        print(key, broker.hgetall(key))
    print([ (e.name, e.data["name"]) for e in scene.journal.events()])
    print(worker.log)
