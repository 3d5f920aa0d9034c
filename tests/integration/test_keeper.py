"""The keeper: it renews what its worker holds, says when it cannot, and lets go of what hung."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from reliable_tasks._broker import keeper, saying
from reliable_tasks._broker.held import Held
from reliable_tasks._broker.keeper import Keeper
from reliable_tasks._broker.sweep import _SILENT, sweep
from reliable_tasks._store.delivery import Delivery
from reliable_tasks.demo._server import EmbeddedServer
from tests.conformance.broker import Broker, letter, message
from tests.integration.apps import alone, hanging, shop
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import Lag, Proxy, WorkerProcess, wait_until

#: Of a keeper in this process, which asks nobody how short a lease may be (s).
LEASE = 2.0
#: Of a worker: the shortest that it takes (s).
SHORTEST = 3.0
#: Longer than it takes to find a worker dead by its connection, on a busy machine, too (s).
LONG = 10.0

pytestmark = pytest.mark.timeout(120)


class Hands:
    """A worker as far as it holds messages: no main loop, no pool, a keeper that can be started.

    Args:
        url: Where it reaches the server.
        direct: A client of the same server which no fault concerns.
        lease: Its lease (s).
    """

    def __init__(self, url: str, direct: redis.Redis, lease: float = LEASE) -> None:
        self.broker = Broker(direct)
        self.held = Held(self.broker.messages, lease, _client(url), _client(url))
        self._lease = lease
        self.keeper = Keeper.of(self.held)

    def take(self, task_id: str) -> Delivery:
        """Publish a task and fetch it."""
        self.broker.publish(task_id)
        delivery = self.broker.fetch_one(self.held.worker, lease=self._lease)
        self.held.take(delivery)
        return delivery

    def lease_end(self, delivery: Delivery) -> float:
        """Say when a lease ends, by the server's clock (s); 0 once it is over."""
        return self.broker.leases.get(delivery.tag, 0.0)

    def wait_renewals(self, delivery: Delivery, times: int = 2) -> None:
        """Wait until a lease was renewed so often."""
        for number in range(times):
            before = self.lease_end(delivery)
            wait_until(
                lambda before=before: self.lease_end(delivery) > before,  # type: ignore[misc]
                2 * LEASE + 5,
                f"renewal {number + 1} of {delivery.task_id}",
            )

    def wait_heard(self) -> None:
        """Wait until the keeper has the answer to a renewal; the next one is some time away."""
        before = self.held.renewed_at
        wait_until(lambda: self.held.renewed_at != before, 2 * LEASE + 5)


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=LEASE / 3, retry=Retry(NoBackoff(), 0))


@pytest.fixture
def make_hands(redis_url: str) -> Iterator[Callable[..., Hands]]:
    """Make a worker that reaches the server in a way of its own."""
    with redis.Redis.from_url(redis_url) as direct:
        yield lambda url, **options: Hands(url, direct, **options)


@pytest.fixture
def hands(make_hands: Callable[..., Hands], redis_proxy: Proxy) -> Hands:
    """A worker whose network can be broken."""
    return make_hands(redis_proxy.url())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[logging.LogRecord]]:
    """Return the log lines that match a pattern."""
    caplog.set_level(logging.INFO, logger="reliable_tasks")

    def find(pattern: str) -> list[logging.LogRecord]:
        return [one for one in caplog.records if re.search(pattern, one.getMessage())]

    return find


Said = Callable[[str], list[logging.LogRecord]]


