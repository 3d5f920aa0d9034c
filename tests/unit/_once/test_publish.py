"""Publishing a once-task: claim, queue, and what happens when either fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError

from reliable_tasks import (
    DuplicateTaskError,
    LockLost,
    ReliableResult,
    ReliableTask,
    ScriptError,
    StoreUnavailable,
    apply_reliable_config,
    once,
)
from reliable_tasks._once.call import Call
from reliable_tasks._once.claim import CLAIM, HOLDER
from reliable_tasks._once.locks import locks_of
from reliable_tasks._once.publish import publish
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.publication import (
    ClaimTaken,
    Publication,
    Published,
    Queued,
    publication_of,
    publishing,
)
from reliable_tasks.testing import fake_redis
from tests.unit.harness import claims, run, run_all, take

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def send(app: Celery) -> Any:
    """A once-task."""

    @app.task(base=ReliableTask, name="send")
    @once(key="{n}")
    def send(n: int, text: str = "") -> int:
        return n

    return app.tasks["send"]


def test_a_call_claims_and_queues(app: Celery, send: Any) -> None:
    """The message carries the claim that the store knows."""
    result = send.delay(7)
    assert isinstance(result, ReliableResult)
    assert (result.duplicate, result.ignored_id) == (False, None)
    (claim,) = claims(app)
    message = take(app)
    assert message.headers["id"] == result.id == claim["owner"]
    name = send.reliable_once.claim_name(send, (7,), {})
    assert message.headers[CLAIM] == {"key": name, "owner": result.id, "attempt": 0}
    assert claim["task"] == "send"


def test_a_second_call_queues_nothing(
    app: Celery, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets the first one's result, and says so."""
    first = send.delay(7)
    with caplog.at_level(logging.INFO, logger="reliable_tasks"):
        again = send.apply_async((7,), {"text": "other"}, task_id="mine")
    assert again.id == first.id
    assert again.duplicate
    assert again.ignored_id == "mine"
    assert take(app) is not None
    assert take(app) is None
    assert f"is a duplicate of {first.id}" in caplog.text
    assert "its own id mine is not used" in caplog.text


def test_a_duplicates_result_is_the_owners(app: Celery, send: Any) -> None:
    """Who waits on a duplicate gets what the owner made."""
    send.delay(7)
    again = send.delay(7)
    run_all(app)
    assert again.get(timeout=1) == 7
    assert not send.delay(7).duplicate


def test_a_callers_id_is_used(send: Any) -> None:
    """Where there is no duplicate a task keeps the id that it was given."""
    assert send.apply_async((7,), task_id="mine").id == "mine"


def test_a_duplicate_can_be_an_error(app: Celery) -> None:
    """``on_conflict="raise"`` says who has the key and for how long."""

    @app.task(base=ReliableTask, name="strict")
    @once(key="{n}", on_conflict="raise", ttl=45)
    def strict(n: int) -> None:
        pass

    first = strict.delay(7)
    with pytest.raises(DuplicateTaskError) as caught:
        strict.delay(7)
    assert caught.value.owner == first.id
    assert caught.value.key == strict.reliable_once.claim_name(strict, (7,), {})
    assert caught.value.expires_in == pytest.approx(45, abs=2)


def lapses_in(app: Celery) -> float:
    """Seconds until the only claim lapses."""
    store = locks_of(app).claims
    (key,) = store.names()
    return float(store.client.redis.pttl(key)) / 1000  # type: ignore[arg-type]


def soon(zone: Any = None) -> datetime:
    """A moment in 100 s."""
    return datetime.now(zone or UTC) + timedelta(seconds=100)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict, 60),
        (lambda: {"countdown": 100}, 160),
        (lambda: {"countdown": 0}, 60),
        (lambda: {"countdown": -5}, 60),
        (lambda: {"eta": soon()}, 160),
        (lambda: {"eta": soon().isoformat()}, 160),
        (lambda: {"eta": soon(ZoneInfo("Asia/Tokyo"))}, 160),
        (lambda: {"eta": soon() - timedelta(days=1)}, 60),
    ],
)
def test_a_claim_outlives_its_wait(
    app: Celery, options: Callable[[], dict[str, Any]], expected: float
) -> None:
    """The allowance begins when the task may start."""
    app.conf.reliable_once_ttl = 60

    @app.task(base=ReliableTask)
    @once
    def t() -> None:
        pass

    t.apply_async(**options())
    assert lapses_in(app) == pytest.approx(expected, abs=20)


