"""The task of a dead letter is sent again, once, whoever asks for it and how often."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
import redis
import time_machine
from celery import Celery, chain
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.transport import virtual

from reliable_tasks import ReliableTask, dead_letters, once
from reliable_tasks._dead.replaying import replay
from reliable_tasks._store.dead import DeadStore, Sent
from reliable_tasks.errors import DeadLetterNotFound, ReplayRefused, StoreUnavailable
from tests.unit._dead.conftest import NOON
from tests.unit._dead.dying import die, place_of, replace_body, sent
from tests.unit.harness import claims, run, run_all, take

pytestmark = pytest.mark.usefixtures("clock")


# -- what is sent --------------------------------------------------------------------------------


def test_the_same_task_is_sent_under_a_new_id(app: Celery, pay: Any, replayed: list[Any]) -> None:
    """With what it was called with; the message says of what it is a replay."""
    pay.apply_async((7,), headers={"tenant": "t7"}, priority=3, time_limit=60)
    id_ = die(app)
    new_id = dead_letters.replay(id_, app=app)
    (message,) = sent(app)
    headers = message.headers
    assert (headers["id"], headers["task"]) == (new_id, "shop.pay")
    assert new_id != id_
    assert message.decode()[0] == [7]
    assert (headers["tenant"], headers["timelimit"]) == ("t7", [60, None])
    assert message.properties["priority"] == 3
    assert headers["reliable-replay-of"] == id_
    assert headers["reliable_copy"] is True
    assert replayed == [(pay, id_, new_id)]
    assert run(app, message).value == 70


def test_it_keeps_its_place_in_the_canvas(app: Celery, pay: Any) -> None:
    """Who began it all, who called it, its group, and the rest of its chain, which runs."""
    chain(pay.s(7), app.tasks["shop.note"].s()).apply_async()
    message = take(app)
    message.headers.update(root_id="r", parent_id="p", group="g", group_index=2)
    dead_letters.replay(die(app, message), app=app)
    (again,) = sent(app)
    names = ("root_id", "parent_id", "group", "group_index")
    assert [again.headers[name] for name in names] == ["r", "p", "g", 2]
    run(app, again)
    assert run(app, take(app)).value == "noted (70,)"


@pytest.mark.parametrize("parent", ["p", None])
def test_a_replay_inside_of_a_task_is_no_child_of_that(
    app: Celery, pay: Any, parent: str | None
) -> None:
    """Its root and its parent are those of the original, and nobody waits for it."""
    pay.apply_async((7,), root_id="r", parent_id=parent)
    id_ = die(app)

    @app.task(base=ReliableTask, name="shop.repair", bind=True)
    def repair(self: Any) -> int:
        dead_letters.replay(id_, app=app)
        return len(self.request.children or ())

    app.tasks["shop.repair"].delay()
    assert run(app, take(app)).value == 0
    (again,) = sent(app)
    assert (again.headers["root_id"], again.headers["parent_id"]) == ("r", parent)
    assert again.headers["reliable-replay-of"] == id_


def test_times_begin_anew(app: Celery, pay: Any, clock: time_machine.Traveller) -> None:
    """It does not expire by what its call asked for long ago, nor is it retried already."""
    pay.apply_async((7,), expires=60, countdown=30, retries=2)
    message = take(app)
    message.headers["x-delivery-count"] = 5
    clock.shift(3000)
    dead_letters.replay(die(app, message), app=app)
    (again,) = sent(app)
    assert (again.headers["expires"], again.headers["eta"]) == (None, None)
    assert again.headers["retries"] == 0
    assert "x-delivery-count" not in again.headers


def test_what_the_task_itself_says_of_expiry_counts(
    app: Celery, pay: Any, clock: time_machine.Traveller
) -> None:
    """From now on."""
    pay.expires = 100
    pay.apply_async((7,))
    message = take(app)
    clock.shift(3000)
    dead_letters.replay(die(app, message), app=app)
    (again,) = sent(app)
    assert datetime.fromisoformat(again.headers["expires"]).timestamp() == NOON + 3100


@pytest.mark.parametrize(
    ("came_by", "asked_for", "goes_to"),
    [
        ("celery", None, "celery"),
        ("slow", None, "slow"),
        ("slow", "other", "other"),
        ("not declared", None, "celery"),
        ("", None, "celery"),
    ],
)
def test_it_goes_to_the_queue_that_it_came_by(
    app: Celery, pay: Any, came_by: str, asked_for: str | None, goes_to: str
) -> None:
    """Or to the one that is asked for; to its usual one where the app knows none of these."""
    app.conf.task_queues = [Queue("celery"), Queue("slow")]
    pay.apply_async((7,), queue="celery")
    id_ = die(app, queue=came_by)
    dead_letters.replay(id_, queue=asked_for, app=app)
    assert len(sent(app, goes_to)) == 1


def test_a_queue_that_the_app_does_not_make_is_refused(app: Celery, pay: Any) -> None:
    """Where it makes none by itself; the letter can be replayed elsewhere."""
    app.conf.task_queues = [Queue("celery")]
    app.conf.task_create_missing_queues = False
    pay.apply_async((7,), queue="celery")
    id_ = die(app)
    with pytest.raises(ReplayRefused, match=r"it cannot be called any more: .*other"):
        dead_letters.replay(id_, queue="other", app=app)
    assert dead_letters.replay(id_, app=app)
    assert len(sent(app)) == 1


def test_a_task_that_nobody_knows_here_is_sent_by_its_name(
    app: Celery, pay: Any, replayed: list[Any]
) -> None:
    """Whoever replays it need not be able to run it."""
    pay.apply_async((7,), expires=60)
    message = take(app)
    message.headers["task"] = "shop.elsewhere"
    id_ = die(app, message)
    new_id = dead_letters.replay(id_, app=app)
    (again,) = sent(app)
    assert (again.headers["task"], again.headers["id"]) == ("shop.elsewhere", new_id)
    assert again.decode()[0] == [7]
    assert again.headers["reliable-replay-of"] == id_
    assert again.headers["expires"] is None
    assert replayed == [(None, id_, new_id)]


# -- once ----------------------------------------------------------------------------------------


def test_it_is_sent_once_however_often_it_is_asked_for(app: Celery, pay: Any) -> None:
    """All are told the same id, also those who looked at it before it was sent."""
    pay.delay(7)
    id_ = die(app)
    before = dead_letters.get(id_, app=app)
    new_ids = {dead_letters.replay(id_, app=app) for _ in range(3)}
    new_ids.add(replay(app, place_of(app), before))
    assert len(new_ids) == 1
    assert len(sent(app)) == 1
    assert dead_letters.get(id_, app=app).replayed_as in new_ids


@pytest.mark.parametrize(
    ("how", "is_sent_here"), [(Sent.SENT, False), (Sent.REFUSED, True), (Sent.IN_DOUBT, True)]
)
def test_who_meets_another_one_waits_for_it(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, how: Sent, is_sent_here: bool
) -> None:
    """And sends it only if that one did not, under the same id if it may have."""
    pay.delay(7)
    id_ = die(app)
    place = place_of(app)
    _, others = place.store.reserve(place.server, id_, "another")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            place.store.release(place.server, id_, "another", how)

    monkeypatch.setattr(time, "sleep", sleep)
    new_id = dead_letters.replay(id_, app=app)
    assert len(looks) == 3
    assert (new_id == others) is (how is not Sent.REFUSED)
    assert len(sent(app)) == int(is_sent_here)


def test_one_that_says_nothing_is_not_waited_for_for_long(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller
) -> None:
    """It is dead: it may have sent it, so the same id is sent again, and one of both runs."""
    pay.delay(7)
    id_ = die(app)
    place = place_of(app)
    _, others = place.store.reserve(place.server, id_, "another")
    monkeypatch.setattr(time, "sleep", clock.shift)
    assert dead_letters.replay(id_, app=app) == others
    assert 15 <= time.time() - NOON < 16
    (again,) = sent(app)
    assert again.headers["id"] == others


def test_one_that_is_removed_meanwhile_is_not_found(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent."""
    pay.delay(7)
    id_ = die(app)
    reserve = DeadStore.reserve

    def discard_and_reserve(self: DeadStore, *args: Any) -> Any:
        dead_letters.discard(id_, app=app)
        return reserve(self, *args)

    monkeypatch.setattr(DeadStore, "reserve", discard_and_reserve)
    with pytest.raises(DeadLetterNotFound):
        dead_letters.replay(id_, app=app)
    assert sent(app) == []


