"""The task of a dead letter is sent again, once, whoever asks for it and how often."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
import redis
import time_machine
from celery import Celery, chain, chord, group
from kombu import Exchange, Producer, Queue
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask, dead_letters, once
from reliable_tasks._dead import replaying, replaying_chords
from reliable_tasks._dead.letters import raw_of
from reliable_tasks._dead.replaying import replay
from reliable_tasks._places import DeadPlace, dead_place
from reliable_tasks._store.dead import DeadStore, Sent
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from reliable_tasks.errors import DeadLetterNotFound, ReplayRefused, StoreUnavailable
from reliable_tasks.instrumentation.signals import dead_letter_replayed
from tests.unit.harness import claims, run, run_all, take

Bury = Callable[..., str]
#: Sunday noon, in 2026.
NOON = 1_772_366_400.0


@pytest.fixture(autouse=True)
def clock() -> Iterator[time_machine.Traveller]:
    """The clock of the Redis and of those who wait for it."""
    with time_machine.travel(NOON, tick=False) as traveller:
        yield traveller


@pytest.fixture
def pay(app: Celery) -> Any:
    """A task."""

    @app.task(base=ReliableTask, name="shop.pay")
    def pay(n: int = 0) -> int:
        return n * 10

    @app.task(base=ReliableTask, name="shop.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(base=ReliableTask, name="shop.note")
    def note(*args: Any) -> str:
        return f"noted {args}"

    return app.tasks["shop.pay"]


@pytest.fixture
def replayed() -> Iterator[list[tuple[Any, str, str]]]:
    """What the signal's receivers were told: sender, letter's id and new id."""
    told: list[tuple[Any, str, str]] = []

    def receive(sender: Any, letter: DeadLetter, task_id: str, **_: Any) -> None:
        told.append((sender, letter.id, task_id))

    dead_letter_replayed.connect(receive)
    yield told
    assert dead_letter_replayed.disconnect(receive)


def place_of(app: Celery) -> DeadPlace:
    """Where the letters are."""
    place = dead_place(app)
    assert place is not None
    return place


def die(app: Celery, message: Any = None, **about: Any) -> str:
    """Have the task of a message die, of the next one by default; return its id."""
    message = message or take(app)
    headers = message.headers
    known: dict[str, Any] = {
        "id": headers["id"],
        "task": headers["task"],
        "task_id": headers["id"],
        "cause": Cause.FAILED,
        "error": "ValueError: no",
        "queue": "celery",
        **about,
    }
    place = place_of(app)
    letter = Letter(DeadLetter(**known), raw_of(message), Bounds(3600, 100, 100_000))
    return place.store.bury(place.server, letter, uuid4().hex)[0]


def succeed(app: Celery, message: Any) -> None:
    """Have a part of a chord succeed, as its worker notes it."""
    assert run(app, message).state == "SUCCESS"
    place = place_of(app)
    headers = message.headers
    place.store.keep_part(place.server, headers["group"], headers["id"], raw_of(message), 60)


def replace_body(message: Any, body: Any) -> Any:
    """Return a message that calls its task otherwise."""
    message.body = json.dumps(body)
    return message


def sent(app: Celery, queue: str = "celery") -> list[Any]:
    """The messages in a queue."""
    found = []
    with app.connection_for_read() as connection:
        known: Any = Queue(queue)(connection.default_channel)
        known.declare()
        while (message := known.get(no_ack=True)) is not None:
            found.append(message)
    return found


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


def test_a_chord_that_is_replayed_inside_of_a_task_is_no_child_of_that(
    app: Celery, pay: Any
) -> None:
    """It begins by itself, as it does where an engineer replays it."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    succeed(app, first)
    id_ = die(app, second, chord_id=group_id)

    @app.task(base=ReliableTask, name="shop.repair")
    def repair() -> None:
        dead_letters.replay(id_, whole_chord=True, app=app)

    app.tasks["shop.repair"].delay()
    run(app, take(app))
    again = sent(app)
    assert [message.decode()[0] for message in again] == [[1], [2]]
    assert [message.headers["parent_id"] for message in again] == [None, None]


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


