"""How long a key stays taken, and what is done about a conflict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery, chain
from celery._state import _task_stack
from celery.exceptions import Reject, TaskRevokedError
from celery.signals import task_revoked

from reliable_tasks import (
    DuplicateTaskError,
    LockLost,
    ReliableTask,
    StoreUnavailable,
    once,
)
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import CLAIM, HOLDER
from reliable_tasks._once.leaving import end_unrun
from reliable_tasks._once.locks import locks_of
from tests.support.claims import abandon, confirm
from tests.unit.harness import claims, run, run_all, take

Body = Callable[[Any], Any]


@pytest.fixture
def make(app: Celery) -> Callable[..., Any]:
    """Make a task that does what the test says, with the options of its ``@once``."""
    bodies: list[Body] = []

    def make(body: Body | None = None, **options: Any) -> Any:
        bodies.append(body or (lambda _: None))
        number = len(bodies) - 1

        @app.task(base=ReliableTask, name=f"task{number}", bind=True)
        @once(key="{n}", **options)
        def task(self: Any, n: int, text: str = "") -> Any:
            return bodies[number](self)

        return app.tasks[f"task{number}"]

    return make


def owners(app: Celery) -> list[str]:
    """Who owns the keys that are taken."""
    return [claim["owner"] for claim in claims(app)]


class TestUntilExecuting:
    """The key is free the moment that a worker starts the task."""

    def test_the_next_call_is_queued_while_the_first_runs(self, app: Celery, make: Any) -> None:
        """And is the owner of the key."""
        task = make(lambda self: (owners(app), self.delay(7).id), lock="until_executing")
        first = task.delay(7)
        assert task.delay(7).id == first.id
        ended = run(app, take(app))
        before, second = ended.value
        assert before == []
        assert owners(app) == [second] != [first.id]

    def test_a_copy_that_comes_back_runs_beside_its_successor(self, app: Celery, make: Any) -> None:
        """It gave its key up when it started first, and is not lost for it."""
        task = make(lambda self: "ran", lock="until_executing")
        task.delay(7)
        message = take(app)
        run(app, message)
        second = task.delay(7)
        assert run(app, message, redelivered=True).value == "ran"
        assert owners(app) == [second.id]

    def test_one_that_lost_its_key_in_the_queue_is_a_duplicate(
        self, app: Celery, make: Any
    ) -> None:
        """It never started, and another call has the key by now."""
        task = make(lock="until_executing", on_conflict="raise", ttl=60)
        task.delay(7)
        message = take(app)
        _forget_claims(app)
        second = task.delay(7)
        ended = run(app, message)
        assert isinstance(ended.value, DuplicateTaskError)
        assert ended.value.owner == second.id
        assert owners(app) == [second.id]

    def test_a_retry_takes_the_key_again(self, app: Celery, make: Any) -> None:
        """While it waits it is what is queued."""
        task = make(_retry_once, lock="until_executing")
        first = task.delay(7)
        assert run(app, take(app)).state == "RETRY"
        assert owners(app) == [first.id]
        assert task.delay(7).duplicate
        assert run(app, take(app)).value == "retried"
        assert owners(app) == []

    def test_a_retry_whose_key_is_taken_runs_all_the_same(self, app: Celery, make: Any) -> None:
        """Another call was queued meanwhile: two are queued then, rather than one lost."""

        def body(self: Any) -> Any:
            if self.request.retries < 2:
                if not self.request.retries:
                    self.apply_async((7, "other"))
                raise self.retry(countdown=0)
            return "retried"

        task = make(body, lock="until_executing", on_conflict="replace")
        first = task.delay(7)
        assert run(app, take(app)).state == "RETRY"
        (other,) = owners(app)
        assert other != first.id
        queued = [take(app), take(app)]
        assert [message.headers["id"] for message in queued] == [other, first.id]
        assert CLAIM not in queued[1].headers
        assert run(app, queued[1]).state == "RETRY"
        again = take(app)
        assert owners(app) == [other], "the second retry has replaced nobody, either"
        assert run(app, again).value == "retried"

    def test_a_late_copy_leaves_the_key_to_the_retry(self, app: Celery, make: Any) -> None:
        """It was continued, and is not run again."""
        task = make(_retry_once, lock="until_executing")
        first = task.delay(7)
        message = take(app)
        run(app, message)
        (claim,) = claims(app)
        assert (claim["attempt"], "next_attempt" in claim) == ("1", False)
        assert run(app, message, redelivered=True).state == "IGNORED"
        assert owners(app) == [first.id]

    def test_a_killed_child_costs_nobody_a_key(self, app: Celery, make: Any) -> None:
        """What the main process frees is the key of a copy that never started."""
        task = make(lambda self: self.delay(7).id, lock="until_executing")
        task.delay(7)
        message = take(app)
        second = run(app, message).value
        headers = {**message.headers, "args": [7], "kwargs": {}, HOLDER: "h"}
        end_unrun(task, task.reliable_once, headers, requeued=False)
        assert owners(app) == [second]


class TestUntilExpired:
    """The key stays taken for the ``ttl`` whatever happens."""

    @pytest.mark.parametrize("fails", [False, True])
    def test_it_outlasts_the_task(self, app: Celery, make: Any, fails: bool) -> None:
        """A call within the window is a duplicate of a task that has ended."""

        def body(self: Any) -> None:
            if fails:
                raise ValueError

        task = make(body, lock="until_expired", ttl=60)
        first = task.delay(7)
        run(app, take(app))
        again = task.delay(7)
        assert (again.id, again.duplicate) == (first.id, True)
        assert take(app) is None

    def test_a_task_that_calls_itself_is_no_exception(self, app: Celery, make: Any) -> None:
        """At most once per window."""
        task = make(lambda self: self.delay(7).duplicate, lock="until_expired", ttl=60)
        task.delay(7)
        assert run(app, take(app)).value is True

    def test_one_that_waited_for_longer_than_its_window_runs(self, app: Celery, make: Any) -> None:
        """It was the one call of its window, whoever called in the next."""
        task = make(lambda self: self.claim.key, lock="until_expired", ttl=60)
        task.delay(7)
        message = take(app)
        _forget_claims(app)
        second = task.delay(7)
        assert run(app, message).value.endswith(":turn")
        assert owners(app) == [second.id]

    def test_calls_by_name_have_windows_too(self, app: Celery, make: Any) -> None:
        """The worker takes the key for them, and lets a copy that comes back run."""
        task = make(lambda self: "ran", lock="until_expired", on_conflict="raise", ttl=60)
        first, second = app.send_task(task.name, (7,)), app.send_task(task.name, (7,))
        message = take(app)
        assert run(app, message).value == "ran"
        assert run(app, message, redelivered=True).value == "ran"
        assert isinstance(run(app, take(app)).value, DuplicateTaskError)
        with pytest.raises(DuplicateTaskError) as raised:
            task.delay(7)
        assert raised.value.owner == first.id != second.id

    def test_a_retry_runs_in_its_window(self, app: Celery, make: Any) -> None:
        """It is the same task."""
        task = make(_retry_once, lock="until_expired", ttl=60)
        task.delay(7)
        assert [ended.state for ended in run_all(app)] == ["RETRY", "SUCCESS"]
        assert task.delay(7).duplicate


class TestWhileExecuting:
    """Any number may be queued, and one runs."""

    def test_all_are_queued_and_one_runs(self, app: Celery, make: Any) -> None:
        """The other is set aside until the first has ended."""
        inner: list[Any] = []
        back: list[Any] = []

        def body(self: Any) -> None:
            if not inner:
                inner.append(run(app, take(app), redeliver_to=back))

        task = make(body, lock="while_executing")
        first = task.delay(7)
        assert not task.delay(7).duplicate
        message = take(app)
        assert CLAIM not in message.headers
        run(app, message)
        (ended,), (again,) = inner, back
        assert isinstance(ended.value, SetAside)
        assert str(ended.value) == f"set aside: task {first.id} runs with its key"
        assert (ended.value.first, ended.value.longest) == (0.2, 5.0)
        assert run(app, again).state == "SUCCESS"
        assert owners(app) == []

    @pytest.mark.parametrize(("action", "state"), [("drop", "REVOKED"), ("raise", "FAILURE")])
    def test_what_may_not_wait_ends(
        self, app: Celery, make: Any, action: str, state: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With a final state that says why."""
        inner: list[Any] = []

        def body(self: Any) -> None:
            inner.append(run(app, take(app)))

        task = make(body, lock="while_executing", on_conflict=action)
        first, second = task.delay(7), task.delay(7)
        with caplog.at_level(logging.WARNING, logger="reliable_tasks"):
            run(app, take(app))
        assert second.state == state
        if action == "drop":
            assert inner[0].state == "IGNORED"
            assert str(second.result) == f"task {first.id} runs with its key"
            assert f"task0[{second.id}] is not run: task {first.id} runs" in caplog.text
        else:
            assert isinstance(inner[0].value, DuplicateTaskError)
        assert first.state == "SUCCESS"
        assert owners(app) == []

    def test_a_retry_gives_its_turn_to_others(self, app: Celery, make: Any) -> None:
        """Nobody waits while it waits."""
        task = make(_retry_once, lock="while_executing")
        task.delay(7)
        assert run(app, take(app)).state == "RETRY"
        assert owners(app) == []
        retry = take(app)
        task.delay(7)
        assert run(app, take(app)).state == "RETRY"
        assert run(app, retry).value == "retried"

    def test_a_task_that_goes_back_gives_its_turn_to_others(self, app: Celery, make: Any) -> None:
        """And runs when it comes again, also as a retry."""

        def body(self: Any) -> str:
            if not self.request.retries:
                raise self.retry(countdown=0)
            if self.request.delivery_info["redelivered"]:
                return "ran"
            raise Reject("later", requeue=True)

        task = make(body, lock="while_executing")
        task.delay(7)
        assert run(app, take(app)).state == "RETRY"
        message = take(app)
        assert run(app, message).state == "REJECTED"
        assert owners(app) == []
        assert run(app, message, redelivered=True).value == "ran"

    def test_a_retry_that_is_replaced_takes_its_turn(self, app: Celery, make: Any) -> None:
        """Its replacement has the same id, and begins at attempt 0."""
        bodies: list[Any] = [lambda _: "replaced", _replace, _retry]
        task = make(lambda self: bodies.pop()(self), lock="while_executing")
        task.delay(7)
        states = [ended.state for ended in run_all(app)]
        assert states == ["RETRY", "IGNORED", "SUCCESS"]

    def test_a_killed_child_gives_its_turn_to_others(self, app: Celery, make: Any) -> None:
        """The main process frees what its child held."""
        task = make(lock="while_executing")
        task.delay(7)
        message = take(app)
        name = f"{task.reliable_once.claim_name(task, (7,), {})}:turn"
        store = locks_of(app).claims
        for holder, left in [("other", 1), ("mine", 0)]:
            store.enter(
                name,
                owner=message.headers["id"],
                attempt=0,
                holder=holder,
                lease=60,
                ttl=60,
                task="t",
            )
            headers = {**message.headers, "args": [7], "kwargs": {}, HOLDER: "mine"}
            end_unrun(task, task.reliable_once, headers, requeued=False)
            assert len(owners(app)) == left
            store.release(name, owner=message.headers["id"], attempt=0, holder=holder)