# -- what is refused, and what is in doubt -------------------------------------------------------


def test_a_key_that_is_taken_refuses_a_replay(app: Celery) -> None:
    """Whoever has it is named; when that has ended it can be tried again."""

    @app.task(base=ReliableTask, name="shop.once")
    @once(key="{n}")
    def once_only(n: int) -> int:
        return n

    task = app.tasks["shop.once"]
    task.delay(7)
    message = take(app)
    run(app, message)
    id_ = die(app, message)
    other = task.delay(7)
    with pytest.raises(ReplayRefused, match=f"task {other.id} has its @once key: replay it when"):
        dead_letters.replay(id_, app=app)
    assert dead_letters.get(id_, app=app).replayed_as is None
    assert [ended.state for ended in run_all(app)] == ["SUCCESS"]
    new_id = dead_letters.replay(id_, app=app)
    assert [claim["owner"] for claim in claims(app)] == [new_id]
    assert [ended.value for ended in run_all(app)] == [7]


def test_a_key_that_is_taken_refuses_also_where_calls_raise(app: Celery) -> None:
    """It is the same refusal."""

    @app.task(base=ReliableTask, name="shop.strict")
    @once(key="{n}", on_conflict="raise")
    def strict(n: int) -> int:
        return n

    task = app.tasks["shop.strict"]
    task.delay(7)
    message = take(app)
    run(app, message)
    id_ = die(app, message)
    task.delay(7)
    with pytest.raises(ReplayRefused, match="its @once key is taken: "):
        dead_letters.replay(id_, app=app)
    run_all(app)
    assert dead_letters.replay(id_, app=app)


