"""How long a key stays taken, with real workers."""

from __future__ import annotations

from itertools import pairwise
from uuid import uuid4

import pytest
from celery import chain
from celery.exceptions import TaskRevokedError

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

POOLS = ["prefork", "threads", "gevent"]
SLOTS = 3


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    """Kinds of pool in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def shop(pool: str, module_redis: EmbeddedServer, module_scenes: StartScene) -> Scene:
    """One worker with a few slots, on databases of its own."""
    number = 2 * POOLS.index(pool)
    urls = (other_database(module_redis, n) for n in (number, number + 1))
    # A green worker makes room for what waits each 2 s only.
    scene = module_scenes(*urls, limit=8, settings={"worker_prefetch_multiplier": 5})
    scene.worker(pool=pool, concurrency=SLOTS)
    return scene


@pytest.fixture
def name() -> str:
    """A name that no other test uses, for each name is one `@once` key."""
    return uuid4().hex[:8]


def most_at_once(scene: Scene, name: str) -> int:
    """Say how many tasks with a name ran at the same time."""
    running = most = 0
    for event in scene.journal.events(name=name):
        running += {"start": 1, "end": -1}.get(event.name, 0)
        most = max(most, running)
    return most


def test_tasks_take_turns(shop: Scene, name: str) -> None:
    """Each runs, no two at once, and who waits holds no slot."""
    results = [shop.call("while_executing", name, "take_a_while") for _ in range(8)]
    shop.wait_starts(name)
    others = [f"{name}, other {n}" for n in range(SLOTS)]
    for other in others:
        shop.call("act", other)
    for result in results:
        assert result.get(timeout=40) == name
    last = shop.wait_starts(name, 8)
    assert all(shop.wait_starts(other) < last for other in others), "they were done meanwhile"
    assert (shop.starts(name), most_at_once(shop, name)) == (8, 1)
    shop.wait_free(name, task="while_executing")


def test_tasks_that_are_acknowledged_early_take_turns(shop: Scene, name: str) -> None:
    """The broker does not have them any more: the worker that lets them wait does."""
    results = [shop.call("while_executing, early ack", name, "take_a_while") for _ in range(4)]
    for result in results:
        assert result.get(timeout=20) == name
    assert (shop.starts(name), most_at_once(shop, name)) == (4, 1)


def test_a_successor_that_expires_leaves_no_claim(shop: Scene, name: str) -> None:
    """It has its caller's claim, and does not live to see its end."""
    first = shop.call("act", name, "call_itself_in_vain")
    assert first.get(timeout=10) == name
    shop.wait_free(name)
    assert shop.starts(name) == 1


def test_one_that_may_not_wait_is_dropped(shop: Scene, name: str) -> None:
    """Its result says for whom."""
    first = shop.call("while_executing, drop", name, "wait")
    shop.wait_starts(name)
    second = shop.call("while_executing, drop", name)
    with pytest.raises(TaskRevokedError, match=f"task {first.id} runs with its key"):
        second.get(timeout=10)
    shop.journal.open(name)
    assert first.get(timeout=10) == name
    assert shop.starts(name) == 1


def test_one_is_queued_and_one_runs(shop: Scene, name: str) -> None:
    """A third call is a duplicate of the second, which waits until the first has ended."""
    task = "until_and_while_executing"
    first = shop.call(task, name, "wait")
    shop.wait_starts(name)
    second = shop.call(task, name)
    third = shop.call(task, name)
    assert not second.duplicate
    assert (third.id, third.duplicate) == (second.id, True)
    shop.journal.open(name)
    assert (first.get(timeout=10), second.get(timeout=10)) == (name, name)
    assert (shop.starts(name), most_at_once(shop, name)) == (2, 1)
    shop.wait_free(name, task=task)


def test_the_key_is_free_when_its_task_starts(shop: Scene, name: str) -> None:
    """The next call runs beside it."""
    first = shop.call("until_executing", name, "wait", queue=name, countdown=0.5)
    assert shop.call("until_executing", name).id == first.id
    shop.release(name)
    shop.wait_starts(name)
    second = shop.call("until_executing", name, "wait")
    assert not second.duplicate
    shop.wait_starts(name, 2)
    shop.journal.open(name)
    assert (first.get(timeout=10), second.get(timeout=10)) == (name, name)
    assert most_at_once(shop, name) == 2


def test_a_window(shop: Scene, name: str) -> None:
    """A call is a duplicate of a task that has ended, until the window is over."""
    first = shop.call("until_expired", name)
    assert first.get(timeout=5) == name
    again = shop.call("until_expired", name)
    assert (again.id, again.duplicate) == (first.id, True)
    shop.wait_free(name, task="until_expired", timeout=8)
    assert shop.call("until_expired", name).get(timeout=5) == name
    assert shop.starts(name) == 2


