"""The main process' part: what becomes of a message when its child does not end it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery
from celery.exceptions import Reject
from celery.signals import task_failure
from celery.worker import state as worker_state

from reliable_tasks import ReliableTask, once
from reliable_tasks._celery import delivery
from reliable_tasks._celery import request as request_module
from reliable_tasks._celery.request import ReliableRequest
from reliable_tasks._once.claim import HOLDER
from reliable_tasks._once.locks import locks_of
from tests.unit._celery.bench import Bench, failure
from tests.unit.harness import claims


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
    delivery._consumers.clear()
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
    request.on_accepted(1, time.time())
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
