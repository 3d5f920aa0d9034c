"""The main process' part: what becomes of a message when its child does not end it."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery
from celery.exceptions import Reject
from celery.signals import task_failure
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask, once
from reliable_tasks._celery import request as request_module
from reliable_tasks._celery.request import ReliableRequest, SetAside
from reliable_tasks._once.claim import HOLDER
from reliable_tasks._once.locks import locks_of
from tests.unit.harness import claims, take


class Timer:
    """A timer whose time is up when a test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def call_after(self, seconds: float, function: Callable[[], None]) -> None:
        """Remember a call."""
        self.calls.append((seconds, function))

    def fire(self) -> float:
        """Make the oldest call and return its delay."""
        seconds, function = self.calls.pop(0)
        function()
        return seconds


class Consumer:
    """A consumer that fetched its messages over one channel."""

    def __init__(self, bench: Bench) -> None:
        self.app = bench.app
        self.timer = bench.timer
        self.task_consumer: Any = None
        self.again: list[ReliableRequest] = []
        self.qos = SimpleNamespace(
            increment_eventually=lambda: bench.raise_prefetch(1),
            decrement_eventually=lambda: bench.raise_prefetch(-1),
        )

    def on_task_request(self, request: ReliableRequest) -> None:
        """Run a request whose time has come."""
        self.again.append(request)