# -- parts of a chord ----------------------------------------------------------------------------


def start_chord(app: Celery, header: list[Any], body: Any) -> str:
    """Call a chord whose size is noted; return its group."""
    result = chord(header, body, app=app).apply_async()
    assert result.parent is not None
    group_id = str(result.parent.id)
    place = place_of(app)
    place.store.note_chord(place.server, group_id, len(header), 60)
    return group_id


def test_a_part_of_a_chord_is_not_replayed_alone(app: Celery, pay: Any) -> None:
    """The chord has counted its failure; the reason says what can be done."""
    group_id = start_chord(app, [pay.s(1), pay.s(2)], app.tasks["shop.total"].s())
    id_ = die(app, chord_id=group_id)
    for ask in (dead_letters.replay, dead_letters.check):
        with pytest.raises(ReplayRefused, match=rf"chord {group_id} .*whole_chord=True") as caught:
            ask(id_, app=app)
        assert caught.value.id == id_


def test_what_is_no_part_of_one_is_not_replayed_as_one(app: Celery, pay: Any) -> None:
    """The reason says what to leave out."""
    pay.delay(7)
    id_ = die(app)
    with pytest.raises(ReplayRefused, match="it is no part of a chord: leave out whole_chord"):
        dead_letters.replay(id_, whole_chord=True, app=app)


def test_a_whole_chord_is_sent_anew(app: Celery, pay: Any, replayed: list[Any]) -> None:
    """All its parts, in their order, under a new group; then it is called with their results."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2, 3)], app.tasks["shop.total"].s())
    first, second, third = sent(app)
    succeed(app, third)
    die(app, first, chord_id=group_id)
    id_ = die(app, second, chord_id=group_id)
    assert dead_letters.check(id_, whole_chord=True, app=app).id == id_
    new_id = dead_letters.replay(id_, whole_chord=True, app=app)
    again = sent(app)
    assert [message.decode()[0] for message in again] == [[1], [2], [3]]
    (new_group,) = {message.headers["group"] for message in again}
    assert new_group != group_id
    assert again[1].headers["id"] == new_id
    assert [one.headers.get("reliable-replay-of") for one in again] == [
        first.headers["id"],
        second.headers["id"],
        None,
    ]
    assert not {one.headers["id"] for one in again} & {one.headers["id"] for one in (first, third)}
    place = place_of(app)
    assert place.store.parts(place.server, group_id) == (0, {})
    for message in again:
        assert run(app, message).state == "SUCCESS"
    assert [ended.value for ended in run_all(app)] == [60]
    assert {(id_, new_id) for _, id_, new_id in replayed} == {
        (first.headers["id"], again[0].headers["id"]),
        (second.headers["id"], new_id),
    }


def test_the_other_dead_parts_are_replayed_with_it(app: Celery, pay: Any) -> None:
    """Whoever asks for one of them is told its new id, and nothing is sent again."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    before = dead_letters.get(ids[1], app=app)
    new_ids = [dead_letters.replay(id_, whole_chord=True, app=app) for id_ in ids]
    # Also who has looked at it before.
    assert replay(app, place_of(app), before, whole_chord=True) == new_ids[1]
    assert [one.headers["id"] for one in sent(app)] == new_ids
    assert dead_letters.count(app=app) == 0
    assert [
        dead_letters.check(id_, whole_chord=True, app=app).replayed_as for id_ in ids
    ] == new_ids


