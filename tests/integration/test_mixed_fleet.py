"""Stock and reliable workers and producers on the same queues of one Redis: a rolling upgrade."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene, reading
from tests.support import WorkerProcess, wait_until

#: Seconds that a long task runs; the promise is to be shown with 60.
SECONDS = float(os.environ.get("RT_MIXED_SECONDS", "8"))
#: A lease that a long task outlives.
LEASE = 4.0
#: Stock workers that take back what is as old as this (s), looking each second.
SHORT = 3

pytestmark = pytest.mark.timeout(240 + 6 * SECONDS)


def _stock(visibility_timeout: float) -> dict[str, Any]:
    return {
        "worker_prefetch_multiplier": 1,
        "broker_transport_options": {
            "visibility_timeout": visibility_timeout,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        },
    }


class Fleet:
    """Workers of both kinds on one broker, and producers of both kinds."""

    def __init__(self, scene: Scene, server: EmbeddedServer, directory: Path) -> None:
        self.scene = scene
        self.redis = redis.Redis.from_url(server.url, decode_responses=True)
        self.stock_app = Celery(
            "stock producer",
            broker=server.url,
            backend=other_database(server),
            set_as_current=False,
        )
        self._server, self._directory = server, directory
        self._plain: list[WorkerProcess] = []

    def ours(self, *, queue: str = "celery") -> WorkerProcess:
        """Start a worker with our transport."""
        return self.scene.worker(args=reading(queue))

    def stock(
        self, visibility_timeout: float = SHORT, *, plain: bool = False, queue: str = "celery"
    ) -> WorkerProcess:
        """Start a worker without: of the same app, or of one without this library."""
        settings = _stock(visibility_timeout)
        if not plain:
            return self.scene.worker(
                settings={"reliable_broker": "stock", **settings}, args=reading(queue)
            )
        worker = WorkerProcess(
            "tests.integration.apps.plain",
            broker_url=self._server.url,
            result_url=other_database(self._server),
            args=reading(queue),
            warm=True,
            env={"RT_JOURNAL": str(self._directory), "RT_SETTINGS": json.dumps(settings)},
        )
        self._plain.append(worker)
        self.scene.workers.append(worker)
        worker.start()
        return worker

    def send(self, name: str, seconds: float = 0, *, stock: bool = False, **options: Any) -> str:
        """Queue a task by a producer of either kind; return its id."""
        if not stock:
            return str(self.scene.call("show", name, seconds, **options).id)
        sent = self.stock_app.send_task("show", (name, seconds), **options)
        return str(sent.id)

    def done(self, name: str, timeout: float = 30) -> None:
        """Wait until a task has ended, and its message is acknowledged."""
        wait_until(
            lambda: self.scene.journal.events("end", name=name),
            timeout,
            lambda: f"end of {name}: {self.scene.journal.events(name=name)}\n{self.scene.logs}",
        )

    def runs(self, name: str) -> list[str]:
        """Return which workers started a task."""
        return [str(e.data["worker"]) for e in self.scene.journal.events("start", name=name)]

    def empty(self, timeout: float = 20) -> None:
        """Wait until the broker holds no message, neither waiting nor delivered."""
        wait_until(
            lambda: not any(map(self.redis.exists, ("celery", "unacked", "reliable:leases"))),
            timeout,
            lambda: f"{self.redis.hgetall('unacked')} {self.redis.lrange('celery', 0, -1)}",
        )

    def close(self) -> None:
        """Close the clients."""
        self.stock_app.close()
        self.redis.close()


@pytest.fixture
def fleet(
    scenes: StartScene, redis_server: EmbeddedServer, tmp_path: Path
) -> Iterator[Callable[..., Fleet]]:
    """Make a fleet; settings are those of our side."""
    made: list[Fleet] = []

    def make(**settings: Any) -> Fleet:
        scene = scenes(
            redis_server.url,
            other_database(redis_server),
            settings={"reliable_lease": LEASE, **settings},
            limit=round(10 * SECONDS) + 60,
        )
        made.append(Fleet(scene, redis_server, scene.journal.directory))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def name() -> str:
    """A name of a task that no other test has."""
    return uuid4().hex[:8]


@pytest.mark.parametrize("plain", [False, True], ids=["our app", "plain app"])
@pytest.mark.parametrize("by_stock", [False, True], ids=["our producer", "stock producer"])
def test_ours_is_not_taken_while_renewed(
    fleet: Callable[..., Fleet], name: str, plain: bool, by_stock: bool
) -> None:
    """A stock worker that sweeps each second, by a short timeout, leaves our long task alone."""
    here = fleet()
    ours = here.ours()
    here.send(name, SECONDS, stock=by_stock)
    here.scene.wait_starts(name)
    stock = here.stock(plain=plain)
    here.done(name, SECONDS + 20)
    assert here.runs(name) == [ours.hostname]
    here.empty()
    here.send(f"{name} later", stock=by_stock)
    here.done(f"{name} later")
    assert stock.running


def test_tasks_on_both_sides_with_kills_on_both_sides(
    fleet: Callable[..., Fleet], name: str
) -> None:
    """Each side's dead worker is replaced by its own rule, and nothing runs twice at once."""
    here = fleet()
    # As stock needs it: longer than its longest task.
    timeout = SECONDS + 4
    ours, survivor = here.ours(), here.ours(queue="elsewhere")
    stock = here.stock(timeout, queue="elsewhere")
    other = here.stock(timeout, plain=True, queue="elsewhere")
    # All are up before the first task is, so that no start takes a part of its time.
    here.send(f"{name} ours", SECONDS)
    here.scene.wait_starts(f"{name} ours")
    here.scene.control("add_consumer", "celery", stock)
    here.send(f"{name} stock", SECONDS, stock=True)
    taken_at = here.scene.wait_starts(f"{name} stock")
    assert here.runs(f"{name} stock") == [stock.hostname]
    for worker in (survivor, other):
        here.scene.control("add_consumer", "celery", worker)
    ours.kill_group()
    stock.kill_group()
    killed_at = time.time()
    again_at = here.scene.wait_starts(f"{name} ours", 2, timeout=30)
    assert again_at - killed_at < LEASE + 4
    # Our workers have no say in when stock's messages come back, though nobody holds them.
    here.scene.wait_starts(f"{name} stock", 2, timeout=2 * timeout + 40)
    assert here.scene.journal.events("start", name=f"{name} stock")[1].at >= taken_at + timeout - 1
    for one in ("ours", "stock"):
        here.done(f"{name} {one}", SECONDS + 20)
        assert len(here.runs(f"{name} {one}")) == 2
    here.empty()
    assert survivor.running
    assert other.running