class Bench:
    """A worker's main process around one message.

    Attributes:
        ended: What was done with the message, in order.
        prefetch: By how much the prefetch was raised.
    """

    def __init__(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.ended: list[str] = []
        self.prefetch = 0
        self.timer = Timer()
        self._monkeypatch = monkeypatch

    def start_consumer(self) -> None:
        """Let the worker be ready."""
        self.consumer = Consumer(self)
        request_module.remember_consumer(self.app, self.consumer)

    def raise_prefetch(self, number: int) -> None:
        """Change how many messages may be held."""
        self.prefetch += number

    def receive(self, **message_options: Any) -> ReliableRequest:
        """Receive the message in the queue."""
        message = take(self.app)
        for name, value in message_options.items():
            setattr(message, name, value)
        self.consumer.task_consumer = SimpleNamespace(channel=message.channel)
        request = ReliableRequest(
            message,
            app=self.app,
            hostname="bench@test",
            eventer=SimpleNamespace(enabled=False, send=lambda *a, **k: None),
            on_ack=lambda *a: self.ended.append("ack"),
            on_reject=lambda log, errors, requeue: self.ended.append(
                "requeue" if requeue else "reject"
            ),
            task=self.app.tasks[message.headers["task"]],
        )
        worker_state.reserved_requests.add(request)
        return request


@pytest.fixture
def bench(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A worker's main process."""
    bench = Bench(app, monkeypatch)
    bench.start_consumer()
    yield bench
    worker_state.reserved_requests.clear()
    worker_state.revoked.clear()
    worker_state.successful_requests.clear()
    request_module._consumers.clear()


@pytest.fixture
def send(app: Celery) -> Any:
    """A once-task."""

    @app.task(base=ReliableTask, name="send", time_limit=60)
    @once(key="{n}")
    def send(n: int) -> None:
        pass

    return app.tasks["send"]


def failure(error: BaseException) -> ExceptionInfo:
    """What a pool reports."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()


def start(app: Celery, request: ReliableRequest) -> None:
    """Let the child take the claim."""
    headers = request.request_dict
    locks_of(app).claims.enter(
        headers["reliable_claim"]["key"],
        owner=headers["id"],
        attempt=0,
        holder=headers[HOLDER],
        lease=60,
        ttl=60,
        task="send",
    )


def test_a_received_copy_has_a_token_of_its_own(bench: Bench, send: Any) -> None:
    """Two copies of one message are told apart by it."""
    send.delay(1)
    first = bench.receive()
    send.delay(2)
    second = bench.receive()
    assert len(first.request_dict[HOLDER]) == 32
    assert first.request_dict[HOLDER] != second.request_dict[HOLDER]


def test_a_task_without_once_carries_no_token(bench: Bench, app: Celery) -> None:
    """What needs no guard costs nothing."""

    @app.task(base=ReliableTask, name="plain")
    def plain() -> None:
        pass

    plain.delay()
    request = bench.receive()
    assert HOLDER not in request.request_dict
    request._guard._reliable_repeated(request.request_dict)
    request.on_failure(failure(WorkerLostError("gone")), send_failed_event=False)
    assert bench.ended == ["requeue"]


def test_a_killed_child_gives_its_message_and_its_claim_back(
    bench: Bench, app: Celery, send: Any
) -> None:
    """The next copy finds the key free to enter; no second task gets it."""
    result = send.delay(7)
    request = bench.receive()
    start(app, request)
    request.on_failure(failure(WorkerLostError("killed")))
    assert bench.ended == ["requeue"]
    (claim,) = claims(app)
    assert claim["owner"] == result.id
    assert "holder" not in claim


def test_a_killed_child_of_an_early_ack_frees_its_claim(bench: Bench, app: Celery) -> None:
    """Its message is gone, so nobody comes back for the key."""

    @app.task(base=ReliableTask, name="send", acks_late=False)
    @once
    def early() -> None:
        pass

    early.delay()
    request = bench.receive()
    start(app, request)
    request.on_failure(failure(WorkerLostError("killed")))
    assert "requeue" not in bench.ended
    assert claims(app) == []


@pytest.mark.usefixtures("on_redis")
def test_an_error_may_come_without_its_traceback(bench: Bench, send: Any) -> None:
    """Pools without processes hand it over as it is."""
    send.delay(7)
    bench.receive().on_failure(SimpleNamespace(exception=BUSY), return_ok=True)
    assert len(bench.timer.calls) == 1


def test_a_timed_out_child_frees_its_claim_when_it_is_dead(
    bench: Bench, app: Celery, send: Any
) -> None:
    """Not before: it is killed only after it was reported."""
    send.delay(7)
    request = bench.receive()
    start(app, request)
    request.on_failure(failure(TimeLimitExceeded(60)))
    assert bench.ended == ["ack"]
    assert len(claims(app)) == 1
    assert bench.timer.fire() == 1.0
    assert claims(app) == []


def test_without_a_consumer_a_timed_out_child_frees_its_claim_at_once(
    bench: Bench, app: Celery, send: Any
) -> None:
    """A worker that is being set up or taken down has no timer."""
    request_module._consumers.clear()
    send.delay(7)
    request = bench.receive()
    start(app, request)
    request.on_failure(failure(TimeLimitExceeded(60)))
    assert claims(app) == []


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that runs until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_a_live_child_over_its_limit_timed_out(
    bench: Bench, send: Any, child: subprocess.Popen[bytes]
) -> None:
    """Its process is still there to be killed."""
    send.delay(7)
    request = bench.receive()
    request.worker_pid = child.pid
    request.on_failure(failure(TimeLimitExceeded(60)))
    assert bench.ended == ["ack"]


def test_a_child_that_died_before_its_limit_did_not_time_out(
    bench: Bench, app: Celery, send: Any, child: subprocess.Popen[bytes]
) -> None:
    """The limit's timer was quicker than the look for dead children; the task runs again."""
    result = send.delay(7)
    request = bench.receive()
    start(app, request)
    request.worker_pid = child.pid
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    request.on_failure(failure(TimeLimitExceeded(60)))
    request.on_timeout(soft=False, timeout=60)
    assert bench.ended == ["requeue"]
    assert [claim["owner"] for claim in claims(app)] == [result.id]
    assert result.state != "FAILURE"


def test_a_child_that_was_reaped_did_not_time_out_either(bench: Bench, send: Any) -> None:
    """billiard has seen its end already."""
    send.delay(7)
    request = bench.receive()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        request.worker_pid = gone.pid
    request.on_failure(failure(TimeLimitExceeded(60)))
    assert bench.ended == ["requeue"]


def test_a_limit_in_a_pool_without_children_is_a_limit(bench: Bench, send: Any) -> None:
    """There the process that runs the task is this one."""
    send.delay(7)
    request = bench.receive()
    request.worker_pid = os.getpid()
    request.on_failure(failure(TimeLimitExceeded(60)))
    assert bench.ended == ["ack"]


@pytest.mark.parametrize("soft", [True, False])
def test_a_time_limit_is_handled_by_celery(
    bench: Bench, send: Any, soft: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless the task went back to the queue before."""
    result = send.delay(7)
    request = bench.receive()
    request.on_timeout(soft=soft, timeout=60)
    assert "time limit (60s) exceeded" in caplog.text
    assert (result.state == "FAILURE") is not soft


class TestAsOn56:
    """Celery 5.6 leaves exits and rejects without an end."""

    @pytest.fixture(autouse=True)
    def old_celery(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take this Celery for an older one."""
        monkeypatch.setattr(request_module, "ENDS_EXITS_AND_REJECTS", False)

    @pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
    def test_a_child_that_exits_counts_as_lost(
        self, bench: Bench, app: Celery, send: Any, error: BaseException
    ) -> None:
        """Its task runs again."""
        send.delay(7)
        request = bench.receive()
        start(app, request)
        request.on_failure(failure(error))
        assert bench.ended == ["requeue"]
        assert len(claims(app)) == 1

    def test_a_rejected_task_has_failed(self, bench: Bench, send: Any) -> None:
        """It has a final state, and its signal is sent."""
        told = []

        def listen(sender: Any, exception: Any, **_: Any) -> None:
            told.append(str(exception))

        task_failure.connect(listen)
        result = send.delay(7)
        bench.receive().on_failure(failure(Reject("no", requeue=False)), return_ok=True)
        assert bench.ended == ["reject"]
        assert result.state == "FAILURE"
        assert told

    def test_a_requeued_task_has_not(self, bench: Bench, send: Any) -> None:
        """It will run again."""
        result = send.delay(7)
        bench.receive().on_failure(failure(Reject("later", requeue=True)), return_ok=True)
        assert bench.ended == ["requeue"]
        assert result.state == "PENDING"


def test_a_failure_that_the_child_reported_was_released_there(
    bench: Bench, app: Celery, send: Any
) -> None:
    """The main process does nothing a second time."""
    send.delay(7)
    request = bench.receive()
    start(app, request)
    request.on_failure(failure(ValueError("no")), return_ok=True)
    assert bench.ended == ["ack"]
    assert len(claims(app)) == 1


def test_a_cancelled_child_keeps_its_claim(bench: Bench, app: Celery, send: Any) -> None:
    """Its message went back with the connection that was lost."""
    result = send.delay(7)
    request = bench.receive()
    start(app, request)
    request.cancel(SimpleNamespace(terminate_job=lambda *args: None))
    request.on_failure(failure(WorkerLostError("cancelled")))
    (claim,) = claims(app)
    assert claim["owner"] == result.id
    assert "holder" not in claim


def test_a_cancelled_task_that_still_ended_is_not_acknowledged(
    bench: Bench, app: Celery, send: Any
) -> None:
    """Its copy has to run: it is no repetition of a success."""
    result = send.delay(7)
    request = bench.receive()
    start(app, request)
    request.cancel(SimpleNamespace(terminate_job=lambda *args: None))
    worker_state.successful_requests.add(result.id)
    request.acknowledge()
    assert bench.ended == []
    assert result.id not in worker_state.successful_requests
    assert "holder" not in claims(app)[0]


def test_a_repetition_that_is_not_run_frees_its_claim(bench: Bench, app: Celery, send: Any) -> None:
    """Celery acknowledges a redelivered task whose result it knows."""
    send.delay(7)
    request = bench.receive()
    request.delivery_info["redelivered"] = True
    request.acknowledge()
    assert bench.ended == ["ack"]
    assert claims(app) == []


def test_a_first_delivery_costs_no_look_at_the_claim(bench: Bench, app: Celery, send: Any) -> None:
    """Its child has released it."""
    send.delay(7)
    bench.receive().acknowledge()
    assert bench.ended == ["ack"]
    assert len(claims(app)) == 1


BUSY = SetAside("busy", 1.0, 5.0)


@pytest.fixture
def on_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take messages for those of kombu's Redis transport, which can wait in a worker."""
    monkeypatch.setattr(request_module, "_visibility_timeout", lambda message: 3600.0)


@pytest.mark.usefixtures("on_redis")
def test_a_copy_that_is_set_aside_waits_without_a_slot(
    bench: Bench, app: Celery, send: Any
) -> None:
    """It is run again after its pause, and another message is fetched meanwhile."""
    send.delay(7)
    request = bench.receive()
    request.on_failure(failure(BUSY), return_ok=True)
    assert (bench.ended, bench.prefetch) == ([], 1)
    assert request not in worker_state.reserved_requests
    bench.timer.fire()
    assert (bench.ended, bench.prefetch) == ([], 0)
    assert bench.consumer.again == [request]
    assert len(claims(app)) == 1


@pytest.mark.usefixtures("on_redis")
def test_the_pauses_of_a_copy_grow(bench: Bench, send: Any) -> None:
    """From the first to the longest."""
    send.delay(7)
    request = bench.receive()
    pauses = []
    for _ in range(5):
        request.on_failure(failure(BUSY), return_ok=True)
        pauses.append(bench.timer.fire())
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


@pytest.mark.usefixtures("on_redis")
def test_a_pause_stays_a_number_however_often_it_comes(bench: Bench, send: Any) -> None:
    """A lock Redis can be away for hours, and 2 ** 1100 is more than a float holds."""
    send.delay(7)
    request = bench.receive()
    for _ in range(1100):
        request.on_failure(failure(BUSY), return_ok=True)
    assert bench.timer.calls[-1][0] == 5.0


@pytest.mark.usefixtures("on_redis")
def test_the_worker_does_not_take_in_the_whole_queue(
    bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a bound a copy that waits uses up the prefetch."""
    monkeypatch.setattr(request_module, "_MOST_WAITING", 0)
    send.delay(7)
    request = bench.receive()
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.prefetch == 0
    bench.timer.fire()
    assert (bench.prefetch, bench.consumer.again) == (0, [request])


@pytest.mark.usefixtures("on_redis")
def test_a_run_that_is_over_is_not_killed_again(bench: Bench, send: Any) -> None:
    """A revoke with terminate would hit the child's next task."""
    send.delay(7)
    request = bench.receive()
    request.on_accepted(4242, time.monotonic())
    request.on_failure(failure(BUSY), return_ok=True)
    assert (request.time_start, request.worker_pid) == (None, None)


def test_with_another_broker_the_copy_is_sent_again(
    bench: Bench, app: Celery, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker cannot raise its prefetch for quorum queues: what waits in it would stop it."""
    result = send.apply_async((7,), headers={"x": "1"})
    request = bench.receive()
    request.on_failure(failure(BUSY), return_ok=True)
    assert (bench.ended, bench.timer.calls) == (["ack"], [])
    again = take(app)
    assert again.headers["id"] == result.id
    assert again.headers["retries"] == 0
    assert again.headers["x"] == "1"
    assert again.headers["eta"]
    assert again.headers["reliable_claim"] == request.request_dict["reliable_claim"]
    assert len(claims(app)) == 1


def test_a_copy_that_cannot_be_sent_again_waits(
    bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is acknowledged that is not queued."""
    send.delay(7)
    request = bench.receive()

    def refuse(*args: Any, **options: Any) -> None:
        raise OperationalError("away")

    monkeypatch.setattr(request_module.Task, "apply_async", refuse)
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == []
    bench.timer.fire()
    assert bench.consumer.again == [request]


@pytest.mark.usefixtures("on_redis")
def test_after_a_reconnection_a_copy_is_left_to_the_broker(bench: Bench, send: Any) -> None:
    """Its message went back with the channel that it came by."""
    send.delay(7)
    request = bench.receive()
    for channel in (None, SimpleNamespace(channel=object())):
        request.on_failure(failure(BUSY), return_ok=True)
        bench.consumer.task_consumer = channel
        bench.timer.fire()
    assert bench.consumer.again == []
    assert bench.ended == []


def test_without_a_consumer_it_goes_back_at_once(bench: Bench, send: Any) -> None:
    """There is nothing to wait with."""
    request_module._consumers.clear()
    send.delay(7)
    bench.receive().on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == ["requeue"]


def test_a_consumer_that_is_gone_is_none(bench: Bench, send: Any) -> None:
    """A worker that was stopped in this process is not kept alive."""
    send.delay(7)
    request = bench.receive()
    del bench.consumer
    gc.collect()
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == ["requeue"]


def test_a_revoked_task_frees_its_claim_once(bench: Bench, app: Celery, send: Any) -> None:
    """It ends without having started."""
    result = send.delay(7)
    request = bench.receive()
    worker_state.revoked.add(result.id)
    assert request.revoked()
    assert claims(app) == []
    again = send.delay(7)
    assert request.revoked()
    assert [claim["owner"] for claim in claims(app)] == [again.id]


def test_an_expired_task_frees_its_claim(bench: Bench, app: Celery, send: Any) -> None:
    """As a revoked one does."""
    send.apply_async((7,), expires=0.001)
    request = bench.receive()
    request._expires = request._expires.replace(year=2000)
    assert request.revoked()
    assert claims(app) == []


def test_a_task_that_may_start_is_not_revoked(bench: Bench, app: Celery, send: Any) -> None:
    """Asking changes nothing."""
    send.delay(7)
    assert not bench.receive().revoked()
    assert len(claims(app)) == 1


class TestHeldForTooLong:
    """Stock kombu hands a message on a visibility_timeout after it was fetched."""

    @pytest.fixture
    def hold(self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Receive a message from kombu's Redis transport and hold it for a while."""

        def hold(
            seconds: float, timeout: float = 100, *, is_ours: bool = True, is_up: bool = True
        ) -> tuple[ReliableRequest, list[str]]:
            send.delay(7)
            forgotten: list[str] = []
            fake = fakeredis.FakeServer()
            server = fakeredis.FakeRedis(server=fake)
            channel = SimpleNamespace(
                unacked_key="unacked",
                unacked_index_key="unacked_index",
                visibility_timeout=timeout,
                qos=SimpleNamespace(_quick_ack=forgotten.append),
                conn_or_acquire=lambda: nullcontext(server),
            )
            request = bench.receive(channel=channel)
            if is_ours:
                server.zadd("unacked_index", {request.message.delivery_tag: 1})
            fake.connected = is_up
            monkeypatch.setattr(request, "_received_at", time.monotonic() - seconds)
            self.score = lambda: server.zscore("unacked_index", request.message.delivery_tag)
            return request, forgotten

        return hold

    def test_it_starts_while_there_is_time(self, hold: Any) -> None:
        """100 s, less 60 for the run, less half of the margin."""
        request, _ = hold(30)
        assert not request.revoked()
        assert self.score() == 1

    def test_its_time_begins_anew_when_the_rest_is_too_short(self, hold: Any) -> None:
        """As long as the broker counts it as ours."""
        request, _ = hold(40)
        assert not request.revoked()
        assert self.score() == pytest.approx(time.time(), abs=5)

    @pytest.mark.parametrize(
        ("seconds", "options"), [(96, {}), (40, {"is_ours": False}), (40, {"is_up": False})]
    )
    def test_it_is_left_to_its_redelivery(
        self, bench: Bench, app: Celery, hold: Any, seconds: float, options: Any
    ) -> None:
        """Where the broker may have passed it on, it is neither run nor given back."""
        request, forgotten = hold(seconds, **options)
        assert request.revoked()
        assert (bench.ended, forgotten) == ([], [request.message.delivery_tag])
        assert request.acknowledged
        assert len(claims(app)) == 1

    def test_a_timeout_below_the_limit_is_used_as_far_as_it_goes(self, hold: Any) -> None:
        """Refusing whatever cannot end in time would refuse for ever."""
        request, _ = hold(40, timeout=50)
        assert not request.revoked()

    def test_other_transports_hand_nothing_on(
        self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only kombu's Redis transport has the timeout."""
        send.delay(7)
        request = bench.receive()
        monkeypatch.setattr(request, "_received_at", -1e9)
        assert not request.revoked()


def test_a_set_aside_survives_the_way_from_the_child() -> None:
    """It is pickled between the pool's processes."""
    error: Any = pickle.loads(pickle.dumps(BUSY))
    assert isinstance(error, Reject)
    assert (error.first, error.longest, error.requeue) == (1.0, 5.0, True)
    assert str(error) == repr(error) == "set aside: busy"
