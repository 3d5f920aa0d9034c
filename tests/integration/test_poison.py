"""Tasks that crash each time: they stop after their budget, and become dead letters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reliable_tasks import PoisonPill, dead_letters
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import poison
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

CHILD = sorted(set(poison.CRASHES) - {"kill_worker"})
BROKERS = ["our transport", "stock kombu", "RabbitMQ"]


@pytest.fixture
def scene(
    request: pytest.FixtureRequest, scenes: StartScene, redis_server: EmbeddedServer
) -> Scene:
    """The app of crashes, on the broker that the test names."""
    broker = getattr(request, "param", BROKERS[0])
    url, settings = redis_server.url, {}
    if broker == "RabbitMQ":
        url = request.getfixturevalue("rabbitmq_url")
    elif broker == "stock kombu":
        # Short, for a killed worker's message comes back when it is over.
        settings = {
            "reliable_broker": "stock",
            "broker_transport_options": {"visibility_timeout": 4},
        }
    return scenes(url, other_database(redis_server), module=poison, settings=settings)


@contextmanager
def supervised(scene: Scene, **options: object) -> Iterator[None]:
    """Start another worker as soon as one is dead, as a supervisor does."""
    done = threading.Event()

    def watch() -> None:
        current = scene.worker(waits=False, **options)
        while not done.wait(0.05):
            if not current.running:
                current = scene.worker(waits=False, **options)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_end(scene: Scene, result: object, name: str, *, starts: int = 3) -> None:
    """Check that a task ended as a poison pill, after so many starts, and is one dead letter."""
    task_id = result.id  # type: ignore[attr-defined]
    with pytest.raises(PoisonPill) as caught:
        result.get(timeout=60)  # type: ignore[attr-defined]
    pill = caught.value
    assert (pill.task_id, pill.crashes, pill.limit) == (task_id, starts, starts), scene.logs
    assert len(pill.history) == starts
    assert all(one["host"] and one["pid"] and one["at"] for one in pill.history)
    assert scene.starts(name) == starts, scene.logs
    # Its handler comes after its result, and its acknowledgement after that.
    wait_until(lambda: dead_letters.count(app=scene.app) == 1, 10, lambda: f"one\n{scene.logs}")
    failures = scene.journal.events("on_failure", id=task_id)
    assert [event.data["error"] for event in failures] == ["PoisonPill"]
    (letter,) = dead_letters.list(app=scene.app)
    assert (letter.id, letter.task_id, letter.cause) == (task_id, task_id, "poison")
    assert (letter.crashes, letter.queue) == (starts, "celery")
    assert letter.first_at < letter.at + 1
    assert result.state == "FAILURE"  # type: ignore[attr-defined]


@pytest.mark.parametrize("scene", BROKERS, indirect=True)
@pytest.mark.parametrize("how", CHILD)
def test_a_task_that_kills_its_child_stops_after_its_budget(scene: Scene, how: str) -> None:
    """Three starts, then a failure that says what is known of them, and its handlers run."""
    scene.worker(concurrency=2)
    result = scene.call("crash", "poison", how)
    check_end(scene, result, "poison")
    assert all(letter.error for letter in dead_letters.list(app=scene.app))


@pytest.mark.parametrize("scene", BROKERS, indirect=True)
def test_a_task_that_kills_its_worker_stops_after_its_budget(scene: Scene) -> None:
    """The same, whichever worker a supervisor starts next."""
    with supervised(scene, concurrency=2):
        result = scene.call("crash", "poison", "kill_worker")
        check_end(scene, result, "poison")
    assert len(scene.workers) == 4
    assert any("has crashed (1 of 3 times)" in worker.log for worker in scene.workers)
