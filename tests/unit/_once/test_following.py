"""A duplicate that somebody waits for: it ends as the task that has its key, or runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
from billiard.exceptions import TimeLimitExceeded
from celery import Celery, chain, chord, group
from celery.exceptions import Ignore, Reject

from reliable_tasks import (
    DuplicateTaskError,
    FollowedTaskFailed,
    FollowTimeout,
    ReliableConfig,
    ReliableTask,
    StoreUnavailable,
    once,
)
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import CLAIM, Follows
from reliable_tasks._once.duplicate import is_refused, needs_value
from reliable_tasks._once.entering import enter
from reliable_tasks._once.following import pause_of
from reliable_tasks._once.leaving import end_unrun
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.claims import Claims
from tests.unit.harness import claims, run, run_all, take

Body = Callable[[Any], Any]


def forget_claims(app: Celery) -> None:
    """Let every claim lapse."""
    store = locks_of(app).claims
    store.client.redis.delete(*store.names())


@pytest.fixture
def runs() -> list[str]:
    """Ids of the tasks whose body ran."""
    return []


@pytest.fixture
def make(app: Celery, runs: list[str]) -> Callable[..., Any]:
    """Make a once-task with a body of the test's."""

    def make(
        body: Body | None = None, *, options: dict[str, Any] | None = None, **given: Any
    ) -> Any:
        @app.task(base=ReliableTask, name="task", bind=True, **(options or {}))
        @once(key="{n}", **given)
        def task(self: Any, n: int) -> Any:
            runs.append(self.request.id)
            return "done" if body is None else body(self)

        @app.task(base=ReliableTask, name="after")
        def after(value: Any = "nothing") -> str:
            return f"after {value}"

        return app.tasks["task"]

    return make


def fail(_: Any) -> None:
    """Fail."""
    raise ValueError("told to")


def followed_by_chain(task: Any) -> tuple[Any, Any]:
    """Call a task, and again as the first of a chain."""
    first = task.delay(7)
    return first, chain(task.s(7), task.app.tasks["after"].s()).apply_async()


