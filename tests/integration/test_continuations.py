"""A worker that dies between publishing a task's continuation and its ack starts one chain.

``RT_CONTINUATIONS`` says how often each is tried; the release was tried with 20.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import goes_on
from tests.integration.conftest import other_database
from tests.integration.scene import Scene
from tests.support import wait_until

TIMES = int(os.environ.get("RT_CONTINUATIONS", "2"))

pytestmark = pytest.mark.timeout(60 + 30 * TIMES)


@pytest.fixture
def scene(tmp_path: Path, redis_server: EmbeddedServer) -> Iterator[Scene]:
    """The app and one worker that stays alive beside those that die."""
    backend = other_database(redis_server)
    with Scene(tmp_path, redis_server.url, backend, module=goes_on) as scene:
        yield scene


@pytest.mark.parametrize("how", ["retry", "replace", "chain", "group"])
def test_what_was_continued_is_not_run_again(scene: Scene, how: str) -> None:
    """Each step is started once, though the first one's message came back."""
    steps = {
        "retry": ["{0}", "{0}"],
        "replace": ["{0}", "{0}, next"],
        "chain": ["{0}", "{0}, next", "{0}, last"],
        "group": ["{0}", "{0}, next", "{0}, last"],
    }[how]
    expected: list[str] = []
    for number in range(TIMES):
        name = f"{how} {number}"
        scene.worker(concurrency=1)
        result = scene.call("go_on", name, how)
        wait_until(
            lambda: not scene.workers[-1].running, 20, lambda: f"a worker's death\n{scene.logs}"
        )
        scene.worker(concurrency=2)
        expected += [step.format(name) for step in steps]
        result.get(timeout=30)
        wait_until(
            lambda: not scene.claims.client.redis.exists("unacked"),
            20,
            lambda: f"no message left\n{scene.logs}",
        )
        started = [event.data["name"] for event in scene.journal.events("start")]
        assert sorted(started) == sorted(expected), scene.logs
        scene.stop_workers()
