"""RabbitMQ as the broker: quorum queues and confirms, with a Redis beside it for the claims."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from kombu.exceptions import OperationalError

from reliable_tasks import ConfigError
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import shop
from tests.integration.conftest import StartScene
from tests.integration.scene import Scene
from tests.support import Proxy, RabbitMQServer, wait_until

Record = Callable[[str, object], None]


@pytest.fixture
def scene(scenes: StartScene, rabbitmq_url: str, redis_url: str) -> Scene:
    """An app on a virtual host of its own, whose results are kept in the Redis of its claims."""
    return scenes(rabbitmq_url, redis_url)


def test_queues_are_quorum_queues(
    scene: Scene, rabbitmq_server: RabbitMQServer, rabbitmq_url: str
) -> None:
    """The default queue and one that Celery makes by itself; and publishes are confirmed."""
    scene.worker(args=["-Q", "celery,extra"])
    scene.call("sleep", "one", queue="extra").get(timeout=15)
    queues = {
        queue["name"]: queue["type"]
        for queue in rabbitmq_server.queues(rabbitmq_url.rpartition("/")[2])
    }
    assert queues["celery"] == "quorum"
    assert queues["extra"] == "quorum"
    assert scene.app.conf.broker_transport_options["confirm_publish"] is True


def test_a_task_runs_with_its_claim_and_frees_it(scene: Scene) -> None:
    """The key is held in the Redis of the results, joined by duplicates, and free afterwards."""
    scene.worker()
    result = scene.call("act", "order", "wait")
    scene.wait_starts("order")
    assert scene.claim("order")["owner"] == result.id
    assert scene.call("act", "order").id == result.id
    scene.journal.open("order")
    assert result.get(timeout=15) == "order"
    scene.wait_free("order")
    assert scene.starts("order") == 1


def test_claims_can_live_in_a_redis_of_their_own(
    scenes: StartScene, rabbitmq_url: str, redis_url: str, result_url: str
) -> None:
    """reliable_redis_url names it, and nothing of a claim is written elsewhere."""
    scene = scenes(rabbitmq_url, result_url, settings={"reliable_redis_url": redis_url})
    scene.worker()
    result = scene.call("act", "order", "wait")
    scene.wait_starts("order")
    assert scene.claims.client.redis.keys("reliable:claim:*")
    assert scene.call("act", "order").duplicate
    scene.journal.open("order")
    assert result.get(timeout=15) == "order"
    scene.wait_free("order")


def test_once_without_a_redis_is_refused(rabbitmq_url: str) -> None:
    """Without any Redis a call says what to set."""
    app = shop.build(rabbitmq_url, None)
    with pytest.raises(ConfigError, match="reliable_redis_url"):
        app.tasks["act"].delay("order")
    app.close()


@pytest.mark.parametrize("what", ["child", "worker"])
def test_killed_tasks_run_once_more(
    scenes: StartScene,
    rabbitmq_url: str,
    redis_url: str,
    record_testsuite_property: Record,
    what: str,
) -> None:
    """RabbitMQ gives a dead worker's messages to another as soon as its connection is gone."""
    # It runs on until the second worker is there, however slow the machine.
    scene = scenes(rabbitmq_url, redis_url, limit=30)
    scene.worker(concurrency=2)
    claimed = scene.call("act", "claimed", "wait")
    bare = scene.call("bare", "bare", "wait")
    scene.wait_starts("claimed")
    scene.wait_starts("bare")
    scene.worker(concurrency=2)
    if what == "child":
        for name in ("claimed", "bare"):
            (started,) = scene.journal.events("start", name=name)
            os.kill(started.pid, signal.SIGKILL)
    else:
        scene.workers[0].kill_group()
    killed = time.time()
    # Celery sees a death at once, or when it looks: each 5 s. The claim of a dead worker's task is
    # covered by the lease of its run, which ends with the worker.
    for name, within in (("bare", 8), ("claimed", 8 if what == "child" else 16)):
        seconds = scene.wait_starts(name, 2, timeout=25) - killed
        record_testsuite_property(f"RabbitMQ, {what}: seconds to restart {name}", round(seconds, 2))
        assert seconds < within, scene.logs
    for name in ("claimed", "bare"):
        scene.journal.open(name)
    assert [bare.get(timeout=15), claimed.get(timeout=15)] == ["bare", "claimed"]
    scene.wait_free("claimed")
    assert [scene.starts("bare"), scene.starts("claimed")] == [2, 2]
    assert not scene.call("act", "claimed").duplicate


def test_a_copy_that_waits_does_not_stop_its_worker(
    scenes: StartScene, rabbitmq_url: str, redis_url: str
) -> None:
    """With quorum queues a worker cannot fetch more while it holds a message that must wait."""
    scene = scenes(rabbitmq_url, redis_url)
    waits = scene.call("act", "waits")
    scene.run_elsewhere("waits", waits.id)
    worker = scene.worker(concurrency=1)
    worker.wait_log(f"{waits.id}.* set aside", timeout=15)
    assert scene.call("act", "other").get(timeout=20) == "other"
    scene.let_go_elsewhere("waits", waits.id)
    assert waits.get(timeout=30) == "waits"
    scene.wait_free("waits")
    assert scene.starts("waits") == 1


