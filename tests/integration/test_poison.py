"""Tasks that crash each time: they stop after their budget, and become dead letters."""

from __future__ import annotations

import pytest

from reliable_tasks import PoisonPill
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import poison
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene

CHILD = sorted(set(poison.CRASHES) - {"kill_worker"})


@pytest.fixture
def scene(scenes: StartScene, redis_server: EmbeddedServer) -> Scene:
    """The app of crashes on our own transport."""
    return scenes(redis_server.url, other_database(redis_server), module=poison)


@pytest.mark.parametrize("how", CHILD)
def test_a_task_that_kills_its_child_stops_after_its_budget(scene: Scene, how: str) -> None:
    """Three starts, then a failure that says what is known of them, and its handlers run."""
    scene.worker(concurrency=2)
    result = scene.call("crash", "poison", how)
    with pytest.raises(PoisonPill) as caught:
        result.get(timeout=30)
    assert scene.starts("poison") == 3
    pill = caught.value
    assert (pill.task_id, pill.crashes, pill.limit) == (result.id, 3, 3)
    assert len(pill.history) == 3
    assert [event.data["error"] for event in scene.journal.events("on_failure")] == ["PoisonPill"]
    print(pill, scene.logs)
    redis = scene.claims.client.redis
    print(redis.keys("*"))
    print(redis.hgetall(f"reliable:dead:letter:{result.id}"))
