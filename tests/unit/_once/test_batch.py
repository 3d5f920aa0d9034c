"""Many calls at once, where each message is a step of its own."""

from __future__ import annotations

from typing import Any

import kombu
import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import virtual

from reliable_tasks import ReliableTask, StoreUnavailable, once
from reliable_tasks._once.claim import CLAIM
from reliable_tasks._store.claims import Claims
from reliable_tasks.instrumentation.signals import claim_acquired, claim_conflict
from tests.unit.harness import claims, run_all, take

NOBODY = "redis://127.0.0.1:1/0"


def make(app: Celery, **options: Any) -> Any:
    """Return a once-task."""

    @app.task(base=ReliableTask, name="send")
    @once(key="{n}", **options)
    def send(n: int, text: str = "") -> int:
        return n

    return app.tasks["send"]


def calls(*numbers: int) -> list[Any]:
    """Return calls with these keys."""
    return [((number,), None) for number in numbers]


def test_each_call_has_its_result_in_its_place(app: Celery) -> None:
    """Duplicates too, of others and of each other."""
    send = make(app)
    before = send.delay(2)
    first, second, third, fourth = send.apply_many(calls(1, 2, 3, 1))
    assert [result.duplicate for result in (first, second, third, fourth)] == [
        *(False, True, False, True)
    ]
    assert (second.id, fourth.id) == (before.id, first.id)
    assert {claim["owner"] for claim in claims(app)} == {before.id, first.id, third.id}
    assert sorted(ended.value for ended in run_all(app)) == [1, 2, 3]
    assert claims(app) == []


def test_a_message_has_all_that_one_call_gives_it(app: Celery) -> None:
    """Its claim, its arguments and the options of all calls."""
    send = make(app)
    (result,) = send.apply_many([((7,), {"text": "x"})], headers={"x": "y"}, shadow="other")
    message = take(app)
    args, kwargs, _ = message.decode()
    assert (args, kwargs) == ([7], {"text": "x"})
    assert message.headers[CLAIM]["owner"] == result.id == message.headers["id"]
    assert (message.headers["x"], message.headers["shadow"]) == ("y", "other")


def test_no_call_raises_for_its_key_is_taken(app: Celery) -> None:
    """Whoever asked for many is told of each."""
    send = make(app, on_conflict="raise")
    first, again = send.apply_many(calls(1, 1))
    assert (first.duplicate, again.duplicate, again.id) == (False, True, first.id)


def test_the_last_call_wins(app: Celery) -> None:
    """With ``on_conflict="replace"`` within a batch, too."""
    send = make(app, on_conflict="replace")
    first, second = send.apply_many(calls(1, 1))
    assert second.replaced_id == first.id
    (claim,) = claims(app)
    assert claim["owner"] == second.id
    assert "replaces" not in claim
    assert [ended.state for ended in run_all(app)] == ["IGNORED", "SUCCESS"]


def test_a_duplicate_with_callbacks_is_queued_to_follow(app: Celery) -> None:
    """As one call of its kind is."""
    send = make(app)
    owner = send.delay(1)
    (result,) = send.apply_many(calls(1), link=send.si(9))
    assert (result.duplicate, result.followed_id) == (True, owner.id)
    assert result.id != owner.id


@pytest.mark.parametrize("lock", ["until_executing", "until_expired", "while_executing"])
def test_other_lifetimes(app: Celery, lock: Any) -> None:
    """Where calls take no key, none is a duplicate."""
    send = make(app, lock=lock)
    results = send.apply_many(calls(1, 1))
    assert [result.duplicate for result in results] == [False, lock != "while_executing"]
    assert {ended.state for ended in run_all(app)} == {"SUCCESS"}