def test_a_signature_that_has_changed_refuses_a_replay(app: Celery, pay: Any) -> None:
    """The reason says how; when the task takes it again it can be sent."""
    pay.delay(7)
    id_ = die(app, replace_body(take(app), [[7, 8], {}, {}]))
    with pytest.raises(ReplayRefused, match=r"it cannot be called any more: TypeError\("):
        dead_letters.replay(id_, app=app)
    assert sent(app) == []
    pay.typing = False
    assert dead_letters.replay(id_, app=app)
    assert len(sent(app)) == 1


def test_a_broker_that_goes_away_leaves_it_in_doubt(
    app: Celery, pay: Any, replayed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been sent: the next one sends it at once, under the same id."""
    pay.delay(7)
    id_ = die(app)
    ids: list[str] = []
    send = app.amqp.send_task_message

    def sends_and_fails(producer: Any, name: str, message: Any, **options: Any) -> Any:
        ids.append(message.headers["id"])
        raise OperationalError("away")

    with monkeypatch.context() as patch:
        patch.setattr(app.amqp, "send_task_message", sends_and_fails)
        with pytest.raises(OperationalError, match="away"):
            dead_letters.replay(id_, app=app)
    assert app.amqp.send_task_message == send
    assert (dead_letters.get(id_, app=app).replayed_as, replayed) == (None, [])
    new_id = dead_letters.replay(id_, app=app)
    assert [new_id] == ids
    assert len(sent(app)) == 1


def test_a_redis_that_goes_away_hides_no_refusal(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the caller has to know is why it was not sent."""
    pay.delay(7)
    id_ = die(app, replace_body(take(app), [[7, 8], {}, {}]))

    def away(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(DeadStore, "release", away)
    with pytest.raises(ReplayRefused, match="cannot be called any more"):
        dead_letters.replay(id_, app=app)


def test_what_is_no_part_of_one_is_not_replayed_as_one(app: Celery, pay: Any) -> None:
    """The reason says what to leave out."""
    pay.delay(7)
    id_ = die(app)
    with pytest.raises(ReplayRefused, match="it is no part of a chord: leave out whole_chord"):
        dead_letters.replay(id_, whole_chord=True, app=app)


def test_a_letter_that_was_replayed_is_left_alone(app: Celery, pay: Any) -> None:
    """Its id alone is said, though nothing of it could be read any more."""
    pay.delay(7)
    letter = dead_letters.get(die(app), app=app)
    assert replay(app, place_of(app), replace(letter, replayed_as="new", id="gone")) == "new"
    assert sent(app) == []


class Killed(BaseException):
    """What nothing of ours handles."""


def dead_once(app: Celery, on_conflict: Any) -> str:
    """Have a call of a once-task with 7 die, whose key is free then; return its letter's id."""

    @app.task(base=ReliableTask, name="shop.ship")
    @once(key="{n}", on_conflict=on_conflict)
    def ship(n: int) -> int:
        return n

    app.tasks["shop.ship"].delay(7)
    message = take(app)
    run(app, message)
    return die(app, message)


@pytest.mark.parametrize("on_conflict", ["existing", "raise"])
def test_who_dies_between_claim_and_message_has_sent_nothing(
    app: Celery, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller, on_conflict: Any
) -> None:
    """Where those are two steps: the next one has the same claim, and sends it."""
    id_ = dead_once(app, on_conflict)
    server = place_of(app).server
    before: dict[bytes, Any] = {}

    def die_there(*args: Any, **options: Any) -> Any:
        before.update({name: server.dump(name) for name in server.keys("*")})
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(app.amqp, "send_task_message", die_there)
        with pytest.raises(Killed):
            dead_letters.replay(id_, app=app)
    # Who is dead has done nothing since.
    server.flushdb()
    for name, dumped in before.items():
        server.restore(name, 0, dumped)
    (claim,) = claims(app)
    clock.shift(16)
    new_id = dead_letters.replay(id_, app=app)
    assert claim["owner"] == new_id
    (again,) = sent(app)
    assert again.headers["id"] == new_id
    assert run(app, again).value == 7


@pytest.mark.parametrize("on_conflict", ["existing", "raise"])
@pytest.mark.parametrize("where", ["before the broker", "at the broker"])
def test_who_fails_takes_nothing_from_who_has_sent_it(
    app: Celery,
    monkeypatch: pytest.MonkeyPatch,
    clock: time_machine.Traveller,
    where: str,
    on_conflict: Any,
) -> None:
    """The claim that it has met is that of the message that is queued."""
    id_ = dead_once(app, on_conflict)

    def away(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)
        patch.setattr(DeadStore, "release", away)
        with pytest.raises(StoreUnavailable):
            dead_letters.replay(id_, app=app)
    (claim,) = claims(app)
    for _ in range(2):
        clock.shift(16)
        with monkeypatch.context() as patch:
            if where == "at the broker":
                patch.setattr(virtual.Channel, "basic_publish", away)
            else:
                patch.setattr(app.amqp, "send_task_message", away)
            with pytest.raises((StoreUnavailable, OperationalError)):
                dead_letters.replay(id_, app=app)
        (after,) = claims(app)
        assert after["owner"] == claim["owner"]
        assert "unconfirmed" not in after
    clock.shift(16)
    new_id = dead_letters.replay(id_, app=app)
    first, second = sent(app)
    assert {first.headers["id"], second.headers["id"]} == {new_id} == {claim["owner"]}
    assert run(app, first).value == 7


def test_a_replay_takes_nobodys_place(app: Celery) -> None:
    """The newer call is the one that counts, also where a call takes the place of another one."""

    @app.task(base=ReliableTask, name="shop.save")
    @once(key="{n}", on_conflict="replace")
    def save(n: int, text: str) -> str:
        return text

    app.tasks["shop.save"].delay(1, "stale")
    message = take(app)
    run(app, message)
    id_ = die(app, message)
    fresh = app.tasks["shop.save"].delay(1, "fresh")
    with pytest.raises(ReplayRefused, match=f"task {fresh.id} has its @once key"):
        dead_letters.replay(id_, app=app)
    assert [ended.value for ended in run_all(app)] == ["fresh"]
    assert dead_letters.replay(id_, app=app)
    assert [ended.value for ended in run_all(app)] == ["stale"]


def test_a_window_that_it_opened_itself_refuses_a_replay(app: Celery) -> None:
    """The reason says what there is to wait for: its task has ended."""

    @app.task(base=ReliableTask, name="shop.remind")
    @once(key="{n}", lock="until_expired", ttl=60)
    def remind(n: int) -> None:
        raise ValueError("no")

    app.tasks["shop.remind"].delay(1)
    message = take(app)
    run(app, message)
    id_ = die(app, message)
    with pytest.raises(ReplayRefused, match="the window of its @once key is still open"):
        dead_letters.replay(id_, app=app)


class Unshowable(Exception):
    """An error of the user's own that cannot be shown."""

    def __repr__(self) -> str:
        """Fail."""
        raise RuntimeError("no")


@pytest.mark.parametrize("error", [AttributeError("id"), RuntimeError("no"), Unshowable()])
def test_whatever_a_key_raises_refuses_a_replay(app: Celery, pay: Any, error: Exception) -> None:
    """The others are replayed, and it is known before."""

    def key(order: Any) -> str:
        if order == "old":
            raise error
        return str(order)

    @app.task(base=ReliableTask, name="shop.ship")
    @once(key=key)
    def ship(order: Any) -> None:
        pass

    pay.delay(7)
    message = take(app)
    message.headers["task"] = "shop.ship"
    old = die(app, replace_body(message, [["old"], {}, {}]))
    pay.delay(8)
    other = die(app)
    with pytest.raises(ReplayRefused, match="it cannot be called any more") as caught:
        dead_letters.check(old, app=app)
    assert type(error).__name__ in caught.value.reason
    outcome = dead_letters.replay_all(app=app)
    assert list(outcome.sent) == [other]
    assert list(outcome.refused) == [old]
    assert dead_letters.get(old, app=app).replayed_as is None


@pytest.mark.parametrize("error", [OperationalError("away"), StoreUnavailable("r", "away")])
def test_what_is_wrong_for_all_stops_the_others(app: Celery, pay: Any, error: Exception) -> None:
    """They would meet the same."""
    pay.delay(7)
    id_ = die(app)

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    pay.apply_async = fail
    with pytest.raises(type(error)):
        dead_letters.replay_all(app=app)
    assert dead_letters.get(id_, app=app).replayed_as is None


@pytest.mark.parametrize(
    "error", [KeyError("audit"), OperationalError("away"), KeyboardInterrupt()]
)
def test_what_fails_after_it_was_sent_does_not_send_it_twice(
    app: Celery, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """It is noted as sent, and the log says what has failed."""

    class Audited(ReliableTask):
        abstract = True

        def apply_async(self, *args: Any, **options: Any) -> Any:
            super().apply_async(*args, **options)
            if "task_id" in options:
                raise error

    @app.task(base=Audited, name="shop.audited")
    def audited() -> None:
        pass

    app.tasks["shop.audited"].delay()
    id_ = die(app)
    if isinstance(error, Exception):
        new_id = dead_letters.replay(id_, app=app)
        assert f"Dead letter {id_} is sent" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            dead_letters.replay(id_, app=app)
        new_id = dead_letters.replay(id_, app=app)
    assert [message.headers["id"] for message in sent(app)] == [new_id]
    assert dead_letters.get(id_, app=app).replayed_as == new_id


def test_a_letter_that_is_yet_to_be_kept_does_not_hide_the_others(app: Celery, pay: Any) -> None:
    """The server has refused a part of it; its message is still the broker's."""
    pay.delay(1)
    pay.delay(2)
    first, second = (die(app) for _ in range(2))
    place = place_of(app)
    place.server.hdel(f"{place.store.keys.dead}letter:{first}", "at")
    assert [letter.id for letter in dead_letters.list(app=app)] == [second]
    with pytest.raises(DeadLetterNotFound):
        dead_letters.get(first, app=app)


def test_a_replay_is_noted_when_redis_answers_again(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent: that it is not said at once does not make it doubtful."""
    pay.delay(7)
    id_ = die(app)
    release, tried = DeadStore.release, []

    def away_at_first(self: DeadStore, *args: Any) -> None:
        tried.append(args)
        if len(tried) < 3:
            raise redis.ConnectionError("away")
        release(self, *args)

    monkeypatch.setattr(DeadStore, "release", away_at_first)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    new_id = dead_letters.replay(id_, app=app)
    assert len(tried) == 3
    assert dead_letters.get(id_, app=app).replayed_as == new_id


def test_a_letter_of_a_queue_that_is_unknown_here_goes_where_it_came_from(
    app: Celery, pay: Any
) -> None:
    """Its exchange and routing key are in its message; nothing comes to the default queue."""
    with app.connection_for_write() as connection:
        elsewhere = Queue("audit", Exchange("events"), routing_key="paid")
        elsewhere(connection.default_channel).declare()
    pay.apply_async((7,), exchange="events", routing_key="paid", exchange_type="topic")
    with app.connection_for_read() as connection:
        message = elsewhere(connection.default_channel).get(no_ack=True)
    id_ = die(app, message, queue="audit")
    new_id = dead_letters.replay(id_, app=app)
    with app.connection_for_read() as connection:
        again = elsewhere(connection.default_channel).get(no_ack=True)
    assert again.headers["id"] == new_id
    assert sent(app) == []
