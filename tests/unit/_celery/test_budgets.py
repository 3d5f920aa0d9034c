"""How often a task may crash or go back to its queue, and beside whom one runs that has crashed."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, Task, chain, chord
from celery.canvas import Signature
from celery.exceptions import Reject
from celery.worker import state as worker_state

from reliable_tasks import ReliableTask, dead_letters
from reliable_tasks._broker.held import Held
from reliable_tasks._celery import budgets
from reliable_tasks._celery.budgets import condemned
from reliable_tasks._celery.request import ReliableRequest
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._store.crashes import Crash, Starter
from reliable_tasks._store.delivery import Delivery
from reliable_tasks.errors import PoisonPill, RequeuesExhausted
from reliable_tasks.instrumentation.signals import task_crashed
from tests.conformance.broker import Broker
from tests.unit._celery.bench import Bench, failure
from tests.unit.harness import Ended, run, take

LEASE = 15.0
SEGFAULT = "signal 11 (SIGSEGV)"


@pytest.fixture
def work(app: Celery) -> Any:
    """A task that says how often it was run."""
    runs: list[int] = []

    @app.task(base=ReliableTask, name="shop.work")
    def work(n: int = 0) -> int:
        runs.append(n)
        return n

    found = app.tasks["shop.work"]
    found.runs = runs
    return found


@pytest.fixture
def told() -> Iterator[list[dict[str, Any]]]:
    """What the receivers of a crash were told."""
    told: list[dict[str, Any]] = []

    def receive(sender: Any, **about: Any) -> None:
        told.append({k: v for k, v in about.items() if k not in ("signal", "at")})

    task_crashed.connect(receive)
    yield told
    assert task_crashed.disconnect(receive)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the suspects, in its only item."""
    now = [1000.0]
    known = SimpleNamespace(monotonic=lambda: now[0], time=lambda: 5.0)
    monkeypatch.setattr(budgets, "time", known)
    return now


@pytest.fixture(autouse=True)
def nothing_runs() -> Iterator[None]:
    """Leave no task behind."""
    yield
    worker_state.active_requests.clear()


