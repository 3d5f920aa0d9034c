"""RabbitMQ with a Redis beside it: running tasks outlive their connection, and run alone."""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from celery import chain

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import bare, goes_on
from tests.integration.conftest import StartScene
from tests.integration.scene import Scene
from tests.integration.test_continuations import TIMES
from tests.support import Proxy, RabbitMQServer, wait_until

Record = Callable[[str, object], None]

#: For how long connections are cut (s): ``RT_CUT_SECONDS=60`` is the whole of it.
SECONDS = int(os.environ.get("RT_CUT_SECONDS", "12"))
#: What a worker says when the second copy of a task that runs has come.
_COPY_CAME = r"{id}\] (is set aside|runs here)"
#: What it says when the connection it consumes by is gone.
_LOST = "consumer: Connection to broker lost"


class Broker:
    """One virtual host."""

    def __init__(self, server: RabbitMQServer, url: str) -> None:
        self._server = server
        self._vhost = url.rpartition("/")[2]

    def cut(self, scene: Scene) -> None:
        """Close connections, as an administrator would, until every worker has lost its own.

        How many were closed says nothing of whose they were: the server lists those of clients
        too, and a worker's own late.
        """

        def all_lost() -> bool:
            for connection in self._server.request("GET", f"vhosts/{self._vhost}/connections"):
                name = urllib.parse.quote(connection["name"], safe="")
                # It may be gone by itself meanwhile.
                with contextlib.suppress(OSError):
                    self._server.request("DELETE", f"connections/{name}")
            return all(_LOST in worker.log for worker in scene.workers)

        wait_until(all_lost, 15, lambda: f"lost connections:\n{scene.logs}", interval=0.5)

    def wait_empty(self) -> None:
        """Wait until nothing is left in any queue, acknowledged all."""

        def left() -> dict[str, int]:
            queues = self._server.queues(self._vhost)
            return {q["name"]: q["messages"] for q in queues if q.get("messages")}

        wait_until(lambda: not left(), 40, lambda: f"empty queues, not {left()}")


@pytest.fixture
def broker(rabbitmq_server: RabbitMQServer, rabbitmq_url: str) -> Broker:
    """The test's virtual host."""
    return Broker(rabbitmq_server, rabbitmq_url)


@pytest.fixture
def scene(scenes: StartScene, rabbitmq_url: str, redis_url: str) -> Scene:
    """An app whose results, and what is known of its runs, are kept in a Redis."""
    return scenes(rabbitmq_url, redis_url, limit=60)


def wait_copy(scene: Scene, task_id: str) -> None:
    """Wait until the second copy of a running task has come to a worker."""
    pattern = _COPY_CAME.format(id=task_id)
    wait_until(
        lambda: any(re.search(pattern, worker.log) for worker in scene.workers),
        30,
        lambda: f"a second copy of {task_id}:\n{scene.logs}",
    )


def assert_never_at_once(scene: Scene, task_id: str) -> None:
    """Fail if a run of a task began before the one before it had ended."""
    events = [e for e in scene.journal.events(id=task_id) if e.name in ("start", "end")]
    for before, after in pairwise(events):
        assert (before.name, after.name) != ("start", "start"), scene.logs


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_running_tasks_outlive_a_closed_connection(
    scene: Scene, broker: Broker, workers: int, pool: str
) -> None:
    """They run on, no copy starts, and all messages are acknowledged in the end."""
    scene.crew(workers, pool=pool, concurrency=3)
    results = [scene.call("bare", f"order {n}", "wait") for n in range(2)]
    for n in range(2):
        scene.wait_starts(f"order {n}")
    broker.cut(scene)
    for result in results:
        wait_copy(scene, result.id)
    for n in range(2):
        scene.journal.open(f"order {n}")
    assert [result.get(timeout=15) for result in results] == ["order 0", "order 1"]
    broker.wait_empty()
    assert [scene.starts("order 0"), scene.starts("order 1")] == [1, 1], scene.logs
    assert "Couldn't ack" not in scene.logs


def test_a_busy_worker_runs_each_task_once(scene: Scene, broker: Broker) -> None:
    """A copy that comes when its task is over is acknowledged without being run."""
    scene.worker(concurrency=1)
    names = [f"order {n}" for n in range(3)]
    results = [scene.call("bare", name, "wait") for name in names]
    scene.wait_starts(names[0])
    broker.cut(scene)
    scene.workers[0].wait_log(r"lost(.|\n)*Connected to amqp", timeout=20)
    for name in names:
        scene.journal.open(name)
    assert [result.get(timeout=20) for result in results] == names
    broker.wait_empty()
    assert [scene.starts(name) for name in names] == [1, 1, 1], scene.logs


