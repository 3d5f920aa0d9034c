"""A worker in a warm shutdown keeps what it runs, and nothing that it only holds."""

from __future__ import annotations

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import adverse
from tests.integration.conftest import StartScene, other_database
from tests.support import wait_until

#: No lease ends while a test waits: what is run elsewhere was given back.
LEASE = 60.0
#: When the task is due that waits (s): not before the worker that has it is told to leave.
DUE = 10.0


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet"])
def test_what_was_not_started_is_run_by_another_worker_at_once(
    redis_server: EmbeddedServer, redis_client: redis.Redis, scenes: StartScene, pool: str
) -> None:
    """What waits for its ETA, its rate limit or a slot need not wait for the task that runs."""
    settings = {"reliable_lease": LEASE, "worker_prefetch_multiplier": 4}
    scene = scenes(
        redis_server.url,
        other_database(redis_server),
        settings=settings,
        limit=adverse.LIMIT,
        module=adverse,
    )
    leaving = scene.worker(pool=pool, concurrency=1)
    # Ready before anything waits, for nobody knows how long a worker takes to start.
    other = scene.worker(concurrency=1, args=["-Q", "nothing", "--without-mingle"])
    assert scene.call("limited", "spends the minute's start").get(timeout=10)
    first = scene.call("wait", "first")
    scene.wait_starts("first")
    waiting = {
        "due": scene.call("sleep", "due", countdown=DUE),
        "limited": scene.call("limited", "limited"),
    }
    # The other pools have what waits for a slot in a queue of their own.
    if pool == "prefork":
        waiting["behind"] = scene.call("sleep", "behind")
    for result in waiting.values():
        leaving.wait_log(rf"{result.id}\] received")
    scene.control("add_consumer", "celery", other)
    assert not [name for name in waiting if scene.starts(name)]
    leaving.terminate()
    for name, result in waiting.items():
        scene.wait_starts(name, timeout=DUE + 5)
        assert result.get(timeout=5) == name
        assert rf"{result.id}] received" in other.log
    assert leaving.running
    assert not scene.journal.events("end", name="first")
    scene.journal.open("first")
    leaving.wait(15)
    assert first.get(timeout=5) == "first"
    wait_until(
        lambda: not redis_client.exists("unacked", "celery", "reliable:leases"),
        10,
        lambda: f"nothing held\n{scene.logs}",
    )
    assert {name: scene.starts(name) for name in ("first", *waiting)} == dict.fromkeys(
        ("first", *waiting), 1
    ), scene.logs