class TestNothingIsRenewed:
    """A worker that cannot renew for a whole lease knows that others may run what it runs."""

    PATTERN = "No lease could be renewed"
    REACHES = "The keeper reaches the broker again"

    def test_it_says_so(self, hands: Hands, redis_proxy: Proxy, said: Said) -> None:
        """Once an outage, when the whole lease is over and no earlier."""
        delivery = hands.take("one")
        hands.keeper.start()
        hands.wait_renewals(delivery)
        for outage in (1, 2):
            # Of one whose answer is cut off the server knows, and the keeper does not.
            hands.wait_heard()
            redis_proxy.black_hole()
            wait_until(lambda outage=outage: len(said(self.PATTERN)) == outage, 5 * LEASE)  # type: ignore[misc]
            line = said(self.PATTERN)[-1]
            assert line.levelno == logging.CRITICAL
            # The server's lease begins when it gets what was sent, a moment later.
            assert line.created >= hands.lease_end(delivery) - 0.1
            assert "the 1 messages of this worker may be run by others" in line.getMessage()
            until = time.monotonic() + LEASE
            wait_until(lambda until=until: time.monotonic() > until, 2 * LEASE)  # type: ignore[misc]
            assert len(said(self.PATTERN)) == outage
            redis_proxy.heal()
            hands.wait_renewals(delivery)
            # The server has its renewal before it has the answer, which can be cut off, too.
            wait_until(lambda outage=outage: len(said(self.REACHES)) == outage, 5 * LEASE)  # type: ignore[misc]
        assert len(said("The keeper cannot reach the broker")) == 2

    def test_a_worker_that_holds_nothing_need_not(
        self, hands: Hands, redis_proxy: Proxy, said: Said
    ) -> None:
        """Nobody can run what it does not have."""
        hands.keeper.start()
        wait_until(lambda: hands.broker.server.zcard("reliable:beats"))
        redis_proxy.refuse()
        wait_until(lambda: time.monotonic() - hands.held.renewed_at > 2 * LEASE, 5 * LEASE)
        assert said("The keeper cannot reach the broker")
        assert not said(self.PATTERN)