def test_tasks_of_a_dead_worker_run_again_soon(
    scene: Scene, broker: Broker, record_testsuite_property: Record
) -> None:
    """The lease of a worker whose connections are gone ends with it, not after 15 s."""
    scene.worker()
    scene.call("bare", "warm-up").get(timeout=15)
    result = scene.call("bare", "order", "wait")
    scene.wait_starts("order")
    scene.worker()
    scene.workers[0].kill_group()
    killed = time.time()
    seconds = scene.wait_starts("order", 2, timeout=25) - killed
    record_testsuite_property("RabbitMQ with a guard: seconds to restart", round(seconds, 2))
    assert seconds < 8, scene.logs
    scene.journal.open("order")
    assert result.get(timeout=15) == "order"
    broker.wait_empty()
    assert scene.starts("order") == 2


@pytest.mark.parametrize("what", ["retry", "replace"])
def test_what_was_continued_is_not_run_again(scene: Scene, broker: Broker, what: str) -> None:
    """A worker that dies between publishing a continuation and its ack starts one chain only."""
    action = f"{what}_and_take_worker_down"
    scene.worker()
    result = scene.call("bare", "order", action, countdown=1)
    scene.wait_starts("order")
    wait_until(lambda: not scene.workers[0].running, 10, "dead worker")
    scene.workers[0].kill_group()
    scene.worker()
    scene.wait_starts("order", 2, timeout=30)
    wait_until(result.ready, 15, lambda: scene.logs)
    broker.wait_empty()
    scene.stop_workers()
    assert scene.starts("order") == 2, scene.logs


def test_what_was_rescheduled_is_not_run_again(
    scenes: StartScene, broker: Broker, rabbitmq_url: str, redis_url: str
) -> None:
    """A worker that dies between sending a copy again and its ack leaves two; one runs."""
    scene = scenes(rabbitmq_url, redis_url, limit=60, module=goes_on)
    for number in range(TIMES):
        name = f"order {number}"
        result = scene.call("act", name)
        scene.run_elsewhere(name, result.id)
        first = scene.worker(concurrency=1)
        wait_until(lambda first=first: not first.running, 20, lambda: scene.logs)
        scene.let_go_elsewhere(name, result.id)
        second = scene.worker(concurrency=1)
        assert result.get(timeout=30) == name
        broker.wait_empty()
        assert scene.starts(name) == 1, scene.logs
        second.stop()


def test_two_calls_with_one_id_never_run_at_once(scene: Scene, broker: Broker) -> None:
    """The second waits for the first, and runs."""
    scene.crew(2, concurrency=2)
    task = scene.app.tasks["bare"]
    for name in ("first", "second"):
        task.apply_async((name, "wait"), task_id="twin")
    wait_until(lambda: scene.journal.events("start"), 15, lambda: scene.logs)
    wait_copy(scene, "twin")
    assert len(scene.journal.events("start")) == 1, scene.logs
    for name in ("first", "second"):
        scene.journal.open(name)
    wait_until(lambda: len(scene.journal.events("end")) == 2, 20, lambda: scene.logs)
    broker.wait_empty()
    assert_never_at_once(scene, "twin")
    assert [scene.starts("first"), scene.starts("second")] == [1, 1]


def test_a_crash_is_counted(scene: Scene, broker: Broker) -> None:
    """A child's death counts, an orderly end does not."""
    scene.worker()
    scene.call("bare", "order", "die")
    scene.wait_starts("order", 2, timeout=20)
    (first, second) = scene.journal.events("start", name="order")
    assert [first.data["crashes"], second.data["crashes"]] == [0, 1]
    broker.wait_empty()


def test_a_dead_workers_once_task_starts_again_in_seconds(scene: Scene) -> None:
    """Its claim goes with the run that is known to be over, long before its hard limit."""
    scene.crew(2)
    scene.call("act", "order", "wait")
    died_at = scene.wait_starts("order")
    (start,) = scene.journal.events("start", name="order")
    claim = scene.claim("order")
    assert claim["delivery"], "the run that its worker renews covers it"
    next(w for w in scene.workers if start.pid in w.child_pids()).kill_group()
    again_at = scene.wait_starts("order", 2, timeout=20)
    assert again_at - died_at < 15, scene.logs
    scene.journal.open("order")
    scene.wait_free("order")


def test_a_duplicate_in_a_chain_follows(scene: Scene, broker: Broker) -> None:
    """It waits in the broker, under an id of its own, and ends as the owner of its key."""
    scene.worker(concurrency=2)
    owner = scene.call("act", "order", "wait")
    scene.wait_starts("order")
    act, bare = scene.app.tasks["act"], scene.app.tasks["bare"]
    rest = chain(act.si("order"), bare.si("after")).apply_async()
    scene.wait_followed(owner.id)
    scene.journal.open("order")
    assert rest.get(timeout=20) == "after"
    assert (scene.starts("order"), scene.starts("after")) == (1, 1)
    broker.wait_empty()
    scene.wait_free("order")