class TestOutcome:
    """How it ends."""

    def test_it_has_the_owners_result(self, app: Celery, make: Any, runs: list[str]) -> None:
        """The body does not run, and the rest of the chain does."""
        first, rest = followed_by_chain(make())
        run_all(app)
        assert (rest.parent.result, rest.result) == ("done", "after done")
        assert runs == [first.id]
        assert claims(app) == []

    def test_it_waits(self, app: Celery, make: Any, runs: list[str]) -> None:
        """A copy that comes while the owner is queued is set aside."""
        task = make()
        first = task.delay(7)
        owner = take(app)
        result = task.apply_async((7,), link=app.signature("after"))
        assert (result.duplicate, result.followed_id) == (True, first.id)
        assert result.id != first.id
        message = take(app)
        ended = run(app, message)
        assert isinstance(ended.value, SetAside)
        assert ended.value.waits_for == first.id
        run(app, owner)
        assert run(app, message).value == "done"
        assert runs == [first.id]

    @pytest.mark.parametrize("how", ["autoretry_for", "retrying"])
    def test_it_has_the_owners_error(
        self, app: Celery, make: Any, runs: list[str], how: str
    ) -> None:
        """The owner's retries are over, so it has none of its own."""
        is_over: list[bool] = []
        options: dict[str, Any] = {"autoretry_for": (Exception,)}
        if how == "retrying":
            options = {"retrying": tenacity.retry_if_exception(lambda _: bool(is_over))}
        task = make(fail, options=options)
        _, rest = followed_by_chain(task)
        owner, message = take(app), take(app)
        task.max_retries = 0
        run(app, owner)
        task.max_retries = 3
        is_over.append(True)
        ended = run(app, message)
        assert (ended.state, type(ended.value)) == ("FAILURE", ValueError)
        assert (rest.parent.state, len(runs)) == ("FAILURE", 1)
        assert take(app) is None

    @pytest.mark.parametrize("what", ["revoked", "ignored", "forgotten"])
    def test_it_runs_if_the_owner_has_no_end_that_it_could_share(
        self, app: Celery, make: Any, runs: list[str], what: str
    ) -> None:
        """It takes the key, as any call would by then."""

        def body(task: Any) -> str:
            if what == "ignored" and len(runs) == 1:
                raise Ignore
            return "done"

        task = make(body)
        first, rest = followed_by_chain(task)
        owner = take(app)
        if what == "revoked":
            app.backend.mark_as_revoked(first.id)
            forget_claims(app)
        else:
            run(app, owner)
            first.forget()
        (ended, _) = run_all(app)
        assert ended.value == "done"
        assert rest.result == "after done"
        assert runs[-1] == rest.parent.id
        assert claims(app) == []

    def test_its_time_is_over(self, app: Celery, make: Any) -> None:
        """The owner has not ended within the ``ttl``."""
        task = make(ttl=60)
        first, rest = followed_by_chain(task)
        take(app)
        message = take(app)
        message.headers[CLAIM]["follows"][1] = 1
        ended = run(app, message)
        assert isinstance(ended.value, FollowTimeout)
        assert (ended.value.owner, rest.parent.state) == (first.id, "FAILURE")
        assert [claim["owner"] for claim in claims(app)] == [first.id]

    def test_it_retries_as_the_owner_when_it_runs(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """The retry follows nobody: the key is its own."""

        def body(task: Any) -> str:
            if len(runs) == 1:
                raise task.retry(countdown=0)
            return "done"

        task = make(body)
        _, rest = followed_by_chain(task)
        take(app)
        forget_claims(app)
        assert run(app, take(app)).state == "RETRY"
        message = take(app)
        assert "follows" not in message.headers[CLAIM]
        assert run(app, message).value == "done"
        assert runs == [rest.parent.id] * 2

    def test_in_a_window_it_has_the_result_of_whoever_ran(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """Though that had ended when it was called: the key is taken until then."""
        task = make(lock="until_expired", ttl=60)
        first = task.delay(7)
        run_all(app)
        rest = chain(task.s(7), app.signature("after")).apply_async()
        run_all(app)
        assert (rest.result, runs) == ("after done", [first.id])

    def test_it_joins_one_that_gave_its_key_up_at_the_start(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """It was a duplicate of what was queued, and that runs."""

        def body(task: Any) -> str:
            assert isinstance(run(app, message).value, SetAside)
            return "done"

        task = make(body, lock="until_executing")
        first, _ = followed_by_chain(task)
        owner, message = take(app), take(app)
        run(app, owner)
        assert run(app, message).value == "done"
        assert runs == [first.id]

    def test_what_is_called_after_the_owners_end_runs(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """The body of a chord can be published before the last of its header has let go."""
        task = make()
        first = task.delay(7)
        take(app)
        app.backend.mark_as_done(first.id, "done before")
        result = task.apply_async((7,), link=app.signature("after"))
        message = take(app)
        assert isinstance(run(app, message).value, SetAside), "two never run at once"
        forget_claims(app)
        assert run(app, message).value == "done"
        assert runs == [result.id]


class TestEnds:
    """Whatever becomes of the owner, who follows it comes to an end."""

    @pytest.mark.parametrize("lock", ["until_executing", "until_and_while_executing"])
    def test_an_owner_without_its_key_comes_back(
        self, app: Celery, make: Any, runs: list[str], lock: str
    ) -> None:
        """Its worker died: it runs again, and does not follow itself."""

        def body(_: Any) -> str:
            if len(runs) == 1:
                raise Reject("as if its child had died", requeue=True)
            return "done"

        first, _ = followed_by_chain(make(body, lock=lock, ttl=60))
        owner, message = take(app), take(app)
        run(app, owner)
        assert isinstance(run(app, message).value, SetAside)
        assert run(app, owner, redelivered=True).value == "done"
        assert run(app, message).value == "done"
        assert runs == [first.id] * 2

    @pytest.mark.parametrize(
        "lock", ["until_executed", "until_executing", "until_and_while_executing", "until_expired"]
    )
    @pytest.mark.parametrize("how", ["ignored", "killed"])
    def test_an_owner_that_reports_no_state(
        self, app: Celery, make: Any, runs: list[str], lock: str, how: str
    ) -> None:
        """One that is killed for its hard limit has one, which the main process stored."""

        def body(_: Any) -> str:
            if len(runs) == 1:
                raise Ignore
            return "done"

        task = make(body, lock=lock, ttl=60)
        first, rest = followed_by_chain(task)
        owner, message = take(app), take(app)
        if how == "ignored":
            run(app, owner)
            assert run(app, message).value == "done"
            assert runs == [first.id, rest.parent.id]
            return
        headers = {**owner.headers, "args": [7], "kwargs": {}}
        task._reliable_reserved(headers)
        task.push_request(**headers, delivery_info={}, is_eager=False)
        enter(task, task.reliable_once)
        task.pop_request()
        app.backend.mark_as_failure(first.id, TimeLimitExceeded(3))
        task._reliable_unfinished(headers, requeued=False, has_started=True)
        ended = run(app, message)
        assert isinstance(ended.value, FollowedTaskFailed)
        assert "TimeLimitExceeded" in str(ended.value)
        assert runs == []

    @pytest.mark.parametrize("error", [Reject("no", requeue=False), TimeLimitExceeded(3)])
    def test_an_error_that_is_about_the_run(
        self, app: Celery, make: Any, error: BaseException
    ) -> None:
        """Raised once more it would be taken for what became of this one."""
        first, rest = followed_by_chain(make())
        take(app)
        app.backend.mark_as_failure(first.id, error)
        forget_claims(app)
        assert isinstance(run(app, take(app)).value, FollowedTaskFailed)
        assert rest.parent.state == "FAILURE"

    def test_an_owner_whose_end_nobody_could_note(
        self, app: Celery, make: Any, runs: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its result is found when the time is over."""

        def release(*_: Any, **__: Any) -> None:
            raise StoreUnavailable("redis://fake/0", "gone")

        followed_by_chain(make())
        owner, message = take(app), take(app)
        with monkeypatch.context() as patch:
            patch.setattr(Claims, "release", release)
            run(app, owner)
        assert isinstance(run(app, message).value, SetAside)
        message.headers[CLAIM]["follows"][1] = 1
        assert run(app, message).value == "done"
        assert len(runs) == 1

    def test_the_word_of_an_end_is_missing_and_so_is_the_claim(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """What the main process was told, it and its child are told again: the end is read."""
        task = make()
        first, _ = followed_by_chain(task)
        take(app)
        message = take(app)
        app.backend.mark_as_done(first.id, "done before")
        forget_claims(app)
        assert task._reliable_pause(dict(message.headers)) is None
        assert run(app, message).value == "done before"
        assert runs == []

    def test_who_follows_a_new_owner_learns_that_its_time_is_over(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """Also where owners come and go without an end."""
        task = make()
        _, rest = followed_by_chain(task)
        take(app)
        message = take(app)
        for _ in range(2):
            forget_claims(app)
            owner = task.delay(7)
            take(app)
            ended = run(app, message)
            assert isinstance(ended.value, SetAside)
            assert ended.value.waits_for == owner.id
        message.headers[CLAIM]["follows"][1] = 1
        assert isinstance(run(app, message).value, FollowTimeout)
        assert (rest.parent.state, runs) == ("FAILURE", [])

    def test_a_result_that_cannot_be_read(
        self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not for ever, either."""

        def away(*_: Any, **__: Any) -> None:
            raise ConnectionError("the backend is away")

        first, _ = followed_by_chain(make(options={"autoretry_for": (Exception,)}))
        run(app, take(app))
        message = take(app)
        monkeypatch.setattr(type(app.backend), "get_task_meta", away)
        ended = run(app, message)
        assert isinstance(ended.value, SetAside)
        assert f"the result of task {first.id} cannot be read" in str(ended.value)
        message.headers[CLAIM]["follows"][1] = 1
        assert isinstance(run(app, message).value, FollowTimeout)

    def test_many_that_followed_one_that_is_gone(
        self, app: Celery, make: Any, runs: list[str]
    ) -> None:
        """One of them takes its place, and the others follow that."""
        task = make()
        first = task.delay(7)
        take(app)
        for _ in range(4):
            task.apply_async((7,), link=app.signature("after"))
        messages = [take(app) for _ in range(4)]
        for message in messages:
            assert isinstance(run(app, message).value, SetAside)
        app.backend.mark_as_revoked(first.id)
        forget_claims(app)
        assert [run(app, message).value for message in messages] == ["done"] * 4
        assert len(runs) == 1

    @pytest.mark.parametrize("how", ["revoked", "ignored"])
    def test_one_looks_while_another_runs(
        self, app: Celery, make: Any, runs: list[str], how: str
    ) -> None:
        """What it is told then holds when it looks again."""

        def body(_: Any) -> str:
            if how == "ignored" and len(runs) == 1:
                raise Ignore
            assert isinstance(run(app, second).value, SetAside)
            return "done"

        task = make(body)
        first = task.delay(7)
        owner = take(app)
        for _ in range(2):
            task.apply_async((7,), link=app.signature("after"))
        one, second = take(app), take(app)
        if how == "ignored":
            run(app, owner)
        else:
            app.backend.mark_as_revoked(first.id)
            end_unrun(task, task.reliable_once, dict(owner.headers), requeued=False)
        before = len(runs)
        assert run(app, one).value == "done"
        assert run(app, second, redelivered=True).value == "done"
        assert len(runs) == before + 1

    def test_an_id_that_is_used_again(self, app: Celery, make: Any, runs: list[str]) -> None:
        """The end of the task before is not that of this one."""
        task = make(options={"ignore_result": True})
        after = app.signature("after", immutable=True)
        task.apply_async((7,), task_id="daily")
        task.apply_async((7,), link=after)
        run_all(app)
        assert not task.apply_async((7,), task_id="daily").duplicate
        owner = take(app)
        assert task.apply_async((7,), link=after).duplicate
        follower = take(app)
        assert isinstance(run(app, follower).value, SetAside)
        run(app, owner)
        assert run(app, follower).state == "SUCCESS"
        assert runs == ["daily"] * 2


class TestBecomes:
    """An owner that becomes a canvas with its own key in it."""

    @pytest.mark.parametrize("lock", ["until_executed", "until_expired"])
    @pytest.mark.parametrize("rest", [True, False])
    def test_its_part_runs(
        self, app: Celery, make: Any, runs: list[str], lock: str, rest: bool
    ) -> None:
        """Nobody waits for himself, wherever in the canvas it is."""

        def body(task: Any) -> str:
            if len(runs) == 1:
                after = app.tasks["after"]
                parts = [after.si(), task.si(7), *([after.s()] if rest else [])]
                raise task.replace(chain(*parts))
            return "done"

        first = make(body, lock=lock, ttl=60).delay(7)
        run_all(app)
        assert first.result == ("after done" if rest else "done")
        assert len(runs) == 2

    @pytest.mark.parametrize("retries", [0, 1])
    def test_a_part_is_quicker_than_its_end(
        self, app: Celery, make: Any, runs: list[str], retries: int
    ) -> None:
        """The last part has the owner's id, and is published while that still has the key."""

        def body(task: Any) -> str:
            if len(runs) <= retries:
                raise task.retry(countdown=0)
            if len(runs) == retries + 1:
                try:
                    task.replace(chain(app.tasks["after"].si(), task.si(7)))
                except Ignore:
                    assert run(app, take(app)).state == "SUCCESS"
                    raise
            return "done"

        first = make(body).delay(7)
        run_all(app)
        assert (first.result, runs) == ("done", [first.id] * (retries + 2))


class TestLate:
    """A duplicate that nobody knew of when it was called."""

    def test_it_ends_as_the_new_owner(self, app: Celery, make: Any, runs: list[str]) -> None:
        """Its claim lapsed in the queue, and another call has the key."""
        task = make()
        first = task.delay(7)
        late = take(app)
        forget_claims(app)
        second = task.delay(7)
        ended = run(app, late)
        assert isinstance(ended.value, SetAside)
        assert ended.value.waits_for == second.id
        run_all(app)
        assert run(app, late, redelivered=True).value == "done"
        assert (runs, first.result) == ([second.id], "done")

    def test_by_name_it_does_the_same(self, app: Celery, make: Any, runs: list[str]) -> None:
        """With no claim in its message at all."""
        task = make()
        first = task.delay(7)
        owner = take(app)
        by_name = app.send_task("task", (7,))
        message = take(app)
        assert isinstance(run(app, message).value, SetAside)
        run(app, owner)
        assert run(app, message, redelivered=True).value == "done"
        assert (runs, by_name.result) == ([first.id], "done")

    def test_in_a_window_it_does_the_same(self, app: Celery, make: Any, runs: list[str]) -> None:
        """The window is the owner's."""
        make(lock="until_expired", ttl=60)
        first, second = app.send_task("task", (7,)), app.send_task("task", (7,))
        owner, message = take(app), take(app)
        run(app, owner)
        assert run(app, message).value == "done"
        assert (runs, second.result) == ([first.id], "done")


class TestRefused:
    """Where a duplicate is an error."""

    def test_the_caller_hears_of_the_head(self, app: Celery, make: Any) -> None:
        """Of the others nobody would."""
        task = make(on_conflict="raise")
        first = task.delay(7)
        take(app)
        with pytest.raises(DuplicateTaskError):
            chain(task.s(7), app.signature("after")).apply_async()
        assert take(app) is None
        middle = chain(app.signature("after"), task.si(7), app.signature("after")).apply_async()
        both = group(task.s(7), app.signature("after")).apply_async()
        run_all(app)
        for result in (middle.parent, both[0]):
            assert isinstance(result.result, DuplicateTaskError)
            assert result.result.owner == first.id
        assert both[1].result == "after nothing"
        assert [claim["owner"] for claim in claims(app)] == [first.id]

    @pytest.mark.parametrize("kind", ["group", "chord"])
    def test_what_is_made_of_chains_is_not_refused_half_way(
        self, app: Celery, make: Any, kind: str
    ) -> None:
        """A chain in it says of its last task alone that it is a part."""
        task, after = make(on_conflict="raise"), app.signature("after")
        task.delay(7)
        take(app)
        parts = [after, chain(task.s(7), after)]
        (group(parts) if kind == "group" else chord(parts, after)).apply_async()
        states = [ended.state for ended in run_all(app)]
        assert states == ["SUCCESS", "FAILURE"]

    def test_a_call_with_the_owners_id(self, app: Celery, make: Any, runs: list[str]) -> None:
        """It cannot wait for itself."""
        task = make()
        task.apply_async((7,), task_id="x")
        with pytest.raises(DuplicateTaskError):
            task.apply_async((7,), task_id="x", link=app.signature("after"))
        run_all(app)
        assert runs == ["x"]

    def test_a_backend_that_answers_the_caller_alone(self, app: Celery, make: Any) -> None:
        """What a duplicate would end with, its own caller could not be told."""
        app.conf.result_backend = "rpc://"
        app._local.__dict__.pop("backend", None)
        task = make()
        assert needs_value(task, None, {})
        assert not needs_value(task, None, {"ignore_result": True})
        first = task.delay(7)
        assert task.delay(7).id == first.id, "nobody waits for that"
        with pytest.raises(DuplicateTaskError):
            task.apply_async((7,), link=app.signature("after"))

    def test_a_value_that_no_backend_keeps(self, app: Celery, make: Any, runs: list[str]) -> None:
        """The next task would wait for nothing, or get it; without a value all goes on."""
        task = make(options={"ignore_result": True})
        first = task.delay(7)
        owner = take(app)
        with pytest.raises(DuplicateTaskError):
            chain(task.s(7), app.signature("after")).apply_async()
        rest = chain(task.s(7), app.signature("after", immutable=True)).apply_async()
        message = take(app)
        run(app, owner)
        assert run(app, message).state == "SUCCESS"
        run_all(app)
        assert (rest.result, runs) == ("after nothing", [first.id])

    def test_an_error_that_no_backend_keeps(self, app: Celery, make: Any) -> None:
        """It is said that there is none."""
        task = make(fail, options={"ignore_result": True})
        first = task.delay(7)
        owner = take(app)
        chain(task.s(7), app.signature("after", immutable=True)).apply_async()
        message = take(app)
        run(app, owner)
        ended = run(app, message)
        assert isinstance(ended.value, FollowedTaskFailed)
        assert ended.value.task_id == first.id

    def test_who_is_told(self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not what Celery calls when a task has ended."""
        task = make()
        assert is_refused(task, "one", {"reply_to": "me"})
        for option in ("group_id", "chord", "parent_id"):
            assert not is_refused(task, "one", {option: "something"})
        body = chain(task.s(1), task.s(2))
        body.freeze()
        ids = [part["options"]["task_id"] for part in body["kwargs"]["tasks"]]
        for name, signature, is_told in (
            ("some", None, True),
            ("some", chord([task.s(1)], task.s(2)), True),
            ("some", body, False),
            ("celery.chord_unlock", None, False),
        ):
            request = SimpleNamespace(chord=signature)
            running = SimpleNamespace(name=name, request=request)
            monkeypatch.setattr(Celery, "current_worker_task", running)
            assert is_refused(task, ids[0], {}) is is_told

    def test_what_needs_a_value(self, app: Celery, make: Any) -> None:
        """The next of a chain and a callback, unless they take none; a chord's body always."""
        task = make()
        mutable, immutable = task.s(), task.si(1)
        assert not needs_value(task, None, {})
        assert not needs_value(task, immutable, {"chain": [mutable, immutable]})
        assert needs_value(task, None, {"chain": [immutable, mutable]})
        assert needs_value(task, [immutable, mutable], {})
        assert needs_value(task, None, {"chord": immutable})


class TestMainProcess:
    """A worker asks before a slot is taken."""

    @pytest.fixture
    def headers(self, app: Celery, make: Any) -> dict[str, Any]:
        """Those of a duplicate whose owner is queued."""
        task = make()
        task.delay(7)
        task.apply_async((7,), link=app.signature("after"))
        self.owner = take(app)
        headers: dict[str, Any] = take(app).headers
        return headers

    def test_it_holds_none_while_the_owner_has_the_key(
        self, app: Celery, headers: dict[str, Any]
    ) -> None:
        """And then it may start."""
        task = app.tasks["task"]
        pause = task._reliable_pause(headers)
        assert isinstance(pause, SetAside)
        assert pause.waits_for == headers[CLAIM]["follows"][0]
        run(app, self.owner)
        assert task._reliable_pause(headers) is None
        assert task._reliable_pause({"id": "one"}) is None

    def test_it_may_start_when_its_time_is_over(self, app: Celery, headers: dict[str, Any]) -> None:
        """To say so."""
        headers[CLAIM]["follows"][1] = 1
        assert app.tasks["task"]._reliable_pause(headers) is None

    def test_a_lock_redis_that_is_away_is_asked_once(
        self, app: Celery, headers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not for each message: the main process has heartbeats to send."""
        asked = []

        def follow(*_: Any, **__: Any) -> None:
            asked.append(1)
            raise StoreUnavailable("redis://fake/0", "gone")

        task = app.tasks["task"]
        store = type(locks_of(app).claims)
        monkeypatch.setattr(store, "follow", follow)
        for _ in range(3):
            assert isinstance(pause_of(task, task.reliable_once, headers), SetAside)
        assert len(asked) == 1

    def test_it_may_start_without_a_lock_redis(
        self, app: Celery, headers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With ``reliable_on_store_error="proceed"`` the child runs it."""

        def follow(*_: Any, **__: Any) -> None:
            raise StoreUnavailable("redis://fake/0", "gone")

        locks = replace(locks_of(app), config=ReliableConfig(on_store_error="proceed"))
        task = app.tasks["task"]
        monkeypatch.setattr(type(task.reliable_once), "locks", lambda *_: locks)
        assert isinstance(task._reliable_pause(headers), SetAside)
        monkeypatch.setattr(Claims, "follow", follow)
        assert task._reliable_pause(headers) is None

    def test_an_error_of_ours_ends_no_worker(
        self, app: Celery, headers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The child meets it."""
        task = app.tasks["task"]
        store = type(locks_of(app).claims)
        monkeypatch.setattr(store, "follow", lambda *_, **__: 1 / 0)
        assert pause_of(task, task.reliable_once, headers) is None


class TestPublishing:
    """What is away when a duplicate is to be queued."""

    @pytest.mark.parametrize("on_error", ["raise", "proceed"])
    def test_the_lock_redis(
        self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch, on_error: str
    ) -> None:
        """The setting says what then."""

        def follow(*_: Any, **__: Any) -> None:
            raise StoreUnavailable("redis://fake/0", "gone")

        app.conf.reliable_on_store_error = on_error
        task = make()
        task.delay(7)
        take(app)
        monkeypatch.setattr(Claims, "follow", follow)
        if on_error == "raise":
            with pytest.raises(StoreUnavailable):
                task.apply_async((7,), link=app.signature("after"))
            assert take(app) is None
        else:
            task.apply_async((7,), link=app.signature("after"))
            assert take(app) is not None

    def test_the_backend(self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """No group is raised half-way for it."""

        def away(*_: Any, **__: Any) -> None:
            raise ConnectionError("the backend is away")

        task = make()
        task.delay(7)
        monkeypatch.setattr(type(app.backend), "get_state", away)
        group(app.signature("after"), task.s(7)).apply_async()
        assert [take(app) is not None for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("header", [None, 7, ["one", "x", "join", 1], ["one", 1]])
def test_headers_that_say_nothing(header: Any) -> None:
    """Somebody else's are taken for none."""
    assert Follows.from_header(header) is None