def test_signals(app: Celery) -> None:
    """Each call is told of."""
    seen: list[Any] = []

    def note(signal: Any, key: str, **_: Any) -> None:
        seen.append((signal, key.split(":")[1]))

    for signal in (claim_acquired, claim_conflict):
        signal.connect(note, weak=False, dispatch_uid="batch")
    try:
        make(app).apply_many(calls(1, 2, 1))
    finally:
        for signal in (claim_acquired, claim_conflict):
            signal.disconnect(dispatch_uid="batch")
    assert seen == [(claim_acquired, "1"), (claim_acquired, "2"), (claim_conflict, "1")]


def test_a_task_without_a_key(app: Celery) -> None:
    """Its calls are queued, each of them."""

    @app.task(base=ReliableTask)
    def add(a: int, b: int) -> int:
        return a + b

    results = add.apply_many([((1,), {"b": 1}), ([2, 2], {})])
    assert [ended.value for ended in run_all(app)] == [2, 4]
    assert len({result.id for result in results}) == 2


def test_no_calls_at_all(app: Celery) -> None:
    """Nothing comes of nothing."""
    assert make(app).apply_many([]) == []


@pytest.mark.parametrize(
    "bad", [7, (7,), ("seven", {}), ((7,), [1]), ((7,), {}, 1)], ids=lambda bad: repr(bad)
)
def test_a_call_that_is_no_pair(app: Celery, bad: Any) -> None:
    """It is named, and nothing is queued."""
    send = make(app)
    with pytest.raises(TypeError, match=r"call 1 of apply_many is .*: give \(args, kwargs\)"):
        send.apply_many([((1,), {}), bad])
    assert take(app) is None
    assert claims(app) == []


def test_one_id_for_all(app: Celery) -> None:
    """There is no such thing."""
    with pytest.raises(TypeError, match="task_id='mine'"):
        make(app).apply_many(calls(1, 2), task_id="mine")


def test_eager(app: Celery) -> None:
    """Each has run when it returns."""
    app.conf.task_always_eager = True
    assert [result.get() for result in make(app).apply_many(calls(1, 2))] == [1, 2]


def test_arguments_that_do_not_fit(app: Celery) -> None:
    """As one call: nothing stays of it, and nothing is queued."""
    send = make(app)
    with pytest.raises(TypeError):
        send.apply_many([((1,), {}), ((), {"what": 1})])
    assert claims(app) == []