def test_two_who_replay_two_parts_of_a_chord_send_it_once(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They meet at the first of its dead parts, and the other one has sent all."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    one, two = (die(app, message, chord_id=group_id) for message in sent(app))
    reserve = DeadStore.reserve
    other: list[str] = []

    def be_late(self: DeadStore, *args: Any) -> Any:
        monkeypatch.setattr(DeadStore, "reserve", reserve)
        other.append(dead_letters.replay(one, whole_chord=True, app=app))
        return reserve(self, *args)

    monkeypatch.setattr(DeadStore, "reserve", be_late)
    new_id = dead_letters.replay(two, whole_chord=True, app=app)
    assert [message.headers["id"] for message in sent(app)] == [*other, new_id]


@pytest.mark.parametrize(("asked_for", "goes_to"), [(None, "orders"), ("audit", "audit")])
def test_the_parts_of_a_chord_go_to_the_queue_that_they_came_by(
    app: Celery, pay: Any, asked_for: str | None, goes_to: str
) -> None:
    """The dead ones, and those that have succeeded; or to the one that is asked for."""
    header: list[Any] = [pay.s(n).set(queue="orders") for n in (1, 2)]
    header.append(chain(pay.s(3).set(queue="orders"), pay.s()))
    group_id = start_chord(app, header, app.tasks["shop.total"].s())
    first, second, third = sent(app, "orders")
    succeed(app, first)
    id_ = die(app, second, queue="orders", chord_id=group_id)
    die(app, third, queue="", chord_id=group_id)
    dead_letters.replay(id_, whole_chord=True, queue=asked_for, app=app)
    assert [message.decode()[0] for message in sent(app, goes_to)] == [[1], [2], [3]]
    assert sent(app) == []


@pytest.mark.parametrize("creates", [True, False])
def test_a_part_that_has_succeeded_goes_where_it_was_sent(
    app: Celery, pay: Any, creates: bool
) -> None:
    """By the exchange and the routing key in its message, or the queue that is named there."""
    with app.connection_for_write() as connection:
        elsewhere = Queue("audit", Exchange("events"), routing_key="paid")
        elsewhere(connection.default_channel).declare()
    app.conf.task_queues = [Queue("celery"), Queue("orders")]
    app.conf.task_create_missing_queues = creates
    there = {"exchange": "events", "routing_key": "paid"}
    header = [pay.s(1).set(**there), pay.s(2).set(queue="orders"), pay.s(3)]
    group_id = start_chord(app, header, app.tasks["shop.total"].s())
    succeed(app, *sent(app, "audit"))
    succeed(app, *sent(app, "orders"))
    id_ = die(app, chord_id=group_id)
    dead_letters.replay(id_, whole_chord=True, app=app)
    queues = ("audit", "orders", "celery")
    assert [[one.decode()[0] for one in sent(app, queue)] for queue in queues] == [
        [[1]],
        [[2]],
        [[3]],
    ]


def test_a_chord_is_not_sent_to_a_queue_that_the_app_does_not_make(app: Celery, pay: Any) -> None:
    """Where it makes none by itself; none of its dead parts is replayed then."""
    app.conf.task_queues = [Queue("celery")]
    app.conf.task_create_missing_queues = False
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    with pytest.raises(ReplayRefused, match=r"it cannot be called any more: .*other"):
        dead_letters.replay(ids[0], whole_chord=True, queue="other", app=app)
    assert sent(app) == []
    assert dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(sent(app)) == 2


def test_chains_in_its_header_and_its_body_are_sent_whole(app: Celery, pay: Any) -> None:
    """From their first step, although the dead one was a later one's first or last."""
    note, total = app.tasks["shop.note"], app.tasks["shop.total"]
    header = [chain(pay.s(1), pay.s()), pay.s(2)]
    group_id = start_chord(app, header, chain(total.s(), note.s()))
    first, second = sent(app)
    succeed(app, second)
    die(app, first, chord_id=group_id)
    dead_letters.replay(first.headers["id"], whole_chord=True, app=app)
    again = sent(app)
    assert sorted(one.decode()[0][0] for one in again) == [1, 2]
    for message in again:
        run(app, message)
    # The chain's second step, then the body, then what follows that.
    assert [ended.value for ended in run_all(app)] == [100, 120, "noted (120,)"]


def ids_in(value: Any) -> set[str]:
    """All ids that a message has in what it embeds."""
    found: set[str] = set()
    if isinstance(value, dict):
        names = ("task_id", "group_id", "root_id", "parent_id")
        found.update(value[name] for name in names if isinstance(value.get(name), str))
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list)):
        found.update(*map(ids_in, parts))
    return found


