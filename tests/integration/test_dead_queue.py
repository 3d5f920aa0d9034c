"""Dead letters of an app on RabbitMQ alone: real workers, and the queue that they are in."""

from __future__ import annotations

import time
from typing import Any

import pytest
from click.testing import CliRunner
from kombu import Producer, Queue
from kombu.exceptions import OperationalError

from reliable_tasks import DeadLetterError, PoisonPill, dead_letters
from reliable_tasks._celery.queues import DEAD, dead_queue
from reliable_tasks._cli import reliable
from reliable_tasks._dead.queue import bury_in_queue
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from tests.integration.apps import poison
from tests.integration.conftest import StartScene
from tests.integration.scene import Scene
from tests.support import RabbitMQServer, wait_until


@pytest.fixture
def bare(scenes: StartScene, rabbitmq_url: str) -> Scene:
    """The app of crashes on RabbitMQ alone."""
    scene = scenes(rabbitmq_url, "rpc://", module=poison)
    scene.worker(concurrency=1)
    return scene


def in_order(scene: Scene, count: int) -> list[dead_letters.DeadLetter]:
    """Wait until so many letters are in the queue, and return them in its order."""
    app = scene.app
    wait_until(lambda: dead_letters.count(app=app) == count, 30, lambda: f"{count}\n{scene.logs}")
    return list(dead_letters.list(app=app))


def test_the_brokers_count_is_the_cap(bare: Scene) -> None:
    """It ends as a poison pill, and its message lies in a quorum queue."""
    result = bare.call("crash", "poison", "sigkill")
    # Celery 5.6 takes its connection for lost after each second in which no result comes, and the
    # queue of results is gone with that. So a result is asked for when it is there.
    (letter,) = in_order(bare, 1)
    with pytest.raises(PoisonPill):
        result.get(timeout=10)
    assert bare.starts("poison") == 3
    assert (letter.task_id, letter.cause) == (result.id, "poison")
    queues = bare.app.amqp.queues["celery"].queue_arguments
    assert queues["x-dead-letter-exchange"] == "reliable.dead"
    assert queues["x-delivery-limit"] >= 30


def test_what_goes_back_is_no_crash(bare: Scene) -> None:
    """The count of the one crash goes with the message, once."""
    result = bare.call("waver", "order", "sigkill", "requeue", "requeue", "requeue")
    wait_until(lambda: f"waver[{result.id}] succeeded" in bare.logs, 40, lambda: bare.logs)
    assert result.get(timeout=10) == "order"
    assert bare.starts("order") == 5


def test_the_count_goes_on_with_what_a_task_goes_on_with(bare: Scene) -> None:
    """Each of its messages is counted by itself, and what it was until then goes with the next."""
    ways = ("sigkill", "retry", "sigkill", "requeue", "replace", "sigkill")
    result = bare.call("waver", "poison", *ways)
    (letter,) = in_order(bare, 1)
    assert (letter.task_id, letter.cause, letter.crashes) == (result.id, "poison", 3), bare.logs
    assert bare.starts("poison") == len(ways)


def test_letters_are_worked_off_in_order(bare: Scene) -> None:
    """List, replay and purge work; what needs an index is refused with the reason."""
    for name in ("a", "b", "c"):
        bare.call("fail", name)
        in_order(bare, "abc".index(name) + 1)
    letters = in_order(bare, 3)
    assert [one.argsrepr for one in letters] == ["('a',)", "('b',)", "('c',)"]
    for refused in (
        lambda: dead_letters.get(letters[0].id, app=bare.app),
        lambda: dead_letters.replay(letters[0].id, app=bare.app),
        lambda: dead_letters.discard(letters[0].id, app=bare.app),
        lambda: dead_letters.count(task="fail", app=bare.app),
        lambda: list(dead_letters.list(replayed=True, app=bare.app)),
    ):
        with pytest.raises(DeadLetterError, match="in its order alone"):
            refused()
    for name in ("a", "b"):
        bare.journal.write("mended", name=name)
    outcome = dead_letters.replay_all(limit=1, app=bare.app)
    assert list(outcome.sent) == [letters[0].id]
    assert [one.id for one in in_order(bare, 2)] == [letters[1].id, letters[2].id]
    outcome = dead_letters.replay_all(lambda one: "b" in one.argsrepr, app=bare.app)
    assert list(outcome.sent) == [letters[1].id]
    wait_until(lambda: bare.starts("a") == bare.starts("b") == 2, 20, lambda: bare.logs)
    assert dead_letters.purge(app=bare.app) == 1
    assert in_order(bare, 0) == []


def test_what_no_worker_can_run_is_kept_once(bare: Scene) -> None:
    """A message of an unknown task, one that cannot be decoded, and one that is rejected."""
    gone = bare.send("shop.gone", 1)
    bare.send_garbage("innocent", "garbage")
    in_order(bare, 2)
    rejected = bare.call("dropped", "order")
    letters = in_order(bare, 3)
    assert [(one.task_id, one.cause) for one in letters] == [
        (gone.id, "unknown_task"),
        ("garbage", "undecodable"),
        (rejected.id, "rejected"),
    ]


def test_what_rabbitmq_drops_by_itself_is_kept(bare: Scene) -> None:
    """A consumer of another kind rejects a message: it is there as it was, with the reason."""
    bare.workers[0].stop()
    bare.call("innocent", "order")
    with bare.app.connection_for_read() as connection:
        queue = bare.app.amqp.queues["celery"](connection.default_channel)
        message = wait_until(lambda: queue.get(no_ack=False), 10)
        message.reject(requeue=False)
    (letter,) = in_order(bare, 1)
    assert (letter.task, letter.cause, letter.queue) == ("innocent", "rejected", "celery")
    assert abs(letter.at - time.time()) < 60
    bare.worker(concurrency=1)
    (new_id,) = dead_letters.replay_all(app=bare.app).sent.values()
    wait_until(lambda: bare.journal.events("start", id=new_id), 20, lambda: bare.logs)


