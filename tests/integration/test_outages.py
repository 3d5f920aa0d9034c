"""The broker or the lock Redis is away: what the caller sees, and what the worker does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import redis
from kombu.exceptions import OperationalError

from reliable_tasks import StoreUnavailable
from reliable_tasks.demo._server import EmbeddedServer
from reliable_tasks.errors import StoreError
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import Proxy, wait_until

#: A publish gives up after three short retries.
BOUND = 15.0


@pytest.fixture
def locks() -> Iterator[EmbeddedServer]:
    """A Redis for claims alone, which keeps what it has when it is killed."""
    with EmbeddedServer(args=["--appendonly", "yes", "--appendfsync", "always"]) as server:
        yield server


@pytest.fixture
def name() -> str:
    """A `@once` key of the test's own."""
    return uuid4().hex[:8]


@contextmanager
def bounded(seconds: float = BOUND) -> Iterator[None]:
    """Check that what is done in here takes no longer."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


class TestPublish:
    """A call whose task cannot be queued raises, and leaves no claim."""

    def test_dead_broker_that_holds_the_claims(self, scenes: StartScene, name: str) -> None:
        """One error is both: kombu's, for those who catch that, and ours."""
        with EmbeddedServer() as server:
            scene = scenes(server.url, None)
            scene.call("act", "warm-up")
            server.kill()
            with bounded(), pytest.raises(OperationalError) as caught:
                scene.call("act", name)
            assert isinstance(caught.value, StoreUnavailable)
            server.start()
            assert scene.claims.names() == []
            assert not scene.call("act", name).duplicate

    def test_broker_that_was_never_there(self, scenes: StartScene, name: str) -> None:
        """The first call of a process fails like any other."""
        with EmbeddedServer() as server:
            url = server.url
        scene = scenes(url, None)
        with bounded(), pytest.raises(OperationalError):
            scene.call("act", name)

    def test_dead_broker_beside_living_claims(
        self, scenes: StartScene, locks: EmbeddedServer, name: str
    ) -> None:
        """The claim that was taken is given back."""
        with EmbeddedServer() as broker:
            scene = scenes(broker.url, None, settings={"reliable_redis_url": locks.url})
            broker.kill()
            with bounded(), pytest.raises(OperationalError):
                scene.call("act", name)
            assert scene.claim(name) == {}
            broker.start()
            assert not scene.call("act", name).duplicate

    def test_dead_lock_redis_beside_a_living_broker(
        self, scenes: StartScene, redis_server: EmbeddedServer, locks: EmbeddedServer, name: str
    ) -> None:
        """Nothing is queued, and the error is ours alone, for the broker is well."""
        scene = scenes(redis_server.url, None, settings={"reliable_redis_url": locks.url})
        locks.kill()
        with bounded(), pytest.raises(StoreUnavailable) as caught:
            scene.call("act", name)
        assert not isinstance(caught.value, OperationalError)
        with redis.Redis.from_url(redis_server.url) as client:
            assert client.llen("celery") == 0

    def test_dead_lock_redis_that_is_not_waited_for(
        self, scenes: StartScene, redis_server: EmbeddedServer, locks: EmbeddedServer, name: str
    ) -> None:
        """With "proceed" the task is queued without a claim."""
        settings = {"reliable_redis_url": locks.url, "reliable_on_store_error": "proceed"}
        scene = scenes(redis_server.url, None, settings=settings)
        locks.kill()
        with bounded():
            result = scene.call("act", name)
        assert not result.duplicate
        with redis.Redis.from_url(redis_server.url) as client:
            assert client.llen("celery") == 1

    @pytest.mark.parametrize(
        ("setting", "value", "back"),
        [("maxmemory", "1", "0"), ("min-replicas-to-write", "1", "0")],
        ids=["out of memory", "no replicas"],
    )
    @pytest.mark.parametrize("claims", ["at the broker", "elsewhere"])
    def test_broker_that_refuses(
        self,
        scenes: StartScene,
        locks: EmbeddedServer,
        name: str,
        setting: str,
        value: str,
        back: str,
        claims: str,
    ) -> None:
        """A broker that answers, but takes nothing, is an error too, and no claim is left."""
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            settings = {"reliable_redis_url": locks.url} if claims == "elsewhere" else {}
            scene = scenes(server.url, None, settings=settings)
            scene.call("act", "warm-up")
            client.config_set(setting, value)
            expected = StoreError if claims == "at the broker" else Exception
            with bounded(), pytest.raises(expected):
                scene.call("act", name)
            client.config_set(setting, back)
            assert scene.claim(name) == {}
            assert client.llen("celery") == 1
            assert not scene.call("act", name).duplicate

    def test_broker_that_became_a_replica(self, scenes: StartScene, name: str) -> None:
        """A demoted master is read-only: the call raises, and its successor decides."""
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            scene = scenes(server.url, None)
            scene.call("act", "warm-up")
            client.replicaof("127.0.0.1", 1)
            with bounded(), pytest.raises(StoreError):
                scene.call("act", name)
            client.replicaof("NO", "ONE")
            assert not scene.call("act", name).duplicate

    def test_lost_reply_to_a_claim(
        self,
        scenes: StartScene,
        redis_server: EmbeddedServer,
        redis_client: redis.Redis,
        locks: EmbeddedServer,
        name: str,
    ) -> None:
        """A claim whose reply was lost is recognised when it is asked for again."""
        with Proxy(locks.port) as proxy:
            scene = scenes(redis_server.url, None, settings={"reliable_redis_url": proxy.url()})
            scene.call("act", "warm-up")
            # Of the claim's script, which names the claim.
            proxy.lose_replies(name.encode())
            result = scene.call("act", name)
            assert not proxy.replies_to_lose
            assert not result.duplicate
            assert scene.claim(name)["owner"] == result.id
            assert redis_client.llen("celery") == 2

    def test_broker_whose_network_is_gone(
        self, scenes: StartScene, redis_proxy: Proxy, name: str
    ) -> None:
        """No answer at all is an error after some seconds, not a call that hangs."""
        options = {"broker_transport_options": {"socket_timeout": 1.0}}
        scene = scenes(redis_proxy.url(), None, settings={"reliable_store_timeout": 1.0, **options})
        scene.call("act", "warm-up")
        redis_proxy.black_hole()
        with bounded(30), pytest.raises(OperationalError):
            scene.call("act", name)
        redis_proxy.heal()
        assert not scene.call("act", name).duplicate

    @pytest.mark.parametrize("task", ["bare", "act"])
    @pytest.mark.parametrize("claims", ["at the broker", "elsewhere"])
    def test_lost_reply_to_a_publish(
        self,
        scenes: StartScene,
        redis_server: EmbeddedServer,
        redis_proxy: Proxy,
        redis_client: redis.Redis,
        locks: EmbeddedServer,
        name: str,
        task: str,
        claims: str,
    ) -> None:
        """It is sent again, and the broker knows it: one message, one start, and one claim."""
        settings = {"reliable_redis_url": locks.url} if claims == "elsewhere" else {}
        results = other_database(redis_server)
        scene = scenes(redis_proxy.url(), results, settings=settings, limit=60)
        scene.call(task, "warm-up")
        # Of the script that queues the message, whose headers show the arguments.
        redis_proxy.lose_replies(name.encode())
        result = scene.call(task, name)
        assert not redis_proxy.replies_to_lose
        queued = [json.loads(message) for message in redis_client.lrange("celery", 0, -1)]
        assert [message["headers"]["id"] for message in queued].count(result.id) == 1
        assert len(queued) == 2
        if task == "act":
            assert not result.duplicate
            assert scene.claim(name)["owner"] == result.id
            assert scene.call(task, name).duplicate
        scene.worker(broker_url=redis_server.url)
        assert result.get(timeout=15) == name
        wait_until(lambda: not redis_client.exists("celery", "unacked"), 15, lambda: scene.logs)
        assert scene.starts(name) == 1


