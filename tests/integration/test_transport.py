"""What users of kombu's Redis transport have, they have with this library's."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery.app.control import flatten_reply
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from reliable_tasks import dead_letters
from reliable_tasks._broker.channel import Channel
from reliable_tasks._places import dead_place
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import ALONE, Scene, reading
from tests.support import Monitor, WorkerProcess, wait_until
from tests.support.redis_variants import Certificates, tls_server

pytestmark = pytest.mark.timeout(180)

Shop = Callable[..., Scene]

_CYCLE = "tests.integration.apps.shop:BackwardCycle"


@pytest.fixture
def shop(scenes: StartScene, redis_server: EmbeddedServer) -> Shop:
    """Make a scene on the test's server; settings are those of client and workers."""

    def make(url: str = "", *, results: str = "", **settings: Any) -> Scene:
        return scenes(
            url or redis_server.url,
            results or other_database(redis_server),
            settings=settings,
            limit=60,
            # Queues are kept in sets: the same order in each worker.
            env={"PYTHONHASHSEED": "0"},
        )

    return make


@pytest.fixture
def name() -> str:
    """A name of a task that no other test has."""
    return uuid4().hex[:8]


@pytest.fixture
def results() -> Iterator[str]:
    """The URL of a server for results that nothing happens to."""
    with EmbeddedServer() as server:
        yield server.url


def _runs(scene: Scene) -> list[str]:
    return [str(event.data["name"]) for event in scene.journal.events("start")]


def _wait_runs(scene: Scene, count: int, timeout: float = 30) -> list[str]:
    wait_until(
        lambda: len(_runs(scene)) >= count,
        timeout,
        lambda: f"{count} starts, not {_runs(scene)}\n{scene.logs}",
    )
    return _runs(scene)


def _wait_idle(scene: Scene, client: redis.Redis, prefix: str = "", timeout: float = 20) -> None:
    wait_until(
        lambda: not client.exists(f"{prefix}unacked") and not client.exists(f"{prefix}celery"),
        timeout,
        lambda: f"{client.hgetall(f'{prefix}unacked')}\n{scene.logs}",
    )