class Post:
    """What a worker holds of a Redis broker.

    Attributes:
        broker: The broker.
        held: What the worker holds.
        asked: How many times it was asked how tasks had crashed.
        work: The task.
    """

    def __init__(self, bench: Bench, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake = fakeredis.FakeServer()
        server = fakeredis.FakeRedis(server=self.fake)
        self.broker = Broker(server)
        self.held = Held(self.broker.messages, LEASE, server, server)
        self.held.host = "bench@test"
        self.asked = 0
        self._bench, self.work = bench, work
        bench.consumer.pool = SimpleNamespace(uses_semaphore=True)
        crashes = self.held.crashes

        def ask(delivery: Delivery) -> Any:
            self.asked += 1
            return crashes(delivery)

        monkeypatch.setattr(self.held, "crashes", ask)

    def crash(self, how: str, *, is_ending: bool = False) -> None:
        """Have another worker start the task that waits, and lose it."""
        delivery = self.broker.fetch_one("another", lease=LEASE)
        delivery.starter = Starter(17, "w1@shop", is_ending)
        self.broker.start(delivery)
        if how:
            delivery.starter = Starter(18, "w1@shop", is_ending, how)
            delivery.has_crashed = True
            assert self.broker.requeue(delivery)
        else:
            self.broker.end_lease(delivery)
            assert self.broker.sweep() == 1

    def receive(self, *hows: str, ends: int = 0, **headers: Any) -> ReliableRequest:
        """Receive a task that has crashed so before; so many of the last ones were its end's."""
        self.work.delay(7)
        message = take(self._bench.app)
        self.broker.publish(message.headers["id"])
        for number, how in enumerate(hows):
            self.crash(how, is_ending=number >= len(hows) - ends)
        delivery = self.broker.fetch_one(self.held.worker, lease=LEASE)
        self.held.take(delivery)
        channel = SimpleNamespace(held=self.held, qos=SimpleNamespace(_quick_ack=lambda tag: None))
        # What it was received with waits no more.
        self.work.apply_async((7,), task_id=message.headers["id"], headers=headers)
        return self._bench.receive(channel=channel, delivery_tag=delivery.tag)

    def starts(self, request: ReliableRequest) -> list[Crash]:
        """What is known of a task's starts, of which the last one may go on."""
        return self.broker.messages.runs.crashes(self.broker.server, request._delivery)


@pytest.fixture
def post(bench: Bench, work: Any, monkeypatch: pytest.MonkeyPatch) -> Post:
    """A worker of a Redis broker."""
    return Post(bench, work, monkeypatch)


def starts(request: ReliableRequest) -> bool:
    """Say whether a request is handed to the pool; then it runs."""
    worker_state.reserved_requests.add(request)
    if request.revoked():
        return False
    worker_state.active_requests.add(request)
    return True


def end(request: ReliableRequest) -> None:
    """Have a request end."""
    worker_state.active_requests.discard(request)
    worker_state.reserved_requests.discard(request)


def run_child(request: ReliableRequest) -> Ended:
    """Run what a child makes of a request."""
    message = request.message
    message.headers = dict(request.request_dict)
    return run(request.app, message)


# -- the crash budget ----------------------------------------------------------------------------


def test_a_first_start_asks_nothing(post: Post, work: Any) -> None:
    """What never crashed costs no round trip, and carries no word of it."""
    request = post.receive()
    assert starts(request)
    assert post.asked == 0
    assert run_child(request) == Ended("SUCCESS", 7)


def test_a_task_that_may_crash_again_is_started(post: Post, work: Any) -> None:
    """As any other one; its start is counted ahead."""
    request = post.receive(SEGFAULT, SEGFAULT)
    assert starts(request)
    assert run_child(request) == Ended("SUCCESS", 7)
    assert [one.how for one in post.starts(request)] == [SEGFAULT, SEGFAULT, ""]


def test_a_task_that_has_crashed_too_often_ends(post: Post, work: Any) -> None:
    """Its child raises a PoisonPill in the place of its body, and that says all that is known."""
    request = post.receive(SEGFAULT, SEGFAULT, "exitcode 3")
    assert starts(request)
    ended = run_child(request)
    assert (ended.state, work.runs) == ("FAILURE", [])
    pill = ended.value
    assert isinstance(pill, PoisonPill)
    assert (pill.task_id, pill.crashes, pill.limit) == (request.id, 3, 3)
    assert [one["how"] for one in pill.history] == [SEGFAULT, SEGFAULT, "exitcode 3"]
    assert {(one["host"], one["pid"]) for one in pill.history} == {("w1@shop", 18)}


def test_the_verdict_outlives_the_way_to_the_child(post: Post) -> None:
    """Headers are pickled, and hold no classes of ours."""
    request = post.receive(SEGFAULT, SEGFAULT, SEGFAULT)
    assert starts(request)
    verdict = condemned(pickle.loads(pickle.dumps(dict(request.request_dict))))
    assert isinstance(verdict, PoisonPill)
    assert condemned({}) is None


def test_the_start_of_an_end_says_that_it_is_one(post: Post) -> None:
    """Should that crash, too, whoever comes next knows."""
    request = post.receive(SEGFAULT, SEGFAULT, SEGFAULT)
    assert starts(request)
    assert post.starts(request)[-1].is_ending
    other = post.receive(SEGFAULT)
    assert starts(other)
    assert not post.starts(other)[-1].is_ending


@pytest.mark.parametrize(("max_crashes", "ends"), [(1, True), (2, True), (3, False), (None, False)])
def test_the_budget_is_the_tasks(
    post: Post, app: Celery, max_crashes: int | None, ends: bool
) -> None:
    """With None nothing stops it."""

    @app.task(base=ReliableTask, name="shop.other", max_crashes=max_crashes)
    def other(n: int) -> int:
        return n

    post.work = app.tasks["shop.other"]
    request = post.receive(SEGFAULT, SEGFAULT)
    assert starts(request)
    assert isinstance(run_child(request).value, PoisonPill) is ends


def test_handlers_that_crash_are_not_called_again(
    bench: Bench, post: Post, work: Any, app: Celery
) -> None:
    """The main process ends the task itself: its result is stored, and it is a dead letter."""
    request = post.receive(SEGFAULT, SEGFAULT, SEGFAULT, SEGFAULT, ends=1)
    assert not starts(request)
    assert (bench.ended, bench.timer.calls, work.runs) == (["ack"], [], [])
    result = work.AsyncResult(request.id)
    assert result.state == "FAILURE"
    assert isinstance(result.result, PoisonPill)
    assert result.result.crashes == 4
    letter = request._delivery.letter
    assert (letter.about.cause, letter.about.crashes) == ("poison", 4)


def test_where_nobody_says_how_it_crashed_it_waits(
    bench: Bench, post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither is it run beside the one that may have killed it, nor ended; it is asked again."""
    caplog.set_level(logging.INFO, logger="reliable_tasks")
    request = post.receive("")
    post.fake.connected = False
    assert not starts(request)
    assert (bench.ended, len(bench.timer.calls)) == ([], 1)
    assert "is set aside: nobody says how it crashed" in caplog.text
    post.fake.connected = True
    post.held._silent_until = 0.0
    bench.timer.fire()
    assert bench.consumer.again == [request]
    assert starts(request)


def test_a_crash_of_a_worker_is_told_by_the_next_one(post: Post, told: list[Any]) -> None:
    """Once, however often the copy waits for its turn; nobody else has seen it."""
    request = post.receive("", "")
    first = post.receive("")
    assert starts(first)
    told.clear()
    for _ in range(3):
        assert not starts(request)
    end(first)
    assert starts(request)
    assert told == [
        {
            "task_id": request.id,
            "crashes": 2,
            "limit": 3,
            "host": "w1@shop",
            "pid": 17,
            "how": "",
        }
    ]


def test_a_crash_of_a_child_was_told_by_its_worker(post: Post, told: list[Any]) -> None:
    """It is not told again."""
    assert starts(post.receive("", SEGFAULT))
    assert told == []


# -- suspects ------------------------------------------------------------------------------------


def test_suspects_wait_for_their_turn(
    bench: Bench, post: Post, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """One of those that were lost together is to blame: not two of them start at a time."""
    caplog.set_level(logging.INFO, logger="reliable_tasks")
    first, second, innocent = post.receive(""), post.receive(""), post.receive()
    assert starts(first)
    assert not starts(second)
    assert [pause for pause, _ in bench.timer.calls] == [0.05]
    assert "it was lost with its worker, and so was another task that runs here" in caplog.text
    assert starts(innocent)
    assert bench.ended == []


def test_one_whose_turn_does_not_come_waits_in_the_broker(
    bench: Bench, post: Post, clock: list[float]
) -> None:
    """Another worker may have none that is in its way."""
    first, last = post.receive("", ""), post.receive("", "")
    tag = last._delivery.tag
    assert starts(first)
    for _ in range(60):
        assert not starts(last)
        assert post.held.is_open(tag)
        bench.timer.fire()
    assert not starts(last)
    assert (bench.ended, bench.timer.calls) == ([], [])
    assert not post.held.is_open(tag)
    assert last not in worker_state.reserved_requests
    assert post.broker.now() + 9 < post.broker.leases[tag] < post.broker.now() + 21


def test_a_suspect_that_ran_for_long_enough_is_beside_others(
    post: Post, clock: list[float]
) -> None:
    """What kills mostly does so soon."""
    first, second, third = post.receive(""), post.receive(""), post.receive("")
    assert starts(first)
    clock[0] += 1000
    assert not starts(second), "it waits in the pool"
    first.on_accepted(os.getpid(), 1.0)
    clock[0] += 2.9
    assert not starts(second)
    clock[0] += 0.1
    assert starts(second)
    assert not starts(third)


def test_when_a_suspect_has_ended_the_next_one_starts(post: Post, clock: list[float]) -> None:
    """It was not to blame."""
    first, second = post.receive(""), post.receive("")
    assert starts(first)
    end(first)
    assert starts(second)


def test_a_suspect_that_waits_again_is_in_nobodys_way(
    bench: Bench, post: Post, clock: list[float]
) -> None:
    """It was set aside in its child, and does not run, although it may again."""
    first, second = post.receive(""), post.receive("")
    assert starts(first)
    first.on_failure(failure(SetAside("busy", 1.0, 5.0)), return_ok=True)
    bench.timer.fire()
    assert first in worker_state.reserved_requests
    assert starts(second)


@pytest.mark.parametrize("is_received_first", [True, False])
def test_a_last_start_is_beside_no_other_suspect(
    post: Post, clock: list[float], is_received_first: bool
) -> None:
    """However long that runs, and whoever comes meanwhile: it would be lost with it for good."""
    last, other = post.receive("", ""), post.receive("")
    if is_received_first:
        assert starts(last)
        last.on_accepted(os.getpid(), 1.0)
        clock[0] += 1000
        assert not starts(other)
        end(last)
        assert starts(other)
    else:
        assert starts(other)
        other.on_accepted(os.getpid(), 1.0)
        clock[0] += 1000
        assert not starts(last)
        end(other)
        assert starts(last)


@pytest.mark.parametrize(("max_crashes", "is_last"), [(2, True), (3, False), (None, False)])
def test_which_start_is_the_last_depends_on_the_budget(
    post: Post,
    work: Any,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    max_crashes: int | None,
    is_last: bool,
) -> None:
    """After one crash of two it is; without a bound nothing is the last but for caution."""
    first, second = post.receive(""), post.receive("")
    monkeypatch.setattr(work, "_reliable_budgets", lambda: (max_crashes, None))
    assert starts(first)
    first.on_accepted(os.getpid(), 1.0)
    clock[0] += 1000
    assert starts(second) is not is_last


def test_without_a_bound_a_second_crash_is_taken_as_seriously(
    post: Post, work: Any, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kills its worker again and again."""
    other, twice = post.receive(""), post.receive("", "")
    monkeypatch.setattr(work, "_reliable_budgets", lambda: (None, None))
    assert starts(other)
    other.on_accepted(os.getpid(), 1.0)
    clock[0] += 1000
    assert not starts(twice)


def test_whoever_killed_its_child_alone_is_no_suspect(post: Post, clock: list[float]) -> None:
    """Nobody else was lost by it."""
    assert starts(post.receive(SEGFAULT))
    assert starts(post.receive(SEGFAULT, SEGFAULT))
    assert starts(post.receive(""))


def test_who_was_lost_once_with_its_worker_is_one_for_good(post: Post, clock: list[float]) -> None:
    """Though it killed its child before, or since."""
    first = post.receive("")
    assert starts(first)
    for hows in ((SEGFAULT, ""), ("", SEGFAULT)):
        assert not starts(post.receive(*hows))


def test_an_end_waits_for_its_turn_too(post: Post, clock: list[float]) -> None:
    """Its handlers can do the same as its body."""
    first = post.receive("")
    assert starts(first)
    clock[0] += 1000
    last = post.receive("", "", "")
    assert not starts(last)
    end(first)
    assert starts(last)
    assert isinstance(condemned(last.request_dict), PoisonPill)


# -- requeues ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requeues", "max_requeues", "ends"),
    [(100, 100, False), (101, 100, True), (1, 0, True), (10_000, None, False)],
)
def test_a_task_goes_back_so_many_times(
    post: Post,
    work: Any,
    monkeypatch: pytest.MonkeyPatch,
    requeues: int,
    max_requeues: int | None,
    ends: bool,
) -> None:
    """Then it ends, without having been run again."""
    monkeypatch.setattr(work, "_reliable_budgets", lambda: (3, max_requeues))
    request = post.receive(reliable_requeues=requeues)
    assert starts(request)
    ended = run_child(request)
    assert (ended.state, len(work.runs)) == (("FAILURE", 0) if ends else ("SUCCESS", 1))
    if ends:
        assert isinstance(ended.value, RequeuesExhausted)
        assert (ended.value.requeues, ended.value.limit) == (requeues, max_requeues)
    assert post.asked == 0


@pytest.mark.parametrize("requeues", ["101", None, [101]], ids=repr)
def test_what_is_no_number_was_not_counted_here(post: Post, work: Any, requeues: Any) -> None:
    """Producers of all kinds write headers: the task runs."""
    request = post.receive()
    request.request_dict["reliable_requeues"] = requeues
    assert starts(request)
    assert run_child(request) == Ended("SUCCESS", 7)


def test_a_poison_pill_is_the_stronger_word(post: Post) -> None:
    """It says more of what is wrong."""
    request = post.receive(SEGFAULT, SEGFAULT, SEGFAULT, reliable_requeues=101)
    assert starts(request)
    assert isinstance(run_child(request).value, PoisonPill)


@pytest.mark.parametrize("acks_on_timeout", [True, False])
@pytest.mark.parametrize("is_green", [False, True])
def test_a_task_that_hangs_at_its_end_ends(
    bench: Bench, app: Celery, post: Post, acks_on_timeout: bool, is_green: bool
) -> None:
    """Its hard limit is not what it has failed with, and it does not go back for it."""
    post.work.acks_on_timeout, post.work.acks_on_failure = acks_on_timeout, True
    request = post.receive(SEGFAULT, SEGFAULT, SEGFAULT)
    assert starts(request)
    request.on_accepted(os.getpid(), 1.0)
    if not is_green:
        # gevent's and eventlet's pools say no more than the other one.
        request.on_failure(failure(TimeLimitExceeded(60)))
    request.on_timeout(soft=False, timeout=60)
    assert bench.ended == ["ack"]
    assert isinstance(post.work.AsyncResult(request.id).result, PoisonPill)
    assert request._delivery.letter.about.cause == "poison"


def test_a_handler_that_puts_a_failure_back_is_no_crash(
    bench: Bench, post: Post, told: list[Any]
) -> None:
    """It has escaped from the child, which is alive."""
    request = post.receive()
    assert starts(request)
    request.on_accepted(os.getpid(), 1.0)
    request.on_failure(failure(Reject("later", requeue=True)), return_ok=False)
    assert (bench.ended, told) == (["requeue"], [])
    assert not request._delivery.has_crashed


def test_a_verdict_of_a_copy_before_is_none_of_this_one(post: Post) -> None:
    """The setting may have been raised meanwhile."""
    request = post.receive(reliable_requeues=5)
    request.request_dict["reliable_condemned"] = ("RequeuesExhausted", (request.id, 5, 4))
    assert starts(request)
    assert run_child(request).state == "SUCCESS"


# -- a child that is lost ------------------------------------------------------------------------


def lose_child(request: ReliableRequest, why: str) -> None:
    """Have the child of a run die."""
    request.on_accepted(4242, 1.0)
    request.on_failure(failure(WorkerLostError(f"Worker exited prematurely: {why}")))


@pytest.mark.parametrize(
    ("why", "how"),
    [("signal 9 (SIGKILL) Job: 3.", "signal 9 (SIGKILL)"), ("exitcode 3.", "exitcode 3")],
)
def test_a_child_that_dies_is_a_crash(
    bench: Bench, post: Post, told: list[Any], why: str, how: str
) -> None:
    """It is told at once; its message goes back, and the next one knows how it was."""
    request = post.receive(SEGFAULT)
    assert starts(request)
    lose_child(request, why)
    assert bench.ended == ["requeue"]
    assert told == [
        {
            "task_id": request.id,
            "crashes": 2,
            "limit": 3,
            "host": "bench@test",
            "pid": 4242,
            "how": how,
        }
    ]
    delivery = request._delivery
    assert post.broker.requeue(delivery)
    (again,) = post.broker.fetch("another")
    assert again.copy.crashes == 2
    known = post.broker.messages.runs.crashes(post.broker.server, again)
    assert [(one.pid, one.how) for one in known] == [(18, SEGFAULT), (4242, how)]


@pytest.mark.parametrize("is_sent", [True, False])
@pytest.mark.parametrize("acks_late", [True, False])
def test_a_lost_task_is_retried_only_where_it_cannot_go_back(
    bench: Bench,
    app: Celery,
    post: Post,
    monkeypatch: pytest.MonkeyPatch,
    acks_late: bool,
    is_sent: bool,
) -> None:
    """It goes on, so it is no dead letter; Celery 5.6 has no such option."""
    post.work.acks_late = acks_late
    post.work.retry_on_worker_lost = True
    post.work.default_retry_delay = 0
    request = post.receive()
    assert starts(request)
    if not is_sent:
        monkeypatch.setattr(Signature, "apply_async", lambda *_, **__: 1 / 0)
    lose_child(request, "signal 9 (SIGKILL)")
    again = take(app)
    if acks_late:
        assert (bench.ended, again) == (["requeue"], None)
        assert request._delivery.has_crashed
    elif is_sent and hasattr(Task, "retry_on_worker_lost"):
        assert (again.headers["id"], again.headers["retries"]) == (request.id, 1)
        assert dead_letters.count(app=app) == 0
    else:
        assert again is None
        assert [letter.cause for letter in dead_letters.list(app=app)] == ["lost"]


def test_a_child_whose_end_nobody_explains_is_lost(
    bench: Bench, post: Post, told: list[Any]
) -> None:
    """That is as much as its worker knows."""
    request = post.receive()
    assert starts(request)
    request.on_failure(failure(WorkerLostError("gone")))
    assert [one["how"] for one in told] == ["lost"]


def test_a_child_that_was_asked_to_stop_has_not_crashed(
    bench: Bench, post: Post, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a warm shutdown a process manager may send SIGTERM to all of a group."""
    request = post.receive()
    assert starts(request)
    monkeypatch.setattr(worker_state, "should_stop", 0)
    lose_child(request, "signal 15 (SIGTERM) Job: 3.")
    assert (bench.ended, told) == (["requeue"], [])
    assert not request._delivery.has_crashed


@pytest.mark.parametrize("error", [TimeLimitExceeded(60), WorkerLostError("gone")], ids=repr)
def test_a_crash_is_what_ends_a_child_without_a_word(
    bench: Bench, post: Post, work: Any, told: list[Any], error: Exception
) -> None:
    """One that is killed for its limit goes back to its queue, if its task says so."""
    work.acks_on_failure_or_timeout = False
    work.acks_on_timeout = False
    request = post.receive()
    assert starts(request)
    request.on_accepted(os.getpid(), 1.0)
    request.on_failure(failure(error))
    assert bench.ended == ["requeue"]
    is_crash = isinstance(error, WorkerLostError)
    assert len(told) == int(is_crash)
    assert request._delivery.has_crashed is is_crash


def test_where_nobody_counts_a_crash_is_told_all_the_same(
    bench: Bench, work: Any, told: list[Any]
) -> None:
    """On kombu's own transports without a Redis beside them."""
    work.delay(7)
    request = bench.receive()
    lose_child(request, "exitcode 3.")
    assert bench.ended == ["requeue"]
    ((crashes, limit),) = [(one["crashes"], one["limit"]) for one in told]
    assert (crashes, limit) == (None, 3)


# -- RabbitMQ without a Redis --------------------------------------------------------------------


class TestOnRabbitMQ:
    """A quorum queue counts how often a message came back: an upper bound."""

    @pytest.fixture(autouse=True)
    def on_amqp(self, bench: Bench) -> None:
        """Have the consumer speak AMQP."""
        transport = SimpleNamespace(driver_type="amqp")
        bench.consumer.connection = SimpleNamespace(transport=transport)
        bench.consumer.pool = SimpleNamespace(uses_semaphore=True)

    def receive(self, bench: Bench, work: Any, **headers: Any) -> ReliableRequest:
        """Receive a message with headers."""
        named = {
            name.replace("_", "-") if name[0] == "x" else name: headers[name] for name in headers
        }
        work.apply_async((7,), headers=named)
        return bench.receive()

    @pytest.mark.parametrize(
        ("headers", "ends"),
        [
            ({}, False),
            ({"x_delivery_count": 2}, False),
            ({"x_delivery_count": 3}, True),
            ({"x_delivery_count": "3"}, False),
            ({"x_delivery_count": 1, "reliable_counted": 2}, True),
            ({"x_delivery_count": 1, "reliable_counted": 1}, False),
            ({"reliable_counted": 3}, True),
            ({"reliable_counted": None}, False),
        ],
    )
    def test_the_count_of_the_queue_is_the_crashes(
        self, bench: Bench, work: Any, headers: dict[str, Any], ends: bool
    ) -> None:
        """With that of the copies that were sent again; at three it is over."""
        request = self.receive(bench, work, **headers)
        assert starts(request)
        ended = run_child(request)
        if ends:
            assert isinstance(ended.value, PoisonPill)
            assert (ended.value.crashes, ended.value.history) == (3, [])
        else:
            assert ended == Ended("SUCCESS", 7)

    def test_an_end_that_came_back_is_not_tried_again(self, bench: Bench, work: Any) -> None:
        """Its handlers have crashed, too."""
        request = self.receive(bench, work, x_delivery_count=4)
        assert not starts(request)
        assert bench.ended == ["ack"]
        assert isinstance(work.AsyncResult(request.id).result, PoisonPill)

    def test_it_is_a_dead_letter(self, bench: Bench, work: Any, app: Celery) -> None:
        """With the count of the queue."""
        request = self.receive(bench, work, x_delivery_count=4)
        assert not starts(request)
        letter = dead_letters.get(request.id, app=app)
        assert (letter.cause, letter.crashes, letter.deliveries) == ("poison", 4, 4)

    def test_an_early_ack_is_not_counted(self, bench: Bench, work: Any) -> None:
        """It came back for another reason."""
        work.acks_late = False
        request = self.receive(bench, work, x_delivery_count=9)
        assert request._crashes == 0
        assert starts(request)

    def test_another_brokers_count_is_none(self, bench: Bench, work: Any) -> None:
        """Only a quorum queue's own is trusted."""
        bench.consumer.connection.transport.driver_type = "redis"
        request = self.receive(bench, work, x_delivery_count=9)
        assert starts(request)
        assert run_child(request).state == "SUCCESS"

    def test_suspects_wait_for_their_turn(
        self, bench: Bench, work: Any, clock: list[float]
    ) -> None:
        """Nobody says who was lost alone, so all that came back are suspects."""
        first = self.receive(bench, work, x_delivery_count=1)
        second = self.receive(bench, work, x_delivery_count=1)
        assert starts(first)
        assert not starts(second)
        again = take(bench.app)
        assert again.headers["id"] == second.id
        assert again.headers["reliable_counted"] == 1
        assert bench.ended == ["ack"]

    def test_a_lost_child_is_counted(self, bench: Bench, work: Any, told: list[Any]) -> None:
        """By the queue, when the message comes back."""
        request = self.receive(bench, work, x_delivery_count=1)
        lose_child(request, "exitcode 3.")
        assert [one["crashes"] for one in told] == [2]

    @pytest.mark.parametrize(
        ("headers", "carried"),
        [
            ({}, None),
            ({"x_delivery_count": 1}, 1),
            ({"x_delivery_count": 1, "reliable_counted": 1}, 2),
            ({"reliable_counted": 1}, 1),
            ({"x_delivery_count": "1", "reliable_counted": None}, None),
        ],
    )
    @pytest.mark.parametrize("own", [{}, {"headers": {"x": "1"}}], ids=["", "headers of its own"])
    @pytest.mark.parametrize("how", ["retries", "is replaced"])
    def test_the_count_goes_on_with_a_task(
        self,
        bench: Bench,
        app: Celery,
        headers: dict[str, Any],
        carried: int | None,
        own: dict[str, Any],
        how: str,
    ) -> None:
        """Its next message is a new one, of which the queue counts nothing yet."""

        @app.task(base=ReliableTask, name="shop.continuing", bind=True)
        def continuing(self: Any, n: int) -> None:
            if how == "retries":
                raise self.retry(countdown=0, **own)
            raise self.replace(self.si(n).set(**own))

        request = self.receive(bench, app.tasks["shop.continuing"], **headers)
        assert starts(request)
        run_child(request)
        again = take(app).headers
        assert again["id"] == request.id
        assert again.get("reliable_counted") == carried
        assert "x-delivery-count" not in again
        assert again.get("x") == own.get("headers", {}).get("x")

    def test_the_count_is_of_those_that_are_counted(self, bench: Bench, app: Celery) -> None:
        """Early acks are not; and a Redis that counts knows it by the task's id."""

        @app.task(base=ReliableTask, name="shop.retrying", bind=True)
        def retrying(self: Any, n: int) -> None:
            raise self.retry(countdown=0)

        task = app.tasks["shop.retrying"]
        for acks_late, headers in ((False, {}), (True, {"reliable_delivery": "tag"})):
            task.acks_late = acks_late
            request = self.receive(bench, task, x_delivery_count=1)
            request.request_dict.update(headers)
            run_child(request)
            assert "reliable_counted" not in take(app).headers

    def test_what_puts_itself_back_and_retries_has_not_crashed(
        self, bench: Bench, app: Celery
    ) -> None:
        """It is sent again for the one, and for the other one; neither is counted."""

        @app.task(base=ReliableTask, name="shop.wavering", bind=True)
        def wavering(self: Any, n: int) -> None:
            raise self.retry(countdown=0)

        request = self.receive(bench, app.tasks["shop.wavering"])
        request.on_failure(failure(Reject("later", requeue=True)), return_ok=True)
        again = bench.receive()
        assert again.request_dict["reliable_requeues"] == 1
        assert starts(again)
        run_child(again)
        assert not {"reliable_counted", "reliable_requeues"} & set(take(app).headers)

    @pytest.mark.parametrize(
        ("shape", "counts"),
        [
            ("in a chain", [1, None]),
            ("the last of a chain", [None, 1]),
            ("the body of a chord", [None, 1]),
        ],
    )
    def test_a_count_goes_on_with_its_id(
        self, bench: Bench, app: Celery, shape: str, counts: list[int | None]
    ) -> None:
        """What a task is replaced by may be more than one; the others have not crashed."""

        @app.task(base=ReliableTask, name="shop.part")
        def part(n: int = 0) -> int:
            return n

        @app.task(base=ReliableTask, name="shop.replaced", bind=True)
        def replaced(self: Any, n: int) -> None:
            one, other = app.tasks["shop.part"].si(1), app.tasks["shop.part"].si(2)
            shapes = {
                "in a chain": one,
                "the last of a chain": chain(one, other),
                "the body of a chord": chord([one], other),
            }
            raise self.replace(shapes[shape])

        rest = [app.tasks["shop.part"].si(3)] if shape == "in a chain" else []
        app.tasks["shop.replaced"].apply_async(
            (7,), headers={"x-delivery-count": 1}, chain=rest, task_id="replaced"
        )
        request = bench.receive()
        assert starts(request)
        run_child(request)
        found = []
        while (message := take(app)) is not None:
            found.append((message.headers["id"], message.headers.get("reliable_counted")))
            run(app, message)
        assert [count for _, count in found] == counts
        assert [identity for identity, count in found if count] == ["replaced"]
