"""Tasks that crash each time: they stop after their budget, and become dead letters."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded
from celery import VERSION

from reliable_tasks import PoisonPill, RequeuesExhausted, dead_letters
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import poison
from tests.integration.conftest import StartScene, on_all_brokers, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

CHILD = sorted(how for how in poison.CRASHES if not how.startswith("kill_worker"))


@pytest.fixture
def transport_options() -> dict[str, Any]:
    """A killed worker's message comes back when its visibility timeout is over."""
    return {"visibility_timeout": 4}


@contextmanager
def supervised(scene: Scene, **options: object) -> Iterator[None]:
    """Start another worker as soon as one is dead, as a supervisor does."""
    done = threading.Event()
    # Here, for what a thread starts can end with it: the server that forks workers does.
    first = scene.worker(waits=False, **options)

    def watch() -> None:
        current = first
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


def wait_succeeded(scene: Scene, results: list[Any]) -> None:
    """Wait until all of some tasks have succeeded."""
    # Celery 5.6 takes a second for each that is ready when it is asked for.
    wait_until(
        lambda: all(one.state == "SUCCESS" for one in results),
        90,
        lambda: f"all succeeded: {Counter(one.state for one in results)}\n{scene.logs}",
        interval=0.2,
    )


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


@on_all_brokers
@pytest.mark.parametrize("how", CHILD)
def test_a_task_that_kills_its_child_stops_after_its_budget(scene: Scene, how: str) -> None:
    """Three starts, then a failure that says what is known of them, and its handlers run."""
    scene.worker(concurrency=2)
    result = scene.call("crash", "poison", how)
    check_end(scene, result, "poison")
    assert all(letter.error for letter in dead_letters.list(app=scene.app))


@on_all_brokers
def test_a_task_that_kills_its_worker_stops_after_its_budget(scene: Scene) -> None:
    """The same, whichever worker a supervisor starts next."""
    with supervised(scene, concurrency=2):
        result = scene.call("crash", "poison", "kill_worker")
        check_end(scene, result, "poison")
    assert len(scene.workers) == 4
    assert any("has crashed (1 of 3 times)" in worker.log for worker in scene.workers)


def test_a_task_whose_ending_crashes_too_is_ended_by_its_worker(scene: Scene) -> None:
    """Its handler kills the child: it ran once, and nothing of the task runs again."""
    scene.worker(concurrency=2)
    result = scene.call("crash", "poison", "sigkill", "crash in on_failure")
    with pytest.raises(PoisonPill) as caught:
        result.get(timeout=60)
    assert caught.value.limit == 3
    wait_until(lambda: dead_letters.count(app=scene.app) == 1, 10, lambda: scene.logs)
    assert scene.starts("poison") == 3
    assert len(scene.journal.events("on_failure")) == 1
    (letter,) = dead_letters.list(app=scene.app)
    assert letter.cause == "poison"


HANDLERS = ("before_start", "on_failure")
THINGS = [f"{what} in {where}" for where in HANDLERS for what in ("raise", "ignore", "reject")]


@pytest.mark.parametrize("then", [*THINGS, *(f"retry in {where}" for where in HANDLERS)])
def test_handlers_that_fail_do_not_keep_a_poison_from_its_end(scene: Scene, then: str) -> None:
    """It ends as any other one; nothing of it goes back, or is sent again."""
    # Before its second start it would come back without a crash.
    starts = 1 if then.endswith("before_start") else 3
    scene.worker(concurrency=2, settings={"reliable_max_crashes": starts})
    result = scene.call("crash", "poison", "sigkill", then)
    check_end(scene, result, "poison", starts=starts)
    assert then in scene.logs or "ignore" in then or "retry" in then


@pytest.mark.parametrize("what", ["raise", "ignore", "reject", "retry", "return"])
def test_who_makes_something_else_of_errors_does_not_keep_a_poison_from_its_end(
    scene: Scene, what: str
) -> None:
    """A ``__call__`` is not asked: it could make a success of it, or put it back without end."""
    scene.worker(concurrency=2)
    result = scene.call("crash_called", "poison", "sigkill", f"{what} in __call__")
    check_end(scene, result, "poison")


