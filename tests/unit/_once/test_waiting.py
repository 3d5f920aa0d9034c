"""Claims of messages that wait in a worker, without the worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from reliable_tasks import ReliableTask, StoreUnavailable, once
from reliable_tasks._once import waiting
from reliable_tasks._once.locks import locks_of
from reliable_tasks._once.waiting import keep_claims
from reliable_tasks._store.claims import Claims
from tests.unit.harness import claims, take

TTL = 60
Wait = Callable[..., Any]


@pytest.fixture
def wait(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Let messages of calls with these keys wait, for so long (s)."""
    requests: list[Any] = []
    monkeypatch.setattr(waiting, "waiting_requests", lambda _: requests)

    def wait(*numbers: int, seconds: float = 10, **options: Any) -> list[Any]:
        @app.task(base=ReliableTask, name="send")
        @once(key="{n}", ttl=TTL, **options)
        def send(n: int) -> None:
            pass

        for number in numbers:
            app.tasks["send"].delay(number)
            message = take(app)
            args, kwargs, _ = message.decode()
            headers = {**message.headers, "args": args, "kwargs": kwargs}
            requests.append(
                SimpleNamespace(
                    task=app.tasks["send"],
                    id=headers["id"],
                    request_dict=headers,
                    received_at=time.monotonic() - seconds,
                    kept_at=0.0,
                )
            )
        return requests

    return wait


def age(app: Celery) -> None:
    """Let all claims be about to lapse."""
    store = locks_of(app).claims
    for key in store.names():
        store.client.redis.pexpire(key, 1500)


def lives(app: Celery) -> list[float]:
    """For how long each claim lives (s)."""
    store = locks_of(app).claims
    return [float(store.client.redis.pttl(key)) / 1000 for key in store.names()]  # type: ignore[arg-type]


def test_it_is_kept_for_its_whole_time_anew(app: Celery, wait: Wait) -> None:
    """And then not before a third of that is over."""
    wait(1, 2)
    age(app)
    keep_claims(app)
    assert lives(app) == pytest.approx([TTL, TTL], abs=2)
    age(app)
    keep_claims(app)
    assert lives(app) == pytest.approx([1.5, 1.5], abs=1)


@pytest.mark.parametrize("seconds", [1, 4.5])
def test_one_that_has_just_come_is_not(app: Celery, wait: Wait, seconds: float) -> None:
    """Most messages start at once, and cost nothing."""
    wait(1, seconds=seconds)
    age(app)
    keep_claims(app)
    assert lives(app) == pytest.approx([1.5], abs=1)


def test_a_window_is_seen_and_not_prolonged(app: Celery, wait: Wait) -> None:
    """Its message is here, so it was queued."""
    wait(1, lock="until_expired")
    store = locks_of(app).claims
    (key,) = store.names()
    store.client.redis.hset(key, "unconfirmed", claims(app)[0]["owner"])
    age(app)
    keep_claims(app)
    assert lives(app) == pytest.approx([1.5], abs=1)
    assert "unconfirmed" not in claims(app)[0]


def test_what_failed_is_tried_again(
    app: Celery, wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the pause is over, and not a third of its time later."""

    def fail(*_: Any) -> None:
        raise StoreUnavailable("redis://gone", "gone")

    wait(1)
    age(app)
    with monkeypatch.context() as patch:
        patch.setattr(Claims, "keep_each", fail)
        keep_claims(app)
    keep_claims(app)
    assert lives(app) == pytest.approx([1.5], abs=1), "nothing is asked in the pause"
    (until,) = waiting._paused.values()
    assert until - time.monotonic() == pytest.approx(TTL / 6, abs=1), "while the claim lives"
    waiting._paused.clear()
    keep_claims(app)
    assert lives(app) == pytest.approx([TTL], abs=2)


def test_one_that_cannot_be_read(app: Celery, wait: Wait) -> None:
    """It does not keep the others from being kept."""
    wait(1, 2)
    store = locks_of(app).claims
    odd = store.names()[0]
    store.client.redis.delete(odd)
    store.client.redis.set(odd, "somebody else's")
    age(app)
    keep_claims(app)
    assert sorted(lives(app)) == pytest.approx([1.5, TTL], abs=2)


def test_one_whose_claim_cannot_be_known(
    app: Celery, wait: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of once, and the others are kept."""
    odd, good = wait(1, 2)
    odd.request_dict["reliable_claim"] = {"key": None, "owner": odd.id, "attempt": 0}
    odd.request_dict["kwargs"] = {"no": "parameter"}
    age(app)
    keep_claims(app)
    keep_claims(app)
    assert sorted(lives(app)) == pytest.approx([1.5, TTL], abs=2)
    assert caplog.text.count(f"The claim of task {odd.id} may lapse") == 1
    assert good.kept_at