def test_a_broker_that_dies_raises_and_keeps_the_key_from_nobody(
    scenes: StartScene, rabbitmq_server: RabbitMQServer, rabbitmq_url: str, redis_url: str
) -> None:
    """What was written to the connection that it closed may have been read: that is in doubt."""
    with Proxy(rabbitmq_server.port) as proxy:
        url = rabbitmq_url.replace(f":{rabbitmq_server.port}/", f":{proxy.port}/")
        scene = scenes(url, redis_url)
        scene.call("act", "warm-up")
        proxy.refuse()
        begun = time.monotonic()
        with pytest.raises(OperationalError):
            scene.call("act", "order")
        assert time.monotonic() - begun < 20
        first = scene.claim("order")
        assert first["unconfirmed"] == first["owner"]
        proxy.heal()
        second = scene.call("act", "order")
        assert (second.duplicate, second.replaced_id) == (False, first["owner"])


def test_a_broker_that_was_never_there_leaves_no_claim(
    scenes: StartScene, rabbitmq_server: RabbitMQServer, rabbitmq_url: str, redis_url: str
) -> None:
    """Nothing was sent: the claim that was taken before is given back."""
    with Proxy(rabbitmq_server.port) as proxy:
        proxy.refuse()
        url = rabbitmq_url.replace(f":{rabbitmq_server.port}/", f":{proxy.port}/")
        scene = scenes(url, redis_url)
        with pytest.raises(OperationalError):
            scene.call("act", "order")
        assert scene.claim("order") == {}


def test_a_countdown_is_kept_by_the_broker(scene: Scene) -> None:
    """Native delayed delivery: a message with an ETA waits in RabbitMQ, in no worker."""
    scene.worker()
    called = time.time()
    result = scene.call("act", "later", countdown=2)
    assert scene.call("act", "later").id == result.id
    started = scene.wait_starts("later")
    assert 2 <= started - called < 6
    assert result.get(timeout=15) == "later"
    scene.wait_free("later")


def test_a_sub_second_retry_is_not_early(scene: Scene) -> None:
    """A policy's waits are kept, the sub-second part too."""
    scene.worker()
    assert scene.call("flaky", "steady", 3).get(timeout=30) == 3
    starts = scene.journal.events("start", name="steady")
    ends = scene.journal.events("end", name="steady")
    assert [event.data["attempt"] for event in starts] == [0, 1, 2, 3]
    for number, wait in enumerate(shop.WAITS):
        assert starts[number + 1].at - ends[number].at >= wait, scene.logs
        assert starts[number + 1].at - ends[number].at < wait + 2.5
    scene.wait_free("steady", 3, task="flaky")


def test_a_message_set_aside_comes_back(scene: Scene) -> None:
    """A copy whose other copy runs waits without a slot, and runs when it can."""
    result = scene.call("act", "order")
    scene.run_elsewhere("order", result.id)
    worker = scene.worker()
    worker.wait_log(f"{result.id}.* set aside", timeout=15)
    scene.let_go_elsewhere("order", result.id)
    assert result.get(timeout=15) == "order"
    assert scene.starts("order") == 1


def test_a_worker_lives_through_a_lost_connection(
    scenes: StartScene, rabbitmq_server: RabbitMQServer, rabbitmq_url: str, redis_url: str
) -> None:
    """A running task runs on, also one with a claim, and no copy of it is started."""
    with Proxy(rabbitmq_server.port) as proxy:
        url = rabbitmq_url.replace(f":{rabbitmq_server.port}/", f":{proxy.port}/")
        scene = scenes(url, redis_url, limit=20)
        worker = scene.worker(concurrency=2)
        result = scene.call("act", "order", "wait")
        scene.wait_starts("order")
        proxy.cut()
        worker.wait_log(rf"{result.id}\] runs here", timeout=30)
        scene.journal.open("order")
        assert result.get(timeout=15) == "order"
        scene.wait_free("order")
        assert scene.starts("order") == 1, scene.logs
        scene.stop_workers()


def test_nothing_is_left_in_the_queues(
    scene: Scene, rabbitmq_server: RabbitMQServer, rabbitmq_url: str
) -> None:
    """Every way to end acknowledges the message."""
    scene.worker()
    for what in ("succeed", "fail", "ignore", "reject", "retry", "requeue", "replace_same"):
        scene.call("act", what, what)
    for what in ("succeed", "fail", "ignore", "reject", "retry", "requeue", "replace_same"):
        scene.wait_starts(what, 2 if what in ("retry", "requeue", "replace_same") else 1)
        scene.wait_free(what, what)
    vhost = rabbitmq_url.rpartition("/")[2]
    scene.stop_workers()

    def left() -> dict[str, int]:
        queues = rabbitmq_server.queues(vhost)
        return {q["name"]: q["messages"] for q in queues if q.get("messages")}

    wait_until(lambda: not left(), 15, lambda: f"empty queues, not {left()}")


def test_the_lock_redis_can_be_the_only_redis(
    scenes: StartScene, rabbitmq_url: str, redis_server: EmbeddedServer
) -> None:
    """Without a result backend tasks run and free their keys all the same."""
    scene = scenes(rabbitmq_url, None, settings={"reliable_redis_url": redis_server.url})
    scene.worker()
    scene.call("act", "order")
    scene.wait_starts("order")
    scene.wait_free("order")