def test_nothing_that_is_sent_anew_has_an_id_that_it_had(app: Celery, pay: Any) -> None:
    """Results of both calls would be mixed, and a chord would be called too early."""
    note, total = app.tasks["shop.note"], app.tasks["shop.total"]
    after = note.s("after").set(task_id="of the callback")
    header = [chain(pay.s(1), pay.s()), pay.s(2).set(link=after)]
    body = chain(total.s().set(link=after), group(note.s("a"), note.s("b")))
    group_id = start_chord(app, header, body)
    before = sent(app)
    for message in before:
        die(app, message, chord_id=group_id)
    dead_letters.replay(before[0].headers["id"], whole_chord=True, app=app)
    old, new = (
        set().union(*({one.headers["id"]} | ids_in(one.decode()[2]) for one in messages))
        for messages in (before, sent(app))
    )
    assert len(new) >= 6
    assert not old & new


def test_a_group_in_its_body_is_sent_with_it(app: Celery, pay: Any) -> None:
    """What was called has ids in all its parts; all are made anew."""
    note = app.tasks["shop.note"]
    group_id = start_chord(app, [pay.s(1), pay.s(2)], group(note.s("a"), note.s("b")))
    first, second = sent(app)
    succeed(app, second)
    die(app, first, chord_id=group_id)
    dead_letters.replay(first.headers["id"], whole_chord=True, app=app)
    for message in sent(app):
        run(app, message)
    ended = sorted(str(one.value) for one in run_all(app))
    assert ended == ["noted ([10, 20], 'a')", "noted ([10, 20], 'b')"]


def test_a_chord_of_unknown_size_is_refused(app: Celery, pay: Any) -> None:
    """Its caller has not told how many parts it has."""
    chord([pay.s(1), pay.s(2)], app.tasks["shop.total"].s()).apply_async()
    message = take(app)
    id_ = die(app, message, chord_id=message.headers["group"])
    with pytest.raises(ReplayRefused, match=r"of nobody knows how many parts .* 1 are known"):
        dead_letters.replay(id_, whole_chord=True, app=app)
    assert dead_letters.get(id_, app=app).replayed_as is None


