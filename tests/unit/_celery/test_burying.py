"""A task that has failed for good is kept as a dead letter when its message is ended."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import Celery, chord
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state as worker_state
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from reliable_tasks import DuplicateTaskError, ReliableTask, dead_letters
from reliable_tasks._broker.beside import Beside
from reliable_tasks._broker.held import Held
from reliable_tasks._celery.queues import keep_what_is_dropped
from reliable_tasks._celery.request import ReliableRequest
from reliable_tasks._dead import keeping
from reliable_tasks._dead.queue import Queued, bury_in_queue
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.delivery import Layout
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.letters import Letter
from reliable_tasks._store.messages import Messages
from tests.conformance.broker import Broker
from tests.unit._celery.bench import Bench, failure

LEASE = 15.0


@pytest.fixture(autouse=True)
def nothing_runs() -> Iterator[None]:
    """Leave no task behind."""
    yield
    worker_state.active_requests.clear()


@pytest.fixture
def pay(app: Celery) -> Any:
    """A task."""

    @app.task(base=ReliableTask, name="shop.pay", throws=(KeyError,))
    def pay(n: int = 0) -> int:
        return n

    @app.task(base=ReliableTask, name="shop.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    return app.tasks["shop.pay"]


def causes(app: Celery) -> list[str]:
    """Why the dead letters are there, the oldest first."""
    return [str(one.cause) for one in dead_letters.list(oldest_first=True, app=app)]


# -- on a broker without leases ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "return_ok", "cause", "ended"),
    [
        (ValueError("no"), True, "failed", "ack"),
        (Reject("no", requeue=False), True, "rejected", "reject"),
        (TimeLimitExceeded(60), False, "time_limit", "ack"),
    ],
    ids=["failed", "rejected", "time limit"],
)
def test_a_task_that_has_failed_is_kept(
    bench: Bench, app: Celery, pay: Any, error: Exception, return_ok: bool, cause: str, ended: str
) -> None:
    """Before its message is ended; the letter says what it failed with."""
    result = pay.delay(7)
    bench.receive().on_failure(failure(error), return_ok=return_ok)
    letter = dead_letters.get(result.id, app=app)
    assert (letter.cause, letter.task, letter.argsrepr) == (cause, "shop.pay", "(7,)")
    assert letter.error.startswith(type(error).__name__)
    assert type(error).__name__ in letter.traceback
    assert bench.ended == [ended]


def test_a_task_that_ran_out_of_memory_is_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """Of Celery's main process it is no end."""
    pay.delay(7)
    bench.receive().on_failure(failure(MemoryError("too large")), return_ok=True)
    (letter,) = dead_letters.list(app=app)
    assert (letter.cause, letter.error) == ("failed", "MemoryError: too large")
    assert bench.ended == ["ack"]


@pytest.mark.parametrize(
    "error",
    [
        Retry(),
        Ignore(),
        Terminated(9),
        Reject("later", requeue=True),
        KeyError("expected"),
        DuplicateTaskError("key", "other", 1.0),
    ],
    ids=repr,
)
def test_a_task_that_has_not_failed_is_not_kept(
    bench: Bench, app: Celery, pay: Any, error: Exception
) -> None:
    """It goes on, is left alone, was killed by somebody, or was expected to end so."""
    pay.delay(7)
    bench.receive().on_failure(failure(error), return_ok=True)
    assert bench.ended
    assert causes(app) == []


def test_a_failure_that_its_handler_ignores_is_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """It has escaped from the child, whose task has failed."""
    pay.delay(7)
    bench.receive().on_failure(failure(Ignore()), return_ok=False)
    assert (bench.ended, causes(app)) == (["ack"], ["failed"])


def test_a_success_is_not_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """Nothing is asked of the Redis for it."""
    pay.delay(7)
    bench.receive().on_success((False, 7, 0.1))
    assert bench.ended == ["ack"]
    assert causes(app) == []


def test_a_lost_child_that_goes_back_is_not_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """It runs again."""
    pay.delay(7)
    bench.receive().on_failure(failure(WorkerLostError("gone")))
    assert (bench.ended, causes(app)) == (["requeue"], [])