class TestUntilAndWhileExecuting:
    """One is queued and one runs."""

    def test_one_is_queued_while_one_runs(self, app: Celery, make: Any) -> None:
        """A third is a duplicate of the second; and the second waits its turn with its key."""
        inner: list[Any] = []
        back: list[Any] = []

        def body(self: Any) -> None:
            if inner:
                return
            second, third = self.delay(7), self.delay(7)
            inner.extend((second.id, third))
            run(app, take(app), redeliver_to=back)

        task = make(body, lock="until_and_while_executing")
        first = task.delay(7)
        run(app, take(app))
        (second, third), (message,) = inner, back
        assert (third.id, third.duplicate) == (second, True)
        assert owners(app) == [second] != [first.id]
        assert task.delay(7).id == second
        assert run(app, message).state == "SUCCESS"
        assert owners(app) == []

    @pytest.mark.parametrize("action", ["drop", "raise"])
    def test_one_that_may_not_wait_leaves_no_key(self, app: Celery, make: Any, action: str) -> None:
        """Its call is over."""
        left: list[Any] = []

        def body(self: Any) -> None:
            self.delay(7)
            run(app, take(app))
            left.extend(owners(app))

        task = make(body, lock="until_and_while_executing", on_conflict={"start": action})
        first = task.delay(7)
        run(app, take(app))
        assert left == [first.id], "its turn alone"
        assert owners(app) == []

    def test_one_that_is_replaced_while_it_waits_ends(self, app: Celery, make: Any) -> None:
        """At once, however long the one before it takes."""
        results: list[Any] = []

        def body(self: Any) -> None:
            if results:
                return
            back: list[Any] = []
            results.append(self.delay(7, "draft"))
            run(app, take(app), redeliver_to=back)
            results.append(self.delay(7, "final"))
            assert run(app, back.pop()).state == "IGNORED"

        task = make(
            body, lock="until_and_while_executing", on_conflict={"publish": "replace"}, ttl=60
        )
        task.delay(7)
        assert run(app, take(app)).state == "SUCCESS"
        draft, final = results
        assert (draft.state, final.replaced_id) == ("REVOKED", draft.id)
        assert run(app, take(app)).state == "SUCCESS"
        assert owners(app) == []

    def test_a_duplicate_in_the_queue_takes_no_turn(self, app: Celery, make: Any) -> None:
        """It ends, and nobody waits for it."""
        task = make(lock="until_and_while_executing", on_conflict={"publish": "raise"}, ttl=60)
        task.delay(7)
        message = take(app)
        _forget_claims(app)
        second = task.delay(7)
        assert isinstance(run(app, message).value, DuplicateTaskError)
        assert owners(app) == [second.id]