@pytest.mark.parametrize("where", HANDLERS)
def test_handlers_that_hang_do_not_keep_a_poison_from_its_end(scene: Scene, where: str) -> None:
    """They are killed at the hard limit, and not called again."""
    scene.worker(concurrency=2, settings={"reliable_max_crashes": 1})
    result = scene.call("slow_end", "poison", "sigkill", f"hang in {where}")
    with pytest.raises(PoisonPill):
        result.get(timeout=60)
    wait_until(lambda: dead_letters.count(app=scene.app) == 1, 10, lambda: scene.logs)
    (letter,) = dead_letters.list(app=scene.app)
    assert (letter.cause, letter.crashes) == ("poison", 1)
    assert scene.starts("poison") == 1
    assert len(scene.journal.events("on_failure")) == int(where == "on_failure")


def test_a_failure_whose_handler_puts_it_back_is_no_crash(scene: Scene) -> None:
    """It spends the budget of what goes back, and then ends as such."""
    scene.worker(concurrency=2, settings={"reliable_max_requeues": 1})
    result = scene.call("fail", "failing", "", "reject in on_failure")
    wait_until(lambda: dead_letters.count(app=scene.app) == 1, 30, lambda: scene.logs)
    (letter,) = dead_letters.list(app=scene.app)
    assert (letter.cause, letter.crashes) == ("requeues", 0), scene.logs
    assert scene.starts("failing") == 2
    assert isinstance(result.result, RequeuesExhausted)


def test_a_failure_whose_handler_ignores_it_is_kept(scene: Scene) -> None:
    """Its result says that it has failed."""
    scene.worker(concurrency=2)
    result = scene.call("fail", "failing", "", "ignore in on_failure")
    wait_until(lambda: dead_letters.count(app=scene.app) == 1, 30, lambda: scene.logs)
    (letter,) = dead_letters.list(app=scene.app)
    assert (letter.cause, result.state) == ("failed", "FAILURE")


def test_a_lost_task_is_not_retried_beside_its_budget(scene: Scene) -> None:
    """Its message goes back and is counted; it is a dead letter when it has ended, no sooner.

    Celery 5.6 knows no such setting, and does the same.
    """
    scene.worker(concurrency=2, settings={"task_retry_on_worker_lost": True})
    assert scene.call("waver", "once", "sigkill").get(timeout=30) == "once"
    assert dead_letters.count(app=scene.app) == 0
    check_end(scene, scene.call("crash", "poison", "sigkill"), "poison")


@pytest.mark.parametrize(("how", "starts"), [(1, 1), (5, 5)])
def test_the_budget_is_the_apps_or_the_tasks(
    scenes: StartScene, redis_server: EmbeddedServer, how: int, starts: int
) -> None:
    """So many starts as it says, across the retries of the task."""
    settings = {"reliable_max_crashes": how}
    backend = other_database(redis_server)
    scene = scenes(redis_server.url, backend, module=poison, settings=settings)
    scene.worker(concurrency=2)
    check_end(scene, scene.call("crash", "poison", "exit"), "poison", starts=starts)


def test_bystanders_of_a_task_that_kills_its_children_succeed(scene: Scene) -> None:
    """One poison among 200 others on four children: it alone ends as a dead letter."""
    scene.worker(concurrency=4)
    others = [scene.call("innocent", f"innocent {n}", 0.02) for n in range(100)]
    result = scene.call("crash", "poison", "sigkill")
    others += [scene.call("innocent", f"innocent {n}", 0.02) for n in range(100, 200)]
    check_end(scene, result, "poison")
    wait_succeeded(scene, others)
    assert dead_letters.count(app=scene.app) == 1


@on_all_brokers
def test_bystanders_of_a_task_that_kills_its_worker_succeed(
    scene: Scene, request: pytest.FixtureRequest
) -> None:
    """Three workers die with what they run, and no innocent task is condemned for it."""
    is_stock = request.node.callspec.params["scene"] == "stock kombu"
    others = [scene.call("innocent", f"innocent {n}", 0.05) for n in range(185)]
    result = scene.call("crash", "poison", "kill_worker_at_rest" if is_stock else "kill_worker")
    others += [scene.call("innocent", f"innocent {n}", 0.05) for n in range(185, 190)]
    # These run and wait in the worker when it takes no more, and are lost with it.
    others += [scene.call("innocent", f"innocent {n}", 1) for n in range(190, 200)]
    with supervised(scene, concurrency=4):
        check_end(scene, result, "poison")
        wait_succeeded(scene, others)
    assert dead_letters.count(app=scene.app) == 1


