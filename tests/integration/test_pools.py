"""The pools: in all but prefork the task and what the main process does share one process."""

from __future__ import annotations

from uuid import uuid4

import pytest

from reliable_tasks import TaskExited
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene
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
    broker, results = (f"redis://127.0.0.1:{module_redis.port}/{n}" for n in (number, number + 1))
    scene = module_scenes(broker, results)
    scene.worker(pool=pool, concurrency=len(slots))
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


def test_a_policy_retries(shop: Scene, name: str) -> None:
    """Attempts follow each other with one claim."""
    assert shop.call("flaky", name, 2).get(timeout=15) == 2
    shop.wait_free(name, 2, task="flaky")
    attempts = [event.data["attempt"] for event in shop.journal.events("start", name=name)]
    assert attempts == [0, 1, 2]


def test_a_copy_of_a_running_task_is_set_aside(shop: Scene, name: str) -> None:
    """A message whose other copy runs waits in the worker without a slot, then runs."""
    result = shop.call("act", name, countdown=0.5)
    shop.run_elsewhere(name, result.id, lease=2.0)
    shop.workers[0].wait_log(f"{result.id}.* set aside")
    assert shop.starts(name) == 0
    assert shop.call("act", f"{name}, meanwhile").get(timeout=10) == f"{name}, meanwhile"
    assert result.get(timeout=10) == name
    shop.wait_free(name)
    assert shop.starts(name) == 1


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
    shop: Scene, slots: range, name: str, what: str, error: type[Exception], says: str
) -> None:
    """The task fails once and for good, and every slot of the same worker takes the next task."""
    (worker,) = shop.workers
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
    redis = shop.claims.client.redis
    wait_until(lambda: not redis.exists("unacked"), 10, lambda: f"no message left\n{shop.logs}")