def test_a_lost_child_that_does_not_go_back_is_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """Where the task says so."""
    pay.reject_on_worker_lost = False
    pay.delay(7)
    bench.receive().on_failure(failure(WorkerLostError("gone")))
    assert (bench.ended, causes(app)) == (["ack"], ["lost"])


def test_a_lost_child_whose_task_had_succeeded_is_not_kept(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """It died behind its result: Celery says that it succeeded."""
    pay.delay(7)
    request = bench.receive()
    request.delivery_info["redelivered"] = True
    pay.reject_on_worker_lost = False
    pay.backend.store_result(request.id, 7, "SUCCESS")
    request.send_event("task-succeeded", result="7")
    request.on_failure(failure(WorkerLostError("gone")))
    assert bench.ended == ["ack"]
    assert causes(app) == []


def test_a_failure_that_is_told_by_the_limit_alone_is_kept(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """Of gevent's pool nothing else is heard."""
    pay.delay(7)
    request = bench.receive()
    request.on_accepted(os.getpid(), time.time())
    request.on_timeout(soft=False, timeout=60)
    assert (bench.ended, causes(app)) == (["ack"], ["time_limit"])


def test_a_limit_that_was_told_before_is_one_letter(bench: Bench, app: Celery, pay: Any) -> None:
    """In prefork both are told."""
    pay.delay(7)
    request = bench.receive()
    request.on_accepted(os.getpid(), time.time())
    request.on_failure(failure(TimeLimitExceeded(60)))
    request.on_timeout(soft=False, timeout=60)
    assert causes(app) == ["time_limit"]


@pytest.mark.parametrize(
    ("error", "acks", "ended", "cause"),
    [
        (WorkerLostError("gone"), True, "ack", "lost"),
        (WorkerLostError("gone"), False, "reject", "lost"),
        # Before Celery 5.7 it is this library that stores it.
        (Reject("no", requeue=False), True, "reject", "rejected"),
    ],
    ids=["lost", "lost, and rejected", "rejected"],
)
def test_a_task_whose_end_is_stored_at_a_later_try_is_one_letter(
    bench: Bench,
    app: Celery,
    pay: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    acks: bool,
    ended: str,
    cause: str,
) -> None:
    """Nor is its message ended before."""
    pay.reject_on_worker_lost = False
    # The second is the name that Celery 5.7 goes by.
    pay.acks_on_failure_or_timeout = pay.acks_on_failure = acks
    pay.delay(7)
    request = bench.receive()

    def away(*args: Any, **options: Any) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(pay.backend), "mark_as_failure", away)
        request.on_failure(failure(error), return_ok=isinstance(error, Reject))
        bench.timer.fire()
        assert (bench.ended, causes(app)) == ([], [])
    bench.timer.fire()
    assert (bench.ended, causes(app)) == ([ended], [cause])
    assert pay.AsyncResult(request.id).state == "FAILURE"


@pytest.mark.parametrize("error", [Reject("no", requeue=False), WorkerLostError("gone")], ids=repr)
def test_an_end_that_no_backend_can_store_ends_the_message(
    bench: Bench, app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It would be held for as long as its worker lives."""
    pay.reject_on_worker_lost = False
    pay.delay(7)

    def refuse(*args: Any, **options: Any) -> None:
        raise TypeError("not storable")

    monkeypatch.setattr(type(pay.backend), "mark_as_failure", refuse)
    bench.receive().on_failure(failure(error))
    assert bench.ended == ["ack"]
    assert len(causes(app)) == 1


def test_an_early_ack_is_kept_after_it(bench: Bench, app: Celery, pay: Any) -> None:
    """Its message is gone, its letter is not."""
    pay.acks_late = False
    pay.delay(7)
    request = bench.receive()
    request.acknowledge()
    assert causes(app) == []
    request.acknowledged = True
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert causes(app) == ["failed"]


@pytest.mark.parametrize(("option", "kept"), [(True, []), ({"expired": True}, ["expired"])])
def test_an_expired_task_is_kept_if_asked(
    bench: Bench, app: Celery, option: Any, kept: list[str]
) -> None:
    """By default it is not: it has not failed."""

    @app.task(base=ReliableTask, name="shop.late", dead_letter=option)
    def late() -> None:
        pass

    app.tasks["shop.late"].apply_async(expires=0.001)
    request = bench.receive()
    request._expires = request._expires.replace(year=2000)
    assert request.revoked()
    assert (bench.ended, causes(app)) == (["ack"], kept)


def test_a_revoked_task_is_not_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """Somebody did not want it."""
    result = pay.delay(7)
    request = bench.receive()
    worker_state.revoked.add(result.id)
    assert request.revoked()
    assert (bench.ended, causes(app)) == (["ack"], [])


def test_a_task_that_is_not_to_be_kept_is_not(bench: Bench, app: Celery) -> None:
    """``dead_letter=False`` of the task."""

    @app.task(base=ReliableTask, name="shop.cheap", dead_letter=False)
    def cheap() -> None:
        pass

    app.tasks["shop.cheap"].delay()
    bench.receive().on_failure(failure(ValueError("no")), return_ok=True)
    assert (bench.ended, causes(app)) == (["ack"], [])


def test_an_error_about_the_letter_does_not_end_the_worker(
    bench: Bench, app: Celery, pay: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the message is kept all the same, and ended as always."""
    pay.delay(7)
    request = bench.receive()
    pay.throws = ("no class",)
    request._note_failure(ValueError("no"), None)
    request.acknowledge()
    assert bench.ended == ["ack"]
    assert f"Task shop.pay[{request.id}] has failed, and little is kept" in caplog.text
    (letter,) = dead_letters.list(app=app)
    assert (letter.id, letter.cause, letter.task) == (request.id, "failed", "shop.pay")
    assert letter.error.startswith("ValueError (more could not be told")
    pay.throws = ()
    assert dead_letters.replay(letter.id, app=app)
    assert bench.receive().args == [7]


@pytest.mark.parametrize("error", [ValueError("no"), Reject("no", requeue=False)], ids=repr)
def test_what_cannot_be_kept_is_rejected(
    bench: Bench,
    app: Celery,
    pay: Any,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RabbitMQ has a place for what is rejected; and the log has all of it."""

    def away(*args: Any, **options: Any) -> Any:
        raise OSError("away")

    monkeypatch.setattr(DeadStore, "bury", away)
    pay.delay(7)
    bench.receive().on_failure(failure(error), return_ok=True)
    assert bench.ended == ["reject"]
    assert "cannot be kept as a dead letter" in caplog.text


def test_what_was_acknowledged_before_is_not_rejected(
    bench: Bench, app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its broker knows no such message any more."""

    def away(*args: Any, **options: Any) -> Any:
        raise OSError("away")

    monkeypatch.setattr(DeadStore, "bury", away)
    pay.acks_late = False
    pay.delay(7)
    request = bench.receive()
    request.acknowledge()
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert bench.ended == ["ack"]


@pytest.mark.parametrize(
    ("is_quorum", "is_kept", "ended"),
    [(True, True, "ack"), (True, False, "reject"), (False, True, "reject")],
)
def test_a_rejected_task_is_not_kept_twice(
    bench: Bench, app: Celery, pay: Any, is_quorum: bool, is_kept: bool, ended: str
) -> None:
    """RabbitMQ would keep what is rejected of its quorum queues, beside the letter."""
    keep_what_is_dropped(app)
    kind = "quorum" if is_quorum else "classic"
    app.conf.task_queues = [Queue("celery", queue_arguments={"x-queue-type": kind})]
    app.conf.reliable_dead_letter = is_kept
    type(pay).bind(app)
    pay.delay(7)
    told: list[str] = []
    request = bench.receive()
    request.eventer = SimpleNamespace(enabled=True, send=lambda name, **_: told.append(name))
    request.on_failure(failure(Reject("no", requeue=False)), return_ok=True)
    assert bench.ended == [ended]
    assert causes(app) == (["rejected"] if is_kept else [])
    assert told.count("task-rejected") == 1


def test_a_queue_whose_routing_key_is_not_its_name_keeps_it_once_too(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """RabbitMQ says by which exchange and which key a message came."""
    keep_what_is_dropped(app)
    exchange = Exchange("shop", type="topic")
    quorum = {"x-queue-type": "quorum"}
    app.conf.task_queues = [
        Queue("orders", exchange, "order.*", queue_arguments=quorum),
        Queue("order.created", exchange, "other"),
    ]
    pay.delay(7)
    request = bench.receive(delivery_info={"exchange": "shop", "routing_key": "order.created"})
    request.on_failure(failure(Reject("no", requeue=False)), return_ok=True)
    assert (bench.ended, causes(app)) == (["ack"], ["rejected"])
    (letter,) = dead_letters.list(app=app)
    assert letter.queue == "orders"
    # Not to that which has the name of the key.
    new_id = dead_letters.replay(letter.id, app=app)
    with app.connection_for_read() as connection:
        queues: Any = app.amqp.queues
        sent = queues["orders"](connection.default_channel).get(no_ack=True)
        assert sent.headers["id"] == new_id


def test_a_rejected_task_that_was_acknowledged_is_ended_once(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """Its early ack was first."""
    keep_what_is_dropped(app)
    app.conf.task_queues = [Queue("celery", queue_arguments={"x-queue-type": "quorum"})]
    pay.acks_late = False
    pay.delay(7)
    request = bench.receive()
    request.acknowledge()
    request.on_failure(failure(Reject("no", requeue=False)), return_ok=True)
    assert (bench.ended, causes(app)) == (["ack"], ["rejected"])


# -- on RabbitMQ alone ---------------------------------------------------------------------------


class Alone:
    """A worker of RabbitMQ alone, whose queue of dead letters can refuse them.

    Attributes:
        refuses: Whether it does.
    """

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses = True
        self._bench = bench
        self.app, self.timer, self.ended = bench.app, bench.timer, bench.ended

        def bury(app: Celery, letter: Letter) -> None:
            if self.refuses:
                raise OperationalError("it refuses")
            bury_in_queue(app, letter)

        monkeypatch.setattr(keeping, "bury_in_queue", bury)

    def receive(self) -> ReliableRequest:
        """Receive the message of a call."""
        self.app.tasks["shop.pay"].delay(7)
        request = self._bench.receive()
        request.message.channel.connection = object()
        return request

    def causes(self) -> list[str]:
        """Why the dead letters are there."""
        return [str(letter.cause) for letter in Queued(self.app).walk()]


@pytest.fixture
def alone(rabbit: Celery, monkeypatch: pytest.MonkeyPatch) -> Alone:
    """A worker of RabbitMQ, and nothing else."""
    keep_what_is_dropped(rabbit)

    @rabbit.task(base=ReliableTask, name="shop.pay")
    def pay(n: int = 0) -> int:
        return n

    bench = Bench(rabbit, monkeypatch)
    bench.start_consumer()
    return Alone(bench, monkeypatch)


@pytest.mark.parametrize(
    ("error", "kind", "ended", "cause"),
    [
        (ValueError("no"), "quorum", "ack", "failed"),
        (Reject("no", requeue=False), "quorum", "ack", "rejected"),
        (Reject("no", requeue=False), "classic", "reject", "rejected"),
    ],
    ids=["failed", "rejected", "rejected of another queue"],
)
def test_a_message_waits_for_a_queue_that_refuses_its_letter(
    alone: Alone,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    kind: str,
    ended: str,
    cause: str,
) -> None:
    """It is not ended before the letter is kept, and that is tried less and less often."""
    alone.app.conf.task_queues = [Queue("celery", queue_arguments={"x-queue-type": kind})]
    request = alone.receive()
    request.on_failure(failure(error), return_ok=True)
    tries = [alone.timer.fire() for _ in range(8)]
    assert tries == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert (alone.ended, alone.causes()) == ([], [])
    told = [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]
    assert told[0] == (
        f"Task shop.pay[{request.id}] cannot be kept as a dead letter yet, trying again in 1 s: "
        "it refuses"
    )
    assert len(told) == 9
    alone.refuses = False
    alone.timer.fire()
    assert (alone.ended, alone.causes(), alone.timer.calls) == ([ended], [cause], [])


def test_an_end_that_is_told_twice_is_one_letter(alone: Alone) -> None:
    """A time limit is, in prefork; the message waits for its letter once."""
    request = alone.receive()
    request.on_accepted(os.getpid(), time.time())
    request.on_failure(failure(TimeLimitExceeded(60)))
    request.on_timeout(soft=False, timeout=60)
    # The other call is that which waits for the child's end.
    assert sorted(seconds for seconds, _ in alone.timer.calls) == [1.0, 1.0]
    for _ in range(2):
        alone.timer.fire()
    assert [seconds for seconds, _ in alone.timer.calls] == [2.0]
    alone.refuses = False
    alone.timer.fire()
    assert (alone.ended, alone.causes(), alone.timer.calls) == (["ack"], ["time_limit"], [])


def test_a_letter_whose_message_went_back_is_not_tried_again(alone: Alone) -> None:
    """Its connection was lost meanwhile: the task runs again."""
    request = alone.receive()
    request.on_failure(failure(ValueError("no")), return_ok=True)
    alone.refuses = False
    request.message.channel.connection = None
    alone.timer.fire()
    assert (alone.ended, alone.causes(), alone.timer.calls) == ([], [], [])
    assert request.acknowledged


def test_an_early_ack_does_not_wait_for_the_queue(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    """Its message is gone: the log has all of it."""
    alone.app.tasks["shop.pay"].acks_late = False
    request = alone.receive()
    request.acknowledge()
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert (alone.ended, alone.timer.calls) == (["ack"], [])
    assert "cannot be kept as a dead letter (it refuses)" in caplog.text


def test_what_no_other_try_can_mend_is_rejected(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be held for as long as its worker lives."""

    def refuse(*args: Any, **options: Any) -> None:
        raise TypeError("no text")

    monkeypatch.setattr(keeping, "bury_in_queue", refuse)
    alone.receive().on_failure(failure(ValueError("no")), return_ok=True)
    assert (alone.ended, alone.timer.calls) == (["reject"], [])


# -- parts of chords -----------------------------------------------------------------------------


def part(bench: Bench, pay: Any) -> ReliableRequest:
    """Receive a part of a chord."""
    chord([pay.s(1), pay.s(2)], pay.app.tasks["shop.total"].s()).apply_async()
    return bench.receive()


def kept_parts(request: ReliableRequest) -> list[str]:
    """The parts of its chord that are kept."""
    place = dead_place(request.app)
    assert place is not None
    return list(place.store.parts(place.server, request.request_dict["group"])[1])


def test_a_part_of_a_chord_that_succeeds_is_kept(bench: Bench, pay: Any) -> None:
    """Another part may die: then all are replayed."""
    request = part(bench, pay)
    request.on_accepted(os.getpid(), time.time())
    request.on_success((False, 7, 0.1))
    assert bench.ended == ["ack"]
    assert kept_parts(request) == [request.id]


def test_a_part_whose_child_was_lost_behind_its_success_is_kept(bench: Bench, pay: Any) -> None:
    """Its chord has counted it."""
    request = part(bench, pay)
    request.on_accepted(os.getpid(), time.time())
    pay.reject_on_worker_lost = False
    pay.backend.store_result(request.id, 7, "SUCCESS")
    request.send_event("task-succeeded", result="7")
    request.on_failure(failure(WorkerLostError("gone")))
    assert bench.ended == ["ack"]
    assert kept_parts(request) == [request.id]


def test_a_part_of_which_little_can_be_told_is_known_as_one(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """Its replay alone would reach no body."""
    request = part(bench, pay)
    pay.throws = ("no class",)
    request._note_failure(ValueError("no"), None)
    request.acknowledge()
    (letter,) = dead_letters.list(app=app)
    assert letter.chord_id == letter.group_id == request.request_dict["group"]
    assert letter.queue == "celery"


def test_a_copy_of_a_part_that_does_not_run_is_not_kept(bench: Bench, pay: Any) -> None:
    """Its task goes on elsewhere, and may die yet."""
    request = part(bench, pay)
    request.acknowledge()
    assert bench.ended == ["ack"]
    assert kept_parts(request) == []


def test_a_part_that_fails_is_kept_as_a_letter(bench: Bench, app: Celery, pay: Any) -> None:
    """And named in its chord."""
    request = part(bench, pay)
    request.on_failure(failure(ValueError("no")), return_ok=True)
    letter = dead_letters.get(request.id, app=app)
    assert letter.chord_id == letter.group_id == request.request_dict["group"]
    assert kept_parts(request) == [request.id]


def test_a_part_that_was_revoked_is_not_kept(bench: Bench, pay: Any) -> None:
    """It has not succeeded."""
    request = part(bench, pay)
    worker_state.revoked.add(request.id)
    assert request.revoked()
    assert kept_parts(request) == []


def test_a_part_with_an_early_ack_is_not_kept(bench: Bench, pay: Any) -> None:
    """It is acknowledged before anybody knows how it ends."""
    pay.acks_late = False
    request = part(bench, pay)
    request.acknowledge()
    assert kept_parts(request) == []


def test_what_is_no_part_of_a_chord_is_not_kept(bench: Bench, app: Celery, pay: Any) -> None:
    """A group alone is replayed member by member."""
    pay.apply_async((7,), group_id="g")
    request = bench.receive()
    request.on_success((False, 7, 0.1))
    assert kept_parts(request) == []


# -- with this library's transport ---------------------------------------------------------------


class Post:
    """What a worker holds of a Redis broker.

    Attributes:
        broker: The broker.
        held: What the worker holds.
    """

    def __init__(self, bench: Bench, pay: Any) -> None:
        self.fake = fakeredis.FakeServer()
        server = fakeredis.FakeRedis(server=self.fake)
        self.broker = Broker(server)
        self.held = Held(self.broker.messages, LEASE, server, server)
        self._bench, self._pay = bench, pay
        bench.consumer.pool = SimpleNamespace(uses_semaphore=True)

    def receive(self) -> ReliableRequest:
        """Receive a message."""
        result = self._pay.delay(7)
        self.broker.publish(result.id)
        delivery = self.broker.fetch_one(self.held.worker, lease=LEASE)
        self.held.take(delivery)
        qos = SimpleNamespace(_quick_ack=lambda tag: None)
        channel = SimpleNamespace(held=self.held, qos=qos)
        return self._bench.receive(channel=channel, delivery_tag=delivery.tag)


@pytest.fixture
def post(bench: Bench, pay: Any) -> Post:
    """A worker of a Redis broker."""
    return Post(bench, pay)


def test_the_step_that_ends_a_delivery_keeps_the_letter(
    bench: Bench, post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a worker that dies has neither lost it nor kept it twice; it is told afterwards."""
    request = post.receive()
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert bench.ended == ["ack"]
    assert post.broker.dead == []
    assert "dead letter" not in caplog.text
    delivery = request._delivery
    post.held.settle(delivery.tag)
    (letter,) = post.broker.dead
    assert (letter.id, letter.cause) == (request.id, "failed")
    assert post.broker.dead_message(letter) == delivery.raw
    assert f"it is dead letter {request.id}" in caplog.text


def test_a_success_has_no_letter(bench: Bench, post: Post) -> None:
    """The step that ends it keeps nothing."""
    request = post.receive()
    request.on_success((False, 7, 0.1))
    post.held.settle(request._delivery.tag)
    assert (bench.ended, post.broker.dead) == (["ack"], [])


def test_an_early_ack_is_kept_in_a_step_of_its_own(
    bench: Bench, post: Post, app: Celery, pay: Any
) -> None:
    """Its delivery has ended long ago."""
    pay.acks_late = False
    request = post.receive()
    request.acknowledge()
    post.held.settle(request._delivery.tag)
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert causes(app) == ["failed"]
    assert request._delivery.letter is None


# -- with a Redis beside the broker --------------------------------------------------------------


class Beneath:
    """RabbitMQ, with a Redis beside it that knows which tasks run.

    Attributes:
        beside: What the worker holds there.
    """

    def __init__(self, bench: Bench, app: Celery) -> None:
        self.fake = fakeredis.FakeServer()
        self.server = fakeredis.FakeRedis(server=self.fake)
        self.store = DeadStore(Keys("reliable:"))
        own = Keys("reliable:").beside.prefix
        layout = Layout("", f"{own}unacked", f"{own}unacked_index", "")
        messages = Messages(layout, own, dead=self.store)
        self.beside = Beside(messages, LEASE, self.server, self.server, "raise")
        bench.consumer.beside = self.beside  # type: ignore[attr-defined]
        bench.consumer.pool = SimpleNamespace(uses_semaphore=True)
        transport = SimpleNamespace(driver_type="amqp")
        bench.consumer.connection = SimpleNamespace(transport=transport)

    def letters(self) -> list[str]:
        """The causes of the letters."""
        found = self.store.walk(self.server, task=None, cause=None, since=None)
        return [str(one.cause) for one in found]


@pytest.fixture
def beneath(bench: Bench, app: Celery) -> Beneath:
    """RabbitMQ with a Redis beside it."""
    return Beneath(bench, app)


def start(bench: Bench, pay: Any) -> ReliableRequest:
    """Receive a message, and let its task in."""
    pay.delay(7)
    request = bench.receive()
    request.message.channel.connection = object()
    assert not request.revoked()
    return request


def test_the_step_that_ends_a_run_keeps_the_letter(
    bench: Bench, beneath: Beneath, pay: Any
) -> None:
    """And only then the message is acknowledged."""
    request = start(bench, pay)
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert beneath.letters() == ["failed"]
    assert bench.ended == ["ack"]


def test_a_message_waits_for_the_redis_that_keeps_it(
    bench: Bench, beneath: Beneath, pay: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not acknowledged before its letter is kept: nobody else has it."""
    caplog.set_level(logging.WARNING, logger="reliable_tasks")
    request = start(bench, pay)
    beneath.fake.connected = False
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert bench.ended == []
    for _ in range(2):
        assert bench.timer.fire() == 0.5
        assert bench.ended == []
    beneath.fake.connected = True
    beneath.beside.say_what_is_unsaid(beneath.server)
    assert beneath.letters() == ["failed"]
    assert bench.timer.fire() == 0.5
    assert (bench.ended, bench.timer.calls) == (["ack"], [])


@pytest.mark.parametrize("error", [Reject("no", requeue=False), ValueError("no")], ids=repr)
@pytest.mark.parametrize(
    ("kind", "ended"), [("quorum", "ack"), ("classic", "reject")], ids=["quorum", "classic"]
)
def test_a_message_that_is_rejected_waits_for_the_redis_too(
    bench: Bench,
    beneath: Beneath,
    app: Celery,
    pay: Any,
    error: Exception,
    kind: str,
    ended: str,
) -> None:
    """RabbitMQ drops what is rejected of some queues: then a worker that dies would lose it."""
    keep_what_is_dropped(app)
    app.conf.task_queues = [Queue("celery", queue_arguments={"x-queue-type": kind})]
    # The second is the name that Celery 5.7 goes by.
    pay.acks_on_failure_or_timeout = pay.acks_on_failure = False
    request = start(bench, pay)
    beneath.fake.connected = False
    request.on_failure(failure(error), return_ok=True)
    for _ in range(2):
        assert bench.ended == []
        assert bench.timer.fire() == 0.5
    beneath.fake.connected = True
    beneath.beside.say_what_is_unsaid(beneath.server)
    assert len(beneath.letters()) == 1
    bench.timer.fire()
    assert (bench.ended, bench.timer.calls) == ([ended], [])


def test_a_success_does_not_wait_for_the_redis(bench: Bench, beneath: Beneath, pay: Any) -> None:
    """Nothing is to be kept of it."""
    request = start(bench, pay)
    beneath.fake.connected = False
    request.on_success((False, 7, 0.1))
    assert (bench.ended, bench.timer.calls) == (["ack"], [])


def test_a_run_that_was_let_in_unguarded_is_kept_in_a_step_of_its_own(
    bench: Bench, beneath: Beneath, app: Celery, pay: Any
) -> None:
    """The Redis did not answer when it started, and knows of no run that could end."""
    beneath.beside._runs_on = True
    beneath.fake.connected = False
    request = start(bench, pay)
    beneath.fake.connected = True
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert bench.ended == ["ack"]
    assert beneath.letters() == []
    assert causes(app) == ["failed"]


def test_a_rejected_run_is_acknowledged_when_it_is_kept(
    bench: Bench, beneath: Beneath, app: Celery, pay: Any
) -> None:
    """Where RabbitMQ would keep it, too."""
    keep_what_is_dropped(app)
    app.conf.task_queues = [Queue("celery", queue_arguments={"x-queue-type": "quorum"})]
    request = start(bench, pay)
    request.on_failure(failure(Reject("no", requeue=False)), return_ok=True)
    assert bench.ended == ["ack"]
    assert beneath.letters() == ["rejected"]