class TestTelling:
    """Who is told of what has happened can take any time: no lease waits for it."""

    def test_a_receiver_that_takes_long(self, hands: Hands, redis_proxy: Proxy) -> None:
        """What could not be said while the broker was away is told when it is back, in order."""
        own = hands.take("own")
        told: list[str] = []
        goes_on = threading.Event()
        redis_proxy.refuse()
        for name in ("first", "second"):
            ended = hands.take(name)

            def hear(name: str = name) -> None:
                told.append(name)
                goes_on.wait(30)

            ended.when_heard_late = hear
            hands.held.settle(ended.tag)
        redis_proxy.heal()
        hands.keeper.start()
        wait_until(lambda: told, 10)
        hands.wait_renewals(own, 3)
        assert told == ["first"]
        goes_on.set()
        wait_until(lambda: told == ["first", "second"], 5)

    def test_what_has_to_be_done_does_not_wait(self, hands: Hands, redis_proxy: Proxy) -> None:
        """A receiver that hangs keeps no key taken, and a worker that stops says so."""
        freed, hangs = threading.Event(), threading.Event()
        for name in ("first", "second"):
            ended = hands.take(name)
            ended.letter = letter(name)
            ended.when_buried = lambda *_: hangs.wait(30)
            ended.when_heard_late = freed.set
            redis_proxy.refuse()
            hands.held.settle(ended.tag)
        redis_proxy.heal()
        hands.keeper.start()
        wait_until(lambda: not hands.held.unsaid, 10)
        assert freed.wait(5)
        hangs.set()

    def test_a_worker_that_stops_waits_no_longer_than_that(
        self, hands: Hands, redis_proxy: Proxy, said: Said, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And says that somebody was not told."""
        monkeypatch.setattr(saying, "_LAST_WORDS", 0.2)
        hangs = threading.Event()
        redis_proxy.refuse()
        for name in ("first", "second", "third"):
            ended = hands.take(name)
            ended.when_heard_late = lambda: hangs.wait(30)
            hands.held.settle(ended.tag)
        redis_proxy.heal()
        hands.keeper.start()
        wait_until(lambda: not hands.held.unsaid, 10)
        hands.keeper.stop()
        assert said("reliable-tasks-doer: 3 calls are not made before this worker ends")
        hangs.set()

    def test_a_worker_that_stops_tells_the_rest(self, hands: Hands, redis_proxy: Proxy) -> None:
        """Also what the keeper's thread was told of just before."""
        told = threading.Event()
        ended = hands.take("own")

        def hear() -> None:
            time.sleep(0.5)
            told.set()

        ended.when_heard_late = hear
        redis_proxy.refuse()
        hands.held.settle(ended.tag)
        redis_proxy.heal()
        hands.keeper.start()
        wait_until(lambda: not hands.held.unsaid, 10)
        hands.keeper.stop()
        assert told.is_set()


class TestMainLoop:
    """A worker whose main loop does not turn lets go of what it holds."""

    PATTERN = "main loop has not turned for"

    def test_leases_are_renewed_while_it_turns(
        self, hands: Hands, said: Said, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When it stops they end and the message is put back; when it turns on, others do not."""
        monkeypatch.setattr(keeper, "_HUNG", 0.0)
        lost = hands.take("lost")
        hands.keeper.main_loop_turns()
        turned_at = time.time()
        hands.keeper.start()
        hands.wait_renewals(lost)
        wait_until(lambda: said(self.PATTERN), 8 * LEASE)
        (line,) = said(self.PATTERN)
        assert line.levelno == logging.CRITICAL
        assert line.created - turned_at > 4 * LEASE
        assert "its 1 messages are left to other workers" in line.getMessage()
        last = hands.lease_end(lost)
        wait_until(lambda: hands.broker.waiting_ids() == ["lost"], 3 * LEASE)
        assert hands.broker.now() > last
        kept = hands.broker.fetch_one(hands.held.worker, lease=4 * LEASE)
        hands.held.take(kept)
        fetched = hands.lease_end(kept)
        wait_until(lambda: hands.broker.now() > fetched - 2 * LEASE, 4 * LEASE)
        assert hands.lease_end(kept) == fetched
        hands.keeper.main_loop_turns()
        # By LEASE, which is shorter than what it was fetched with; then it grows again.
        wait_until(lambda: hands.lease_end(kept) != fetched, 3 * LEASE)
        hands.wait_renewals(kept)
        assert len(said(self.PATTERN)) == 1

    def test_while_it_connects_again_it_is_not_expected_to_turn(
        self, hands: Hands, said: Said, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A broker can be away for longer than a main loop may hang."""
        monkeypatch.setattr(keeper, "_HUNG", 0.0)
        delivery = hands.take("one")
        hands.keeper.main_loop_turns()
        hands.keeper.main_loop_rests()
        hands.keeper.start()
        end = time.monotonic() + 5 * LEASE
        wait_until(lambda: time.monotonic() > end, 6 * LEASE)
        hands.wait_renewals(delivery)
        assert not said(self.PATTERN)

    def test_of_a_worker(self, scenes: StartScene, redis_server: EmbeddedServer) -> None:
        """Hung from its first second on, it lets another one run its task, and finds out later."""
        scene = _hanging(scenes, redis_server, RT_HUNG="0")
        hung = scene.worker()
        result = scene.call("bare", "order", "wait")
        scene.wait_starts("order")
        called = time.time()
        seconds = 4 * SHORTEST + SHORTEST + 3
        scene.app.control.broadcast("hang", {"seconds": seconds}, destination=[hung.hostname])
        scene.worker()
        hung.wait_log(rf"CRITICAL.*{self.PATTERN} 1\d s: its 1 messages", timeout=6 * SHORTEST)
        again = scene.wait_starts("order", 2, timeout=3 * SHORTEST)
        assert 4 * SHORTEST < again - called < seconds, scene.logs
        hung.wait_log(f"Task {result.id} lost its lease", timeout=3 * SHORTEST)
        scene.journal.open("order")
        assert result.get(timeout=10) == "order"

    def test_where_the_loop_is_the_tasks_own(
        self, scenes: StartScene, redis_server: EmbeddedServer
    ) -> None:
        """In solo it does not turn while a task runs, and has not hung."""
        scene = _hanging(scenes, redis_server, RT_HUNG="0")
        crew = scene.crew(2, pool="solo")
        # Not before the loop has turned for a while: then it would be expected to.
        result = scene.call("sleep", "long", 4 * SHORTEST + 3, countdown=2)
        assert result.get(timeout=8 * SHORTEST) == "long"
        assert scene.starts("long") == 1
        assert not [worker for worker in crew if re.search(self.PATTERN, worker.log)]


def _hanging(scenes: StartScene, server: EmbeddedServer, *, limit: int = 60, **env: str) -> Scene:
    return scenes(
        server.url,
        other_database(server),
        settings={"reliable_lease": SHORTEST},
        limit=limit,
        module=hanging,
        env=env,
    )


class TestHungRuns:
    """A run that outlives its hard limit, which ends all others, has hung."""

    PATTERN = "has outlived its hard limit"

    def test_its_lease_ends(self, hands: Hands, said: Said) -> None:
        """It is said once, its message is put back, and the others are renewed."""
        hung, well = hands.take("hung"), hands.take("well")
        hung.renew_until = time.monotonic() + LEASE
        hands.keeper.start()
        wait_until(lambda: said(self.PATTERN), 5 * LEASE)
        wait_until(lambda: hands.broker.waiting_ids() == ["hung"], 3 * LEASE)
        hands.wait_renewals(well)
        (line,) = said(self.PATTERN)
        assert line.levelno == logging.ERROR
        assert line.getMessage().startswith("Task hung ")

    def test_one_that_was_set_aside_has_not_hung(self, hands: Hands, said: Said) -> None:
        """Its limit was that of the start which is over; the next one has a limit, too."""
        delivery = hands.take("patient")
        hands.held.count_start(delivery)
        delivery.renew_until = time.monotonic()
        hands.keeper.start()
        wait_until(lambda: said(self.PATTERN), 3 * LEASE)
        hands.held.uncount_start(delivery)
        hands.wait_renewals(delivery, 3)
        assert len(said(self.PATTERN)) == 1
        hands.held.count_start(delivery)
        delivery.renew_until = time.monotonic()
        wait_until(lambda: len(said(self.PATTERN)) == 2, 3 * LEASE)

    def test_one_that_waits_after_its_start_in_a_worker(
        self, scenes: StartScene, redis_server: EmbeddedServer
    ) -> None:
        """A task is set aside by its child, waits longer than it might have run, and runs once."""
        scene = _hanging(scenes, redis_server, limit=1, RT_HUNG_AFTER="0")
        crew = scene.crew(2)
        result = scene.call("act", "order", queue="order")
        scene.run_elsewhere("order", result.id)
        scene.release("order")
        crew[0].wait_log(rf"{result.id}.* set aside.*\([345]\.\d s\)", timeout=20)
        scene.let_go_elsewhere("order", result.id)
        assert result.get(timeout=30) == "order"
        assert scene.starts("order") == 1
        logs = "\n".join(worker.log for worker in crew)
        assert not re.search(self.PATTERN, logs)

    def test_a_thread_that_nothing_ends_has_not(
        self, scenes: StartScene, redis_server: EmbeddedServer
    ) -> None:
        """Where no limit is enforced a task may last, and is not run beside itself."""
        scene = _hanging(scenes, redis_server, limit=1, RT_HUNG_AFTER="0")
        crew = scene.crew(2, pool="threads")
        result = scene.call("sleep", "long", 3 * SHORTEST)
        assert result.get(timeout=6 * SHORTEST) == "long"
        assert scene.starts("long") == 1
        assert not [worker for worker in crew if re.search(self.PATTERN, worker.log)]


BY_LEASE = "Dead workers are found by their leases alone"


@pytest.mark.parametrize(
    ("how", "waits"), [("connection", False), ("lease", True), ("proxy", True), ("exclusive", True)]
)
def test_a_dead_workers_task_waits_for_its_lease(
    scenes: StartScene, redis_server: EmbeddedServer, redis_proxy: Proxy, how: str, waits: bool
) -> None:
    """Where its connection says nothing of the worker, or must not; else it starts sooner.

    It must not by `reliable_death_detection`, or where a task of the app is exclusive.
    """
    module: ModuleType = alone if how == "exclusive" else shop
    detection = "lease" if how == "lease" else "connection"
    settings = {"reliable_lease": LONG, "reliable_death_detection": detection}
    backend = other_database(redis_server)
    scene = scenes(redis_server.url, backend, settings=settings, limit=60, module=module)
    dies = scene.worker(broker_url=redis_proxy.url() if how == "proxy" else redis_server.url)
    result = scene.call("bare", "order", "wait")
    scene.wait_starts("order")
    survives = scene.worker()
    dies.kill_group()
    lease_end = _lease_end(redis_server.url)
    again = scene.wait_starts("order", 2, timeout=2 * LONG)
    assert (again >= lease_end) is waits, scene.logs
    assert ("is dead; it held 1 messages" in survives.log) is not waits
    assert (f"{BY_LEASE}: Redis sees this one at 127.0.0.1:" in dies.log) is (how == "proxy")
    scene.journal.open("order")
    assert result.get(timeout=10) == "order"


def _lease_end(url: str) -> float:
    """Return when the only lease ends, which nobody renews any more (s)."""
    with redis.Redis.from_url(url) as client:
        # What its worker sent before it died is done once two more rounds are.
        client.ping()
        client.ping()
        ((_, score),) = client.zrange("reliable:leases", 0, -1, withscores=True)
    return float(score) / 1000


class TestLostData:
    """A server that forgets everything takes no running task down, and the worker says so."""

    @pytest.fixture
    def server(self) -> Iterator[EmbeddedServer]:
        """A broker that keeps nothing."""
        with EmbeddedServer() as server:
            yield server

    @pytest.fixture
    def running(
        self, scenes: StartScene, server: EmbeddedServer, redis_server: EmbeddedServer
    ) -> tuple[Scene, WorkerProcess, Any]:
        """A task that runs until its gate is opened."""
        settings = {"reliable_lease": SHORTEST}
        scene = scenes(server.url, other_database(redis_server), settings=settings, limit=60)
        worker = scene.worker()
        result = scene.call("bare", "order", "wait")
        scene.wait_starts("order")
        return scene, worker, result

    @pytest.mark.parametrize("how", ["FLUSHALL", "restart"])
    def test_while_a_task_runs(
        self, server: EmbeddedServer, running: tuple[Scene, WorkerProcess, Any], how: str
    ) -> None:
        """The task runs on to its result, once, and the worker takes the next one."""
        scene, worker, result = running
        if how == "restart":
            server.kill()
            server.start()
        else:
            _flush(server)
        lost = f"Task {result.id} lost its lease"
        worker.wait_log(lost, timeout=15 * SHORTEST)
        scene.journal.open("order")
        assert result.get(timeout=10) == "order"
        assert scene.call("bare", "next").get(timeout=20) == "next"
        assert scene.starts("order") == 1
        assert worker.log.count(lost) == 1
        scene.stop_workers()

    def test_just_before_a_task_ends(
        self, server: EmbeddedServer, running: tuple[Scene, WorkerProcess, Any]
    ) -> None:
        """Its end is said, for nothing could be acknowledged."""
        scene, worker, result = running
        _flush(server)
        scene.journal.open("order")
        assert result.get(timeout=10) == "order"
        worker.wait_log(f"Task {result.id} ended after its lease")
        assert scene.starts("order") == 1
        scene.stop_workers()


def _flush(server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


class TestManyLapsed:
    """Thousands of messages to put back over a slow network keep the sweeper from nothing else."""

    COUNT = 2000
    #: Each way (s). In one go it would take six seconds to put them back.
    LATENCY = 0.05

    @pytest.fixture
    def hands(self, make_hands: Callable[..., Hands], redis_proxy: Proxy) -> Hands:
        """A worker whose lease ends before they are all put back, however slow the machine."""
        return make_hands(redis_proxy.url(), lease=4.0)

    @pytest.fixture
    def left(self, hands: Hands, redis_proxy: Proxy) -> Callable[[], int]:
        """Have a worker die with them, and say how many of them are still to be put back."""
        broker = hands.broker
        broker.server.lpush("celery", *(message(f"lapsed-{n}") for n in range(self.COUNT)))
        while broker.fetch("dead", count=500):
            pass
        assert len(broker.leases) == self.COUNT
        broker.server.zadd("reliable:leases", dict.fromkeys(broker.leases, 1.0))
        redis_proxy.latency = self.LATENCY
        return lambda: int(broker.server.zcount("reliable:leases", "-inf", 1.0))

    def test_one_sweep_is_short(self, hands: Hands, left: Callable[[], int]) -> None:
        """It ends after half a second and one more round; the next ones do the rest."""
        count = 0
        while left():
            with Lag() as lag:
                before = time.monotonic()
                put_back = sweep(hands.held, hands.held.keepers, hands.broker.now(), "")
                took = time.monotonic() - before
            assert took < 2.0 + lag.seconds
            assert 0 < put_back <= self.COUNT / 2
            count += put_back
        assert count == self.COUNT
        assert len(set(hands.broker.waiting_ids())) == self.COUNT

    def test_its_worker_beats_and_renews_meanwhile(
        self, hands: Hands, left: Callable[[], int]
    ) -> None:
        """It is never silent for so long that it could be taken for dead, nor loses a lease."""
        own = hands.take("own")
        beats, worker = hands.broker.keys.beats, hands.held.worker
        hands.keeper.start()
        wait_until(lambda: hands.broker.server.zscore(beats, worker))
        wait_until(lambda: left() < self.COUNT, 5)

        def all_put_back() -> bool:
            now = hands.broker.now()
            silent = now - hands.broker.server.zscore(beats, worker) / 1000
            # What the machine takes from all of its processes is not the sweep's.
            assert silent < _SILENT + lag.seconds
            assert now < hands.lease_end(own)
            return not left()

        with Lag() as lag:
            begun = time.monotonic()
            while not all_put_back():
                assert time.monotonic() - begun < 40 + lag.seconds, f"{left()} left"
                time.sleep(0.02)