class TestProducers:
    """A producer of the caller's own leads where it leads, and its claim goes with it."""

    def test_of_another_broker(
        self, shop: Shop, redis_server: EmbeddedServer, redis_client: redis.Redis, name: str
    ) -> None:
        """The message of a once-task is queued there, not in the app's own broker."""
        scene = shop()
        elsewhere = other_database(redis_server, 5)
        with scene.app.connection_for_write(url=elsewhere) as connection:
            scene.call("act", name, producer=connection.Producer())
        with redis.Redis.from_url(elsewhere) as client:
            assert client.llen("celery") == 1
        assert redis_client.llen("celery") == 0
        assert scene.claim(name)
        assert scene.call("act", name).duplicate

    def test_of_the_app(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """A group publishes all its parts by one, without a second connection for the claims."""
        scene = shop()
        with scene.app.producer_or_acquire() as producer:
            for number in range(3):
                scene.call("act", f"{name} {number}", producer=producer)
            pool = scene.app.amqp.producer_pool
            assert len(pool._dirty) == 1
        assert redis_client.llen("celery") == 3
        assert scene.claim(f"{name} 2")


class TestOrder:
    """Which message comes next is what stock kombu says."""

    @pytest.mark.parametrize("strategy", ["round_robin", "priority", "sorted", _CYCLE])
    @pytest.mark.parametrize("multiplier", [1, 4, 0])
    def test_as_stock(
        self, shop: Shop, redis_server: EmbeddedServer, strategy: str, multiplier: int
    ) -> None:
        """Three queues with two priorities each are emptied in the same order as by stock."""
        settings = {
            "worker_prefetch_multiplier": multiplier,
            "broker_transport_options": {"queue_order_strategy": strategy},
        }
        orders = []
        for mode, database in (("reliable", 0), ("stock", 2)):
            scene = shop(
                other_database(redis_server, database),
                results=other_database(redis_server, database + 1),
                **settings,
            )
            for number in range(3):
                for queue in "bca":
                    for priority in (9, 0):
                        text = f"{queue}{number} {priority}"
                        scene.call("show", text, queue=queue, priority=priority)
            scene.worker(settings={"reliable_broker": mode}, args=reading("b,c,a"))
            orders.append(_wait_runs(scene, 18))
            scene.stop_workers()
        assert orders[0] == orders[1]

    def test_priorities(self, shop: Shop, name: str) -> None:
        """apply_async(priority=) works without a word in the queue's declaration."""
        scene = shop()
        for priority in (9, 6, 3, 0):
            scene.call("show", f"{name} {priority}", priority=priority)
        scene.worker()
        assert _wait_runs(scene, 4) == [f"{name} {priority}" for priority in (0, 3, 6, 9)]


class TestQueues:
    """Prefixes, and queues that come and go."""

    def test_global_keyprefix(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """Each key of the broker stands behind the prefix, in work and in recovery."""
        scene = shop(
            broker_transport_options={"global_keyprefix": "tenant:"},
            reliable_lease=4,
        )
        first, _ = scene.crew(2)
        scene.call("show", name, 3)
        scene.wait_starts(name)
        (started,) = scene.journal.events("start", name=name)
        killed = next(w for w in scene.workers if w.hostname == started.data["worker"])
        killed.kill_group()
        scene.wait_starts(name, 2)
        wait_until(lambda: scene.journal.events("end", name=name))
        _wait_idle(scene, redis_client, "tenant:")
        assert all(key.startswith("tenant:") for key in redis_client.scan_iter())
        assert first is scene.workers[0]

    def test_apps_behind_different_prefixes(
        self, shop: Shop, redis_client: redis.Redis, name: str
    ) -> None:
        """Two apps on one database do not see each other's tasks."""
        made = [shop(broker_transport_options={"global_keyprefix": p}) for p in ("a:", "b:")]
        for scene in made:
            scene.worker()
        for number, scene in enumerate(made):
            for task in range(4):
                assert scene.call("show", f"{name} {number}{task}").get(timeout=10)
        assert [len(_runs(scene)) for scene in made] == [4, 4]
        for prefix in ("a:", "b:"):
            _wait_idle(made[0], redis_client, prefix)

    def test_apps_behind_the_same_prefix(
        self, shop: Shop, redis_client: redis.Redis, name: str
    ) -> None:
        """Two apps that differ in reliable_key_prefix alone can share queues."""
        first, second = shop(reliable_lease=4), shop(reliable_key_prefix="other:")
        first.worker()
        second.worker()
        for number in range(6):
            scene = (first, second)[number % 2]
            assert scene.call("show", f"{name} {number}").get(timeout=10)
        _wait_idle(first, redis_client)

    def test_three_queues(self, shop: Shop, name: str) -> None:
        """One worker serves several queues, and each wakes it at once."""
        scene = shop()
        scene.worker(args=reading("one,two,three"))
        for number, queue in enumerate(("one", "two", "three", "one", "three")):
            sent_at = time.time()
            scene.call("show", f"{name} {number}", queue=queue)
            assert scene.wait_starts(f"{name} {number}") - sent_at < 1

    def test_added_and_cancelled(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """control.add_consumer and cancel_consumer take effect at once and lose nothing."""
        scene = shop()
        worker = scene.worker()
        scene.call("show", f"{name} 1", queue="extra")
        # The worker has found its queue empty, and waits for it alone.
        wait_until(lambda: redis_client.info("clients")["blocked_clients"])
        asked_at = time.time()
        scene.control("add_consumer", "extra", worker)
        assert scene.wait_starts(f"{name} 1") - asked_at < 2
        scene.control("cancel_consumer", "extra", worker)
        scene.call("show", f"{name} 2", queue="extra")
        assert scene.call("show", f"{name} 3").get(timeout=10)
        wait_until(lambda: redis_client.llen("extra") == 1)
        assert f"{name} 2" not in _runs(scene)
        asked_at = time.time()
        scene.control("add_consumer", "extra", worker)
        assert scene.wait_starts(f"{name} 2") - asked_at < 2

    def test_purge(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """Purge counts and removes what waits, of all priorities, and frees its claims."""
        scene = shop()
        for priority in (0, 3, 9):
            scene.call("show", name, priority=priority)
        once = scene.call("act", name)
        assert scene.app.control.purge() == 4
        assert not any(redis_client.exists(f"celery{step}") for step in ("", "\x06\x163"))
        again = scene.call("act", name)
        assert (again.duplicate, again.id == once.id) == (False, False)
        assert scene.app.control.purge() == 1
        scene.worker()
        assert scene.call("show", f"{name} later").get(timeout=10)
        assert _runs(scene) == [f"{name} later"]

    def test_queue_that_expires(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """x-expires is set at each publish, on the lists of all priorities, as stock does."""
        scene = shop()
        queue = Queue("brief", Exchange("brief"), routing_key="brief", expires=1.0)
        with scene.app.connection_for_write() as connection:
            queue(connection.default_channel).declare()
            producer = connection.Producer()
            producer.publish({}, exchange="brief", routing_key="brief")
            assert 0 < redis_client.pttl("brief") <= 1000
        wait_until(lambda: not redis_client.exists("brief"), 5)

    def test_queue_that_is_deleted_with_its_consumer(
        self, shop: Shop, redis_client: redis.Redis
    ) -> None:
        """An auto_delete queue of a fanout goes with the channel that has it, as with stock."""
        scene = shop()
        exchange = Exchange("fleeting", type="fanout")
        queue = Queue("fleeting", exchange, auto_delete=True)
        with scene.app.connection_for_write() as connection:
            channel = connection.channel()
            with connection.Consumer(queue, channel=channel, callbacks=[lambda *_: None]):
                assert redis_client.exists("_kombu.binding.fleeting")
            channel.close()
        assert not redis_client.exists("_kombu.binding.fleeting", "fleeting")

    def test_basic_get(self, shop: Shop, redis_client: redis.Redis) -> None:
        """A message taken by hand is on lease until it is acknowledged or rejected."""
        scene = shop()
        with scene.app.connection_for_write() as connection:
            channel = connection.default_channel
            assert isinstance(channel, Channel)
            queue = Queue("byhand", Exchange(""), routing_key="byhand")(channel)
            queue.declare()
            assert queue.get() is None
            connection.Producer().publish({"a": 1}, routing_key="byhand")
            message = queue.get()
            assert message.payload == {"a": 1}
            assert redis_client.zcard("reliable:leases") == redis_client.hlen("unacked") == 1
            message.reject(requeue=True)
            assert redis_client.llen("byhand") == 1
            assert not redis_client.exists("unacked", "unacked_index", "reliable:leases")
            again = queue.get()
            assert again.headers["x-delivery-count"] == 1
            again.ack()
            assert not redis_client.exists("byhand", "unacked", "reliable:leases")
            connection.Producer().publish({"a": 2}, routing_key="byhand")
            assert queue.get(no_ack=True).payload == {"a": 2}
            assert not redis_client.exists("byhand", "unacked", "reliable:leases")

    def test_consumer_that_does_not_acknowledge(
        self, shop: Shop, redis_client: redis.Redis
    ) -> None:
        """A no_ack consumer takes messages without a lease, each once and in order."""
        scene = shop()
        got: list[Any] = []
        with scene.app.connection_for_write() as connection:
            queue = Queue("noack", Exchange(""), routing_key="noack")
            consumer = connection.Consumer(
                queue, callbacks=[lambda body, message: got.append(body)], no_ack=True
            )
            with consumer:
                producer = scene.app.amqp.Producer(scene.app.connection_for_write())
                for number in range(20):
                    producer.publish(number, routing_key="noack")
                while len(got) < 20:
                    connection.drain_events(timeout=5)
                producer.channel.connection.client.close()
        assert got == list(range(20))
        assert not redis_client.exists("noack", "unacked", "reliable:leases")


class TestControl:
    """Remote control, broadcast and events."""

    def test_inspect_and_revoke(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """Ping, active, reserved, scheduled and revoke see and do what they did."""
        scene = shop(worker_prefetch_multiplier=3)
        worker = scene.worker()
        control = scene.app.control
        assert control.ping(timeout=30, limit=1) == [{worker.hostname: {"ok": "pong"}}]
        later = scene.call("act", f"{name} later", countdown=60)
        running = scene.call("act", name, "wait")
        scene.wait_starts(name)
        waiting = [scene.call("act", f"{name} {number}") for number in range(4)]
        inspect = control.inspect(timeout=2)

        def ids(found: Any, key: str | None = None) -> set[str]:
            tasks = (found or {}).get(worker.hostname, [])
            return {(task[key] if key else task)["id"] for task in tasks}

        wait_until(lambda: ids(inspect.scheduled(), "request") == {later.id}, 15)
        assert ids(inspect.active()) == {running.id}
        # The one that runs, two beside it by the prefetch count.
        wait_until(lambda: len(ids(inspect.reserved())) == 2, 15, lambda: str(inspect.reserved()))
        assert ids(inspect.reserved()) == {waiting[0].id, waiting[1].id}
        assert redis_client.zcard("reliable:leases") == 4
        assert inspect.stats()[worker.hostname]["prefetch_count"] == 4
        control.revoke(waiting[0].id, reply=True, timeout=2)
        control.revoke(later.id, reply=True, timeout=2)
        scene.journal.open(name)
        for one in waiting[1:]:
            one.get(timeout=10)
        assert scene.starts(f"{name} 0") == 0
        assert flatten_reply(control.ping(timeout=30, limit=1))

    def test_terminate(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """A task that is revoked while it runs is killed, and does not come back."""
        scene = shop()
        scene.worker()
        running = scene.call("act", name, "sleep")
        scene.wait_starts(name)
        scene.app.control.revoke(running.id, terminate=True, signal="SIGKILL")
        wait_until(lambda: running.state == "REVOKED", 15)
        _wait_idle(scene, redis_client)
        assert scene.call("act", f"{name} next").get(timeout=10)
        assert scene.starts(name) == 1

    def test_broadcast_reaches_all(self, shop: Shop) -> None:
        """A broadcast is heard by each worker, and each answers."""
        scene = shop()
        crew = scene.crew(2)
        # One that says that it is ready subscribes when its loop turns next.
        scene.wait_listening(crew)
        replies = flatten_reply(
            # Until all have answered, however slow the machine.
            scene.app.control.broadcast("pool_grow", {"n": 1}, reply=True, timeout=30, limit=2)
        )
        assert set(replies) == {worker.hostname for worker in crew}

    def test_events(self, shop: Shop, name: str) -> None:
        """What Flower does: events of a task arrive, and make the state that it shows."""
        scene = shop()
        scene.worker(args=[*ALONE, "-E"])
        state = scene.app.events.State()
        with scene.app.connection_for_read() as connection:
            receiver = scene.app.events.Receiver(connection, handlers={"*": state.event})
            listening = threading.Thread(
                target=lambda: receiver.capture(limit=None, timeout=20, wakeup=True), daemon=True
            )
            listening.start()
            wait_until(lambda: state.workers, 20)
            result = scene.call("show", name)
            wait_until(lambda: state.tasks.get(result.id), 20)
            wait_until(lambda: state.tasks[result.id].state == "SUCCESS", 20)
            receiver.should_stop = True
            listening.join(10)
        assert state.tasks[result.id].worker.hostname == scene.workers[0].hostname

    def test_autoscale(self, shop: Shop, name: str) -> None:
        """A pool that grows with its work runs as many at once, and goes on when it shrank."""
        scene = shop(worker_autoscaler="celery.worker.autoscale:Autoscaler")
        scene.worker(args=[*ALONE, "--autoscale=3,1"])
        for number in range(3):
            scene.call("act", f"{name} {number}", "wait")
        for number in range(3):
            scene.wait_starts(f"{name} {number}", timeout=30)
        for number in range(3):
            scene.journal.open(f"{name} {number}")
        assert scene.call("act", f"{name} last").get(timeout=30)


class TestPrefetch:
    """A worker never holds more than it was told to."""

    @pytest.mark.parametrize(("multiplier", "held"), [(1, 2), (4, 8), (0, 30)])
    def test_multiplier(
        self, shop: Shop, redis_client: redis.Redis, name: str, multiplier: int, held: int
    ) -> None:
        """As many messages are held as concurrency and multiplier make, exactly."""
        scene = shop(worker_prefetch_multiplier=multiplier)
        results = [scene.call("act", f"{name} {number}", "wait") for number in range(30)]
        scene.worker(concurrency=2)
        wait_until(lambda: len(_runs(scene)) == 2, 20)
        wait_until(lambda: redis_client.zcard("reliable:leases") == held, 20)
        _stays(lambda: redis_client.zcard("reliable:leases") <= held)
        for number in range(30):
            scene.journal.open(f"{name} {number}")
        for result in results:
            result.get(timeout=30)
        assert len(_runs(scene)) == 30
        _wait_idle(scene, redis_client)

    def test_none(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """worker_disable_prefetch: a message is taken when a child is free, not before."""
        scene = shop(worker_disable_prefetch=True, worker_prefetch_multiplier=4)
        results = [scene.call("act", f"{name} {number}", "wait") for number in range(6)]
        scene.worker(concurrency=2)
        wait_until(lambda: len(_runs(scene)) == 2, 20)
        _stays(lambda: redis_client.zcard("reliable:leases") <= 2)
        for number in range(6):
            scene.journal.open(f"{name} {number}")
        for result in results:
            result.get(timeout=30)

    def test_limit_of_waiting_tasks(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """worker_eta_task_limit bounds what a worker holds for later."""
        scene = shop(worker_eta_task_limit=5)
        scene.worker()
        for number in range(12):
            scene.call("show", f"{name} {number}", countdown=4)
        wait_until(lambda: redis_client.zcard("reliable:leases") == 5, 15)
        _stays(lambda: redis_client.zcard("reliable:leases") <= 5, 1.5)
        _wait_runs(scene, 12, 40)

    def test_after_lost_connections(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """What was held stays held, counts as held, and nothing more is taken."""
        scene = shop(worker_prefetch_multiplier=2)
        worker = scene.worker(concurrency=2)
        later = [scene.call("show", f"{name} later {n}", countdown=14) for n in range(3)]
        gated = [scene.call("act", f"{name} {n}", "wait") for n in range(12)]
        wait_until(lambda: len(_runs(scene)) == 2, 20)
        wait_until(lambda: redis_client.zcard("reliable:leases") == 7, 20)
        before = set(redis_client.zrange("reliable:leases", 0, -1))
        for count in range(1, 4):
            redis_client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            wait_until(
                lambda count=count: worker.log.count("Connected to redis") > count,  # type: ignore[misc]
                20,
                lambda: worker.log,
            )
            _stays(lambda: set(redis_client.zrange("reliable:leases", 0, -1)) == before, 1.5)
        for number in range(12):
            scene.journal.open(f"{name} {number}")
        # Asked, not waited for: the client's own subscription was cut as well.
        wait_until(lambda: all(result.ready() for result in gated + later), 60, lambda: scene.logs)
        assert len(_runs(scene)) == 15
        _wait_idle(scene, redis_client)

    def test_rate_limit(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """Tasks that wait for their rate limit are held, run once each, at that rate."""
        scene = shop(worker_prefetch_multiplier=4, reliable_lease=3)
        scene.worker()
        for number in range(6):
            scene.call("limited", f"{name} {number}")
        _wait_runs(scene, 6, 40)
        events = scene.journal.events("start")
        assert events[-1].at - events[0].at > 4
        _wait_idle(scene, redis_client)
        assert len(_runs(scene)) == 6

    def test_early_acks(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """A task without acks_late is acknowledged before it runs."""
        scene = shop()
        scene.worker(settings={"task_acks_late": False})
        result = scene.call("act", name, "wait")
        scene.wait_starts(name)
        wait_until(lambda: not redis_client.exists("unacked", "reliable:leases"))
        scene.journal.open(name)
        assert result.get(timeout=10)


class TestWaiting:
    """Idle workers wake at once, and do not share what one of them could take alone."""

    def test_latency(self, shop: Shop, name: str) -> None:
        """An idle worker starts a message at once, also one that comes after a long wait."""
        scene = shop()
        scene.worker()
        waits = []
        for number in range(20):
            sent_at = time.time()
            result = scene.call("show", f"{name} {number}")
            waits.append(scene.wait_starts(f"{name} {number}") - sent_at)
            result.get(timeout=10)
        assert sorted(waits)[10] < 0.05
        assert max(waits) < 0.5

    def test_cost_of_waiting(self, shop: Shop, redis_server: EmbeddedServer) -> None:
        """A worker that waits sends few commands."""
        scene = shop()
        scene.crew(2)
        with Monitor(redis_server.url) as monitor:
            _stays(lambda: True, 10)
        assert len(monitor.commands) / 10 < 15, monitor.names()

    @pytest.mark.parametrize("trial", range(3))
    def test_two_messages_for_two_idle_workers(
        self, shop: Shop, redis_client: redis.Redis, name: str, trial: int
    ) -> None:
        """Each wakes for one of them, and they run side by side."""
        scene = shop(worker_prefetch_multiplier=1)
        scene.crew(2)
        wait_until(lambda: redis_client.info("clients")["blocked_clients"] >= 2)
        with scene.app.producer_pool.acquire(block=True) as producer:
            for number in (1, 2):
                scene.call("act", f"{name} {number}", "wait", producer=producer)
        for number in (1, 2):
            scene.wait_starts(f"{name} {number}")
            scene.journal.open(f"{name} {3 - number}")

    def test_who_wakes_first_leaves_the_others_their_share(
        self, shop: Shop, redis_client: redis.Redis, name: str
    ) -> None:
        """It takes one message, whatever it has room for: others were woken for the rest."""
        scene = shop()
        taken: list[Any] = []
        with scene.app.connection_for_read() as connection:
            channel: Any = connection.channel()
            queue: Any = scene.app.amqp.queues["celery"]
            consumer = connection.Consumer(queue, channel=channel, on_message=taken.append)
            consumer.consume()
            channel.client.connection = channel.client.connection_pool.get_connection()
            while not channel._is_empty:
                _poll(channel)
            # Now it waits; each is what an event loop does when there is something to read.
            channel._brpop_start()
            for number in range(3):
                scene.call("act", f"{name} {number}")
            with suppress(Empty):
                channel._brpop_read()
            _poll(channel)
            assert (len(taken), redis_client.llen("celery")) == (1, 2)
            _poll(channel)
            assert (len(taken), redis_client.llen("celery")) == (3, 0)


def _poll(channel: Any) -> None:
    channel._brpop_start()
    with suppress(Empty):
        channel._brpop_read()


_HEADERS = {"lang": "py", "task": "show", "id": "of-a-strange-message"}
_STRANGE = {
    "not JSON": b"\xff\xfenot json",
    "cut off": b'{"body": "W10=", "properties"',
    "a number": b"17",
    "a text": b'"text"',
    "a list": b"[1, 2]",
    "empty": b"{}",
    "no headers": b'{"body": "W10=", "content-type": "application/json", '
    b'"content-encoding": "utf-8", "properties": {"delivery_tag": "1", "delivery_info": {}, '
    b'"body_encoding": "base64"}}',
    "headers are a list": b'{"body": "W10=", "headers": [], "properties": {"delivery_info": {}}}',
    "headers are a number": b'{"body": "W10=", "headers": 5, "properties": {"delivery_info": {}}}',
    "headers are null": b'{"body": "W10=", "headers": null, "properties": {"delivery_info": {}}}',
    "properties are null": b'{"body": "W10=", "headers": {}, "properties": null}',
    "id is a number": json.dumps(
        {
            "body": b64encode(b'[["strange"], {}, {}]').decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {**_HEADERS, "id": 5},
            "properties": {"delivery_info": {}, "body_encoding": "base64"},
        }
    ).encode(),
}


class TestStrangeMessages:
    """A message that nobody can read harms no other."""

    @pytest.mark.parametrize("what", _STRANGE)
    def test_worker_lives(
        self, shop: Shop, redis_client: redis.Redis, name: str, what: str
    ) -> None:
        """The worker goes on, and what came before and after runs."""
        scene = shop(worker_prefetch_multiplier=4)
        scene.call("show", f"{name} before")
        redis_client.execute_command("LPUSH", "celery", _STRANGE[what])
        scene.call("show", f"{name} after")
        worker = scene.worker()
        both = {f"{name} before", f"{name} after"}
        wait_until(lambda: both <= set(_runs(scene)), 30, lambda: scene.logs)
        assert scene.call("show", f"{name} last").get(timeout=10)
        assert worker.running
        _wait_idle(scene, redis_client)
        assert worker.log.count("Connected to redis") == 1

    def test_kept(self, shop: Shop, redis_client: redis.Redis, redis_url: str, name: str) -> None:
        """What is not JSON is kept where somebody can look at it."""
        scene = shop()
        redis_client.execute_command("LPUSH", "celery", _STRANGE["not JSON"])
        scene.worker()
        assert scene.call("show", name).get(timeout=10)
        with redis.Redis.from_url(redis_url) as client:
            (letter,) = dead_letters.list(app=scene.app)
            place = dead_place(scene.app)
            assert place is not None
            assert place.store.message(place.server, letter.id) == _STRANGE["not JSON"]
            wait_until(lambda: not client.exists("unacked", "reliable:leases"))

    @pytest.mark.parametrize("what", ["not JSON", "a number", "headers are a list"])
    def test_left_by_a_dead_worker(self, shop: Shop, redis_url: str, name: str, what: str) -> None:
        """A worker that died with one in its hands does not keep the sweep from the others."""
        scene = shop(reliable_lease=3)
        with redis.Redis.from_url(redis_url) as client:
            tag = "dead:1:1:celery"
            client.hset("unacked", tag, b"[" + _STRANGE[what] + b',"","celery"]')
            client.zadd("unacked_index", {tag: 1.0})
            client.zadd("reliable:leases", {tag: 1.0})
            scene.crew(2)
            scene.call("show", name, 2)
            scene.wait_starts(name)
            (started,) = scene.journal.events("start", name=name)
            dead = next(w for w in scene.workers if w.hostname == started.data["worker"])
            dead.kill_group()
            scene.wait_starts(name, 2, timeout=20)
            wait_until(lambda: not client.exists("unacked"), 20)

    def test_unknown_task(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """A task that is not registered is discarded with a log line, as by stock."""
        scene = shop()
        worker = scene.worker()
        scene.send("nobody knows", 1)
        worker.wait_log("Received unregistered task")
        assert scene.call("show", name).get(timeout=10)
        _wait_idle(scene, redis_client)

    def test_megabytes(self, shop: Shop, redis_client: redis.Redis, name: str) -> None:
        """Messages of 2 MB are published, run, put back and run again."""
        scene = shop(reliable_lease=4, worker_prefetch_multiplier=4)
        first, _ = scene.crew(2)
        text = "x" * 2_000_000
        results = [scene.call("show", f"{name} {number}", 0.5, text) for number in range(6)]
        scene.wait_starts(f"{name} 0")
        first.kill_group()
        for number, result in enumerate(results):
            assert result.get(timeout=40) == f"{name} {number}"
        assert {event.data["length"] for event in scene.journal.events("end")} == {2_000_000}
        _wait_idle(scene, redis_client)


class TestServers:
    """Servers that refuse, and other ways to reach one."""

    def test_memory_full(self, shop: Shop, results: str, name: str) -> None:
        """A publish says no; the worker works off what there is, which frees memory."""
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            scene = shop(server.url, results=results, reliable_redis_url=results, reliable_lease=4)
            worker = scene.worker()
            running = scene.call("show", f"{name} running", 9)
            scene.wait_starts(f"{name} running")
            waiting = [scene.call("show", f"{name} {number}") for number in range(20)]
            client.config_set("maxmemory", "1mb")
            with pytest.raises((OperationalError, redis.RedisError), match="maxmemory"):
                scene.call("show", f"{name} refused")
            assert running.get(timeout=20)
            for result in waiting:
                result.get(timeout=30)
            assert "refuses to hand out" not in worker.log
            client.config_set("maxmemory", "0")
            assert worker.running
            assert sorted(_runs(scene)) == sorted(
                [f"{name} running", *(f"{name} {number}" for number in range(20))]
            )
            _wait_idle(scene, client)

    def test_read_only(self, shop: Shop, results: str, name: str) -> None:
        """A master that is a replica for a while: what runs goes on, once, and is acknowledged."""
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            scene = shop(server.url, results=results, reliable_redis_url=results, reliable_lease=4)
            worker = scene.worker()
            running = scene.call("show", f"{name} running", 6)
            scene.wait_starts(f"{name} running")
            waiting = [scene.call("show", f"{name} {number}") for number in range(3)]
            # Of nobody who answers: it keeps its data and takes no writes.
            client.replicaof("127.0.0.1", "1")
            assert running.get(timeout=20)
            client.replicaof("NO", "ONE")
            for result in waiting:
                result.get(timeout=60)
            assert worker.running
            assert scene.starts(f"{name} running") == 1
            _wait_idle(scene, client)

    def test_tls(self, shop: Shop, results: str, tmp_path: Path, name: str) -> None:
        """rediss:// with a certificate that is checked, through a lost connection."""
        certificates = Certificates.make(tmp_path)
        checked = {"ssl_cert_reqs": "required", "ssl_ca_certs": certificates.authority}
        with tls_server(certificates) as url:
            scene = shop(url, results=results, broker_use_ssl=checked)
            _works_through_a_lost_connection(
                scene, name, redis.Redis.from_url(url, ssl_ca_certs=certificates.authority)
            )

    def test_password_and_database(self, shop: Shop, results: str, name: str) -> None:
        """A password and another database than the first."""
        with EmbeddedServer(args=["--requirepass", "p@ss"]) as server:
            url = f"redis://:p%40ss@127.0.0.1:{server.port}/7"
            scene = shop(url, results=results)
            _works_through_a_lost_connection(scene, name, redis.Redis.from_url(url))
            with redis.Redis.from_url(url.replace("/7", "/0")) as client:
                assert client.dbsize() == 0

    def test_unix_socket(self, shop: Shop, redis_server: EmbeddedServer, name: str) -> None:
        """By a Unix socket, where the dead are told by their leases."""
        scene = shop(f"redis+socket://{redis_server.socket_path}?virtual_host=0")
        _works_through_a_lost_connection(scene, name, redis.Redis.from_url(redis_server.url))


def _works_through_a_lost_connection(scene: Scene, name: str, client: redis.Redis) -> None:
    with client:
        worker = scene.worker()
        running = scene.call("show", name, 3)
        scene.wait_starts(name)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert running.get(timeout=20)
        assert scene.call("show", f"{name} next").get(timeout=20)
        assert scene.starts(name) == 1
        wait_until(lambda: not client.exists("unacked"), 20)
        assert client.zcard("reliable:beats") == 1
        assert worker.running


#: What a worker and a producer need: the commands, for the keys and channels below.
_RIGHTS = (
    *("+eval", "+evalsha", "+ping", "+select", "+time", "+publish", "+subscribe", "+psubscribe"),
    *("+unsubscribe", "+punsubscribe", "+del", "+set", "+exists", "+expire", "+pexpire", "+pttl"),
    *("+zadd", "+zrem", "+zscore", "+zmscore", "+zrange", "+zrangebyscore", "+zscan"),
    *(
        "+zremrangebyscore",
        "+hset",
        "+hget",
        "+hdel",
        "+hmget",
        "+hincrby",
        "+hlen",
        "+hexists",
        "+hstrlen",
    ),
    *("+lpush", "+rpush", "+ltrim", "+blpop", "+lindex", "+llen", "+sadd", "+srem", "+smembers"),
    *("+multi", "+exec", "+watch", "+unwatch", "+script|load", "+script|exists"),
)
#: What makes the death of a worker known before its leases end.
_FOR_DEATHS = ("+client", "+info")
_KEYS = ("~celery*", "~unacked*", "~_kombu.binding*", "~reliable:*", "~*.celery.pidbox*")
# A PSUBSCRIBE is allowed only by a rule that is its very pattern.
_CHANNELS = ("&/0.*", "&/0.celery.pidbox")


@contextmanager
def _user(server: EmbeddedServer, *rights: str) -> Iterator[str]:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "shop", "reset", "on", ">secret", *_KEYS, *_CHANNELS, *rights
        )
        client.execute_command("ACL", "LOG", "RESET")
        yield f"redis://shop:secret@127.0.0.1:{server.port}/0"


def _refused(server: EmbeddedServer) -> set[str]:
    with redis.Redis.from_url(server.url) as client:
        return {
            f"{entry[b'reason'].decode()} {entry[b'object'].decode()}"
            for entry in client.execute_command("ACL", "LOG", 128)
        }


class TestRights:
    """A user of the server who may do only what is needed."""

    @pytest.mark.parametrize("extra", [_FOR_DEATHS, ()], ids=["all", "without CLIENT and INFO"])
    def test_enough(self, shop: Shop, results: str, name: str, extra: tuple[str, ...]) -> None:
        """Nothing else is needed; without CLIENT and INFO the lease alone tells the dead."""
        with EmbeddedServer() as server, _user(server, *_RIGHTS, *extra) as url:
            scene = shop(url, results=results, reliable_redis_url=results, reliable_lease=5)
            crew: list[WorkerProcess] = scene.crew(2)
            assert len(scene.app.control.ping(timeout=30, limit=2)) == 2
            assert scene.call("show", name).get(timeout=10)
            scene.call("show", f"{name} killed", 3)
            scene.wait_starts(f"{name} killed")
            (started,) = scene.journal.events("start", name=f"{name} killed")
            dead = next(w for w in crew if w.hostname == started.data["worker"])
            dead.kill_group()
            killed_at = time.time()
            again_at = scene.wait_starts(f"{name} killed", 2, timeout=20)
            assert again_at - killed_at < (4.5 if extra else 9)
            # The crash of the first copy was counted, by whatever way is left.
            assert scene.journal.events("start", name=f"{name} killed")[1].data["crashes"] == 1
            wait_until(lambda: scene.journal.events("end", name=f"{name} killed"), 20)
            with redis.Redis.from_url(server.url) as client:
                _wait_idle(scene, client)
            needless = {"command client|setinfo", "command client|setname"}
            if not extra:
                needless |= {"command info", "command client|reply", "command client|info"}
                needless |= {"command client|list", "command client|id"}
            assert _refused(server) <= needless


def _stays(condition: Callable[[], Any], seconds: float = 2.0) -> None:
    """Check again and again for some seconds that something is so."""
    until = time.monotonic() + seconds

    def over() -> bool:
        assert condition()
        return time.monotonic() > until

    wait_until(over, seconds + 5, interval=0.05)
