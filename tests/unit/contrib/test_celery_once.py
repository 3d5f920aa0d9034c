"""celery-once's names on our machinery, beside the original."""

from __future__ import annotations

import contextlib
import json
import pickle
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import celery_once
import pytest
from celery import Celery, chain, group, states
from celery.result import EagerResult
from celery_once.backends.redis import Redis as TheirBackend
from celery_once.helpers import queue_once_key
from hypothesis import given
from hypothesis import strategies as st

from reliable_tasks import ConfigError, DuplicateTaskError, ScriptError, once
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import CLAIM
from reliable_tasks._once.leaving import end_unrun
from reliable_tasks._store.claims import Claims
from reliable_tasks.contrib.celery_once import AlreadyQueued, QueueOnce, _with_tls
from reliable_tasks.testing import fake_redis
from tests.unit.harness import run, run_all, take

SETTINGS = {"url": "redis://fake/3", "default_timeout": 60}
KEY = "qo_example_a-10"


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app with settings as celery-once's README has them, and no other Redis."""
    with fake_redis(), Celery("t", broker="memory://", backend="cache+memory://") as app:
        app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": dict(SETTINGS)}
        yield app


@pytest.fixture
def example(app: Celery) -> Any:
    """The task of the README's examples."""

    @app.task(base=QueueOnce, name="example")
    def example(a: int, b: int = 2) -> int:
        return a

    return app.tasks["example"]


@pytest.fixture
def server(app: Celery, example: Any) -> Any:
    """The Redis of ``app.conf.ONCE``."""
    return example.reliable_once.locks(example).claims.client.redis


@pytest.fixture
def theirs(server: Any, monkeypatch: pytest.MonkeyPatch) -> TheirBackend:
    """celery-once's own backend, on the same server."""
    monkeypatch.setattr("celery_once.backends.redis.redis", server)
    return TheirBackend(SETTINGS)


def send_as_theirs(app: Celery, theirs: TheirBackend, key: str = KEY, n: int = 10) -> Any:
    """Queue a task as a producer with celery-once does."""
    theirs.raise_or_lock(key, 60)
    return app.send_task("example", (n,))