def _call_and_cut(scene: Scene, proxy: Proxy, *, seconds: float) -> tuple[dict[str, Any], int]:
    """Queue tasks, and cut all connections each second; return results, and how many were cut."""
    rng = random.Random(5)
    is_over = threading.Event()
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        while not is_over.wait(1.0):
            cuts += proxy.connections
            proxy.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    results: dict[str, Any] = {}
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name = f"order {len(results)}"
            results[name] = scene.call("sleep", name, rng.uniform(0, 1.5))
            is_over.wait(0.25)
    finally:
        is_over.set()
        cutter.join()
    return results, cuts


@pytest.mark.parametrize("producer", ["steady", "cut off"])
def test_nothing_is_lost_or_doubled_while_connections_die(
    scenes: StartScene,
    broker: Broker,
    rabbitmq_server: RabbitMQServer,
    rabbitmq_url: str,
    redis_url: str,
    record_testsuite_property: Record,
    producer: str,
) -> None:
    """All connections cut each second under load: every task runs, never two at once.

    A producer that lost the answer to a publish has to repeat it: RabbitMQ cannot tell, so then
    a task may run twice, one after the other.
    """
    with Proxy(rabbitmq_server.port) as proxy:
        through = rabbitmq_url.replace(f":{rabbitmq_server.port}/", f":{proxy.port}/")
        scene = scenes(through if producer == "cut off" else rabbitmq_url, redis_url, limit=60)
        scene.crew(2, concurrency=2, broker_url=through)
        results, cuts = _call_and_cut(scene, proxy, seconds=SECONDS)
        for name, result in results.items():
            assert result.get(timeout=60) == name, scene.logs
        broker.wait_empty()
        for result in results.values():
            assert_never_at_once(scene, result.id)
        twice = [name for name in results if scene.starts(name) != 1]
        about = f"RabbitMQ with a guard, producer {producer}"
        record_testsuite_property(f"{about}: connections cut", cuts)
        record_testsuite_property(f"{about}: tasks run again, of {len(results)}", len(twice))
        assert cuts > SECONDS
        assert producer == "cut off" or not twice, scene.logs
        scene.stop_workers()


def test_a_lock_redis_that_is_away_stops_no_task_for_good(
    scenes: StartScene, broker: Broker, rabbitmq_url: str, redis_server: EmbeddedServer
) -> None:
    """A message waits in its worker until it is known that nobody else runs it."""
    with Proxy(redis_server.port) as proxy:
        scene = scenes(rabbitmq_url, None, settings={"reliable_redis_url": proxy.url()})
        worker = scene.worker()
        scene.call("sleep", "warm-up")
        scene.wait_starts("warm-up")
        proxy.refuse()
        result = scene.call("sleep", "order")
        worker.wait_log(f"{result.id}.* is set aside", timeout=15)
        assert scene.starts("order") == 0
        proxy.heal()
        scene.wait_starts("order")
        broker.wait_empty()


def test_an_app_can_run_tasks_without_its_lock_redis(
    scenes: StartScene, broker: Broker, rabbitmq_url: str, redis_server: EmbeddedServer
) -> None:
    """With reliable_on_store_error = "proceed" a task runs unguarded, and an error says so."""
    with Proxy(redis_server.port) as proxy:
        settings = {"reliable_redis_url": proxy.url(), "reliable_on_store_error": "proceed"}
        scene = scenes(rabbitmq_url, None, settings=settings)
        worker = scene.worker()
        scene.call("sleep", "warm-up")
        scene.wait_starts("warm-up")
        proxy.refuse()
        scene.call("sleep", "order")
        scene.wait_starts("order")
        worker.wait_log("runs unguarded")
        broker.wait_empty()
        proxy.heal()


def test_a_worker_without_a_redis_says_what_is_not_promised(
    scenes: StartScene, rabbitmq_url: str
) -> None:
    """It names what can happen, and the setting that ends it; and keeps stopping such tasks."""
    worker = scenes(rabbitmq_url, None, module=bare).worker()
    worker.wait_log("can run twice at once.*reliable_redis_url")


@pytest.mark.parametrize("has_guard", [True, False])
def test_a_worker_says_what_becomes_of_very_long_tasks(
    scenes: StartScene, rabbitmq_url: str, redis_url: str, has_guard: bool
) -> None:
    """A limit of more than 30 minutes meets RabbitMQ's consumer_timeout."""
    scene = scenes(rabbitmq_url, redis_url if has_guard else None, limit=3600, module=bare)
    worker = scene.worker()
    expected = "its copy is set aside" if has_guard else "starts the task again"
    worker.wait_log(f"consumer_timeout, and .*{expected}.*: sleep")
    assert ("can run twice at once" in worker.log) is not has_guard