def test_a_naive_eta_is_in_the_apps_time_zone(app: Celery, send: Any) -> None:
    """As Celery takes it."""
    app.conf.timezone = "Asia/Tokyo"
    app.conf.reliable_once_ttl = 60
    send.apply_async((7,), eta=soon(ZoneInfo("Asia/Tokyo")).replace(tzinfo=None))
    assert lapses_in(app) == pytest.approx(160, abs=20)


def test_a_decorators_time_wins(app: Celery) -> None:
    """``@once(ttl=...)`` is more specific than the setting."""

    @app.task(base=ReliableTask)
    @once(ttl=timedelta(minutes=2))
    def t() -> None:
        pass

    t.delay()
    assert lapses_in(app) == pytest.approx(120, abs=2)


def test_headers_of_the_callers_own_travel_too(app: Celery, send: Any) -> None:
    """A claim adds to them."""
    send.apply_async((7,), headers={"x": "y"})
    message = take(app)
    assert message.headers["x"] == "y"
    assert CLAIM in message.headers


def test_somebody_elses_claim_is_not_handed_on(app: Celery, send: Any) -> None:
    """Headers copied from another task's request are not a claim."""
    stolen = {CLAIM: {"key": "k", "owner": "somebody", "attempt": 3}, HOLDER: "h", "x": "y"}
    result = send.apply_async((7,), headers=stolen)
    message = take(app)
    assert message.headers[CLAIM]["owner"] == result.id
    assert HOLDER not in message.headers


