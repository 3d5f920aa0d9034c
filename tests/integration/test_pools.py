"""The pools: in all but prefork the task and what the main process does share one process."""

from __future__ import annotations

from uuid import uuid4

import pytest
import redis
from celery.exceptions import TaskRevokedError

from reliable_tasks import TaskExited
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

POOLS = ["prefork", "threads", "solo", "gevent", "eventlet"]


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    """Each kind of pool in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def slots(pool: str) -> range:
    """As many numbers as the worker runs tasks at once."""
    return range(1 if pool == "solo" else 4)


@pytest.fixture(scope="module")
def shop(pool: str, slots: range, module_redis: EmbeddedServer, module_scenes: StartScene) -> Scene:
    """One worker of each kind, each on databases of its own."""
    number = 2 * POOLS.index(pool)
    scene = module_scenes(*(other_database(module_redis, n) for n in (number, number + 1)))
    scene.worker(pool=pool, concurrency=len(slots))
    return scene


@pytest.fixture
def pair(
    pool: str,
    slots: range,
    module_redis: EmbeddedServer,
    redis_server: EmbeddedServer,
    scenes: StartScene,
) -> Scene:
    """Two workers of a kind whose broker anything may happen to, but not to their results."""
    results = other_database(module_redis, 2 * POOLS.index(pool) + 1)
    scene = scenes(redis_server.url, results, limit=60)
    scene.crew(2, pool=pool, concurrency=len(slots))
    return scene


@pytest.fixture
def name() -> str:
    """A `@once` key of the test's own."""
    return uuid4().hex[:8]


def test_a_task_runs_with_its_claim_and_frees_it(shop: Scene, name: str) -> None:
    """The key is held while the task runs, joined by duplicates, and free afterwards."""
    result = shop.call("act", name, "wait")
    shop.wait_starts(name)
    claim = shop.claim(name)
    assert (claim["owner"], claim["holder_attempt"]) == (result.id, "0")
    again = shop.call("act", name)
    assert again.duplicate
    shop.journal.open(name)
    assert again.get(timeout=10) == name
    shop.wait_free(name)
    assert shop.starts(name) == 1


def test_a_failure_frees_the_key(shop: Scene, name: str) -> None:
    """An error ends the claim as a result does."""
    result = shop.call("act", name, "fail")
    with pytest.raises(ValueError, match=name):
        result.get(timeout=10)
    shop.wait_free(name)


@pytest.mark.parametrize("task", ["act", "while_executing, early ack"])
def test_a_task_that_is_terminated_frees_its_key(
    shop: Scene, pool: str, name: str, task: str
) -> None:
    """Also where its message was acknowledged long before."""
    # A claim of a task with a short limit would lapse soon.
    result = shop.call(task, name, "wait", time_limit=60)
    shop.wait_starts(name)
    result.revoke(terminate=True)
    if pool in ("threads", "solo"):
        # Nothing stops it; what Celery says of its state depends on the version.
        shop.journal.open(name)
    else:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=10)
    shop.wait_free(name, task=task)
    turn = f"{shop.claim_name(name, task=task)}:turn"
    wait_until(lambda: not shop.claims.read(turn), 10, lambda: shop.logs)
    assert shop.starts(name) == 1


@pytest.mark.parametrize("kind", ["prefork", "threads", "gevent", "eventlet"])
def test_a_task_that_is_terminated_while_it_waits_for_a_slot(
    redis_server: EmbeddedServer, scenes: StartScene, name: str, kind: str
) -> None:
    """It gets the slot, and ends as revoked; its worker goes on."""
    urls = (redis_server.url, other_database(redis_server))
    scene = scenes(*urls, limit=60, settings={"worker_prefetch_multiplier": 4})
    worker = scene.worker(pool=kind, concurrency=1)
    first = scene.call("act", f"{name}, first", "wait")
    scene.wait_starts(f"{name}, first")
    second = scene.call("act", name)
    worker.wait_log(rf"{second.id}\] received")
    second.revoke(terminate=True)
    wait_until(lambda: second.id in scene.revoked(), 20)
    scene.journal.open(f"{name}, first")
    assert first.get(timeout=20) == f"{name}, first"
    with pytest.raises(TaskRevokedError):
        second.get(timeout=20)
    scene.wait_free(name)
    assert scene.call("act", name).get(timeout=20) == name
    assert scene.starts(name) == 1
    with redis.Redis.from_url(redis_server.url) as broker:
        wait_until(lambda: not broker.exists("unacked", "celery"), 20, lambda: scene.logs)


def test_a_policy_retries(shop: Scene, name: str) -> None:
    """Attempts follow each other with one claim."""
    assert shop.call("flaky", name, 2).get(timeout=15) == 2
    shop.wait_free(name, 2, task="flaky")
    attempts = [event.data["attempt"] for event in shop.journal.events("start", name=name)]
    assert attempts == [0, 1, 2]


def test_a_copy_of_a_running_task_is_set_aside(shop: Scene, name: str) -> None:
    """A message whose other copy runs waits in the worker without a slot, then runs."""
    result = shop.call("act", name, queue=name)
    shop.run_elsewhere(name, result.id)
    shop.release(name)
    shop.workers[0].wait_log(f"{result.id}.* set aside")
    assert shop.call("act", f"{name}, meanwhile").get(timeout=10) == f"{name}, meanwhile"
    assert shop.starts(name) == 0
    shop.let_go_elsewhere(name, result.id)
    assert result.get(timeout=10) == name
    shop.wait_free(name)
    (started,) = shop.journal.events("start", name=name)
    # It was handed out more than once, and asked to wait.
    assert started.data["crashes"] == 0


