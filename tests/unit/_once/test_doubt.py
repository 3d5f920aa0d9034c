"""Publishes that failed for their caller, and perhaps for nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError
from kombu.transport import virtual

from reliable_tasks import ReliableTask, once
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.records import look_at
from tests.unit.harness import claims, run, run_all, take

#: What ends a publish of which nobody knows whether it went through.
DOUBTS = [OperationalError, ConnectionResetError, KeyboardInterrupt, GeneratorExit]
DOUBTS.append(SoftTimeLimitExceeded)

Break = Callable[..., None]


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Have the next publish end by an error, when its message is queued or before."""

    def break_(error: BaseException, *, queues: bool) -> None:
        publish = virtual.Channel.basic_publish

        def fail(*args: Any, **options: Any) -> None:
            monkeypatch.setattr(virtual.Channel, "basic_publish", publish)
            if queues:
                publish(*args, **options)
            raise error

        monkeypatch.setattr(virtual.Channel, "basic_publish", fail)

    return break_


@pytest.fixture
def started() -> list[Any]:
    """The ids of the tasks that were started."""
    return []


def make(app: Celery, started: list[Any], **options: Any) -> Any:
    """Return a once-task."""

    @app.task(base=ReliableTask, bind=True, name="send")
    @once(key="{n}", **options)
    def send(self: Any, n: int) -> int:
        started.append(self.request.id)
        return n

    return app.tasks["send"]


@pytest.mark.parametrize("queues", [True, False], ids=["queued", "not queued"])
@pytest.mark.parametrize("error", DOUBTS, ids=lambda error: error.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"lock": "until_executing"}, {"lock": "until_expired", "ttl": 60}],
    ids=["until_executed", "until_executing", "until_expired"],
)
def test_the_next_call_takes_the_place(
    app: Celery,
    breaking: Break,
    started: list[Any],
    options: Any,
    error: type[BaseException],
    queues: bool,
) -> None:
    """One of them runs, and it is the one that was not refused."""
    send = make(app, started, **options)
    breaking(error("on the way"), queues=queues)
    with pytest.raises(error):
        send.delay(7)
    (claim,) = claims(app)
    assert claim["unconfirmed"] == claim["owner"]
    name = send.reliable_once.claim_name(send, (7,), {})
    record = look_at(locks_of(app).claims, name)
    assert record is not None
    assert record.state == "unconfirmed"
    second = send.delay(7)
    assert (second.duplicate, second.replaced_id) == (False, claim["owner"])
    assert send.delay(7).id == second.id
    run_all(app)
    assert started == [second.id]


@pytest.mark.parametrize("lock", ["until_executed", "until_executing", "until_expired"])
def test_a_message_that_is_seen_was_queued(
    app: Celery, breaking: Break, started: list[Any], lock: Any
) -> None:
    """It runs as any other, and a call that comes later is a new one, or one of its window."""
    send = make(app, started, lock=lock, ttl=60)
    breaking(OperationalError("on the way"), queues=True)
    with pytest.raises(OperationalError):
        send.delay(7)
    (first,) = claims(app)
    assert [ended.state for ended in run_all(app)] == ["SUCCESS"]
    assert started == [first["owner"]]
    assert send.delay(7).duplicate is (lock == "until_expired")


def test_the_caller_can_try_again_with_the_same_id(
    app: Celery, breaking: Break, started: list[Any]
) -> None:
    """It is no duplicate of itself."""
    send = make(app, started)
    breaking(OperationalError("on the way"), queues=False)
    with pytest.raises(OperationalError):
        send.apply_async((7,), task_id="mine")
    again = send.apply_async((7,), task_id="mine")
    assert (again.duplicate, again.id) == (False, "mine")
    run_all(app)
    assert started == ["mine"]