def test_the_last_call_of_several_runs(shop: Scene, name: str) -> None:
    """The last arguments win; with a countdown that is debounce."""
    later = {"queue": name, "countdown": 0.5}
    results = [shop.call("replace", name, "succeed", text, **later) for text in ("a", "b", "c")]
    shop.release(name)
    assert results[-1].get(timeout=10) == "c"
    for result, successor in pairwise(results):
        with pytest.raises(TaskRevokedError, match=f"task {successor.id} has taken its place"):
            result.get(timeout=10)
    assert shop.starts(name) == 1
    shop.wait_free(name, task="replace")


def test_a_replaced_chain_ends(shop: Scene, name: str) -> None:
    """Who waits for its last task is told."""
    task = shop.app.tasks["replace"]
    result = chain(
        task.si(name).set(queue=name, countdown=0.5), shop.app.tasks["bare"].si(name)
    ).apply_async()
    second = shop.call("replace", name)
    shop.release(name)
    assert second.get(timeout=10) == name
    with pytest.raises(TaskRevokedError):
        result.get(timeout=10)


def test_one_that_runs_is_not_stopped_by_its_replacement(shop: Scene, name: str) -> None:
    """The new one starts when the old one has ended."""
    first = shop.call("replace", name, "wait")
    shop.wait_starts(name)
    second = shop.call("replace", name, "succeed", "new")
    assert second.replaced_id == first.id
    shop.journal.open(name)
    assert (first.get(timeout=10), second.get(timeout=10)) == (name, "new")
    assert most_at_once(shop, name) == 1
    shop.wait_free(name, task="replace")


def test_a_task_that_calls_itself(shop: Scene, name: str) -> None:
    """Its successor runs when it has ended, not beside it."""
    first = shop.call("act", name, "call_itself")
    assert first.get(timeout=10) == name
    shop.wait_starts(name, 2)
    shop.wait_free(name)
    assert (shop.starts(name), most_at_once(shop, name)) == (2, 1)


@pytest.mark.parametrize("task", ["while_executing", "replace"])
def test_a_terminated_task_is_dead_before_the_next_one_starts(
    redis_server: EmbeddedServer, scenes: StartScene, name: str, task: str
) -> None:
    """Celery acknowledges its message at once, and its child may take its time."""
    scene = scenes(redis_server.url, other_database(redis_server), limit=60)
    scene.worker(concurrency=2)
    first = scene.call(task, name, "clean_up")
    scene.wait_starts(name)
    second = scene.call(task, name, "clean_up", "second")
    scene.app.control.revoke(first.id, terminate=True, signal="SIGUSR1")
    assert second.get(timeout=20) == "second"
    assert (scene.starts(name), most_at_once(scene, name)) == (2, 1)
    scene.wait_free(name, task=task)


def test_many_that_wait_leave_room_for_others(
    redis_server: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """The broker keeps those that are too many for the worker."""
    scene = scenes(redis_server.url, other_database(redis_server), limit=60)
    worker = scene.worker(pool="threads", concurrency=3)
    results = [scene.call("while_executing", name, "wait") for _ in range(120)]
    worker.wait_log("waits in the broker for", timeout=60)
    # The gate is shut: without room they would never end.
    others = [scene.call("act", f"{name}, other {n}") for n in range(6)]
    for other in others:
        other.get(timeout=25)
    assert scene.starts(name) == 1
    scene.journal.open(name)
    # On 5.6 get() can take a second for each that has ended, when there is nothing to listen to.
    wait_until(lambda: all(result.successful() for result in results), 90, lambda: scene.logs)
    assert [result.result for result in results] == [name] * 120
    assert (scene.starts(name), most_at_once(scene, name)) == (120, 1)
    assert "put back" not in worker.log, "nobody is at fault"


@pytest.mark.parametrize("task", ["while_executing", "until_and_while_executing", "replace"])
def test_a_killed_worker_leaves_its_turn_to_others(
    redis_server: EmbeddedServer, scenes: StartScene, name: str, task: str
) -> None:
    """In seconds, not after its hard limit; and its own task runs again."""
    scene = scenes(redis_server.url, other_database(redis_server), limit=60)
    doomed, _ = scene.crew(2, concurrency=1)
    first = scene.call(task, name, "wait")
    scene.wait_starts(name)
    (start,) = scene.journal.events("start", name=name)
    holder = next(w for w in scene.workers if start.pid in w.child_pids())
    second = scene.call(task, name, "wait", "second")
    holder.kill_group()
    scene.journal.open(name)
    assert second.get(timeout=20) == "second"
    if task == "replace":
        with pytest.raises(TaskRevokedError, match=f"task {second.id} has taken its place"):
            first.get(timeout=20)
        assert scene.starts(name) == 2
    else:
        assert first.get(timeout=20) == name
        assert scene.starts(name) == 3
    # One that was killed did not write down its end.
    assert most_at_once(scene, name) <= 2
    assert doomed in scene.workers
    wait_until(lambda: not scene.claim(name, task=task), 10, lambda: scene.logs)