def _one_after_the_other(scene: Scene, task_id: str) -> None:
    wait_until(
        lambda: len(scene.journal.events("end", id=task_id)) == 2,
        20,
        lambda: f"the end of both\n{scene.logs}",
    )
    assert [event.name for event in scene.journal.events(id=task_id)] == ["start", "end"] * 2
    _wait_acknowledged(scene)


def test_two_calls_of_one_id_run_one_after_the_other(shop: Scene, name: str) -> None:
    """While there is a slot for both, the second waits until the first has ended."""
    for number in (1, 2):
        shop.call("sleep", f"{name} {number}", 1.0, task_id=name)
    _one_after_the_other(shop, name)


def test_two_calls_of_one_id_run_one_after_the_other_in_two_workers(
    pair: Scene, pool: str, name: str
) -> None:
    """The same where each worker has one of them."""
    pair.call("sleep", f"{name} 1", 4.0, task_id=name)
    pair.wait_starts(f"{name} 1")
    received = f"sleep[{name}] received"
    (first,) = (worker for worker in pair.workers if received in worker.log)
    # Where the loop is the task's, it neither takes another one nor answers before it has ended.
    if pool != "solo":
        pair.control("cancel_consumer", "celery", first)
    pair.call("sleep", f"{name} 2", 1.0, task_id=name)
    wait_until(lambda: all(received in worker.log for worker in pair.workers), 10)
    if pool != "solo":
        pair.control("add_consumer", "celery", first)
    _one_after_the_other(pair, name)


def test_a_task_outlives_its_workers_connections(
    pair: Scene, pool: str, redis_client: redis.Redis, name: str
) -> None:
    """All are killed three times while it runs: it is started once, ends, and is acknowledged."""
    result = pair.call("bare", name, "wait")
    pair.wait_starts(name)
    for times in range(1, 4):
        keepers = set(redis_client.hvals("reliable:keepers"))
        redis_client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        wait_until(
            lambda before=keepers: not before.intersection(redis_client.hvals("reliable:keepers")),  # type: ignore[misc]
            15,
            lambda: f"the keepers' new connections\n{pair.logs}",
        )
        # Where the loop is the task's, it cannot connect again before the task has ended.
        others = [
            w for w in pair.workers if pool != "solo" or f"{result.id}] received" not in w.log
        ]
        wait_until(
            lambda times=times, others=others: all(  # type: ignore[misc]
                worker.log.count("Connected to redis") > times for worker in others
            ),
            15,
            lambda: f"new connections\n{pair.logs}",
        )
        # One that is killed before anything waits on it is made anew without a word in the log.
        pair.wait_listening(others)
    pair.journal.open(name)
    assert result.get(timeout=20) == name
    _wait_acknowledged(pair)
    assert pair.starts(name) == 1
    assert all(worker.running for worker in pair.workers)


def test_a_copy_that_goes_back_by_itself_has_not_crashed(shop: Scene, name: str) -> None:
    """A task that rejects its message with requeue ended by a word of its own."""
    assert shop.call("act", name, "requeue").get(timeout=15) == name
    crashes = [event.data["crashes"] for event in shop.journal.events("start", name=name)]
    assert crashes == [0, 0]


def test_the_death_of_a_worker_is_a_crash_of_what_it_ran(pair: Scene, name: str) -> None:
    """The next copy is told: `self.request.crashes` is 1."""
    result = pair.call("show", name, 2.0)
    pair.wait_starts(name)
    (started,) = pair.journal.events("start", name=name)
    (worker,) = (w for w in pair.workers if w.hostname == started.data["worker"])
    worker.kill_group()
    pair.wait_starts(name, 2, timeout=20)
    crashes = [event.data["crashes"] for event in pair.journal.events("start", name=name)]
    assert crashes == [0, 1]
    assert result.get(timeout=15) == name


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        pytest.param("leave", TaskExited, r"SystemExit\(3\)", id="SystemExit"),
        pytest.param("interrupt", TaskExited, r"KeyboardInterrupt\(\)", id="KeyboardInterrupt"),
        pytest.param("cancel", TaskExited, r"CancelledError\(\)", id="CancelledError"),
        pytest.param("run_out_of_memory", MemoryError, r"^\w+ \d$", id="MemoryError"),
    ],
)
def test_what_would_end_a_worker_is_the_failure_of_one_task(
    shop: Scene,
    pool: str,
    slots: range,
    name: str,
    what: str,
    error: type[Exception],
    says: str,
) -> None:
    """The task fails once and for good, and every slot of the same worker takes the next task."""
    (worker,) = shop.workers
    if pool == "prefork":
        # One that an earlier test has killed is replaced within a second of its death.
        wait_until(lambda: len(worker.child_pids()) == len(slots))
    children = worker.child_pids()
    failed = {n: shop.call("act", f"{name} {n}", what) for n in slots}
    for n, result in failed.items():
        with pytest.raises(error, match=says):
            result.get(timeout=20)
        shop.wait_free(f"{name} {n}")
        assert shop.starts(f"{name} {n}") == 1, shop.logs
    later = {n: shop.call("act", f"{name} later {n}", "wait") for n in slots}
    for n in slots:
        shop.wait_starts(f"{name} later {n}")
    for n, result in later.items():
        shop.journal.open(f"{name} later {n}")
        assert result.get(timeout=10)
    assert worker.running
    assert worker.child_pids() == children
    _wait_acknowledged(shop)


def _wait_acknowledged(scene: Scene) -> None:
    server = scene.claims.client.redis
    wait_until(
        lambda: not server.exists("unacked", "celery", "reliable:leases"),
        15,
        lambda: f"no message left\n{scene.logs}",
    )