@pytest.mark.parametrize("what", ["queue", "queue and exchange"])
def test_a_queue_that_is_deleted_is_made_anew(bare: Scene, what: str) -> None:
    """An operator does so; the letters after that are kept, and the worker goes on."""
    bare.call("fail", "a")
    in_order(bare, 1)
    with bare.app.connection_for_write() as connection:
        connection.default_channel.queue_delete(DEAD)
        if what == "queue and exchange":
            connection.default_channel.exchange_delete(DEAD)
    result = bare.call("fail", "b")
    # Not counted before: whoever counts declares the queue.
    wait_until(lambda: f"it is dead letter {result.id}" in bare.logs, 30, lambda: bare.logs)
    (letter,) = in_order(bare, 1)
    assert letter.task_id == result.id
    bare.call("innocent", "c")
    bare.wait_starts("c")


def test_what_gets_into_no_queue_is_not_kept(
    scenes: StartScene, rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the queue is deleted in between."""
    app = scenes(rabbitmq_url, "rpc://", module=poison).app
    with app.connection_for_write() as connection:
        dead_queue().exchange(connection.default_channel).declare()
    monkeypatch.setattr(Queue, "declare", lambda *args, **options: None)
    about = DeadLetter(id="one", task="fail", task_id="one", cause=Cause.FAILED, error="no")
    with pytest.raises(OperationalError, match="NO_ROUTE"):
        bury_in_queue(app, Letter(about, b"{}", Bounds(60, 10, 10)))


def test_a_queue_that_refuses_letters_stops_nobody(
    scenes: StartScene, rabbitmq_server: RabbitMQServer, rabbitmq_url: str
) -> None:
    """An operator has bounded it: the message waits until it can be kept; its task ran once."""
    scene = scenes(rabbitmq_url, "rpc://", module=poison)
    # RabbitMQ hands out no more at once than can run; one place is that message's.
    scene.worker(concurrency=2)
    scene.call("fail", "a")
    in_order(scene, 1)
    vhost = rabbitmq_url.rpartition("/")[2]
    policy = f"policies/{vhost}/bounded"
    bound = {"max-length": 1, "overflow": "reject-publish"}
    rabbitmq_server.request("PUT", policy, {"pattern": DEAD, "definition": bound})

    def refused() -> str:
        """Have a task fail; return its id if its letter is refused, which RabbitMQ begins late."""
        id_ = scene.call("fail", "b").id
        wait_until(
            lambda: f"it is dead letter {id_}" in scene.logs or refusal(id_) in scene.logs,
            20,
            lambda: scene.logs,
        )
        return id_ if refusal(id_) in scene.logs else ""

    def refusal(id_: str) -> str:
        return f"Task fail[{id_}] cannot be kept as a dead letter yet, trying again in 1 s: queue"

    id_ = wait_until(refused, 30, lambda: scene.logs)
    scene.call("innocent", "c")
    scene.wait_starts("c")
    rabbitmq_server.request("DELETE", policy)
    dead_letters.purge(app=scene.app)
    wait_until(lambda: f"it is dead letter {id_}" in scene.logs, 30, lambda: scene.logs)
    (letter,) = in_order(scene, 1)
    assert letter.task_id == id_
    assert len(scene.journal.events("start", id=id_)) == 1
    with scene.app.connection_for_read() as connection:
        queue = scene.app.amqp.queues["celery"](connection.default_channel)
        assert queue.get() is None


#: Headers and bodies that nobody expects there.
STRANGE: list[tuple[dict[str, Any], bytes]] = [
    ({"id": "counts", "task": "innocent", "retries": "many", "x-death": ["?"]}, b'[["a"], {}, {}]'),
    ({"id": "packed", "task": "innocent", "compression": "zlib"}, b"not packed"),
    ({"reliable-dead-letter": "x"}, b"\xff\x00 from elsewhere"),
    ({}, b""),
]


def test_strange_messages_hide_no_others(bare: Scene) -> None:
    """They are listed, told to be refused, and purged; whoever looks changes nothing."""
    bare.call("fail", "a")
    in_order(bare, 1)
    with bare.app.connection_for_write() as connection:
        for headers, body in STRANGE:
            Producer(connection).publish(
                body,
                content_type="application/json",
                content_encoding="utf-8",
                exchange=dead_queue().exchange,
                routing_key=DEAD,
                headers=headers,
            )
    bare.call("fail", "b")
    letters = in_order(bare, 6)
    assert [one.cause for one in letters] == [
        "failed",
        "rejected",
        "undecodable",
        "undecodable",
        "rejected",
        "failed",
    ]
    assert [one.id for one in in_order(bare, 6)] == [one.id for one in letters]
    result = CliRunner().invoke(reliable, ["dead", "replay", "--all", "--dry-run"], obj=bare)
    assert "3 would be sent, 3 would be refused" in result.stderr, result.output
    assert bare.starts("a") == 1
    for name in ("a", "b"):
        bare.journal.write("mended", name=name)
    outcome = dead_letters.replay_all(app=bare.app)
    assert list(outcome.sent) == [letters[0].id, "counts", letters[5].id]
    assert list(outcome.refused) == [one.id for one in letters[2:5]]
    wait_until(lambda: bare.starts("b") == 2, 20, lambda: bare.logs)
    in_order(bare, 3)
    purged = CliRunner().invoke(reliable, ["dead", "purge", "--yes"], obj=bare)
    assert purged.stdout == "removed 3 dead letters\n", purged.output