class TestReplace:
    """The new call takes over, and the old message ends as revoked."""

    def test_the_last_call_runs(
        self, app: Celery, make: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each result says how its call ended, and by whom."""
        task = make(lambda self: self.request.args[1], on_conflict="replace")
        with caplog.at_level(logging.INFO, logger="reliable_tasks"):
            results = [task.delay(7, text) for text in ("a", "b", "c")]
        first, second, third = results
        assert [result.replaced_id for result in results] == [None, first.id, second.id]
        assert not third.duplicate
        assert f"[{second.id}] takes the place of {first.id}" in caplog.text
        assert [ended.value for ended in run_all(app)][-1] == "c"
        assert [result.state for result in results] == ["REVOKED", "REVOKED", "SUCCESS"]
        assert str(first.result) == f"task {second.id} has taken its place"
        assert owners(app) == []

    def test_a_replaced_call_is_not_run_when_the_key_is_free(self, app: Celery, make: Any) -> None:
        """As it is when the new one came and went before the old one's countdown ended."""
        task = make(lambda self: self.request.args[1], on_conflict="replace")
        task.delay(7, "a")
        old = take(app)
        task.delay(7, "b")
        assert run(app, take(app)).value == "b"
        assert run(app, old).state == "IGNORED"
        assert owners(app) == []

    def test_it_is_revoked_as_celery_revokes(self, app: Celery, make: Any) -> None:
        """With its signal."""
        told: list[Any] = []

        def receive(sender: Any, request: Any, **_: Any) -> None:
            told.append((sender.name, request.id))

        task_revoked.connect(receive, weak=False)
        try:
            task = make(on_conflict="replace")
            first = task.delay(7)
            task.delay(7)
            run_all(app)
        finally:
            task_revoked.disconnect(receive)
        assert told == [(task.name, first.id)]

    def test_a_call_whose_replacement_may_not_be_queued_waits(self, app: Celery, make: Any) -> None:
        """Its caller is about to queue it, or has died."""
        task = make(lambda self: "ran", on_conflict="replace")
        task.delay(7)
        message = take(app)
        store = locks_of(app).claims
        (claim,) = claims(app)
        name = task.reliable_once.claim_name(task, (7,), {})
        store.acquire(name, owner="other", attempt=0, token="t", ttl=60, task="t", how="replace")
        assert isinstance(run(app, message).value, SetAside)
        abandon(store, name, owner="other", token="t")
        assert owners(app) == [claim["owner"]]
        assert run(app, message).value == "ran"

    def test_the_rest_of_a_replaced_chain_is_told(self, app: Celery, make: Any) -> None:
        """Who waits for its end does not wait for ever."""
        task = make(on_conflict="replace")
        result = chain(task.si(7), task.si(8)).delay()
        task.delay(7)
        run_all(app)
        assert (result.parent.state, result.state) == ("REVOKED", "REVOKED")
        with pytest.raises(TaskRevokedError):
            result.get(timeout=1)

    def test_one_that_runs_is_not_stopped(self, app: Celery, make: Any) -> None:
        """The new one waits for its end."""
        inner: list[Any] = []
        back: list[Any] = []

        def body(self: Any) -> str:
            if not inner:
                # From elsewhere: a task that calls itself hands its claim on.
                with _outside_of_tasks():
                    inner.append(self.delay(7).replaced_id)
                run(app, take(app), redeliver_to=back)
                return "first"
            return "second"

        task = make(body, on_conflict="replace")
        first = task.delay(7)
        assert run(app, take(app)).value == "first"
        assert inner == [first.id]
        (message,) = back
        assert run(app, message).value == "second"

    def test_a_replaced_run_finds_out(self, app: Celery, make: Any) -> None:
        """It may go on, and may not retry: its successor waits for it to end."""
        seen: list[Any] = []

        def body(self: Any) -> None:
            if seen:
                return
            claims_ = locks_of(app).claims
            answer = claims_.acquire(
                self.claim.key,
                owner="other",
                attempt=0,
                token="t",
                ttl=60,
                task=self.name,
                how="replace",
            )
            confirm(claims_, self.claim.key, owner="other", attempt=0)
            seen.append(answer)
            with pytest.raises(LockLost) as lost:
                self.claim.check()
            seen.append(lost.value)
            raise self.retry(countdown=0)

        task = make(body, on_conflict="replace")
        task.delay(7)
        ended = run(app, take(app))
        assert ended.state == "FAILURE"
        assert isinstance(ended.value, LockLost)
        assert seen[1].owner == "other"
        (claim,) = claims(app)
        assert claim["owner"] == "other"
        assert "holder" not in claim

    def test_a_replacement_that_cannot_be_queued_replaces_nobody(
        self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The call before it has its key again, and runs."""
        task = make(lambda self: "ran", on_conflict="replace")
        first = task.delay(7)
        with pytest.raises(Exception, match="serializable"):
            task.apply_async((7, object()))
        assert owners(app) == [first.id]
        assert run(app, take(app)).value == "ran"

    def test_an_end_that_cannot_be_stored_is_tried_again(
        self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its caller would wait for ever."""

        def away(*args: Any, **options: Any) -> None:
            raise ConnectionError("away")

        task = make(on_conflict="replace")
        task.delay(7)
        old = take(app)
        task.delay(7)
        with monkeypatch.context() as patched:
            patched.setattr(task.backend, "mark_as_failure", away)
            ended = run(app, old)
        assert isinstance(ended.value, SetAside)
        assert "its end cannot be stored: away" in str(ended.value)


class TestItself:
    """A once-task that calls itself with its own key hands its claim on."""

    def test_the_next_one_starts_when_the_caller_has_ended(self, app: Celery, make: Any) -> None:
        """It owns the key at once; a second call is a duplicate of the first."""
        inner: list[Any] = []
        back: list[Any] = []

        def body(self: Any) -> str:
            if inner:
                return "second"
            inner.extend((self.delay(7), self.delay(7)))
            self.claim.check()
            run(app, take(app), redeliver_to=back)
            return "first"

        task = make(body)
        first = task.delay(7)
        assert run(app, take(app)).value == "first"
        (second, again), (message,) = inner, back
        assert (second.duplicate, second.replaced_id) == (False, first.id)
        assert (again.id, again.duplicate) == (second.id, True)
        assert owners(app) == [second.id]
        assert run(app, message).value == "second"
        assert owners(app) == []

    def test_a_caller_that_goes_back_runs_on_before_its_successor(
        self, app: Celery, make: Any
    ) -> None:
        """It has not ended."""

        def body(self: Any) -> str:
            if self.request.delivery_info["redelivered"]:
                return "again"
            self.delay(7)
            raise Reject("later", requeue=True)

        task = make(body)
        task.delay(7)
        message = take(app)
        assert run(app, message).state == "REJECTED"
        assert run(app, message, redelivered=True).value == "again"

    def test_a_retry_after_it_says_what_was_retried(self, app: Celery) -> None:
        """The error of the task is not lost behind that of its claim."""

        @app.task(base=ReliableTask, name="auto", bind=True, autoretry_for=(ValueError,))
        @once
        def auto(self: Any) -> None:
            self.delay()
            raise ValueError("the cause")

        auto.delay()
        ended = run(app, take(app))
        assert isinstance(ended.value, LockLost)
        assert isinstance(ended.value.__cause__, ValueError)

    def test_another_task_does_not_get_the_callers_claim(self, app: Celery, make: Any) -> None:
        """A key is of one task."""
        other = make()
        task = make(lambda self: other.delay(7).replaced_id)
        task.delay(7)
        assert run(app, take(app)).value is None


class TestClaim:
    """What a running task can ask about its claim."""

    def test_it_is_known_while_the_task_runs(self, app: Celery, make: Any) -> None:
        """Its key, and a fence that grows."""
        task = make(lambda self: (self.claim.key, self.claim.fence, repr(self.claim)))
        assert task.claim is None
        task.delay(7)
        key, fence, text = run(app, take(app)).value
        assert key == task.reliable_once.claim_name(task, (7,), {})
        assert text.startswith(f"<HeldClaim {key} of ")
        task.delay(7)
        assert run(app, take(app)).value[1] > fence

    def test_a_task_that_gave_its_key_up_has_none(self, app: Celery, make: Any) -> None:
        """There is nothing that it could lose."""
        task = make(lambda self: self.claim, lock="until_executing")
        task.delay(7)
        assert run(app, take(app)).value is None

    def test_one_that_waited_its_turn_holds_it(self, app: Celery, make: Any) -> None:
        """The fence is that of all who run with the key."""
        task = make(lambda self: self.claim.check() or self.claim.key, lock="while_executing")
        task.delay(7)
        assert run(app, take(app)).value.endswith(":turn")

    def test_a_lapsed_claim_is_lost(self, app: Celery, make: Any) -> None:
        """Nobody owns it, or somebody else does."""

        def body(self: Any) -> Any:
            _forget_claims(app)
            with pytest.raises(LockLost) as lost:
                self.claim.check()
            other = self.delay(7).id
            with pytest.raises(LockLost) as again:
                self.claim.check()
            return lost.value.owner, again.value.owner == other

        task = make(body)
        task.delay(7)
        assert run(app, take(app)).value == (None, True)

    def test_an_answer_needs_the_lock_redis(
        self, app: Celery, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No answer is no answer."""

        def body(self: Any) -> None:
            def away(name: str) -> Any:
                raise StoreUnavailable("redis://h", "away")

            monkeypatch.setattr(locks_of(app).claims.__class__, "read", lambda _, name: away(name))
            self.claim.check()

        task = make(body)
        task.delay(7)
        assert isinstance(run(app, take(app)).value, StoreUnavailable)


@contextmanager
def _outside_of_tasks() -> Iterator[None]:
    running = _task_stack.pop()
    try:
        yield
    finally:
        _task_stack.push(running)


def _retry(self: Any) -> None:
    raise self.retry(countdown=0)


def _replace(self: Any) -> None:
    raise self.replace(self.si(7))


def _retry_once(self: Any) -> str:
    if not self.request.retries:
        raise self.retry(countdown=0)
    return "retried"


def _forget_claims(app: Celery) -> None:
    """Let every claim lapse."""
    store = locks_of(app).claims
    for key in store.names():
        store.client.redis.delete(key)