@pytest.mark.parametrize("is_discarded", [False, True])
def test_a_chord_of_which_parts_are_missing_is_refused(
    app: Celery, pay: Any, is_discarded: bool
) -> None:
    """They have not ended yet, or nobody keeps them any more."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    id_ = die(app, first, chord_id=group_id)
    if is_discarded:
        dead_letters.discard(die(app, second, chord_id=group_id), app=app)
    with pytest.raises(ReplayRefused, match=r"of 2 parts .* 1 are known: the others have not"):
        dead_letters.check(id_, whole_chord=True, app=app)


def test_a_letter_that_its_chord_does_not_know_is_refused(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task has died once more since; nothing is reserved, nor forgotten."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    other, id_ = (die(app, message, chord_id=group_id) for message in (first, second))
    place = place_of(app)
    later = die(app, second, chord_id=group_id)
    assert later != id_
    kept = place.store.parts(place.server, group_id)
    with monkeypatch.context() as patch:
        patch.delattr(DeadStore, "reserve")
        for ask in (dead_letters.check, dead_letters.replay):
            with pytest.raises(ReplayRefused, match=f"has died again since: replay {later}"):
                ask(id_, whole_chord=True, app=app)
    assert sent(app) == []
    assert place.store.parts(place.server, group_id) == kept
    new_id = dead_letters.replay(later, whole_chord=True, app=app)
    assert dead_letters.replay(later, app=app) == new_id
    assert dead_letters.get(other, app=app).replayed_as


def test_a_chord_in_a_chord_is_refused(app: Celery, pay: Any) -> None:
    """The outer one has counted the end of the inner one."""
    total = app.tasks["shop.total"]
    inner = chord([pay.s(1), pay.s(2)], total.s())
    chord([inner, pay.s(3)], total.s()).apply_async()
    parts = [message for message in sent(app) if message.decode()[0] in ([1], [2])]
    group_id = parts[0].headers["group"]
    ids = [die(app, message, chord_id=group_id) for message in parts]
    with pytest.raises(ReplayRefused, match=f"chord {group_id} is itself a part of a chord"):
        dead_letters.replay(ids[0], whole_chord=True, app=app)


def test_a_chord_that_cannot_be_called_any_more_is_refused(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of its dead parts is replayed then, and all can be tried again."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]

    def refuse(*args: Any, **options: Any) -> Any:
        raise TypeError("changed")

    with monkeypatch.context() as patch:
        patch.setattr(pay, "apply_async", refuse)
        with pytest.raises(ReplayRefused, match="cannot be called any more"):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert sent(app) == []
    assert dead_letters.count(app=app) == 2
    assert dead_letters.replay(ids[1], whole_chord=True, app=app)
    assert len(sent(app)) == 2


@pytest.mark.parametrize(
    "options", [["fast"], {"task_id": "mine", "parent_id": 7, "chord": "C major", "width": 1}]
)
def test_what_a_chord_gives_its_tasks_stays_as_it_is(app: Celery, pay: Any, options: Any) -> None:
    """Though it looks like a part of a canvas that was called."""
    job = {"task": "resize", "options": options}
    note = app.tasks["shop.note"]
    header = [chain(note.s(job), note.s(job)), note.s([job])]
    group_id = start_chord(app, header, note.s(job, job=job))
    before = sent(app)
    ids = [die(app, message, chord_id=group_id) for message in before]
    dead_letters.replay(ids[0], whole_chord=True, app=app)
    again = sorted(sent(app), key=lambda one: str(one.decode()[0]))
    assert [one.decode()[0] for one in again] == [[[job]], [job]]
    embed = again[1].decode()[2]
    assert [step["args"] for step in embed["chain"]] == [[job]]
    body = again[0].decode()[2]["chord"]
    assert (body["args"], body["kwargs"]) == ([job], {"job": job})


@pytest.mark.parametrize(
    "changed",
    [
        {"options": ["fast"]},
        {"kwargs": None},
        {"subtask_type": "unknown"},
        {"subtask_type": "chain", "kwargs": {"tasks": [{"task": "a", "options": ["fast"]}]}},
    ],
)
def test_a_chord_whose_body_is_none_is_refused(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """Whoever wrote its messages may have put anything there; none of its parts is reserved."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = []
    for message in sent(app):
        args, kwargs, embed = message.decode()
        embed["chord"] |= changed
        ids.append(die(app, replace_body(message, [args, kwargs, embed]), chord_id=group_id))
    monkeypatch.delattr(DeadStore, "reserve")
    for ask in (dead_letters.check, dead_letters.replay):
        with pytest.raises(ReplayRefused, match="it cannot be called any more: ") as caught:
            ask(ids[0], whole_chord=True, app=app)
        assert caught.value.id == ids[0]