@pytest.fixture
def far(
    scenes: StartScene, redis_server: EmbeddedServer, locks: EmbeddedServer
) -> Iterator[Callable[..., tuple[Scene, Proxy]]]:
    """Start a worker that reaches its claims through a connection that can be cut."""
    with Proxy(locks.port) as proxy:

        def start(**settings: object) -> tuple[Scene, Proxy]:
            short = {"reliable_visibility_margin": 1.0}
            scene = scenes(
                redis_server.url,
                other_database(redis_server),
                settings={"reliable_redis_url": locks.url, **short, **settings},
                limit=3,
            )
            scene.worker(settings={"reliable_redis_url": proxy.url()})
            return scene, proxy

        yield start


class TestWorker:
    """A worker whose lock Redis is away loses nothing and fails nothing."""

    @pytest.mark.parametrize("how", ["killed", "cut off"])
    def test_gone_at_the_end(
        self,
        far: Callable[..., tuple[Scene, Proxy]],
        locks: EmbeddedServer,
        name: str,
        how: str,
    ) -> None:
        """The result stands, and the claim that nobody could free lapses by itself."""
        scene, proxy = far()
        result = scene.call("act", name, "wait")
        scene.wait_starts(name)
        if how == "killed":
            locks.kill()
        else:
            proxy.refuse()
        scene.journal.open(name)
        assert result.get(timeout=10) == name
        scene.workers[0].wait_log("until it lapses")
        assert result.state == "SUCCESS"
        locks.start()
        proxy.heal()
        assert scene.claim(name)["owner"] == result.id
        assert scene.call("act", name).duplicate
        scene.wait_free(name, timeout=20)
        assert not scene.call("act", name).duplicate
        scene.wait_starts(name, 2)
        scene.wait_free(name)

    def test_gone_at_the_start(self, far: Callable[..., tuple[Scene, Proxy]], name: str) -> None:
        """The message waits until the lock Redis answers: no failure, no attempt used up."""
        scene, proxy = far()
        result = scene.call("act", name, queue=name)
        proxy.refuse()
        scene.release(name)
        scene.workers[0].wait_log(f"{result.id}.* set aside")
        assert scene.starts(name) == 0
        assert result.state in ("PENDING", "STARTED")
        proxy.heal()
        assert result.get(timeout=15) == name
        (started,) = scene.journal.events("start", name=name)
        assert started.data["attempt"] == 0
        scene.wait_free(name)

    def test_gone_at_the_start_and_not_waited_for(
        self, far: Callable[..., tuple[Scene, Proxy]], name: str
    ) -> None:
        """With "proceed" the task runs unguarded, and the log says so."""
        scene, proxy = far(reliable_on_store_error="proceed")
        proxy.refuse()
        result = scene.call("act", name)
        assert result.get(timeout=10) == name
        scene.workers[0].wait_log(f"{result.id}\\] runs without a claim")

    def test_gone_at_a_retry(self, far: Callable[..., tuple[Scene, Proxy]], name: str) -> None:
        """A retry that cannot keep its claim is not dropped: the attempt is repeated later."""
        scene, proxy = far()
        result = scene.call("act", name, "wait_and_retry")
        scene.wait_starts(name)
        proxy.refuse()
        scene.journal.open(name)
        scene.workers[0].wait_log("its retry could not be published", timeout=15)
        proxy.heal()
        assert result.get(timeout=25) == name
        attempts = [event.data["attempt"] for event in scene.journal.events("start", name=name)]
        assert attempts == [0, 0, 1]
        scene.wait_free(name)

    def test_broker_restarted_while_a_task_runs(self, scenes: StartScene, name: str) -> None:
        """The worker comes back to a broker that kept what it had, and the task ends once."""
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        with EmbeddedServer(args=durable) as server, EmbeddedServer() as results:
            scene = scenes(server.url, results.url)
            scene.worker()
            result = scene.call("act", name, "wait")
            scene.wait_starts(name)
            server.kill()
            server.start()
            scene.journal.open(name)
            assert result.get(timeout=60) == name
            scene.wait_free(name, timeout=40)
            scene.stop_workers()

    @pytest.mark.parametrize("task", ["act", "while_executing", "until_and_while_executing"])
    @pytest.mark.parametrize("where", ["the broker's Redis", "beside RabbitMQ"])
    def test_what_ends_while_nobody_answers_leaves_no_claim(
        self,
        request: pytest.FixtureRequest,
        module_redis: EmbeddedServer,
        scenes: StartScene,
        locks: EmbeddedServer,
        name: str,
        task: str,
        where: str,
    ) -> None:
        """Its worker frees it when the Redis is back that knows the run by its lease."""
        is_one = where == "the broker's Redis"
        broker = locks.url if is_one else str(request.getfixturevalue("rabbitmq_url"))
        settings = {} if is_one else {"reliable_redis_url": locks.url}
        scene = scenes(broker, other_database(module_redis), settings=settings, limit=60)
        worker = scene.worker()
        result = scene.call(task, name, "wait")
        scene.wait_starts(name)
        locks.kill()
        scene.journal.open(name)
        assert result.get(timeout=20) == name
        worker.wait_log("may stay until it lapses", timeout=20)
        locks.start()
        wait_until(lambda: not scene.claims.names(), 20, lambda: f"no claim\n{scene.logs}")
        again = scene.call(task, name)
        assert not again.duplicate
        assert again.get(timeout=20) == name
