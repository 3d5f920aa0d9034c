"""A copy that is set aside: where it waits, for how long, and what becomes of it."""

from __future__ import annotations

import gc
import logging
import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError

from reliable_tasks._celery import delivery, setting_aside, stock
from reliable_tasks._celery.setting_aside import SetAside
from tests.unit._celery.bench import Bench, failure
from tests.unit.harness import claims, take

BUSY = SetAside("busy", 1.0, 5.0)


@pytest.fixture
def on_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take messages for those of kombu's Redis transport, which can wait in a worker."""
    monkeypatch.setattr(stock, "visibility_timeout", lambda message: 3600.0)


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
def test_who_waits_for_another_one_begins_anew(
    bench: Bench, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its turn may come soon, for the one that it waited for has ended; that alone is news."""
    caplog.set_level(logging.DEBUG, logger="reliable_tasks")
    send.delay(7)
    request = bench.receive()
    pauses = []
    for waits_for in ("one", "one", "one", "two", "two"):
        answer = SetAside("busy", 0.2, 5.0, waits_for)
        request.on_failure(failure(pickle.loads(pickle.dumps(answer))), return_ok=True)
        pauses.append(bench.timer.calls[-1][0])
    assert pauses == [0.2, 0.4, 0.8, 0.2, 0.4]
    lines = [record for record in caplog.records if "is set aside: busy" in record.message]
    assert [record.levelname for record in lines] == ["INFO", "DEBUG", "DEBUG", "INFO", "DEBUG"]


@pytest.mark.usefixtures("on_redis")
def test_the_worker_does_not_take_in_the_whole_queue(
    bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a bound a copy that waits uses up the prefetch."""
    monkeypatch.setattr(setting_aside, "_MOST_WAITING", 0)
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

    monkeypatch.setattr(setting_aside.Task, "apply_async", refuse)
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


@pytest.mark.usefixtures("on_redis")
@pytest.mark.parametrize("acks_late", [True, False])
def test_a_copy_that_may_not_take_a_slot_yet(
    bench: Bench, app: Celery, send: Any, acks_late: bool
) -> None:
    """It follows another task: it waits as one that came back from its child does.

    Its message is not acknowledged, so after a reconnection the broker has that.
    """
    send.acks_late = acks_late
    send.delay(7)
    take(app)
    send.apply_async((7,), link=send.si(8))
    request = bench.receive()
    worker_state.task_reserved(request)
    assert request.revoked()
    assert (bench.ended, bench.prefetch) == ([], 1)
    bench.consumer.task_consumer = SimpleNamespace(channel=request.message.channel)
    bench.timer.fire()
    assert bench.consumer.again == [request]
    worker_state.task_reserved(request)
    assert request.revoked()
    bench.consumer.task_consumer = SimpleNamespace(channel=object())
    bench.timer.fire()
    assert (bench.ended, bench.consumer.again) == ([], [request])


def test_without_a_consumer_it_goes_back_at_once(bench: Bench, send: Any) -> None:
    """There is nothing to wait with."""
    delivery._consumers.clear()
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


@pytest.mark.usefixtures("on_redis")
def test_an_error_may_come_without_its_traceback(bench: Bench, send: Any) -> None:
    """Pools without processes hand it over as it is."""
    send.delay(7)
    bench.receive().on_failure(SimpleNamespace(exception=BUSY), return_ok=True)
    assert len(bench.timer.calls) == 1


def test_a_set_aside_survives_the_way_from_the_child() -> None:
    """It is pickled between the pool's processes."""
    error: Any = pickle.loads(pickle.dumps(BUSY))
    assert isinstance(error, Reject)
    assert (error.first, error.longest, error.requeue) == (1.0, 5.0, True)
    assert str(error) == repr(error) == "set aside: busy"