def test_a_dead_worker_of_ours_where_only_stock_is_left(
    fleet: Callable[..., Fleet], name: str
) -> None:
    """Stock's own sweep brings back what our last worker had, after lease and timeout."""
    here = fleet()
    ours = here.ours()
    here.send(name, 1)
    here.scene.wait_starts(name)
    ours.kill_group()
    ((tag, score),) = here.redis.zrange("unacked_index", 0, -1, withscores=True)
    # Every release of kombu sweeps when it connects, not every one each second.
    wait_until(lambda: time.time() > score + SHORT + 1, LEASE + SHORT + 5)
    stock = here.stock(plain=True)
    here.done(name)
    assert here.runs(name) == [ours.hostname, stock.hostname]
    wait_until(lambda: not here.redis.exists("unacked"))
    # Our next worker finds the lease without a message, and forgets it.
    here.ours()
    wait_until(lambda: here.redis.zscore("reliable:leases", tag) is None, 3 * LEASE)
    assert len(here.runs(name)) == 2


def test_entries_of_stock_workers_are_left_to_them(fleet: Callable[..., Fleet], name: str) -> None:
    """However old an entry of a stock worker is, none of ours takes it back."""
    here = fleet()
    here.send("a message", stock=True)
    message = here.redis.rpop("celery")
    entry = json.dumps([json.loads(str(message)), "", "celery"])
    here.redis.hset("unacked", "of-a-stock-worker", entry)
    here.redis.zadd("unacked_index", {"of-a-stock-worker": 1.0})
    dead, survivor = here.ours(), here.ours()
    here.send(name, 2)
    here.scene.wait_starts(name)
    first = dead if here.runs(name) == [dead.hostname] else survivor
    first.kill_group()
    # A sweep has been: it brought back what the dead worker of ours had.
    here.scene.wait_starts(name, 2, timeout=LEASE + 10)
    here.done(name)
    wait_until(lambda: here.redis.hkeys("unacked") == ["of-a-stock-worker"])
    assert here.redis.zrange("unacked_index", 0, -1, withscores=True) == [
        ("of-a-stock-worker", 1.0)
    ]
    assert not here.runs("a message")
    here.stock(plain=True)
    here.done("a message")


