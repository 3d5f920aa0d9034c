"""The chord of a dead letter is sent anew, once, whoever asks for a part of it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
import time_machine
from celery import Celery, chain, chord, group
from kombu import Exchange, Producer, Queue
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask, dead_letters, once
from reliable_tasks._dead import replaying, replaying_chords
from reliable_tasks._dead.replaying import replay
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.letters import Cause
from reliable_tasks.errors import DeadLetterNotFound, ReplayRefused, StoreUnavailable
from tests.unit._dead.conftest import NOON
from tests.unit._dead.dying import (
    dead_chord,
    die,
    place_of,
    replace_body,
    sent,
    start_chord,
    succeed,
)
from tests.unit.harness import run, run_all, take

pytestmark = pytest.mark.usefixtures("clock")


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


def test_a_part_of_a_chord_is_not_replayed_alone(app: Celery, pay: Any) -> None:
    """The chord has counted its failure; the reason says what can be done."""
    group_id = start_chord(app, [pay.s(1), pay.s(2)], app.tasks["shop.total"].s())
    id_ = die(app, chord_id=group_id)
    for ask in (dead_letters.replay, dead_letters.check):
        with pytest.raises(ReplayRefused, match=rf"chord {group_id} .*whole_chord=True") as caught:
            ask(id_, app=app)
        assert caught.value.id == id_


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
    ids = dead_chord(app)
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
    ids = dead_chord(app)
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
    ids = dead_chord(app)

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


@pytest.mark.parametrize("reply_is_lost", [False, True])
def test_a_chord_of_which_some_are_reserved_and_none_is_sent_is_not_in_doubt(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, reply_is_lost: bool
) -> None:
    """Redis was away in between: when it answers again all of it is sent, by whoever asks."""
    ids = dead_chord(app, 3)
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
    ids = dead_chord(app)
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
    ids = dead_chord(app)
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
    ids = dead_chord(app)
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
    ids = dead_chord(app)
    group_id = dead_letters.get(ids[0], app=app).chord_id
    assert group_id is not None
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
    ids = dead_chord(app)
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
    ids = dead_chord(app)
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


def two_dead(app: Celery) -> tuple[str, str, Any]:
    """Call a chord of two parts that die; return its group, the first one's letter, the second."""
    pay, total = app.tasks["shop.pay"], app.tasks["shop.total"]
    group_id = start_chord(app, [pay.s(n) for n in (1, 2)], total.s())
    first, second = sent(app)
    id_, _ = (die(app, message, chord_id=group_id) for message in (first, second))
    return group_id, id_, second


def test_a_part_that_dies_again_after_its_chord_was_sent_is_refused(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its letter is of no task that was sent."""
    group_id, id_, second = two_dead(app)

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


def test_a_chord_that_is_noted_while_another_one_asks_is_not_sent_twice(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller
) -> None:
    """It was let in when the first one took long, and comes to send when that has ended."""
    ids = dead_chord(app)
    publish, begin_chord = Producer.publish, DeadStore.begin_chord
    may_end, has_ended, begun = (threading.Event() for _ in range(3))
    first: list[str] = []

    def send_first() -> None:
        first.append(dead_letters.replay(ids[0], whole_chord=True, app=app))
        has_ended.set()

    def publish_late(self: Any, *args: Any, **options: Any) -> Any:
        begun.set()
        assert may_end.wait(10)
        return publish(self, *args, **options)

    def begin_late(self: DeadStore, *args: Any) -> bool:
        if begun.is_set():
            may_end.set()
            assert has_ended.wait(10)
        return begin_chord(self, *args)

    monkeypatch.setattr(Producer, "publish", publish_late)
    monkeypatch.setattr(DeadStore, "begin_chord", begin_late)
    thread = threading.Thread(target=send_first)
    thread.start()
    assert begun.wait(10)
    clock.shift(16)
    assert [dead_letters.replay(ids[0], whole_chord=True, app=app)] == first
    thread.join()
    assert len(sent(app)) == 2


def test_a_chord_whose_last_part_has_died_again_was_sent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of it came later: who has sent the chord has said what it sent last."""
    group_id, id_, second = two_dead(app)
    again = unsaid(app, id_, monkeypatch, 2)
    later = die(app, second, chord_id=group_id)
    with pytest.raises(ReplayRefused, match=again[1].headers["id"]):
        dead_letters.replay(id_, whole_chord=True, app=app)
    for message in again:
        run(app, message)
    assert dead_letters.replay(id_, whole_chord=True, app=app) == again[0].headers["id"]
    assert dead_letters.get(later, app=app).replayed_as is None
    assert [ended.value for ended in run_all(app)] == [30]


def test_a_part_that_has_died_again_does_not_make_its_chord_unsent(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its letter is a new one, which nobody could have reserved."""
    group_id, id_, second = two_dead(app)

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


def test_a_chord_that_is_refused_when_a_part_of_it_is_sent_is_not_sent_again(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason says so, and the next one is asked to look for it."""
    ids = dead_chord(app)
    apply_async = pay.apply_async

    def refuse_second(args: Any, *rest: Any, **options: Any) -> Any:
        if [*args] == [2]:
            raise KeyError("audit")
        return apply_async(args, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pay, "apply_async", refuse_second)
        with pytest.raises(
            ReplayRefused, match=r"KeyError\('audit'\); but a part of chord .* is sent"
        ):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(sent(app)) == 1
    with pytest.raises(ReplayRefused, match="may have been sent already, or in part"):
        dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert sent(app) == []


def test_a_part_of_a_chord_takes_nobodys_place(app: Celery, pay: Any) -> None:
    """Neither alone nor with its chord."""

    @app.task(base=ReliableTask, name="shop.save")
    @once(key="{n}", on_conflict="replace")
    def save(n: int, text: str) -> int:
        return n

    save_ = app.tasks["shop.save"]
    group_id = start_chord(app, [save_.s(1, "stale"), pay.s(2)], app.tasks["shop.total"].s())
    first, second = sent(app)
    run(app, first)
    ids = [die(app, message, chord_id=group_id) for message in (first, second)]
    fresh = save_.delay(1, "fresh")
    dead_letters.replay(ids[0], whole_chord=True, app=app)
    run_all(app)
    assert fresh.state == "SUCCESS"


def test_a_chord_that_was_refused_can_be_replayed_later(
    app: Celery, pay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it was sent."""
    ids = dead_chord(app)

    def refuse(*args: Any, **options: Any) -> Any:
        raise TypeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(replaying_chords, "chord", lambda *args, **options: refuse)
        with pytest.raises(ReplayRefused, match="cannot be called any more"):
            dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert dead_letters.replay(ids[0], whole_chord=True, app=app)
    assert len(sent(app)) == 2


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