def test_a_chord_one_of_whose_parts_has_changed_is_refused(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the parts that come before it are sent; a task that is unknown here is not asked."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2, 3)], app.tasks["shop.total"].s())
    first, second, third = sent(app)
    first.headers["task"] = "shop.elsewhere"
    ids = [
        die(app, message, chord_id=group_id)
        for message in (first, second, replace_body(third, [[7, 8], *third.decode()[1:]]))
    ]
    with monkeypatch.context() as patch:
        patch.delattr(DeadStore, "reserve")
        for ask in (dead_letters.check, dead_letters.replay):
            with pytest.raises(ReplayRefused, match=r"it cannot be called any more: TypeError\("):
                ask(ids[0], whole_chord=True, app=app)
    assert sent(app) == []
    pay.typing = False
    assert dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(sent(app)) == 3


def test_a_letter_that_was_replayed_is_left_alone(app: Celery, pay: Any) -> None:
    """Its id alone is said, though nothing of it could be read any more."""
    pay.delay(7)
    letter = dead_letters.get(die(app), app=app)
    assert replay(app, place_of(app), replace(letter, replayed_as="new", id="gone")) == "new"
    assert sent(app) == []


@pytest.mark.parametrize("reply_is_lost", [False, True])
def test_a_chord_of_which_some_are_reserved_and_none_is_sent_is_not_in_doubt(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, reply_is_lost: bool
) -> None:
    """Redis was away in between: when it answers again all of it is sent, by whoever asks."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2, 3)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    reserve, last = DeadStore.reserve, max(ids)

    def away_at_last(self: DeadStore, server: Any, id_: str, *args: Any) -> Any:
        if id_ != last or reply_is_lost:
            answer = reserve(self, server, id_, *args)
        if id_ == last:
            raise redis.ConnectionError("away")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(DeadStore, "reserve", away_at_last)
        with pytest.raises(StoreUnavailable):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert sent(app) == []
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    assert dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert [message.decode()[0] for message in sent(app)] == [[1], [2], [3]]


def test_a_chord_of_which_a_part_is_discarded_meanwhile_reserves_none(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was reserved before it is as it was."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    place = place_of(app)
    before = [place.server.hgetall(f"{place.store.keys.dead}letter:{id_}") for id_ in ids]
    reserve, last = DeadStore.reserve, max(ids)

    def discard_and_reserve(self: DeadStore, server: Any, id_: str, *args: Any) -> Any:
        if id_ == last:
            dead_letters.discard(id_, app=app)
        return reserve(self, server, id_, *args)

    monkeypatch.setattr(DeadStore, "reserve", discard_and_reserve)
    with pytest.raises(DeadLetterNotFound) as caught:
        dead_letters.replay(min(ids), whole_chord=True, app=app)
    assert caught.value.id == last
    assert sent(app) == []
    after = [place.server.hgetall(f"{place.store.keys.dead}letter:{id_}") for id_ in ids]
    assert [one for one in after if one] == [before[ids.index(min(ids))]]


def test_a_chord_of_which_not_all_were_reserved_was_not_sent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller
) -> None:
    """Who has died in between, or was cut off, had sent nothing: all of it is sent after that."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    place = place_of(app)
    _, others = place.store.reserve(place.server, min(ids), "another")
    monkeypatch.setattr(time, "sleep", clock.shift)
    new_id = dead_letters.replay(min(ids), whole_chord=True, app=app)
    assert time.time() - NOON >= 15
    assert new_id == others
    assert [message.decode()[0] for message in sent(app)] == [[1], [2]]
    assert dead_letters.count(app=app) == 0


def test_a_chord_whose_replay_was_noted_in_part_is_noted_by_who_asks_next(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller
) -> None:
    """Who has sent one of its parts has sent all."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    release, first = DeadStore.release, min(ids)

    def away_after_one(self: DeadStore, server: Any, id_: str, *args: Any) -> None:
        if id_ != first:
            raise redis.ConnectionError("away")
        release(self, server, id_, *args)

    monkeypatch.setattr(time, "sleep", clock.shift)
    with monkeypatch.context() as patch:
        patch.setattr(DeadStore, "release", away_after_one)
        with pytest.raises(StoreUnavailable):
            dead_letters.replay(first, whole_chord=True, app=app)
    again = {message.headers["reliable-replay-of"]: message.headers["id"] for message in sent(app)}
    assert dead_letters.count(app=app) == 1
    assert [dead_letters.replay(id_, whole_chord=True, app=app) for id_ in ids] == [
        again[id_] for id_ in ids
    ]
    assert sent(app) == []
    assert dead_letters.count(app=app) == 0


def test_a_chord_that_may_have_been_sent_is_not_sent_again(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new group would be another one: until a part of it has ended it is refused."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    place = place_of(app)
    again = unsaid(app, ids[0], monkeypatch, 2)
    assert len(again) == 2
    for _ in range(2):
        with pytest.raises(ReplayRefused, match=f"chord {group_id} may have been sent already"):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert sent(app) == []
    for message in again:
        assert run(app, message).state == "SUCCESS"
    assert dead_letters.replay(ids[0], whole_chord=True, app=app) == again[0].headers["id"]
    assert dead_letters.get(ids[1], app=app).replayed_as == again[1].headers["id"]
    assert place.store.parts(place.server, group_id) == (0, {})
    assert [ended.value for ended in run_all(app)] == [30]


def unsaid(app: Celery, id_: str, monkeypatch: pytest.MonkeyPatch, publishes: int) -> list[Any]:
    """Replay a chord of which so many messages get out; return them. How it went is not noted."""
    publish, count = Producer.publish, itertools.count()

    def away(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("away")

    def publish_some(self: Any, *args: Any, **options: Any) -> Any:
        if next(count) >= publishes:
            raise OperationalError("away")
        return publish(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)
        patch.setattr(DeadStore, "release", away)
        patch.setattr(Producer, "publish", publish_some)
        with pytest.raises((OperationalError, StoreUnavailable)):
            dead_letters.replay(id_, whole_chord=True, app=app)
    place = place_of(app)
    for letter in dead_letters.list(app=app):
        # Nobody waits for whoever died in the midst of it.
        place.server.hset(f"{place.store.keys.dead}letter:{letter.id}", "replay_until", 0)
    return sent(app)


@pytest.mark.parametrize("last", [die, succeed])
def test_a_chord_that_was_sent_in_part_is_never_taken_for_sent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, last: Callable[..., Any]
) -> None:
    """A part that got out has ended: what was to be sent last was not."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    id_ = die(app, first, chord_id=group_id)
    last(app, second, **({"chord_id": group_id} if last is die else {}))
    (again,) = unsaid(app, id_, monkeypatch, 1)
    assert run(app, again).state == "SUCCESS"
    for _ in range(2):
        with pytest.raises(ReplayRefused, match=f"chord {group_id} may have been sent already"):
            dead_letters.replay(id_, whole_chord=True, app=app)
    assert dead_letters.get(id_, app=app).replayed_as is None
    place = place_of(app)
    assert place.store.parts(place.server, group_id)[0] == 2


def test_a_chord_whose_last_part_has_ended_was_sent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though that had succeeded before, and has no letter."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    id_ = die(app, first, chord_id=group_id)
    succeed(app, second)
    again = unsaid(app, id_, monkeypatch, 2)
    with pytest.raises(ReplayRefused, match=again[1].headers["id"]):
        dead_letters.replay(id_, whole_chord=True, app=app)
    assert run(app, again[1]).state == "SUCCESS"
    assert dead_letters.replay(id_, whole_chord=True, app=app) == again[0].headers["id"]
    assert run(app, again[0]).state == "SUCCESS"
    assert [ended.value for ended in run_all(app)] == [30]


def test_a_chord_whose_last_part_keeps_no_result_is_known_to_be_sent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps one of its replay."""

    @app.task(base=ReliableTask, name="shop.forget", ignore_result=True)
    def forget(n: int) -> int:
        return n

    header = [pay.s(1), app.tasks["shop.forget"].s(2)]
    group_id = start_chord(app, header, app.tasks["shop.total"].s())
    first, second = sent(app)
    id_ = die(app, first, chord_id=group_id)
    succeed(app, second)
    again = unsaid(app, id_, monkeypatch, 2)
    assert [run(app, message).state for message in again] == ["SUCCESS", "SUCCESS"]
    assert dead_letters.replay(id_, whole_chord=True, app=app) == again[0].headers["id"]


def test_a_chord_that_nobody_has_begun_to_send_is_sent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis was away when all its letters were reserved."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    begin_chord = DeadStore.begin_chord

    def begin(self: DeadStore, *args: Any) -> bool:
        begin_chord(self, *args)
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(DeadStore, "begin_chord", begin)
        with pytest.raises(StoreUnavailable):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert sent(app) == []
    assert dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(sent(app)) == 2


def test_a_chord_that_takes_long_to_send_is_noted_though_somebody_asks_meanwhile(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller
) -> None:
    """That one is refused; who has sent it has sent it."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]
    publish, refused = Producer.publish, []

    def publish_slowly(self: Any, *args: Any, **options: Any) -> Any:
        if not refused:
            clock.shift(16)
            with pytest.raises(ReplayRefused, match="may have been sent already") as caught:
                dead_letters.replay(ids[0], whole_chord=True, app=app)
            refused.append(caught.value)
        return publish(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Producer, "publish", publish_slowly)
        new_id = dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(refused) == 1
    assert len(sent(app)) == 2
    assert dead_letters.get(ids[0], app=app).replayed_as == new_id
    assert dead_letters.count(app=app) == 0


def test_a_part_that_dies_again_after_its_chord_was_sent_is_refused(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its letter is of no task that was sent."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    id_ = die(app, first, chord_id=group_id)
    die(app, second, chord_id=group_id)

    def away(*args: Any) -> None:
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(DeadStore, "forget_parts", away)
        with pytest.raises(StoreUnavailable):
            dead_letters.replay(id_, whole_chord=True, app=app)
    assert len(sent(app)) == 2
    later = die(app, second, chord_id=group_id)
    with pytest.raises(ReplayRefused, match=f"chord {group_id} was sent anew before this copy"):
        dead_letters.replay(later, whole_chord=True, app=app)
    assert dead_letters.get(later, app=app).replayed_as is None
    assert dead_letters.count(app=app) == 1


class Killed(BaseException):
    """What nothing of ours handles."""


@pytest.mark.parametrize("on_conflict", ["existing", "raise"])
def test_who_dies_between_claim_and_message_has_sent_nothing(
    app: Celery, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller, on_conflict: Any
) -> None:
    """Where those are two steps: the next one has the same claim, and sends it."""

    @app.task(base=ReliableTask, name="shop.ship")
    @once(key="{n}", on_conflict=on_conflict)
    def ship(n: int) -> int:
        return n

    app.tasks["shop.ship"].delay(7)
    message = take(app)
    run(app, message)
    id_ = die(app, message)
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


def test_a_part_that_has_died_again_does_not_make_its_chord_unsent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its letter is a new one, which nobody could have reserved."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    id_ = die(app, first, chord_id=group_id)
    die(app, second, chord_id=group_id)

    def away(*args: Any, **options: Any) -> Any:
        raise OperationalError("away")

    with monkeypatch.context() as patch:
        patch.setattr(replaying_chords, "chord", lambda *args, **options: away)
        with pytest.raises(OperationalError):
            dead_letters.replay(id_, whole_chord=True, app=app)
    die(app, second, chord_id=group_id)
    for _ in range(2):
        with pytest.raises(ReplayRefused, match=f"chord {group_id} may have been sent already"):
            dead_letters.replay(id_, whole_chord=True, app=app)
    assert sent(app) == []


def test_a_chord_that_was_refused_can_be_replayed_later(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it was sent."""
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], app.tasks["shop.total"].s())
    ids = [die(app, message, chord_id=group_id) for message in sent(app)]

    def refuse(*args: Any, **options: Any) -> Any:
        raise TypeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(replaying_chords, "chord", lambda *args, **options: refuse)
        with pytest.raises(ReplayRefused, match="cannot be called any more"):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(sent(app)) == 2


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


def test_the_parts_of_a_chord_keep_their_order_where_they_are_chains(app: Celery, pay: Any) -> None:
    """A chain has its place at the step that the chord waits for."""
    note = app.tasks["shop.note"]
    header = [pay.s(1), chain(pay.s(2), pay.s()), pay.s(3)]
    group_id = start_chord(app, header, note.s())
    for message in sent(app):
        die(app, message, chord_id=group_id)
    letter = next(iter(dead_letters.list(app=app)))
    dead_letters.replay(letter.id, whole_chord=True, app=app)
    assert [message.decode()[0] for message in sent(app)] == [[1], [2], [3]]


def test_a_part_that_no_chord_has_counted_is_replayed_alone(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a task that its worker did not know, say: the chord waits for it yet."""
    start_chord(app, [pay.s(1), pay.s(2)], app.tasks["shop.total"].s())
    first, _ = sent(app)
    id_ = die(app, first, cause=Cause.UNKNOWN_TASK)
    with pytest.raises(ReplayRefused, match=f"which waits for task {id_} itself"):
        dead_letters.replay(id_, app=app)
    # Only Redis counts parts; the others wait for the ids that they know.
    monkeypatch.setattr(replaying, "counts_any_part", lambda _: True)
    dead_letters.replay(id_, app=app)
    (again,) = sent(app)
    assert again.headers["id"] != id_
    assert again.decode()[2]["chord"] == first.decode()[2]["chord"]
    assert [again.headers[name] for name in ("group", "group_index")] == [
        first.headers[name] for name in ("group", "group_index")
    ]


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