def test_a_publish_that_fails_frees_the_claim(
    app: Celery, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not queued does not block the next call."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(app.amqp, "send_task_message", fail)
        with pytest.raises(OperationalError, match="gone"):
            send.delay(7)
    assert claims(app) == []
    assert not send.delay(7).duplicate


def test_a_claim_that_cannot_be_freed_is_logged(
    app: Celery,
    send: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller sees why the publish failed, not why the release did."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("gone")

    monkeypatch.setattr(Claims, "abandon_each", _unavailable)
    monkeypatch.setattr(app.amqp, "send_task_message", fail)
    with pytest.raises(OperationalError, match="gone"):
        send.delay(7)
    assert "stay until it lapses" in caplog.text


class TestWithoutAStore:
    """The lock Redis does not answer."""

    @pytest.fixture
    def app(self) -> Any:
        """An app whose lock Redis is down."""
        with Celery("shop", broker="memory://", backend="cache+memory://") as app:
            app.conf.reliable_redis_url = NOBODY
            yield app

    def test_a_call_is_refused(self, app: Celery, send: Any) -> None:
        """By default nothing is queued that could run twice."""
        with pytest.raises(StoreUnavailable) as caught:
            send.delay(7)
        assert not isinstance(caught.value, OperationalError)
        assert caught.value.url == NOBODY
        assert take(app) is None

    def test_a_store_that_is_the_broker_fails_like_one(self, app: Celery, send: Any) -> None:
        """Then callers get the error that they expect of a dead broker."""
        app.conf.broker_url = NOBODY
        with pytest.raises(OperationalError) as caught:
            send.delay(7)
        assert isinstance(caught.value, StoreUnavailable)

    def test_a_call_can_go_on(
        self, app: Celery, send: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With ``proceed`` the task is queued unclaimed, and claims when it starts."""
        app.conf.reliable_on_store_error = "proceed"
        result = send.apply_async((7,), headers={"x": "y"})
        message = take(app)
        assert message.headers["id"] == result.id
        assert message.headers["x"] == "y"
        assert message.headers[CLAIM]["owner"] == result.id
        assert "queued without a claim" in caplog.text


def test_a_refused_script_is_raised(
    app: Celery, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's refusal is the caller's to see."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ScriptError("claim_acquire", "OOM")

    monkeypatch.setattr(Claims, "acquire", refuse)
    with pytest.raises(ScriptError):
        send.delay(7)
    assert take(app) is None


class TestContinuations:
    """Retries and replacements keep the claim."""

    @pytest.fixture
    def flaky(self, app: Celery) -> Any:
        """A task that retries twice."""

        @app.task(base=ReliableTask, name="flaky", bind=True)
        @once(key="{items[0]}")
        def flaky(self: Any, items: list[int]) -> int:
            retries: int = self.request.retries
            items.append(99)
            if retries < 2:
                raise self.retry(countdown=0, args=([items[0] + 1],))
            return retries

        return app.tasks["flaky"]

    def test_a_retry_keeps_the_key_it_was_called_with(self, app: Celery, flaky: Any) -> None:
        """Whatever becomes of the arguments on the way."""
        result = flaky.delay([7])
        attempts = []
        while (message := take(app)) is not None:
            (claim,) = claims(app)
            assert claim["owner"] == result.id
            attempts.append((message.headers[CLAIM]["attempt"], claim["attempt"]))
            run(app, message)
        assert attempts == [(0, "0"), (1, "1"), (2, "2")]
        assert result.get(timeout=1) == 2
        assert claims(app) == []

    def test_between_a_run_and_its_retry_the_key_is_taken(self, app: Celery, flaky: Any) -> None:
        """No second task slips in."""
        result = flaky.delay([7])
        run(app, take(app))
        assert flaky.delay([7]).id == result.id

    def test_a_copy_that_was_continued_does_not_run(self, app: Celery, flaky: Any) -> None:
        """A message that comes again after its retry was published is acknowledged unrun."""
        flaky.delay([7])
        message = take(app)
        assert run(app, message).state == "RETRY"
        assert run(app, message).state == "IGNORED"

    def test_a_retry_of_a_task_published_by_name(self, app: Celery, flaky: Any) -> None:
        """Without a header the run itself knows its claim."""
        result = app.send_task("flaky", ([7],))
        assert [ended.state for ended in run_all(app)] == ["RETRY", "RETRY", "SUCCESS"]
        assert result.get(timeout=1) == 2
        assert claims(app) == []

    def test_a_retry_with_headers_of_its_own(self, app: Celery) -> None:
        """They add to the claim and do not drop it."""

        @app.task(base=ReliableTask, name="t", bind=True)
        @once
        def t(self: Any) -> Any:
            if not self.request.retries:
                raise self.retry(countdown=0, headers={"x": "y"})
            return self.request.headers["x"]

        result = t.delay()
        assert [ended.state for ended in run_all(app)] == ["RETRY", "SUCCESS"]
        assert result.get(timeout=1) == "y"

    @pytest.mark.parametrize("by_name", [False, True])
    def test_a_retry_whose_key_was_lost_fails(self, app: Celery, by_name: bool) -> None:
        """A run that another task took the key from cannot go on as if nothing had been."""

        @app.task(base=ReliableTask, name="robbed", bind=True)
        @once
        def robbed(self: Any) -> None:
            store = locks_of(app).claims
            (key,) = store.names()
            store.client.redis.hset(key, "owner", "thief")
            raise self.retry(countdown=0)

        if by_name:
            app.send_task("robbed")
        else:
            robbed.delay()
        ended = run(app, take(app))
        assert ended.state == "FAILURE"
        assert isinstance(ended.value, LockLost)
        assert ended.value.owner == "thief"
        assert take(app) is None

    def test_a_retry_without_a_claim_does_not_end_as_a_duplicate(
        self, app: Celery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task that ran unguarded and then finds its key taken fails in the open."""
        app.conf.reliable_on_store_error = "proceed"

        @app.task(base=ReliableTask, name="t", bind=True)
        @once
        def t(self: Any) -> None:
            raise self.retry(countdown=0)

        app.send_task("t")
        message = take(app)
        other = t.delay()
        monkeypatch.setattr(Claims, "enter", _unavailable)
        ended = run(app, message)
        assert ended.state == "FAILURE"
        assert isinstance(ended.value, LockLost)
        assert ended.value.owner == other.id

    def test_a_replacement_with_the_same_key_keeps_the_claim(self, app: Celery) -> None:
        """``self.replace`` goes on with the claim of the task that it replaces."""

        @app.task(base=ReliableTask, name="t", bind=True)
        @once(key="{n}")
        def t(self: Any, n: int, again: bool = True) -> int:
            if again:
                raise self.replace(t.s(n, again=False))
            return n

        result = t.delay(7)
        assert [ended.state for ended in run_all(app)] == ["IGNORED", "SUCCESS"]
        assert result.get(timeout=1) == 7
        assert claims(app) == []

    def test_a_replacement_with_another_key_takes_that(self, app: Celery) -> None:
        """The first key is free, the second is taken until the replacement ends."""

        @app.task(base=ReliableTask, name="t", bind=True)
        @once(key="{n}")
        def t(self: Any, n: int) -> int:
            if n == 7:
                raise self.replace(t.s(8))
            return n

        result = t.delay(7)
        run(app, take(app))
        assert not t.delay(7).duplicate
        assert t.delay(8).id == result.id

    def test_a_call_with_the_same_id_from_inside_is_a_duplicate(self, app: Celery) -> None:
        """Only a retry or a replacement continues a task."""

        @app.task(base=ReliableTask, name="t", bind=True)
        @once(key="{n}")
        def t(self: Any, n: int) -> bool:
            duplicate: bool = t.apply_async((n,), task_id=self.request.id).duplicate
            return duplicate

        t.delay(7)
        assert run(app, take(app)).value is True
        assert take(app) is None

    def test_a_retry_that_cannot_be_published_is_not_dropped(
        self, app: Celery, flaky: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message goes back, the attempt too, and the redelivered copy retries again."""

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OperationalError("gone")

        result = flaky.delay([7])
        message = take(app)
        back: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(app.amqp, "send_task_message", fail)
            ended = run(app, message, redeliver_to=back)
        assert ended.state == "REJECTED"
        assert "its retry could not be published: gone" in str(ended.value)
        assert [claim["attempt"] for claim in claims(app)] == ["0"]
        assert run(app, back.pop()).state == "RETRY"
        run_all(app)
        assert result.get(timeout=1) == 2


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise StoreUnavailable("redis://h", "away")


# -- where the lock Redis is the broker ------------------------------------------------------


@pytest.fixture
def at_broker() -> Any:
    """A once-task of an app whose broker makes the claims; nothing is connected."""
    with Celery("shop", broker="redis://fake/0", backend="cache+memory://") as app:
        apply_reliable_config(app)

        @app.task(base=ReliableTask, name="send")
        @once(key="{n}", ttl=60)
        def send(n: int) -> int:
            return n

        with fake_redis():
            yield app.tasks["send"]


def call(task: Any, queue: Any, *args: Any, waited_for: bool = False, **options: Any) -> Any:
    """Publish with a queue of the test's own."""
    given = Call(
        args=args,
        kwargs={},
        task_id=options.pop("task_id", None),
        producer=options.pop("producer", None),
        link=None,
        options=options,
        is_waited_for=waited_for,
        link_error=None,
        shadow=None,
        queued_by=queue,
    )
    return publish(task, task.reliable_once, given)


def refusing(call: Any, owner: str, headers: Any, producer: Any) -> ReliableResult:
    """What the transport answers where another task has the claim."""
    raise ClaimTaken(Published(Queued.CLAIM_TAKEN, "other", 12.5, 7))


def test_the_broker_makes_the_claim_in_the_step_that_queues(at_broker: Any) -> None:
    """The wish is about this task's message, and there is no script before it."""
    seen: list[Any] = []

    def queue(call: Any, owner: str, headers: Any, producer: Any) -> ReliableResult:
        assert claims(at_broker.app) == []
        assert publication_of({"id": "another task"}) is None
        seen.extend([owner, headers, publication_of({"id": owner})])
        return ReliableResult(owner)

    result = call(at_broker, queue, 7, countdown=10)
    owner, headers, wish = seen
    assert result.id == owner
    assert publication_of({"id": owner}) is None
    assert headers[CLAIM] == {"key": wish.claim, "owner": owner, "attempt": 0}
    assert (wish.owner, wish.claim_attempt, wish.how, wish.holder) == (owner, 0, "acquire", "")
    assert (wish.task, wish.ttl, wish.continues) == ("send", 70, "")


def test_a_retry_keeps_its_claim_in_the_step_that_queues(at_broker: Any) -> None:
    """Beside what is wished already: that its delivery counts as continued."""
    name = at_broker.reliable_once.claim_name(at_broker, (7,), {})
    carried = {CLAIM: {"key": name, "owner": "mine", "attempt": 2}}
    seen: list[Any] = []

    def queue(call: Any, owner: str, headers: Any, producer: Any) -> ReliableResult:
        seen.append(publication_of({"id": owner}))
        return ReliableResult(owner)

    outer = Publication(continues="w1:1:1:celery", task_id="mine")
    with publishing(outer, "mine"):
        call(at_broker, queue, 7, task_id="mine", headers=carried, retries=3)
    (wish,) = seen
    assert (wish.how, wish.claim_attempt, wish.claim) == ("continue", 3, name)
    assert (wish.continues, wish.task_id) == ("w1:1:1:celery", "mine")


def test_a_refused_call_gets_the_owners_result(at_broker: Any) -> None:
    """As with a claim that is taken in a step of its own."""
    result = call(at_broker, refusing, 7, task_id="mine")
    assert (result.id, result.duplicate, result.ignored_id) == ("other", True, "mine")

    @at_broker.app.task(base=ReliableTask, name="strict")
    @once(key="{n}", on_conflict="raise")
    def strict(n: int) -> None:
        pass

    with pytest.raises(DuplicateTaskError) as caught:
        call(at_broker.app.tasks["strict"], refusing, 7)
    assert (caught.value.owner, caught.value.expires_in) == ("other", 12.5)


def test_a_refused_retry_has_lost_its_claim(at_broker: Any) -> None:
    """It must not end as somebody's duplicate."""
    with pytest.raises(LockLost):
        call(at_broker, refusing, 7, task_id="mine", retries=1)


@pytest.mark.parametrize("option", ["producer", "connection"])
def test_a_connection_of_the_callers_own_makes_no_claims(at_broker: Any, option: str) -> None:
    """It may lead to another broker, so the claim is taken before."""

    def queue(call: Any, owner: str, headers: Any, producer: Any) -> ReliableResult:
        assert publication_of({"id": owner}) is None
        (claim,) = claims(at_broker.app)
        assert claim["owner"] == owner
        return ReliableResult(owner)

    with Connection("redis://elsewhere:6379/0") as connection:
        given = {"connection": connection, "producer": SimpleNamespace(connection=connection)}
        call(at_broker, queue, 7, **{option: given[option]})


def test_a_producer_of_the_apps_own_makes_claims(at_broker: Any) -> None:
    """As a group hands it on to its parts: the claim comes with the message."""
    given = SimpleNamespace(connection=at_broker.app.connection_for_write())

    def queue(call: Any, owner: str, headers: Any, producer: Any) -> ReliableResult:
        assert producer.connection is given.connection
        assert publication_of({"id": owner}) is not None
        return ReliableResult(owner)

    call(at_broker, queue, 7, producer=given)


def test_stock_kombu_makes_no_claims(at_broker: Any) -> None:
    """Without the library's transport the claim is taken before, too."""
    options = dict(at_broker.app.conf.broker_transport_options)
    del options["reliable"]
    at_broker.app.conf.broker_transport_options = options

    def queue(call: Any, owner: str, headers: Any, producer: Any) -> ReliableResult:
        assert len(claims(at_broker.app)) == 1
        return ReliableResult(owner)

    call(at_broker, queue, 7)