def test_tasks_that_were_lost_together_are_not_lost_together_again(scene: Scene) -> None:
    """What ran beside a culprit is started beside it once, and no more than that."""
    with supervised(scene, concurrency=4):
        innocent = [scene.call("innocent", f"long {n}", 3) for n in range(3)]
        for n in range(3):
            scene.wait_starts(f"long {n}")
        result = scene.call("crash", "poison", "kill_worker")
        check_end(scene, result, "poison")
        for one in innocent:
            assert one.get(timeout=90)
    counts = [scene.starts(f"long {n}") for n in range(3)]
    assert max(counts) <= 3, counts
    assert any("was lost with its worker" in worker.log for worker in scene.workers)


@pytest.mark.parametrize("serializer", ["literals", "sealed"])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "with a Redis"])
def test_what_goes_back_on_rabbitmq_is_the_same_call(
    scenes: StartScene,
    rabbitmq_url: str,
    redis_server: EmbeddedServer,
    is_alone: bool,
    serializer: str,
) -> None:
    """It runs with the arguments that it was called with, and its requeues are no crashes.

    Also where a worker cannot send it again, and it waits there.
    """
    scene = scenes(
        rabbitmq_url,
        "rpc://" if is_alone else other_database(redis_server),
        module=poison,
        settings={"accept_content": ["json", serializer]},
    )
    scene.worker(concurrency=1)
    # JSON changes the first one, and refuses the other one.
    things: list[object] = [{1: (2,)}, {1, 2}]
    for thing in things:
        scene.call("hand_back", repr(thing), thing, serializer=serializer, argsrepr="(hidden)")
    wait_until(
        lambda: dead_letters.count(app=scene.app) == len(things), 30, lambda: f"all\n{scene.logs}"
    )
    for thing in things:
        starts = scene.journal.events("start", name=repr(thing))
        assert [start.data["thing"] for start in starts] == [repr(thing)] * 2, scene.logs
    letters = dead_letters.list(app=scene.app)
    told = [(letter.cause, letter.crashes, letter.argsrepr) for letter in letters]
    assert told == [("requeues", 0, "(hidden)")] * len(things)


def test_a_task_that_outlives_its_limit_without_end_is_stopped(scene: Scene) -> None:
    """With acks_on_timeout=False Celery starts it again for ever, at once."""
    # Before 5.7 there is no such option, and no such loop.
    has_option = VERSION >= (5, 7)
    scene.worker(concurrency=2)
    result = scene.call("overtime", "long")

    def ended() -> bool:
        return dead_letters.count(app=scene.app) == 1

    wait_until(ended, 30, lambda: scene.logs)
    assert scene.starts("long") == (3 if has_option else 1)
    (letter,) = dead_letters.list(app=scene.app)
    assert letter.cause == ("requeues" if has_option else "time_limit")
    with pytest.raises(RequeuesExhausted if has_option else TimeLimitExceeded):
        result.get(timeout=10)


@on_all_brokers
def test_a_task_that_went_back_ends_as_its_last_run_does(scene: Scene) -> None:
    """Nothing of a run before is taken for its end, and what goes back by itself is no crash."""
    scene.worker(concurrency=4)
    # Before Celery 5.7 there is no acks_on_timeout.
    back = "overtime" if VERSION >= (5, 7) else "requeue"
    done = [
        scene.call("waver", "crashed", "sigkill", "requeue", "requeue", "requeue"),
        scene.call("waver", "back", back, "requeue", back),
    ]
    broken = [scene.call("waver", way, way, "fail") for way in {back, "requeue"}]
    wait_succeeded(scene, done)
    wait_until(
        lambda: dead_letters.count(app=scene.app) == len(broken), 30, lambda: f"all\n{scene.logs}"
    )
    assert {(one.task_id, one.cause) for one in dead_letters.list(app=scene.app)} == {
        (one.id, "failed") for one in broken
    }
    assert [scene.starts(name) for name in ("crashed", "back")] == [5, 4]


@on_all_brokers
def test_in_threads_a_task_whose_ending_crashes_too_is_ended(scene: Scene) -> None:
    """Each crash is its worker's there; the fifth one ends the task without its handlers."""
    with supervised(scene, concurrency=2, pool="threads"):
        result = scene.call("crash", "poison", "sigkill", "crash in on_failure")
        with pytest.raises(PoisonPill):
            result.get(timeout=90)
        wait_until(lambda: dead_letters.count(app=scene.app) == 1, 20, lambda: scene.logs)
    assert scene.starts("poison") == 3
    assert len(scene.journal.events("on_failure")) == 1
    assert len(scene.workers) == 5
