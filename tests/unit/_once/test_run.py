"""The worker's side of a claim: let in, set aside, released."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject

from reliable_tasks import DuplicateTaskError, ReliableTask, StoreUnavailable, once
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import CLAIM, HOLDER, Run
from reliable_tasks._once.leaving import end_unrun
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.claims import Claims
from tests.unit.harness import claims, run, take


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise StoreUnavailable("redis://h", "away")


@pytest.fixture
def task(app: Celery) -> Any:
    """A task that does what it is told to and looks at its claim."""

    @app.task(base=ReliableTask, name="task", bind=True)
    @once(key="{n}")
    def task(self: Any, n: int, end: str = "") -> Any:
        (claim,) = claims(app) or [{}]
        if end == "ignore":
            raise Ignore
        if end == "reject":
            raise Reject("no")
        if end == "requeue":
            raise Reject("later", requeue=True)
        if end == "fail":
            raise ValueError(end)
        found = Run.of(self)
        assert found is not None
        assert found.fence == int(claim["fence"])
        assert found.holder == claim["holder"] == self.request.get(HOLDER)
        return claim

    return app.tasks["task"]


def lease(claim: dict[str, str]) -> float:
    """How long a run was covered when it started, to the second."""
    return round((int(claim["lease_end"]) - int(claim["since"])) / 1000)


def test_a_run_holds_its_claim_and_frees_it(app: Celery, task: Any) -> None:
    """While the body runs the claim is held, afterwards it is gone."""
    result = task.delay(7)
    ended = run(app, take(app))
    assert ended.state == "SUCCESS"
    assert (ended.value["owner"], ended.value["attempt"]) == (result.id, "0")
    assert claims(app) == []


@pytest.mark.parametrize(
    ("end", "state"), [("ignore", "IGNORED"), ("reject", "REJECTED"), ("fail", "FAILURE")]
)
def test_every_end_frees_the_claim(app: Celery, task: Any, end: str, state: str) -> None:
    """A task that will not run again leaves its key to others, however it ended."""
    task.delay(7, end)
    assert run(app, take(app)).state == state
    assert claims(app) == []


def test_a_requeued_copy_keeps_the_claim(app: Celery, task: Any) -> None:
    """Its message waits in the queue again, and the key waits with it."""
    result = task.delay(7, "requeue")
    assert run(app, take(app)).state == "REJECTED"
    (claim,) = claims(app)
    assert claim["owner"] == result.id
    assert "holder" not in claim
    assert task.delay(7).id == result.id


def test_a_task_published_by_name_claims_at_start(app: Celery, task: Any) -> None:
    """Without a header the key is computed from the arguments that arrived."""
    app.send_task("task", (7,))
    message = take(app)
    assert CLAIM not in message.headers
    ended = run(app, message)
    assert ended.value["owner"] == message.headers["id"]
    assert claims(app) == []


def test_a_task_published_by_name_that_is_a_duplicate_fails(app: Celery) -> None:
    """Its caller could not be told, so its result says who has the key."""

    @app.task(base=ReliableTask, name="task")
    @once(on_conflict="raise")
    def task(n: int) -> None:
        pass

    first = task.delay(7)
    take(app)
    app.send_task("task", (7,))
    ended = run(app, take(app))
    assert ended.state == "FAILURE"
    assert isinstance(ended.value, DuplicateTaskError)
    assert ended.value.owner == first.id
    assert [claim["owner"] for claim in claims(app)] == [first.id]


def test_a_duplicate_is_no_failure_to_retry(app: Celery) -> None:
    """autoretry_for=(Exception,) does not turn it into a message that comes again."""

    @app.task(base=ReliableTask, name="auto", autoretry_for=(Exception,), default_retry_delay=0)
    @once(on_conflict="raise")
    def auto() -> None:
        pass

    auto.delay()
    take(app)
    app.send_task("auto")
    assert isinstance(run(app, take(app)).value, DuplicateTaskError)
    assert take(app) is None


@pytest.mark.parametrize("autoretry", [(), (Exception,)])
def test_a_second_copy_is_set_aside(
    app: Celery, autoretry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """While another copy of its attempt runs, a message goes back and changes nothing.

    The main process says so, and Celery does not warn of it beside that.
    """

    @app.task(base=ReliableTask, name="t", autoretry_for=autoretry, bind=True)
    @once
    def t(self: Any, nested: bool = True) -> Any:
        if nested:
            before = claims(app)
            ended = run(app, message)
            assert claims(app) == before
            answer = ended.value
            return ended.state, answer.first, answer.longest, answer.requeue, str(answer)
        return None

    t.delay()
    message = take(app)
    state, first, longest, requeue, text = run(app, message).value
    assert (state, first, longest, requeue) == ("REJECTED", 1.0, 5.0, True)
    assert text == "set aside: another copy of it runs"
    assert take(app) is None
    assert [r.message for r in caplog.records if r.name == "celery.app.trace"] == []


def test_a_retry_that_comes_too_early_waits_briefly(app: Celery) -> None:
    """The attempt that published it is about to end."""

    @app.task(base=ReliableTask, name="t", bind=True)
    @once
    def t(self: Any) -> Any:
        if self.request.retries:
            return None
        self.retry(countdown=0, throw=False)
        return run(app, take(app)).value.first

    t.delay()
    assert run(app, take(app)).value == 0.1


class TestWithoutAStore:
    """The lock Redis does not answer."""

    def test_a_task_goes_back(
        self, app: Celery, task: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It neither fails nor runs unguarded."""
        task.delay(7)
        monkeypatch.setattr(Claims, "enter", _unavailable)
        ended = run(app, take(app))
        assert isinstance(ended.value, SetAside)
        assert ended.value.first == 1.0

    def test_a_task_runs_unguarded(
        self, app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With ``proceed`` it runs, and the log says so; its key is free when it has ended."""
        app.conf.reliable_on_store_error = "proceed"

        @app.task(base=ReliableTask, name="t", bind=True)
        @once
        def t(self: Any) -> bool:
            return Run.of(self) is None

        t.delay()
        with monkeypatch.context() as patch:
            patch.setattr(Claims, "enter", _unavailable)
            assert run(app, take(app)).value is True
        assert "runs without a claim" in caplog.text
        assert claims(app) == []

    def test_a_result_stands_when_the_release_fails(
        self,
        app: Celery,
        task: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The claim lapses by itself."""
        result = task.delay(7)
        monkeypatch.setattr(Claims, "release", _unavailable)
        assert run(app, take(app)).state == "SUCCESS"
        assert result.get(timeout=1)["owner"] == result.id
        assert "stay until it lapses" in caplog.text


@pytest.mark.parametrize(
    ("options", "settings", "expected"),
    [
        ({}, {}, 3605),
        ({"time_limit": 100}, {}, 105),
        ({"time_limit": 10}, {}, 15),
        ({}, {"reliable_longest_task": 200}, 205),
        ({"time_limit": 100}, {"reliable_longest_task": 200}, 105),
        ({}, {"task_time_limit": 100}, 105),
    ],
)
def test_a_lease_covers_the_longest_run(
    app: Celery, options: Any, settings: Any, expected: float
) -> None:
    """The hard limit, else what the user stated, else an hour."""
    app.conf.update(settings)

    @app.task(base=ReliableTask, name="t", **options)
    @once
    def t() -> Any:
        return claims(app)

    t.delay()
    (claim,) = run(app, take(app)).value
    assert lease(claim) == pytest.approx(expected, abs=2)


def test_a_lease_follows_the_limit_of_the_call(app: Celery) -> None:
    """A limit given to ``apply_async`` is the one that applies."""

    @app.task(base=ReliableTask, name="t", time_limit=100)
    @once
    def t() -> Any:
        return claims(app)

    t.apply_async(time_limit=500)
    (claim,) = run(app, take(app)).value
    assert lease(claim) == pytest.approx(505, abs=2)


def test_a_held_claim_outlives_a_redelivery(app: Celery) -> None:
    """A dead worker's message comes back after visibility_timeout, and finds its claim."""
    app.conf.broker_transport_options = {"visibility_timeout": 900}

    @app.task(base=ReliableTask, name="t", time_limit=10)
    @once
    def t() -> Any:
        store = locks_of(app).claims
        (key,) = store.names()
        return store.client.redis.pttl(key)

    t.delay()
    assert run(app, take(app)).value / 1000 == pytest.approx(905, abs=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda server, key: server.delete(key), "ended after its claim on"),
        (lambda server, key: server.hset(key, "owner", "thief"), "ended when thief owned"),
        (
            lambda server, key: server.hset(key, "holder", "other"),
            "ended when a later run of it owned",
        ),
    ],
)
def test_a_lost_claim_is_told(
    app: Celery, caplog: pytest.LogCaptureFixture, change: Any, words: str
) -> None:
    """A task that ends without the claim that it began with says so."""

    @app.task(base=ReliableTask, name="t")
    @once
    def t() -> None:
        store = locks_of(app).claims
        change(store.client.redis, store.names()[0])

    t.delay()
    run(app, take(app))
    assert words in caplog.text


