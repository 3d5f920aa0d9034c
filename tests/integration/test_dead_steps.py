"""A worker that dies at any step of writing a dead letter: it is never lost, and never there twice.

The steps are lines that are executed and the two sides of commands; see `apps/steps.py`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pytest

from reliable_tasks import ReliableResult, dead_letters
from reliable_tasks._places import dead_place
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import steps
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene, reading
from tests.integration.test_rabbitmq_guard import Broker
from tests.support import RabbitMQServer, WorkerProcess, wait_until

#: So many workers die at once.
_AT_ONCE = 8
#: What is executed when the answer has come that a letter is kept.
_IS_KEPT = "_store/letters.py:of:"
#: Where a letter is made and kept, and the two sides of commands.
_CLOSELY = ("_store/", "_broker/", "_dead/", "redis/", "amqp/", "kombu/")
_TAKES_ALL = bool(os.environ.get("RT_ALL_STEPS"))

pytestmark = pytest.mark.timeout(600 if _TAKES_ALL else 240)


def until_kept(places: Sequence[str]) -> list[str]:
    """Return the steps until the answer comes that a letter is kept."""
    return list(takewhile(lambda place: not place.startswith(_IS_KEPT), places))


class Stage:
    """An app with workers that die at a step, and others that do what is left to do.

    Args:
        scene: The app, with no worker.
        directory: Where steps are written.
        task: The task that fails.

    Attributes:
        results: Of the tasks that were called, by their names.
    """

    def __init__(self, scene: Scene, directory: Path, task: str) -> None:
        self.scene = scene
        self.results: dict[str, ReliableResult] = {}
        self._directory, self._task = directory, task
        self._killed = 0
        self._unkept: set[str] = set()

    def measure(self) -> list[str]:
        """Return all steps that there are: of the second worker, for the first loads scripts."""
        for name in ("first", "second"):
            self.results[name] = self._call(name, name)
            worker, file = self._worker(name, 0)
            wait_until(file.exists, 20, lambda: self.scene.logs)
            worker.stop()
        return file.read_text().splitlines()

    def die_at(self, numbers: Sequence[int]) -> None:
        """Have a worker die at each of some steps, some workers at once.

        When they are dead another one is started, which does what they have left.
        """
        for begin in range(0, len(numbers), _AT_ONCE):
            crew = {}
            for number in numbers[begin : begin + _AT_ONCE]:
                name = f"step-{number}"
                self.results[name] = self._call(name, name)
                crew[name], _ = self._worker(name, number)
            for worker in crew.values():
                assert worker.wait(30) == -signal.SIGKILL, worker.log[-3000:]
                worker.stop()
                self.scene.workers.remove(worker)
            self._killed += len(crew)
            self._unkept |= {name for name in crew if not self._is_kept(name)}
            self.scene.worker(args=reading(",".join(crew)), waits=False)

    def check(self) -> None:
        """Check that each task is one dead letter, and ran again only if it was none before."""
        app, count = self.scene.app, len(self.results)
        wait_until(
            lambda: dead_letters.count(app=app) >= count,
            60,
            lambda: f"{count} letters, not {dead_letters.count(app=app)}\n{self.scene.logs}",
        )
        self._wait_nothing_left()
        letters = [(letter.id, letter.task_id) for letter in dead_letters.list(app=app)]
        assert sorted(letters) == sorted((one.id, one.id) for one in self.results.values())
        assert {one.state for one in self.results.values()} == {"FAILURE"}
        starts = Counter(event.data["name"] for event in self.scene.journal.events("start"))
        assert starts == {name: 1 + (name in self._unkept) for name in self.results}
        assert 0 < len(self._unkept) < self._killed

    def _is_kept(self, name: str) -> bool:
        """Say whether a worker that is dead had kept the letter of its task."""
        place = dead_place(self.scene.app)
        assert place is not None
        # When this is answered, what the dead have sent was executed.
        place.server.ping()
        return place.store.get(place.server, self.results[name].id) is not None

    def claimed(self) -> list[str]:
        """Return the tasks whose keys are taken."""
        return [name for name in self.results if self.scene.claim(name, task=self._task)]

    def check_free(self) -> None:
        """Check that each key can be taken, at the latest when the lease of a dead run has ended.

        What was to free it may have died when the message was acknowledged.
        """
        for name in self.claimed():
            wait_until(lambda name=name: not self._call(name, "nobody").duplicate, 20)

    def _wait_nothing_left(self) -> None:
        place = dead_place(self.scene.app)
        assert place is not None
        server, keys = place.server, place.store.keys

        def left() -> list[str]:
            names = [keys.leases, keys.beside.leases, "unacked", "unacked_index", *self.results]
            return [name for name in names if server.exists(name)]

        wait_until(lambda: not left(), 30, lambda: f"left: {left()}\n{self.scene.logs}")

    def _call(self, name: str, queue: str) -> ReliableResult:
        return self.scene.call(self._task, name, queue=queue)

    def _worker(self, name: str, dies_at: int) -> tuple[WorkerProcess, Path]:
        file = self._directory / name
        env = {**self.scene._env, steps.STEPS_FILE: str(file), steps.DIES_AT: str(dies_at)}
        return self.scene.worker(args=reading(name), env=env, waits=False), file


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, scenes: StartScene, redis_server: EmbeddedServer, tmp_path: Path
) -> Stage:
    """The task that the test names; its letters and claims are kept by a Redis."""
    url = redis_server.url
    if "rabbitmq_url" in request.fixturenames:
        url = request.getfixturevalue("rabbitmq_url")
    scene = scenes(url, other_database(redis_server), module=steps)
    return Stage(scene, tmp_path, request.param)


def of_a_failure(places: Sequence[str]) -> list[int]:
    """Choose all steps where a letter is made and kept, and each third of the others."""
    return [
        number
        for number, place in enumerate(places, 1)
        if _TAKES_ALL or place.startswith(_CLOSELY) or number % 3 == 1
    ]


def of_a_time_limit(places: Sequence[str]) -> list[int]:
    """Choose each fifth step, and those next to the one by which the letter is kept."""
    kept_at = len(until_kept(places))
    assert kept_at < len(places)
    return [
        number
        for number in range(1, len(places) + 1)
        if _TAKES_ALL or number % 5 == 1 or abs(number - kept_at) < 6
    ]


@pytest.mark.parametrize("stage", ["fail_once"], indirect=True)
def test_a_worker_dies_at_each_step_of_a_failure(stage: Stage) -> None:
    """Its child has told of the end: of some 310 steps 210 are taken, all with RT_ALL_STEPS=1."""
    places = stage.measure()
    stage.die_at(of_a_failure(places))
    stage.check()
    assert stage.claimed() == []


@pytest.mark.parametrize("stage", ["fail_once"], indirect=True)
def test_a_worker_of_rabbitmq_dies_at_each_step_of_a_failure(
    rabbitmq_server: RabbitMQServer, rabbitmq_url: str, stage: Stage
) -> None:
    """The letter is another server's: of some 320 steps 220 are taken, all with RT_ALL_STEPS=1."""
    places = stage.measure()
    stage.die_at(of_a_failure(places))
    stage.check()
    Broker(rabbitmq_server, rabbitmq_url).wait_empty()
    assert stage.claimed() == []


@pytest.mark.parametrize("stage", ["slow_once"], indirect=True)
def test_a_worker_dies_at_steps_of_a_time_limit(stage: Stage) -> None:
    """It stores the end itself: of some 520 steps 110 are taken, all with RT_ALL_STEPS=1."""
    places = stage.measure()
    stage.die_at(of_a_time_limit(places))
    stage.check()
    stage.check_free()


@pytest.mark.parametrize("stage", ["slow_once"], indirect=True)
def test_a_worker_of_rabbitmq_dies_at_steps_of_a_time_limit(
    rabbitmq_server: RabbitMQServer, rabbitmq_url: str, stage: Stage
) -> None:
    """The same beside a Redis: of some 540 steps 110 are taken, all with RT_ALL_STEPS=1."""
    places = stage.measure()
    stage.die_at(of_a_time_limit(places))
    stage.check()
    Broker(rabbitmq_server, rabbitmq_url).wait_empty()
    stage.check_free()