class TestBroken:
    """The broker goes away in the midst of it."""

    @pytest.fixture
    def left(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
        """The claims that are left, of three calls of which the second one failed."""
        publish, seen = kombu.Producer.publish, []

        def fail(*args: Any, **options: Any) -> None:
            seen.append(1)
            if len(seen) == 2:
                raise OperationalError("gone")
            publish(*args, **options)

        send = make(app)
        with monkeypatch.context() as patch:
            patch.setattr(kombu.Producer, "publish", fail)
            with pytest.raises(OperationalError, match="gone"):
                send.apply_many(calls(1, 2, 3))
        return claims(app)

    def test_what_is_queued_keeps_its_claim(self, app: Celery, left: Any) -> None:
        """What may be, is in doubt."""
        (queued,) = [claim for claim in left if "unconfirmed" not in claim]
        assert take(app).headers["id"] == queued["owner"]

    def test_an_interrupt_among_the_claims(
        self, app: Celery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All are taken back."""
        take_each = Claims.take_each

        def interrupted(self: Claims, *args: Any) -> Any:
            take_each(self, *args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Claims, "take_each", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make(app).apply_many(calls(1, 2))
        assert claims(app) == []

    def test_those_that_took_a_place_are_confirmed(
        self, app: Celery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If their messages are queued."""
        send = make(app, on_conflict="replace")
        send.apply_many(calls(1, 2))
        publish, seen = kombu.Producer.publish, []

        def fail(*args: Any, **options: Any) -> None:
            seen.append(1)
            if len(seen) == 2:
                raise OperationalError("gone")
            publish(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(kombu.Producer, "publish", fail)
            with pytest.raises(OperationalError, match="gone"):
                send.apply_many(calls(1, 2))
        assert not any("replaces" in claim for claim in claims(app))
        assert [ended.state for ended in run_all(app)] == ["IGNORED", "SUCCESS", "SUCCESS"]

    def test_it_can_be_called_again(self, app: Celery, left: Any) -> None:
        """The whole of it: each runs once."""
        results = app.tasks["send"].apply_many(calls(1, 2, 3))
        assert [result.duplicate for result in results] == [True, False, False]
        assert sorted(ended.value for ended in run_all(app)) == [1, 2, 3]
        assert claims(app) == []


class TestWithoutAStore:
    """The lock Redis does not answer."""

    @pytest.fixture
    def app(self) -> Any:
        """An app whose lock Redis is down."""
        with Celery("shop", broker="memory://", backend="cache+memory://") as app:
            app.conf.reliable_redis_url = NOBODY
            yield app

    def test_it_is_refused(self, app: Celery) -> None:
        """As one call is."""
        with pytest.raises(StoreUnavailable):
            make(app).apply_many(calls(1, 2))
        assert take(app) is None

    def test_it_can_go_on(self, app: Celery) -> None:
        """Where that was asked for."""
        app.conf.reliable_on_store_error = "proceed"
        results = make(app).apply_many(calls(1, 2))
        assert [result.duplicate for result in results] == [False, False]
        assert take(app) is not None


def test_the_store_is_asked_in_one_go(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and once more where places were taken."""
    send = make(app, on_conflict="replace")
    send.apply_many(calls(*range(50)))
    asked: list[str] = []
    ask = Claims._ask_each

    def note(self: Claims, script: str, *args: Any) -> Any:
        asked.append(script)
        return ask(self, script, *args)

    monkeypatch.setattr(Claims, "_ask_each", note)
    send.apply_many(calls(*range(100)))
    assert asked == ["claim_acquire", "claim_confirm"]


@pytest.mark.parametrize("error", [RuntimeError, OperationalError, ConnectionResetError])
def test_only_what_was_under_way_is_in_doubt(
    app: Celery, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Those before are queued, and those behind were never begun."""
    send = make(app)
    publish, begun = virtual.Channel.basic_publish, []

    def fail(channel: Any, message: Any, *args: Any, **options: Any) -> None:
        begun.append(message)
        if len(begun) == 2:
            raise error("on the way")
        publish(channel, message, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(virtual.Channel, "basic_publish", fail)
        with pytest.raises(error):
            send.apply_many(calls(1, 2, 3))
    owners = [message["headers"]["id"] for message in begun]
    doubted = {claim["owner"]: claim.get("unconfirmed") for claim in claims(app)}
    assert doubted == {owners[0]: None, owners[1]: owners[1]}
    again = send.apply_many(calls(1, 2, 3))
    assert [(one.duplicate, one.replaced_id) for one in again] == [
        *((True, None), (False, owners[1]), (False, None))
    ]


def test_a_router_that_fails_leaves_no_doubt(app: Celery) -> None:
    """What was not even begun is not queued."""
    send = make(app)
    seen: list[Any] = []

    def route(name: str, args: Any, *_: Any, **__: Any) -> None:
        seen.append(args)
        if len(seen) == 2:
            raise RuntimeError("no way")

    app.conf.task_routes = (route,)
    with pytest.raises(RuntimeError):
        send.apply_many(calls(1, 2, 3))
    assert [claim.get("unconfirmed") for claim in claims(app)] == [None]


def test_what_goes_wrong_with_many_is_told_in_one_line(
    app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of how many calls, and of which one."""

    def unavailable(*_: Any, **__: Any) -> None:
        raise StoreUnavailable(NOBODY, "gone")

    monkeypatch.setattr(Claims, "take_each", unavailable)
    monkeypatch.setattr(Claims, "abandon_each", unavailable)
    app.conf.reliable_on_store_error = "proceed"
    make(app).apply_many(calls(*range(50)))
    told = [record.getMessage() for record in caplog.records if record.name == "reliable_tasks"]
    assert len(told) == 2
    assert all("and 49 more" in line for line in told)