class TestAsUsersKnowIt:
    """What celery-once's users wrote stays true."""

    def test_a_second_call_raises(self, app: Celery, example: Any, server: Any) -> None:
        """Their name catches it, and ours does; and the key is free at the end."""
        first = example.delay(10)
        for name in (celery_once.AlreadyQueued, AlreadyQueued, DuplicateTaskError):
            with pytest.raises(name) as raised:
                example.apply_async(args=(10,))
        error = raised.value
        assert isinstance(error, AlreadyQueued)
        assert 59 < error.countdown <= 60
        assert error.message == f"Expires in {error.countdown} seconds"
        assert (error.key, error.owner, error.expires_in) == (KEY, first.id, error.countdown)
        assert server.keys("*") == [KEY]
        run_all(app)
        assert server.keys("*") == []
        example.delay(10)

    def test_keys_that_are_almost_the_same(self, app: Celery, server: Any) -> None:
        """A key is of the users' own making: no other is touched, whatever it ends in."""

        @app.task(base=QueueOnce, name="fetch", once={"keys": ["url"]})
        def fetch(url: str) -> None:
            pass

        task = app.tasks["fetch"]
        for end in (":", "::", ":0"):
            task.delay(f"a{end}")
            take(app)
        kept = set(server.keys("*"))
        task.delay("a")
        run_all(app)
        assert set(server.keys("*")) == kept

    @pytest.mark.parametrize("where", ["call", "task"])
    def test_a_graceful_one_is_rejected(self, app: Celery, example: Any, where: str) -> None:
        """The option of the call or of the task."""
        if where == "task":

            @app.task(base=QueueOnce, name="mild", once={"graceful": True})
            def mild(a: int) -> None:
                pass

            example = app.tasks["mild"]
        of_call = {"once": {"graceful": True}} if where == "call" else {}
        assert not isinstance(example.apply_async((10,), **of_call), EagerResult)
        again = example.apply_async((10,), **of_call)
        assert isinstance(again, EagerResult)
        assert (again.id, again.state) == (None, states.REJECTED)
        message = take(app)
        assert take(app) is None
        assert "graceful" not in json.dumps({**message.headers, **message.properties}), "its own"

    def test_the_options_of_a_call_go_before_those_of_its_task(self, app: Celery) -> None:
        """As in celery-once; and the keys too, which it ignores."""

        @app.task(base=QueueOnce, name="t", once={"graceful": True, "timeout": 30})
        def t(a: int, b: int) -> None:
            pass

        task = app.tasks["t"]
        task.delay(1, 1)
        with pytest.raises(AlreadyQueued) as raised:
            task.apply_async((1, 1), once={"graceful": False})
        assert 29 < raised.value.countdown <= 30
        task.apply_async((2, 1), once={"timeout": 5, "keys": ["a"]})
        with pytest.raises(AlreadyQueued) as raised:
            task.apply_async((2, 7), once={"graceful": False, "keys": ["a"]})
        assert 4 < raised.value.countdown <= 5

    @pytest.mark.parametrize(
        ("keys", "same", "other"), [(["a"], (1, 2), (2, 2)), ([], (2, 2), None)]
    )
    def test_some_arguments_count(
        self, app: Celery, keys: list[str], same: Any, other: Any
    ) -> None:
        """Or none."""

        @app.task(base=QueueOnce, name="slow_add", once={"keys": keys})
        def slow_add(a: int, b: int) -> int:
            return a + b

        task = app.tasks["slow_add"]
        task.delay(1, 1)
        with pytest.raises(AlreadyQueued):
            task.delay(*same)
        if other:
            task.delay(*other)

    def test_a_key_that_has_a_default(self, app: Celery) -> None:
        """In celery-once a KeyError."""

        @app.task(base=QueueOnce, name="t", once={"keys": ["b"]})
        def t(a: int, b: int = 2) -> None:
            pass

        assert app.tasks["t"].get_key((1,)) == "qo_t_b-2"

    def test_unlock_before_run(self, app: Celery, server: Any) -> None:
        """The key is free when the task starts."""

        @app.task(base=QueueOnce, name="t", once={"unlock_before_run": True})
        def t() -> list[str]:
            found: list[str] = server.keys("qo_*")
            return found

        task = app.tasks["t"]
        assert task.unlock_before_run()
        task.delay()
        with pytest.raises(AlreadyQueued):
            task.delay()
        assert run(app, take(app)).value == []

    def test_a_bound_task(self, app: Celery) -> None:
        """Itself is no part of its key."""

        @app.task(base=QueueOnce, name="t", bind=True)
        def t(self: Any, a: int) -> str:
            return str(self.get_key((a,)))

        app.tasks["t"].delay(1)
        assert run(app, take(app)).value == "qo_t_a-1"

    def test_a_retry_keeps_the_key(self, app: Celery, server: Any) -> None:
        """Until it has ended."""

        @app.task(base=QueueOnce, name="t", bind=True)
        def t(self: Any) -> None:
            if not self.request.retries:
                raise self.retry(countdown=0)

        app.tasks["t"].delay()
        assert run(app, take(app)).state == "RETRY"
        assert server.keys("qo_*") == ["qo_t"]
        run_all(app)
        assert server.keys("qo_*") == []

    def test_a_call_that_waits_for_its_lock(
        self, app: Celery, example: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """``blocking``, for ``blocking_timeout`` seconds."""
        app.conf.ONCE["settings"].update(blocking=True, blocking_timeout=5)
        example.delay(10)
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                run_all(app)

        monkeypatch.setattr(time, "sleep", sleep)
        example.delay(10)
        assert slept == [0.1] * 3
        app.conf.ONCE["settings"]["blocking_timeout"] = 0
        with pytest.raises(AlreadyQueued):
            example.delay(10)
        app.conf.ONCE["settings"]["blocking_timeout"] = None
        slept.clear()
        example.delay(10)
        assert len(slept) == 3

    def test_a_timeout_of_zero(self, app: Celery, server: Any) -> None:
        """celery-once never lets go of such a lock; ours goes with its task, or after a year."""

        @app.task(base=QueueOnce, name="t", once={"timeout": 0})
        def t() -> None:
            pass

        app.tasks["t"].delay()
        assert server.ttl("qo_t") > 360 * 86400

    def test_what_else_the_task_has(self, app: Celery, example: Any, server: Any) -> None:
        """For those who look, and who free locks by hand."""
        assert example.config is app.conf
        assert example.once_config is app.conf.ONCE
        assert example.default_timeout == 60
        app.conf.ONCE["backend"] = "celery_once.backends.redis.Redis"
        key = example.get_key((10,), {})
        example.once_backend.raise_or_lock(key, timeout=30)
        with pytest.raises(AlreadyQueued):
            example.once_backend.raise_or_lock(key, timeout=30)
        with pytest.raises(AlreadyQueued):
            example.delay(10)
        example.once_backend.clear_lock(key)
        example.delay(10)

    def test_a_canvas_completes(self, app: Celery) -> None:
        """A graceful duplicate follows the task that has the key."""

        @app.task(base=QueueOnce, name="t", once={"graceful": True})
        def t(a: int) -> int:
            return a

        task = app.tasks["t"]
        task.delay(1)
        result = chain(task.s(1), task.s()).apply_async()
        run_all(app)
        assert result.get(timeout=1) == 1

    def test_neither_eager_nor_direct_calls_touch_a_lock(
        self, app: Celery, example: Any, server: Any
    ) -> None:
        """In celery-once they free other tasks' locks."""
        example.delay(10)
        before = server.hgetall(KEY)
        assert (example.apply((10,)).get(), example(10)) == (10, 10)
        assert server.hgetall(KEY) == before

    def test_the_error_travels(self) -> None:
        """It is the same behind the wire."""
        error = AlreadyQueued(12.5, KEY, "one")
        for copy in (pickle.loads(pickle.dumps(error)), AlreadyQueued(*error.args)):
            assert vars(copy) == vars(error)
            assert str(copy) == str(error) != ""
        assert AlreadyQueued(3).countdown == 3


class TestAsTasksAreWritten:
    """What else celery-once's users have in their tasks."""

    @pytest.mark.parametrize("bind", [False, True])
    def test_autoretry(self, app: Celery, server: Any, example: Any, bind: bool) -> None:
        """Celery wraps the body of the task, and the key is the same."""

        def body(a: int, b: int = 2) -> None:
            raise ValueError

        def bound(self: Any, a: int, b: int = 2) -> None:
            raise ValueError

        app.task(
            base=QueueOnce,
            name="t",
            bind=bind,
            autoretry_for=(ValueError,),
            default_retry_delay=0,
            max_retries=1,
        )(bound if bind else body)
        task = app.tasks["t"]
        task.delay(1)
        assert server.keys("qo_*") == ["qo_t_a-1"]
        assert [ended.state for ended in run_all(app)] == ["RETRY", "FAILURE"]
        assert server.keys("qo_*") == []

    @pytest.mark.parametrize("graceful", [False, True])
    def test_a_task_that_calls_itself(self, app: Celery, graceful: bool) -> None:
        """It is queued already: in its own body too."""
        runs = []

        @app.task(base=QueueOnce, name="t", bind=True, once={"graceful": graceful})
        def t(self: Any) -> None:
            runs.append(1)
            with contextlib.suppress(AlreadyQueued):
                assert self.delay().state == states.REJECTED

        app.tasks["t"].delay()
        run_all(app)
        assert len(runs) == 1

    def test_it_is_twice_in_a_chain(self, app: Celery, example: Any) -> None:
        """There the second gets the key from the first."""
        result = chain(example.si(10), example.si(10)).apply_async()
        assert [ended.value for ended in run_all(app)] == [10, 10]
        assert result.get(timeout=1) == 10

    def test_a_refused_part_of_a_canvas(self, app: Celery, example: Any) -> None:
        """Its error is the one that users know."""
        example.delay(10)
        take(app)
        result = group(example.si(10), example.si(11)).apply_async()
        run_all(app)
        assert isinstance(result[0].result, celery_once.AlreadyQueued)
        assert result[1].get(timeout=1) == 11

    def test_the_lock_of_a_task_that_runs(self, app: Celery) -> None:
        """It lives for as long as that may take, and a caller is told its timeout."""

        @app.task(base=QueueOnce, name="t", bind=True, time_limit=500)
        def t(self: Any) -> float:
            with pytest.raises(AlreadyQueued) as raised:
                self.delay()
            return raised.value.countdown

        app.tasks["t"].delay()
        assert run(app, take(app)).value == 60

    @pytest.mark.parametrize("where", ["task", "settings"])
    def test_no_timeout(self, app: Celery, server: Any, example: Any, where: str) -> None:
        """In celery-once ``None`` is for ever, as 0 is."""
        if where == "settings":
            app.conf.ONCE["settings"]["default_timeout"] = None
        once = {"timeout": None} if where == "task" else {"keys": []}

        @app.task(base=QueueOnce, name="t", once=once)
        def t() -> None:
            pass

        app.tasks["t"].delay()
        assert server.ttl("qo_t") > 360 * 86400

    def test_a_lock_that_is_taken_by_hand(self, app: Celery, example: Any, server: Any) -> None:
        """It belongs to the message that is sent then, which frees it."""
        example.once_backend.raise_or_lock(KEY, timeout=30)
        app.send_task("example", (10,))
        assert run(app, take(app)).value == 10
        assert server.keys("*") == []

    def test_a_call_of_its_own_with_a_callback(self, app: Celery) -> None:
        """It is refused, too: nobody but Celery goes on with a canvas."""
        runs = []

        @app.task(base=QueueOnce, name="t", bind=True)
        def t(self: Any) -> None:
            runs.append(1)
            with pytest.raises(AlreadyQueued):
                self.apply_async(link=self.si())

        app.tasks["t"].delay()
        assert [ended.state for ended in run_all(app)] == ["SUCCESS"]
        assert len(runs) == 1


class TestLongKeys:
    """A key that is longer than a header may be is not sent: the worker makes it anew."""

    TEXT = "x" * 200_000

    @pytest.fixture
    def runs(self) -> list[int]:
        """How often the task ran."""
        return []

    @pytest.fixture
    def task(self, app: Celery, runs: list[int]) -> Any:
        """A task whose argument is its key."""

        @app.task(base=QueueOnce, name="t", bind=True, once={"graceful": True})
        def t(self: Any, text: str, what: str = "") -> int:
            runs.append(1)
            if what == "retry" and len(runs) == 1:
                raise self.retry(countdown=0)
            if what == "replace" and len(runs) == 1:
                raise self.replace(self.si(text, what))
            return len(text)

        return app.tasks["t"]

    @pytest.mark.parametrize("what", ["retry", "replace"])
    def test_it_goes_on_with_its_claim(
        self, app: Celery, task: Any, server: Any, what: str
    ) -> None:
        """As with any key."""
        result = task.delay(self.TEXT, what)
        message = take(app)
        assert len(json.dumps(message.headers[CLAIM])) < 200
        run(app, message)
        again = task.delay(self.TEXT, what)
        assert again.state == states.REJECTED
        assert run(app, take(app)).value == 200_000
        assert (result.get(timeout=1), server.keys("qo_*")) == (200_000, [])

    def test_a_duplicate_follows(self, app: Celery, task: Any, runs: list[int]) -> None:
        """It is known whom, though not by the key."""
        task.delay(self.TEXT)
        owner = take(app)
        task.apply_async((self.TEXT,), link=task.si("b"))
        follower = take(app)
        assert isinstance(task._reliable_pause({**follower.headers, "args": [self.TEXT]}), SetAside)
        assert isinstance(run(app, follower).value, SetAside)
        run(app, owner)
        assert run(app, follower).value == 200_000
        assert len(runs) == 1

    def test_it_takes_no_lock_of_celery_onces(
        self, app: Celery, task: Any, theirs: TheirBackend, server: Any
    ) -> None:
        """It has a claim of its own, though the header does not name it."""
        task.delay(self.TEXT)
        message, key = take(app), task.get_key((self.TEXT,))
        server.delete(key)
        theirs.raise_or_lock(key, 60)
        assert isinstance(run(app, message).value, SetAside)
        assert server.type(key) == "string"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/1?ssl=true", "rediss://h:6379/1"),
        ("redis://h:6379/1?ssl=true&socket_timeout=3", "rediss://h:6379/1?socket_timeout=3"),
        ("redis://h:6379/1?ssl=false", "redis://h:6379/1?ssl=false"),
        ("rediss://h/1", "rediss://h/1"),
    ],
)
def test_urls_as_its_readme_has_them(url: str, shown: str) -> None:
    """TLS by a query option, too."""
    assert _with_tls(url) == shown


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3))
def test_keys_are_celery_onces_own(arguments: dict[str, Any]) -> None:
    """To the letter, for whatever goes into a message."""
    task = _any_arguments()
    assert task.get_key((), arguments) == queue_once_key("t", arguments)


