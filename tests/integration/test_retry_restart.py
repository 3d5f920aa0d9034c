"""A retry policy whose attempts run in different workers."""

from __future__ import annotations

import pytest

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps.shop import WAITS
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

#: What a message's way through the broker and a busy machine may add to a delay (s).
LATE = 0.9


@pytest.fixture
def shop(scenes: StartScene, redis_server: EmbeddedServer) -> Scene:
    """One worker."""
    scene = scenes(redis_server.url, other_database(redis_server))
    scene.worker()
    return scene


def _check(scene: Scene, name: str, *, late: tuple[float, ...]) -> None:
    """Check what tenacity was told of each attempt against the journal's clock."""
    attempts = scene.journal.events("attempt", name=name)
    assert [attempt.data["number"] for attempt in attempts] == [1, 2, 3, 4]
    waited = [sum(WAITS[:count]) for count in range(4)]
    assert [attempt.data["idle_for"] for attempt in attempts] == pytest.approx(waited)
    for attempt in attempts:
        # The age that a stop_after_delay sees is the time since the first attempt began.
        assert attempt.data["age"] == pytest.approx(attempt.at - attempts[0].at, abs=0.15)
    ends = scene.journal.events("end", name=name)
    starts = scene.journal.events("start", name=name)
    for number, wait in enumerate(WAITS):
        delay = starts[number + 1].at - ends[number].at
        assert wait <= delay < wait + late[number], (number, delay, scene.logs)


def test_delays_are_those_that_tenacity_computes(shop: Scene) -> None:
    """Sub-second waits included, and the last attempt's result is the task's."""
    assert shop.call("flaky", "steady", 3).get(timeout=20) == 3
    _check(shop, "steady", late=(LATE, LATE, LATE))
    shop.wait_free("steady", 3, task="flaky")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_attempts_and_age_survive_a_restart(shop: Scene, how: str) -> None:
    """Another worker goes on with the count, the age and the waits of the first."""
    result = shop.call("flaky", "moved", 3)
    shop.wait_starts("moved", 2)
    # The third attempt waits in the worker that is stopped, and has been acknowledged by nobody.
    wait_until(lambda: shop.claim("moved", 3, task="flaky").get("attempt") == "2")
    wait_until(lambda: "holder" not in shop.claim("moved", 3, task="flaky"))
    if how == "stopped":
        shop.workers[0].stop()
    else:
        shop.workers[0].kill_group()
    shop.worker()
    assert result.get(timeout=40) == 3
    # A dead worker's message comes back a visibility_timeout later.
    _check(shop, "moved", late=(LATE, 6.0 if how == "stopped" else 25.0, LATE))
    assert len({event.pid for event in shop.journal.events("start", name="moved")}) == 2
    shop.wait_free("moved", 3, task="flaky")