def test_trying_again_in_vain_leaves_the_doubt(
    app: Celery, breaking: Break, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the second try was not queued says nothing of the first."""
    send = make(app, started, lock="until_expired", ttl=60)
    breaking(OperationalError("on the way"), queues=True)
    with pytest.raises(OperationalError):
        send.apply_async((7,), task_id="mine")

    def fail(*args: Any, **options: Any) -> None:
        raise OperationalError("no one there")

    with monkeypatch.context() as patch:
        patch.setattr(virtual.Channel, "prepare_message", fail)
        with pytest.raises(OperationalError):
            send.apply_async((7,), task_id="mine")
    (claim,) = claims(app)
    assert claim["unconfirmed"] == "mine"
    run_all(app)
    assert started == ["mine"]
    assert send.delay(7).duplicate


def test_a_call_that_took_a_place_gives_it_back(
    app: Celery, breaking: Break, started: list[Any]
) -> None:
    """Of two messages one runs: that of the caller who was told of no error."""
    send = make(app, started, on_conflict="replace")
    first = send.delay(7)
    breaking(OperationalError("on the way"), queues=True)
    with pytest.raises(OperationalError):
        send.delay(7)
    (claim,) = claims(app)
    assert claim["owner"] == first.id
    run_all(app)
    assert started == [first.id]
    assert claims(app) == []


@pytest.mark.parametrize("lock", ["until_executed", "until_executing", "until_expired"])
def test_nobody_follows_a_message_that_may_not_be(
    app: Celery, breaking: Break, started: list[Any], lock: Any
) -> None:
    """One that starts late takes the key, rather than wait for what may never come."""
    send = make(app, started, lock=lock, ttl=60)
    late = send.delay(7)
    message = take(app)
    store = locks_of(app).claims
    store.client.redis.delete(store.names()[0])
    breaking(OperationalError("on the way"), queues=False)
    with pytest.raises(OperationalError):
        send.delay(7)
    assert run(app, message).state == "SUCCESS"
    assert started == [late.id]


def test_a_window_that_was_seen_is_in_doubt_no_more(
    app: Celery, breaking: Break, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task has run when its caller gives up."""
    send = make(app, started, lock="until_expired", ttl=60)
    publish = virtual.Channel.basic_publish

    def fail(*args: Any, **options: Any) -> None:
        publish(*args, **options)
        run_all(app)
        raise OperationalError("too late")

    with monkeypatch.context() as patch:
        patch.setattr(virtual.Channel, "basic_publish", fail)
        with pytest.raises(OperationalError):
            send.delay(7)
    assert send.delay(7).duplicate
    assert len(started) == 1


def test_two_doubts_in_a_row(app: Celery, breaking: Break, started: list[Any]) -> None:
    """The one that is queued does not end for the one that is not."""
    send = make(app, started)
    for queues in (False, True):
        breaking(OperationalError("on the way"), queues=queues)
        with pytest.raises(OperationalError):
            send.delay(7)
    assert [ended.state for ended in run_all(app)] == ["SUCCESS"]
    assert len(started) == 1


def test_what_cannot_be_made_was_not_queued(app: Celery, started: list[Any]) -> None:
    """The key is free at once."""

    @app.task(base=ReliableTask)
    @once(key="{n}")
    def odd(n: int, value: object) -> None:
        pass

    with pytest.raises(Exception, match="not JSON serializable"):
        odd.delay(7, object())
    assert claims(app) == []


@pytest.mark.parametrize("error", DOUBTS, ids=lambda error: error.__name__)
def test_what_found_no_connection_was_not_queued(
    app: Celery, monkeypatch: pytest.MonkeyPatch, started: list[Any], error: type[BaseException]
) -> None:
    """The key is free at once: a broker that is not there was sent nothing."""
    send = make(app, started)

    def fail(*args: Any, **options: Any) -> None:
        raise error("on the way there")

    with monkeypatch.context() as patch:
        patch.setattr(virtual.Channel, "prepare_message", fail)
        with pytest.raises(error):
            send.delay(7)
    assert claims(app) == []