class TestEndUnrun:
    """What the main process does for a copy whose child cannot."""

    def headers(self, app: Celery, task: Any, *, by_name: bool = False) -> dict[str, Any]:
        """The headers of a published message, as the worker's request has them."""
        if by_name:
            app.send_task("task", (7,))
        else:
            task.delay(7)
        message = take(app)
        args, kwargs, _ = message.decode()
        headers = {**message.headers, "args": args, "kwargs": kwargs}
        task._reliable_reserved(headers)
        return headers

    def test_a_copy_that_never_ran_frees_its_claim(self, app: Celery, task: Any) -> None:
        """A revoked or expired message takes its key with it."""
        end_unrun(task, task.reliable_once, self.headers(app, task), requeued=False)
        assert claims(app) == []

    def test_a_copy_that_was_killed_keeps_it_for_its_redelivery(
        self, app: Celery, task: Any
    ) -> None:
        """Nobody holds it any more, so the next copy starts at once."""
        headers = self.headers(app, task)
        store = locks_of(app).claims
        options: dict[str, Any] = {"lease": 60, "ttl": 60, "task": "task", "attempt": 0}
        name, owner = headers[CLAIM]["key"], headers["id"]
        store.enter(name, owner=owner, holder=headers[HOLDER], **options)
        end_unrun(task, task.reliable_once, headers, requeued=True)
        (claim,) = claims(app)
        assert claim["owner"] == owner
        assert "holder" not in claim

    def test_a_copy_published_by_name_is_found_by_its_arguments(
        self, app: Celery, task: Any
    ) -> None:
        """Its claim has the name that its child would have given it."""
        headers = self.headers(app, task, by_name=True)
        store = locks_of(app).claims
        name = task.reliable_once.claim_name(task, (7,), {})
        store.enter(name, owner=headers["id"], holder="h", attempt=0, lease=60, ttl=60, task="task")
        headers[HOLDER] = "h"
        end_unrun(task, task.reliable_once, headers, requeued=False)
        assert claims(app) == []

    def test_arguments_that_do_not_fit_do_not_end_the_worker(self, app: Celery, task: Any) -> None:
        """Such a call has no claim; its child fails, the main process goes on."""
        headers = self.headers(app, task, by_name=True)
        headers["args"] = (1, 2, 3, 4)
        end_unrun(task, task.reliable_once, headers, requeued=False)

    def test_no_error_ends_the_worker(
        self,
        app: Celery,
        task: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Not even one that nobody thought of."""

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("unthought of")

        headers = self.headers(app, task)
        monkeypatch.setattr(Claims, "release", fail)
        end_unrun(task, task.reliable_once, headers, requeued=False)
        assert "is not released" in caplog.text
        assert "unthought of" in caplog.text

    def test_a_dead_store_is_waited_for_once(
        self,
        app: Celery,
        task: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The main process has heartbeats to send; the claims lapse by themselves."""
        asked = []

        def unavailable(*args: Any, **kwargs: Any) -> Any:
            asked.append(args)
            raise StoreUnavailable("redis://h", "away")

        headers = self.headers(app, task)
        monkeypatch.setattr(Claims, "release", unavailable)
        for _ in range(3):
            end_unrun(task, task.reliable_once, headers, requeued=False)
        assert len(asked) == 1
        assert caplog.text.count("stays until it lapses") == 2

    def test_a_repetition_is_not_worth_a_word(
        self, app: Celery, task: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A copy whose twin has ended finds the claim released."""
        headers = self.headers(app, task)
        locks_of(app).claims.client.redis.flushall()
        caplog.clear()
        end_unrun(task, task.reliable_once, headers, requeued=False, is_routine=True)
        assert caplog.text == ""


class FailsBefore(ReliableTask):
    """A base whose own code fails before the body begins."""

    abstract = True

    def before_start(self, *args: Any) -> None:
        """Fail."""
        raise RuntimeError("before")


def test_a_task_that_fails_before_its_body_frees_its_claim(app: Celery) -> None:
    """Celery runs code of the user's before ours."""

    @app.task(base=FailsBefore, name="t")
    @once
    def t() -> None:
        pass

    t.delay()
    assert run(app, take(app)).state == "FAILURE"
    assert claims(app) == []
