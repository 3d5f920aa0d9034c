"""A task never starts twice while its worker lives, whatever a worker makes it wait for.

Stock kombu hands a message to another worker a ``visibility_timeout`` after it was fetched. What
waits in a worker before it starts uses up that time; a task that starts late would still run when
the broker passes it on.

``RT_HOLD_LIMIT`` sets the hard time limit that is tried, in seconds; 20 takes some minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest

from reliable_tasks import recommended_visibility_timeout
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

LIMIT = int(os.environ.get("RT_HOLD_LIMIT", "6"))
#: How long a task runs: close to its limit, and below the soft one.
RUN = (LIMIT - 1) * 0.9
#: A task can be given back and fetched again some times before it starts.
PATIENCE = 12 * LIMIT
#: Of stock kombu: a lease of ours is renewed for as long as a worker has to wait.
SETTINGS = {"reliable_broker": "stock", "reliable_visibility_margin": 2.0}

pytestmark = pytest.mark.timeout(60 + 20 * LIMIT)


def _two_workers(scenes: StartScene, server: EmbeddedServer, *, multiplier: int) -> Scene:
    settings = {**SETTINGS, "worker_prefetch_multiplier": multiplier}
    scene = scenes(server.url, other_database(server), settings=settings, limit=LIMIT)
    scene.crew(2)
    return scene


def _all_run_once(scene: Scene, names: Iterable[str], *, at_once: int | None) -> None:
    """Wait until all have ended, and check that none started twice or ran beside itself."""
    names = list(names)
    ended = wait_until(
        lambda: len(found := scene.journal.events("end")) >= len(names) and found,
        PATIENCE,
        lambda: f"{len(names)} ends, not {len(scene.journal.events('end'))}\n{scene.logs}",
    )
    redis = scene.claims.client.redis
    wait_until(
        lambda: not redis.exists("unacked"), PATIENCE, lambda: f"no message left\n{scene.logs}"
    )
    starts = [event.data["name"] for event in scene.journal.events("start")]
    assert sorted(starts) == sorted(names), scene.logs
    assert len(ended) == len(names)
    if at_once is not None:
        assert _most_at_once(scene) <= at_once


def _most_at_once(scene: Scene) -> int:
    running = most = 0
    for event in sorted(scene.journal.events(), key=lambda event: event.at):
        running += {"start": 1, "end": -1}[event.name]
        most = max(most, running)
    return most


@pytest.mark.parametrize("multiplier", [1, 4])
def test_behind_tasks_that_take_as_long_as_they_may(
    scenes: StartScene, redis_server: EmbeddedServer, multiplier: int
) -> None:
    """A full prefetch of long tasks: none of them is started twice."""
    scene = _two_workers(scenes, redis_server, multiplier=multiplier)
    names = [f"long-{number}" for number in range(3 + multiplier // 2)]
    for name in names:
        scene.call("sleep", name, RUN)
    _all_run_once(scene, names, at_once=2)


def test_when_many_come_due_at_once(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """A worker fetches messages with an ETA without bound, and all of them come due together."""
    scene = _two_workers(scenes, redis_server, multiplier=1)
    names = [f"due-{number}" for number in range(4)]
    due = datetime.now(UTC) + timedelta(seconds=2)
    for name in names:
        scene.call("sleep", name, RUN, eta=due)
    _all_run_once(scene, names, at_once=2)


def test_when_many_come_due_in_one_worker(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """What one worker fetched and cannot run in time is not started there beside another's copy."""
    settings = {**SETTINGS, "worker_prefetch_multiplier": 1}
    scene = scenes(redis_server.url, other_database(redis_server), settings=settings, limit=LIMIT)
    worker = scene.worker()
    names = [f"due-{number}" for number in range(4)]
    # Time enough for all of them to be fetched before.
    due = datetime.now(UTC) + timedelta(seconds=LIMIT)
    for name in names:
        scene.call("sleep", name, RUN, eta=due)
    wait_until(lambda: worker.log.count(" received") == len(names), message="all fetched")
    scene.worker()
    _all_run_once(scene, names, at_once=2)
    assert "was held for" in worker.log


def test_behind_a_rate_limit(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """A message that waits for its turn is held by the worker as well."""
    scene = _two_workers(scenes, redis_server, multiplier=4)
    names = [f"limited-{number}" for number in range(5)]
    for name in names:
        scene.call("limited", name, RUN / 2)
    _all_run_once(scene, names, at_once=2)


def test_behind_plain_tasks(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """Tasks of Celery's own kind, which know no such care, stand before it."""
    scene = _two_workers(scenes, redis_server, multiplier=4)
    names = []
    for number in range(6):
        task = "sleep" if number % 3 == 2 else "plain"
        name = f"{task}-{number}"
        scene.call(task, name, RUN)
        names.append(name)
    wait_until(
        lambda: (
            len(scene.journal.events("end", name="sleep-2")) == 1
            and len(scene.journal.events("end", name="sleep-5")) == 1
        ),
        PATIENCE,
        lambda: f"both ended\n{scene.logs}",
    )
    for name in ("sleep-2", "sleep-5"):
        assert scene.starts(name) == 1, scene.logs


def test_a_countdown_longer_than_the_visibility_timeout(
    scenes: StartScene, redis_server: EmbeddedServer
) -> None:
    """The broker passes such a message on while it waits, and still it starts only once."""
    scene = _two_workers(scenes, redis_server, multiplier=1)
    timeout = recommended_visibility_timeout(scene.app).seconds
    names = [f"later-{number}" for number in range(2)]
    for name in names:
        scene.call("sleep", name, RUN, countdown=timeout * 1.3)
    _all_run_once(scene, names, at_once=2)


def test_a_claimed_task_behind_long_ones(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """A task with a key that waits in the prefetch keeps its key, and runs once."""
    scene = _two_workers(scenes, redis_server, multiplier=4)
    names = [f"long-{number}" for number in range(4)]
    for name in names:
        scene.call("sleep", name, RUN)
    scene.call("act", "claimed")
    _all_run_once(scene, [*names, "claimed"], at_once=2)
    scene.wait_free("claimed")