@pytest.mark.parametrize("by_stock", [False, True], ids=["our producer", "stock producer"])
@pytest.mark.parametrize("stock_first", [False, True], ids=["ours first", "stock first"])
def test_a_message_that_went_through_both_sides_is_the_same(
    fleet: Callable[..., Fleet], name: str, by_stock: bool, stock_first: bool
) -> None:
    """Headers, body, id and priority survive a death on one side and a run on the other."""
    here = fleet()
    first = here.stock(plain=True) if stock_first else here.ours()
    sent = here.send(name, 2, stock=by_stock, headers={"x-custom": "kept"}, priority=6)
    here.scene.wait_starts(name)
    first.kill_group()
    ((_, score),) = here.redis.zrange("unacked_index", 0, -1, withscores=True)
    second = here.ours() if stock_first else here.stock(plain=True)
    wait_until(lambda: time.time() > float(score) + SHORT + 1, LEASE + SHORT + 5)
    here.stock(plain=True, queue="elsewhere")
    here.done(name)
    assert here.runs(name) == [first.hostname, second.hostname]
    shown = [event.data for event in here.scene.journal.events("start", name=name)]
    assert {data["id"] for data in shown} == {sent}
    assert {data["custom"] for data in shown} == {"kept"}
    assert {data["priority"] for data in shown} == {6}
    wait_until(lambda: not here.redis.exists("celery", "unacked"))


def test_a_zombie_leaves_the_stock_workers_entry_alone(
    fleet: Callable[..., Fleet], name: str
) -> None:
    """Our worker, stopped past its lease and then continued, acknowledges nothing of stock's."""
    here = fleet()
    zombie = here.ours()
    here.send(name, SECONDS, stock=True)
    here.scene.wait_starts(name)
    zombie.send_signal(signal.SIGSTOP)
    ((tag, score),) = here.redis.zrange("unacked_index", 0, -1, withscores=True)
    wait_until(lambda: time.time() > float(score) + SHORT + 1, LEASE + SHORT + 5)
    # Its own timeout is long: what it holds must not come back by that.
    stock = here.stock(10 * SECONDS + 60, plain=True)
    here.stock(plain=True, queue="elsewhere").stop()
    here.scene.wait_starts(name, 2)
    (entry,) = here.redis.hkeys("unacked")
    assert entry != tag
    zombie.send_signal(signal.SIGCONT)
    # Its child was not stopped and has ended meanwhile, or does now.
    zombie.wait_log("ended after its lease|lost its lease", timeout=SECONDS + 20)
    zombie.wait_log(r"show\[.*succeeded", timeout=SECONDS + 20)
    assert here.redis.hkeys("unacked") in ([entry], [])
    assert len(here.scene.journal.events("end", name=name)) == 2 or here.redis.hkeys("unacked") == [
        entry
    ]
    wait_until(lambda: len(here.scene.journal.events("end", name=name)) == 2, SECONDS + 20)
    assert here.runs(name) == [zombie.hostname, stock.hostname]
    wait_until(lambda: not here.redis.exists("unacked"))


def test_idle_workers_start_a_stock_producers_message_soon(
    fleet: Callable[..., Fleet], name: str
) -> None:
    """A message that comes without a bell waits less than a second for an idle worker."""
    here = fleet()
    here.ours()
    here.ours()
    waits = []
    for number in range(5):
        sent_at = time.time()
        here.send(f"{name} {number}", stock=True)
        waits.append(here.scene.wait_starts(f"{name} {number}") - sent_at)
        here.done(f"{name} {number}")
    assert max(waits) < 1, waits


@pytest.mark.parametrize("plain", [False, True], ids=["our app", "plain app"])
def test_our_client_hears_stock_workers(fleet: Callable[..., Fleet], plain: bool) -> None:
    """Replies that a stock worker sends reach our client in time, though they ring no bell."""
    here = fleet()
    here.ours()
    here.stock(plain=plain)
    control = here.scene.app.control
    wait_until(lambda: len(control.ping(timeout=1)) == 2, 20)
    for _ in range(3):
        assert len(control.ping(timeout=1)) == 2
        assert len(control.inspect(timeout=1).active() or {}) == 2
    assert len(here.stock_app.control.ping(timeout=1)) == 2