@cache
def _any_arguments() -> Any:
    app = Celery("t", set_as_current=False)

    @app.task(base=QueueOnce, name="t", shared=False)
    def t(a: Any = None, b: Any = None, c: Any = None) -> None:
        pass

    return app.tasks["t"]


class TestRollingUpgrade:
    """Producers and workers of both respect each other's locks."""

    def test_their_call_finds_our_lock(
        self, app: Celery, example: Any, theirs: TheirBackend
    ) -> None:
        """And says how long it lives."""
        example.delay(10)
        with pytest.raises(celery_once.AlreadyQueued) as raised:
            theirs.raise_or_lock(KEY, 60)
        assert 59 < raised.value.countdown <= 60

    def test_our_call_finds_their_lock(
        self, app: Celery, example: Any, theirs: TheirBackend
    ) -> None:
        """Also when it waits for what it calls."""
        send_as_theirs(app, theirs)
        with pytest.raises(AlreadyQueued) as raised:
            example.delay(10)
        assert 59 < raised.value.countdown <= 60
        assert raised.value.owner == "celery-once"
        assert example.apply_async((10,), once={"graceful": True}).state == states.REJECTED

    def test_our_worker_runs_their_message(
        self, app: Celery, example: Any, theirs: TheirBackend, server: Any
    ) -> None:
        """It is the lock's holder: it has a claim while it runs, and frees the key."""

        @app.task(base=QueueOnce, name="looks", bind=True)
        def looks(self: Any, a: int) -> Any:
            return server.hgetall("qo_looks_a-10")["owner"], self.claim.fence > 0

        theirs.raise_or_lock("qo_looks_a-10", 60)
        result = app.send_task("looks", (10,))
        assert run(app, take(app)).value == (result.id, True)
        assert server.keys("*") == []

    def test_their_worker_runs_our_message(
        self, app: Celery, example: Any, theirs: TheirBackend
    ) -> None:
        """It deletes the key at the end, which is what it should do."""
        example.delay(10)
        theirs.clear_lock(KEY)
        example.delay(10)

    def test_a_message_of_theirs_waits_for_ours(
        self, app: Celery, example: Any, theirs: TheirBackend, server: Any
    ) -> None:
        """Nobody was told that it is a duplicate: so it runs, and not beside it."""
        example.delay(10)
        ours = take(app)
        app.send_task("example", (10,))
        message = take(app)
        ended = run(app, message)
        assert isinstance(ended.value, SetAside)
        run(app, ours)
        assert run(app, message).value == 10
        assert server.keys("*") == []

    def test_a_message_of_ours_whose_lock_went_to_theirs(
        self, app: Celery, example: Any, theirs: TheirBackend, server: Any
    ) -> None:
        """A worker of theirs has deleted it: ours waits until theirs has ended."""
        example.delay(10)
        ours = take(app)
        server.delete(KEY)
        send_as_theirs(app, theirs)
        assert isinstance(run(app, ours).value, SetAside)
        assert server.type(KEY) == "string", "it is left alone"
        assert run(app, take(app)).value == 10
        assert run(app, ours).value == 10

    def test_what_ends_unrun_leaves_their_lock_alone(
        self, app: Celery, example: Any, theirs: TheirBackend, server: Any
    ) -> None:
        """Revoked, say, or killed."""
        example.delay(10)
        ours = take(app)
        server.delete(KEY)
        theirs.raise_or_lock(KEY, 60)
        headers = {**ours.headers, "args": (10,), "kwargs": {}}
        end_unrun(example, example.reliable_once, headers, requeued=False)
        example._reliable_uncovered(headers)
        assert server.type(KEY) == "string"

    def test_a_canvas_waits_for_their_lock(
        self, app: Celery, example: Any, theirs: TheirBackend
    ) -> None:
        """And runs itself, for nobody knows how that task has ended."""
        send_as_theirs(app, theirs)
        their_message = take(app)
        result = chain(example.s(10), example.si(11)).apply_async(once={"graceful": True})
        message = take(app)
        assert message.headers[CLAIM]["follows"][0] == "celery-once"
        assert isinstance(run(app, message).value, SetAside)
        run(app, their_message)
        assert run(app, message).value == 10
        run_all(app)
        assert result.get(timeout=1) == 11

    def test_a_retry_of_ours_waits_for_their_task(
        self, app: Celery, theirs: TheirBackend, server: Any
    ) -> None:
        """It does not take their lock over, nor free it."""

        @app.task(base=QueueOnce, name="t", bind=True)
        def t(self: Any) -> str:
            if not self.request.retries:
                server.delete("qo_t")
                theirs.raise_or_lock("qo_t", 60)
                raise self.retry(countdown=0)
            return "retried"

        app.tasks["t"].delay()
        assert run(app, take(app)).state == "RETRY"
        retry = take(app)
        assert isinstance(run(app, retry).value, SetAside)
        assert server.type("qo_t") == "string"
        theirs.clear_lock("qo_t")
        assert run(app, retry).value == "retried"

    def test_a_message_of_theirs_that_ends_unrun_frees_its_lock(
        self, app: Celery, example: Any, theirs: TheirBackend, server: Any
    ) -> None:
        """It is the lock's holder, though its body never began."""
        send_as_theirs(app, theirs)
        message = take(app)
        headers = {**message.headers, "args": (10,), "kwargs": {}}
        end_unrun(example, example.reliable_once, headers, requeued=True)
        assert server.type(KEY) == "string", "it comes back"
        end_unrun(example, example.reliable_once, headers, requeued=False)
        assert server.keys("*") == []

    @pytest.mark.parametrize("how", ["killed", "repeated"])
    def test_the_end_of_a_run_frees_no_other_lock(
        self, app: Celery, example: Any, theirs: TheirBackend, server: Any, how: str
    ) -> None:
        """What started has taken its own over: what is there now is another message's."""
        send_as_theirs(app, theirs)
        message = take(app)
        run(app, message)
        send_as_theirs(app, theirs)
        headers = {**message.headers, "args": (10,), "kwargs": {}}
        if how == "killed":
            end_unrun(example, example.reliable_once, headers, requeued=False, has_started=True)
        else:
            example._reliable_repeated(headers)
        assert server.type(KEY) == "string"

    def test_a_graceful_message_of_theirs_comes_back(
        self, app: Celery, theirs: TheirBackend, server: Any
    ) -> None:
        """It is the lock's holder, and follows nobody."""

        @app.task(base=QueueOnce, name="mild", once={"graceful": True})
        def mild(a: int) -> int:
            return a

        theirs.raise_or_lock("qo_mild_a-10", 60)
        app.send_task("mild", (10,))
        assert run(app, take(app), redelivered=True).value == 10
        assert server.keys("qo_*") == []

    def test_who_follows_their_lock_follows_no_other_task(
        self, app: Celery, theirs: TheirBackend, server: Any
    ) -> None:
        """Nothing of one lock of theirs is taken for the next one's."""
        results = iter("abc")

        @app.task(base=QueueOnce, name="t", once={"graceful": True})
        def t() -> str:
            return next(results)

        task = app.tasks["t"]

        def theirs_and_a_follower() -> tuple[Any, Any]:
            theirs.raise_or_lock("qo_t", 60)
            app.send_task("t")
            message = take(app)
            task.apply_async(link=task.si())
            return message, take(app)

        first, follower = theirs_and_a_follower()
        assert run(app, first).value == "a"
        assert run(app, follower).value == "b"
        server.delete("qo_t")
        while take(app) is not None:
            pass
        second, follower = theirs_and_a_follower()
        assert isinstance(run(app, follower).value, SetAside)
        assert run(app, second).value == "c"

    def test_a_lock_that_never_lapses_is_asked_about_at_leisure(
        self, app: Celery, example: Any, server: Any
    ) -> None:
        """celery-once has such, with a timeout of 0."""
        example.delay(10)
        ours = take(app)
        server.delete(KEY)
        server.set(KEY, "token")
        ended = run(app, ours)
        assert (ended.value.first, ended.value.longest) == (0.2, 5.0)

    def test_another_error_of_the_server_is_one(
        self, app: Celery, example: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not everything is a lock of theirs."""

        def refuse(*_: Any, **__: Any) -> None:
            raise ScriptError("claim_acquire", "NOPERM")

        monkeypatch.setattr(Claims, "_ask", refuse)
        with pytest.raises(ScriptError):
            example.delay(10)


class TestBadSettings:
    """Each is named, with the fix."""

    @pytest.mark.parametrize("value", [None, "redis", {"backend": "celery_once.backends.Redis"}])
    def test_no_settings(self, app: Celery, example: Any, value: Any) -> None:
        """In celery-once an AttributeError."""
        app.conf.ONCE = value
        with pytest.raises(ConfigError, match=r"app\.conf\.ONCE is"):
            example.delay(10)

    def test_another_backend(self, app: Celery, example: Any) -> None:
        """Files are not locks that a network shares."""
        app.conf.ONCE["backend"] = "celery_once.backends.File"
        with pytest.raises(ConfigError, match=r"celery_once\.backends\.File"):
            example.delay(10)

    def test_an_unknown_option(self, app: Celery, example: Any) -> None:
        """Of the task, and of a call."""
        with pytest.raises(ConfigError, match="did you mean 'graceful'"):
            example.apply_async((10,), once={"gracefull": True})
        with pytest.raises(ConfigError, match="unlock_before_run"):
            example.apply_async((10,), once={"unlock_before_run": True})
        with pytest.raises(ConfigError, match="did you mean 'timeout'"):

            @app.task(base=QueueOnce, name="t", once={"timeouts": 3}, lazy=False)
            def t() -> None:
                pass

    def test_an_unknown_key(self, app: Celery) -> None:
        """It names no parameter."""

        @app.task(base=QueueOnce, name="t", once={"keys": ["invoice"]})
        def t(invoice_id: int) -> None:
            pass

        with pytest.raises(ConfigError, match="did you mean 'invoice_id'"):
            app.tasks["t"].delay(1)

    def test_once_beside_it(self, app: Celery) -> None:
        """One of the two would be ignored."""
        with pytest.raises(ConfigError, match="keep one of them"):

            @app.task(base=QueueOnce, name="t", lazy=False)
            @once
            def t() -> None:
                pass
