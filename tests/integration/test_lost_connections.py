"""What is told of, and done with, the tasks of a worker whose connection was lost."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import Any

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import adverse
from tests.integration.conftest import StartScene, lose_connections, other_database
from tests.integration.scene import ALONE, Scene
from tests.support import wait_until

#: When the task is due that outlives the connection (s).
DUE = 5.0


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "prefork"])
def test_what_is_cancelled_with_its_connection_runs_again(
    redis_server: EmbeddedServer,
    module_redis: EmbeddedServer,
    redis_client: redis.Redis,
    scenes: StartScene,
    pool: str,
) -> None:
    """Where the user asks Celery to stop it, its message goes back, and it is not held."""
    settings = {"worker_cancel_long_running_tasks_on_connection_loss": True}
    scene = _scene(scenes, redis_server, module_redis, settings)
    # A green one that is full does not look at its connection.
    worker = scene.worker(pool=pool, concurrency=2)
    result = scene.call("wait", "stopped")
    scene.wait_starts("stopped")
    lose_connections(worker, redis_client)
    scene.wait_starts("stopped", 2)
    scene.journal.open("stopped")
    assert result.get(timeout=10) == "stopped"
    assert scene.call("sleep", "after").get(timeout=10) == "after"
    wait_until(
        lambda: not redis_client.exists("unacked", "celery", "reliable:leases"),
        10,
        lambda: f"nothing held\n{scene.logs}",
    )
    assert scene.starts("stopped") == 2
    assert len(scene.journal.events("end", name="stopped")) == 1
    assert worker.running


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_task_that_waited_through_a_lost_connection_tells_of_itself(
    redis_server: EmbeddedServer,
    module_redis: EmbeddedServer,
    redis_client: redis.Redis,
    scenes: StartScene,
    pool: str,
) -> None:
    """With -E it sends its events by the connection that there is now."""
    scene = _scene(scenes, redis_server, module_redis, {})
    arguments = [*ALONE, "-E"]
    worker = scene.worker(pool=pool, concurrency=1, args=arguments)
    result = scene.call("wait", "due", countdown=DUE)
    worker.wait_log(rf"{result.id}\] received")
    lose_connections(worker, redis_client)
    told: list[str] = []
    deadline = time.monotonic() + DUE + 10
    with scene.app.connection_for_read() as connection:

        def note(event: dict[str, Any]) -> None:
            if event.get("uuid") == result.id:
                told.append(event["type"])
                # Celery loses an event that a thread adds while the one before is being sent.
                scene.journal.open("due")
            # The worker's heartbeat is an event, too: this looks at the clock every 2 s.
            receiver.should_stop = "task-succeeded" in told or time.monotonic() > deadline

        receiver = scene.app.events.Receiver(connection, handlers={"*": note})
        with suppress(socket.timeout):
            receiver.capture(timeout=DUE + 10, wakeup=False)
    assert result.get(timeout=5) == "due"
    assert told == ["task-started", "task-succeeded"], scene.logs
    assert scene.starts("due") == 1


def _scene(
    scenes: StartScene,
    broker: EmbeddedServer,
    results: EmbeddedServer,
    settings: dict[str, Any],
) -> Scene:
    """Make the app on a broker that can be cut off, and on a backend that is not."""
    return scenes(
        broker.url,
        other_database(results),
        settings={"reliable_lease": 15.0, **settings},
        limit=adverse.LIMIT,
        module=adverse,
    )
