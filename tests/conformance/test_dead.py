"""Dead letters: every answer of every script about them, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
import redis

from reliable_tasks._store.crashes import Crash, Starter
from reliable_tasks._store.dead import Pruned, Reservation, Sent
from reliable_tasks._store.delivery import Delivery, Guard
from reliable_tasks._store.letters import Bounds, Buried, Cause, DeadLetter, undecodable
from reliable_tasks._store.publication import Publication, Queued
from reliable_tasks._store.scripts import load
from tests.conformance.broker import BOUNDS, Broker, letter, message
from tests.conformance.test_messages import (
    Beside,
    FullBroker,
    everything,
    put,
    taken,
    taken_over,
)

KIND = "failed:shop.send_invoice"
NOTHING = Buried(False, "", 0)
#: What keeps a letter.
SCRIPTS = ["dead_bury", "message_bury", "run_bury"]


def ids(found: Iterator[DeadLetter] | list[DeadLetter]) -> list[str]:
    """The ids of letters, in their order."""
    return [one.id for one in found]


def at(broker: Broker, **times: float) -> None:
    """Have letters be kept at other times (s by a clock of the test's)."""
    for id_, seconds in times.items():
        kind = broker.server.hget(broker.keys.dead_letter(id_), "kind")
        broker.server.hset(broker.keys.dead_letter(id_), "at", round(seconds * 1000))
        for index in ("all", f"of:{kind.decode()}"):
            broker.server.zadd(broker.keys.dead + index, {id_: round(seconds * 1000)}, xx=True)


def counts(broker: Broker) -> dict[str, int]:
    """How many there are of each kind."""
    found = broker.server.hgetall(broker.keys.dead + "counts")
    return {kind.decode(): int(count) for kind, count in found.items()}


# -- the end of a delivery -------------------------------------------------------------------


def test_a_delivery_ends_as_a_dead_letter(broker: Broker) -> None:
    """Nothing of the delivery is left, and its message is kept whole, with what is known of it."""
    delivery = taken(broker)
    broker.start(delivery)
    kept = letter(
        raw=delivery.raw, traceback="Traceback: \u2713", worker="w1@shop", priority=0, retries=2
    )
    assert broker.die(delivery, kept) == Buried(True, "one", 1)
    assert broker.unacked == broker.index == broker.leases == broker.run_of() == {}
    found = broker.dead_store.get(broker.server, "one")
    assert found is not None
    assert found.at == pytest.approx(broker.now(), abs=2)
    assert found == DeadLetter(
        id="one",
        task="shop.send_invoice",
        task_id="one",
        cause=Cause.FAILED,
        error="ValueError: it is broken",
        traceback="Traceback: \u2713",
        worker="w1@shop",
        priority=0,
        retries=2,
        at=found.at,
        size=len(delivery.raw),
    )
    assert broker.dead_store.message(broker.server, "one") == delivery.raw
    assert [*broker.indexed_dead()[0]] == ["one"]
    assert counts(broker) == {KIND: 1}


def test_the_bounds_are_those_of_the_last_one(broker: Broker) -> None:
    """Who prunes goes by what the app says now."""
    key = broker.keys.dead + "bounds"
    broker.keep(letter())
    assert broker.server.hgetall(key) == {b"max_age": b"3600000", b"max_count": b"100"}
    broker.keep(letter("two", bounds=Bounds(max_age=0.5, max_count=7, max_body=10)))
    assert broker.server.hgetall(key) == {b"max_age": b"500", b"max_count": b"7"}


def test_a_repeated_end_keeps_nothing_again(broker: Broker) -> None:
    """Whichever reply is lost, there is one letter, and it does not change."""
    delivery = taken(broker)
    broker.die(delivery)
    before = everything(broker)
    for _ in range(2):
        # Told again under which id: whoever lost the reply has told nobody yet.
        assert broker.die(delivery) == Buried(False, "one", 1)
    assert everything(broker) == before


def test_a_late_end_keeps_nothing_of_what_another_one_runs(broker: Broker) -> None:
    """Whose worker lost the lease buries no message that is alive."""
    zombie, successor = taken_over(broker)
    broker.start(successor)
    before = everything(broker)
    assert broker.die(zombie) == NOTHING
    assert everything(broker) == before
    assert broker.die(successor) == Buried(True, "one", 1)
    assert broker.die(zombie) == NOTHING
    assert ids(broker.dead) == ["one"]


def test_a_late_end_keeps_nothing_of_what_waits(broker: Broker) -> None:
    """The message is in its queue again, and its task will run."""
    zombie = taken(broker)
    broker.end_lease(zombie)
    broker.sweep()
    before = everything(broker)
    assert broker.die(zombie) == NOTHING
    assert everything(broker) == before
    assert broker.waiting_ids() == ["one"]


def test_an_end_after_the_lease_is_kept_if_nobody_swept(broker: Broker) -> None:
    """The message is this delivery's still."""
    delivery = taken(broker)
    broker.end_lease(delivery)
    assert broker.die(delivery) == Buried(True, "one", 1)
    assert broker.sweep() == 0
    assert broker.unacked == broker.leases == {}


def test_a_dead_task_that_had_other_copies_is_remembered_as_over(broker: Broker) -> None:
    """For an hour a copy that was forgotten cannot continue it; with no crashes counted."""
    zombie, successor = taken_over(broker)
    broker.start(successor)
    assert successor.is_redelivered
    broker.die(successor)
    assert broker.run_of() == {"tag": "over"}
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(3600, abs=5)
    wish = Publication(continues=zombie.tag, task_id="one")
    assert broker.publish(publication=wish).code is Queued.SUPERSEDED


def test_a_task_that_died_twice_is_kept_twice(broker: Broker) -> None:
    """Somebody sent it again under its id: each death has a number, and each message is there."""
    raws = []
    for number in range(3):
        put(broker, "one")
        delivery = broker.fetch_one(f"w{number}")
        raws.append(delivery.raw)
        expected = "one" if number == 0 else f"one.{number}"
        assert broker.die(delivery) == Buried(True, expected, number + 1)
        assert broker.die(delivery) == Buried(False, expected, number + 1)
    assert ids(broker.walk(oldest_first=True)) == ["one", "one.1", "one.2"]
    assert [one.task_id for one in broker.dead] == ["one"] * 3
    assert [broker.dead_message(one) for one in broker.walk(oldest_first=True)] == raws
    broker.indexed_dead()


def test_the_end_of_a_copy_that_waited_leaves_the_run(broker: Broker) -> None:
    """Two messages with one id: the death of the one is no end of the other."""
    put(broker, "one", "one")
    first, second = broker.fetch()
    broker.start(first)
    assert broker.die(second) == Buried(True, "one", 1)
    run = broker.run_of()
    assert (run["tag"], run["crashes"]) == (first.tag, "1")
    assert broker.die(first) == Buried(True, "one.1", 2)
    broker.indexed_dead()


def test_a_task_that_continued_itself_is_not_kept(broker: Broker) -> None:
    """Its retry is queued: a letter, too, would have it run twice when that is replayed."""
    delivery = taken(broker)
    broker.start(delivery)
    wish = Publication(continues=delivery.tag, task_id="one")
    assert broker.publish(publication=wish).code is Queued.QUEUED
    broker.die(delivery)
    assert broker.unacked == broker.leases == {}
    assert broker.waiting_ids() == ["one"]
    assert ids(broker.dead) == []


# -- what is kept of a message ---------------------------------------------------------------


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe no text \x00", b"base64:\xff", '{"a": "\u2713"}'.encode(), b"\x00"]
)
def test_a_message_is_kept_byte_for_byte(broker: Broker, raw: bytes) -> None:
    """Also one that is no UTF-8, which a client may read that takes all for text."""
    broker.keep(letter(raw=raw))
    assert broker.dead_store.message(broker.server, "one") == raw
    kept = broker.server.hget(broker.keys.dead_letter("one"), "message")
    kept.decode()


def test_the_size_of_a_message_is_its_own(broker: Broker) -> None:
    """Not that of the text which stands for one that is no UTF-8."""
    for number, raw in enumerate((b"x" * 100, b"\xff" * 100)):
        kept = letter(f"t{number}", raw=raw)
        broker.keep(kept)
        found = broker.dead_store.get(broker.server, f"t{number}")
        assert found is not None
        assert found.size == kept.kept_as("x").size == 100


@pytest.mark.parametrize("size", [99, 100, 101])
def test_a_message_that_is_too_large_is_left_out(broker: Broker, size: int) -> None:
    """All else is kept of it, and its size is 0."""
    delivery = taken(broker)
    kept = letter(raw=b"x" * size, bounds=Bounds(max_age=60, max_count=9, max_body=100))
    assert broker.die(delivery, kept) == Buried(True, "one", 1)
    (found,) = broker.dead
    is_kept = size <= 100
    assert found.size == (size if is_kept else 0)
    assert found.error == "ValueError: it is broken"
    assert broker.dead_message(found) == (b"x" * size if is_kept else b"")
    assert broker.unacked == {}


def test_odd_names_are_kept(broker: Broker) -> None:
    """A task's name is whatever a message says; it can be found by it."""
    names = ["", "a:b", "{x}", "*", "\u2713", "a b\n"]
    for number, name in enumerate(names):
        broker.keep(letter(f"t{number}", task=name))
    for number, name in enumerate(names):
        assert ids(broker.walk(task=name)) == [f"t{number}"]
        assert broker.count_dead(task=name, cause="failed") == 1
    broker.indexed_dead()


def test_messages_that_nobody_can_read_are_told_apart(broker: Broker) -> None:
    """They have no id: two of the same bytes are two letters, one that comes again is one."""
    for event in ("w1:1:1:celery", "w1:1:2:celery", "w1:1:1:celery"):
        kept = undecodable(b"no JSON", event=event, queue="celery", bounds=BOUNDS)
        broker.keep(kept, event)
    assert broker.count_dead(cause="undecodable", task="") == 2
    assert {broker.dead_message(one) for one in broker.dead} == {b"no JSON"}
    broker.indexed_dead()


def test_a_letter_that_is_not_there(broker: Broker) -> None:
    """Nobody finds one of a name that nobody wrote."""
    store, server = broker.dead_store, broker.server
    assert store.get(server, "nobody") is None
    assert store.message(server, "nobody") == b""
    assert store.discard(server, "nobody") is False
    assert store.discard_each(server, ["nobody", "none"]) == store.discard_each(server, []) == 0
    assert ids(broker.dead) == []
    assert broker.count_dead() == broker.count_dead(since=0.0) == 0
    assert everything(broker) == {}


# -- a letter without a delivery -------------------------------------------------------------


def test_one_event_is_kept_once(broker: Broker) -> None:
    """What is kept in a step of its own is recognised, too."""
    assert broker.keep(letter(), "e1") == ("one", 1)
    before = everything(broker)
    assert broker.keep(letter(), "e1") == ("one", 1)
    assert everything(broker) == before


def test_each_event_of_one_id_is_kept_once(broker: Broker) -> None:
    """The first death and the latest are recognised when they are repeated."""
    for number in range(3):
        expected = ("one" if number == 0 else f"one.{number}", number + 1)
        assert broker.keep(letter(), f"e{number}") == expected
        before = everything(broker)
        assert broker.keep(letter(), f"e{number}") == expected
        assert broker.keep(letter(), "e0") == ("one", number + 1)
        assert everything(broker) == before
    broker.indexed_dead()


def test_an_event_is_recognised_behind_a_later_one(broker: Broker) -> None:
    """Another death of the task came between an event and its repetition."""
    for event in ("e0", "e1", "e2", "e1"):
        broker.keep(letter(), event)
    assert sorted(ids(broker.dead)) == ["one", "one.1", "one.2"]


def test_a_number_is_not_given_twice(broker: Broker) -> None:
    """Where the first one is gone, those behind it keep their names."""
    for event in ("e0", "e1", "e2"):
        broker.keep(letter(), event)
    assert broker.dead_store.discard(broker.server, "one")
    assert broker.keep(letter(), "e3") == ("one", 3)
    assert broker.keep(letter(), "e4") == ("one.3", 4)
    events = {
        id_: broker.server.hget(broker.keys.dead_letter(id_), "delivery").decode()
        for id_ in ids(broker.dead)
    }
    assert events == {"one": "e3", "one.1": "e1", "one.2": "e2", "one.3": "e4"}
    broker.indexed_dead()


# -- a server that refuses half-way ----------------------------------------------------------


def bury_by(broker: Broker, how: str) -> Callable[[], Any]:
    """Return what keeps the same letter by one of the three scripts, as often as it is called."""
    kept = letter(chord_id="g1", raw=b"whole")
    if how == "dead_bury":
        return lambda: broker.keep(kept, "e1")
    if how == "message_bury":
        delivery = taken(broker)
        return lambda: broker.die(delivery, kept)
    copy = Beside(broker).copy()
    messages = broker.messages
    messages.runs.enter(broker.server, copy, order=0, is_copy=False, lease=30.0)
    copy.letter = kept
    return lambda: messages.runs.bury(broker.server, copy, order=0, remembers=100.0)


def is_over(broker: Broker) -> bool:
    """Whether the delivery, or the run, that was to end has ended."""
    return broker.run_of().get("tag") not in broker.leases


def assert_kept_whole(broker: Broker) -> None:
    """Fail unless the letter is there once, in each index, and for its chord."""
    assert is_over(broker)
    assert [*broker.indexed_dead()[0]] == ["one"]
    assert broker.dead_store.message(broker.server, "one") == b"whole"
    assert broker.server.hexists(broker.keys.dead + "bounds", "max_age")
    assert broker.dead_store.parts(broker.server, "g1") == (0, {"one": b"@one"})
    assert broker.server.pttl(broker.keys.chord("g1")) > 0


@pytest.mark.parametrize("spoiled", ["all", f"of:{KIND}", "counts", "bounds", "chord:g1"])
@pytest.mark.parametrize("how", SCRIPTS)
def test_what_cannot_be_kept_is_kept_later(broker: Broker, how: str, spoiled: str) -> None:
    """A key is of another kind: the message stays, and a repetition keeps the whole letter."""
    bury = bury_by(broker, how)
    key = broker.keys.dead + spoiled
    broker.server.set(key, "of another kind")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        bury()
    assert how == "dead_bury" or not is_over(broker)
    broker.server.delete(key)
    bury()
    assert_kept_whole(broker)


@contextmanager
def without_right(url: str, commands: str) -> Iterator[None]:
    """Have the server refuse commands of all who ask."""
    with redis.Redis.from_url(url) as admin:
        admin.execute_command("ACL", "SETUSER", "default", *(f"-{c}" for c in commands.split()))
        try:
            yield
        finally:
            admin.execute_command("ACL", "SETUSER", "default", *(f"+{c}" for c in commands.split()))


#: What each script needs to keep a letter, and what two of them need besides to end its delivery.
NEEDED = ("hset", "zadd", "pexpire", "del")
RIGHTS = [(how, right) for how in SCRIPTS for right in NEEDED]
RIGHTS += [("message_bury", "hdel"), ("message_bury", "zrem"), ("run_bury", "zrem")]


@pytest.mark.parametrize(("how", "right"), RIGHTS)
def test_what_must_not_be_kept_is_kept_later(redis_url: str, how: str, right: str) -> None:
    """A right is missing: when it is given, the same call keeps the letter, once and whole."""
    with redis.Redis.from_url(redis_url) as client:
        broker = Broker(client)
        bury = bury_by(broker, how)
        with (
            without_right(redis_url, right),
            pytest.raises(redis.exceptions.ResponseError, match="permission"),
        ):
            bury()
        bury()
        assert_kept_whole(broker)


@pytest.mark.parametrize("spoiled", ["all", f"of:{KIND}", "counts"])
def test_what_cannot_be_discarded_is_discarded_later(broker: Broker, spoiled: str) -> None:
    """Half of it was refused, and the other half is done by the next one, the counts right."""
    broker.keep(letter())
    broker.keep(letter("two"))
    key = broker.keys.dead + spoiled
    broker.server.rename(key, "elsewhere")
    broker.server.set(key, "of another kind")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        broker.dead_store.discard(broker.server, "one")
    broker.server.delete(key)
    broker.server.rename("elsewhere", key)
    assert broker.dead_store.discard(broker.server, "one")
    assert [*broker.indexed_dead()[0]] == ["two"]


@pytest.mark.parametrize("spoiled", ["all", f"of:{KIND}", "counts", "replayed"])
def test_what_cannot_be_noted_as_sent_is_noted_later(broker: Broker, spoiled: str) -> None:
    """Half of it was refused: the letter is in one index when the release is repeated."""
    broker.keep(letter())
    broker.keep(letter("two"))
    store, server = broker.dead_store, broker.server
    store.reserve(server, "one", "a")
    key = broker.keys.dead + spoiled
    if spoiled != "replayed":
        server.rename(key, "elsewhere")
    server.set(key, "of another kind")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        store.release(server, "one", "a", Sent.SENT)
    server.delete(key)
    if spoiled != "replayed":
        server.rename("elsewhere", key)
    store.release(server, "one", "a", Sent.SENT)
    waiting, replayed = broker.indexed_dead()
    assert ([*waiting], [*replayed]) == (["two"], ["one"])


# -- a server without memory -----------------------------------------------------------------


def test_a_server_without_memory_keeps_dead_letters(full_broker: FullBroker) -> None:
    """What it has already as a message it can have as a letter; and what frees memory works."""
    broker, fill = full_broker
    delivery = taken(broker)
    broker.keep(letter("two"))
    broker.keep(letter("three"))
    fill()
    assert broker.die(delivery) == Buried(True, "one", 3)
    assert broker.keep(letter("four")) == ("four", 4)
    store, server = broker.dead_store, broker.server
    assert store.reserve(server, "two", "a")[0] is Reservation.OURS
    store.release(server, "two", "a", Sent.SENT)
    assert store.discard(server, "three")
    store.note_chord(server, "g1", 2, 60)
    store.keep_part(server, "g1", "p1", b"m1", 60)
    assert store.parts(server, "g1") == (2, {"p1": b"m1"})
    waiting, replayed = broker.indexed_dead()
    assert (set(waiting), set(replayed)) == ({"one", "four"}, {"two"})


def test_a_server_without_memory_prunes(full_broker: FullBroker) -> None:
    """That is what may help it."""
    broker, fill = full_broker
    for number in range(5):
        broker.keep(letter(f"t{number}", bounds=Bounds(60, 2, 1000)))
    fill()
    assert broker.dead_store.prune(broker.server).many == 3
    assert len(broker.indexed_dead()[0]) == 2


def test_a_server_without_memory_ends_runs_beside_another_broker(full_broker: FullBroker) -> None:
    """They are let in, counted and kept as if there were enough."""
    broker, fill = full_broker
    beside = Beside(broker)
    first, second = beside.copy(), beside.copy()
    fill()
    assert beside.enter(first).may_run
    assert beside.leave(first, goes_back=True)
    assert beside.enter(second, is_copy=True).may_run
    assert die_beside(broker, second) == Buried(True, "one", 1)
    assert [*broker.indexed_dead()[0]] == ["one"]


# -- discard ---------------------------------------------------------------------------------


def test_a_letter_is_discarded_once(broker: Broker) -> None:
    """Nothing is left of it, and the second one finds none."""
    for task_id in ("one", "two", "three"):
        broker.keep(letter(task_id))
    broker.keep(letter("four", cause=Cause.LOST))
    assert broker.dead_store.discard(broker.server, "four") is True
    assert broker.dead_store.discard(broker.server, "four") is False
    assert counts(broker) == {KIND: 3}
    assert set(broker.indexed_dead()[0]) == {"one", "two", "three"}
    assert broker.dead_store.discard_each(broker.server, ["one", "four", "two", "one"]) == 2
    assert [*broker.indexed_dead()[0]] == ["three"]
    assert broker.dead_store.discard(broker.server, "three")
    assert [*everything(broker)] == [f"{broker.keys.dead}bounds".encode()]


def test_a_replayed_letter_can_be_discarded(broker: Broker) -> None:
    """It was counted no more."""
    broker.keep(letter())
    broker.keep(letter("two"))
    replay(broker, "one")
    assert broker.dead_store.discard(broker.server, "one") is True
    assert counts(broker) == {KIND: 1}
    waiting, replayed = broker.indexed_dead()
    assert ([*waiting], replayed) == (["two"], {})


def test_a_discard_takes_the_traces_of_one_that_is_gone(broker: Broker) -> None:
    """A letter that lapsed or was evicted leaves no entry in the order for ever."""
    broker.keep(letter())
    broker.server.delete(broker.keys.dead_letter("one"))
    assert ids(broker.dead) == []
    assert broker.dead_store.discard(broker.server, "one") is False
    assert broker.server.zcard(broker.keys.dead + "all") == 0


# -- prune -----------------------------------------------------------------------------------


def replay(broker: Broker, id_: str) -> str:
    """Replay a letter, as far as the store knows; return the new task's id."""
    code, new_id = broker.dead_store.reserve(broker.server, id_, f"of {id_}")
    assert code is Reservation.OURS
    broker.dead_store.release(broker.server, id_, f"of {id_}", Sent.SENT)
    return new_id


def test_nothing_is_pruned_where_nothing_was_kept(broker: Broker) -> None:
    """There are no bounds, and nothing is written."""
    assert broker.dead_store.prune(broker.server) == Pruned(0, 0, 0, 0, 0)
    assert everything(broker) == {}


def test_what_is_within_its_bounds_stays(broker: Broker) -> None:
    """As many as there may be are not too many."""
    bounds = Bounds(60, 2, 1000)
    for task_id in ("one", "two"):
        broker.keep(letter(task_id, bounds=bounds))
    before = everything(broker)
    assert broker.dead_store.prune(broker.server) == Pruned(0, 0, 0, 2, 2)
    assert everything(broker) == before


def test_the_oldest_go_first(broker: Broker) -> None:
    """As many as there are too many."""
    for number in range(6):
        broker.keep(letter(f"t{number}", bounds=Bounds(1e6, 4, 1000)))
    now = broker.now()
    at(broker, t3=now - 50, t1=now - 40, t0=now - 30, t2=now - 20, t4=now - 10, t5=now - 1)
    assert broker.dead_store.prune(broker.server) == Pruned(0, 2, 0, 4, 4)
    assert [*broker.indexed_dead()[0]] != []
    assert ids(broker.walk(oldest_first=True)) == ["t0", "t2", "t4", "t5"]
    assert broker.dead_store.prune(broker.server) == Pruned(0, 0, 0, 4, 4)


def test_those_that_were_replayed_go_before_others(broker: Broker) -> None:
    """However young they are: they have done their part. They are not told of as lost."""
    for number in range(5):
        broker.keep(letter(f"t{number}", bounds=Bounds(60, 3, 1000)))
    for id_ in ("t4", "t3"):
        replay(broker, id_)
    assert broker.dead_store.prune(broker.server) == Pruned(0, 0, 0, 3, 3)
    waiting, replayed = broker.indexed_dead()
    assert (set(waiting), replayed) == ({"t0", "t1", "t2"}, {})


def test_of_those_that_were_replayed_the_first_goes_first(broker: Broker) -> None:
    """No more of them than there are too many, counted with the others."""
    for number in range(4):
        broker.keep(letter(f"t{number}", bounds=Bounds(60, 3, 1000)))
    for id_ in ("t1", "t0"):
        replay(broker, id_)
        broker.let_pass(0.01)
    assert broker.dead_store.prune(broker.server) == Pruned(0, 0, 0, 2, 3)
    waiting, replayed = broker.indexed_dead()
    assert (set(waiting), [*replayed]) == ({"t2", "t3"}, ["t0"])


def test_what_is_too_old_goes(broker: Broker) -> None:
    """By the server's clock, and not before its time."""
    bounds = Bounds(0.4, 100, 1000)
    for task_id in ("one", "two"):
        broker.keep(letter(task_id, bounds=bounds))
    replay(broker, "two")
    broker.let_pass(0.2)
    broker.keep(letter("three", bounds=bounds))
    assert broker.dead_store.prune(broker.server).aged == 0
    broker.let_pass(0.25)
    pruned = broker.dead_store.prune(broker.server)
    # Of the one that was replayed nothing is lost.
    assert (pruned.aged, pruned.many, pruned.count) == (1, 0, 1)
    waiting, replayed = broker.indexed_dead()
    assert ([*waiting], replayed) == (["three"], {})
    assert counts(broker) == {KIND: 1}


def test_a_replayed_letter_is_kept_from_its_replay_on(broker: Broker) -> None:
    """Who replays it late can look at it as long as anybody."""
    broker.keep(letter(bounds=Bounds(60, 100, 1000)))
    at(broker, one=broker.now() - 59)
    replay(broker, "one")
    broker.server.hset(broker.keys.dead + "bounds", "max_age", 30_000)
    assert broker.dead_store.prune(broker.server).aged == 0
    assert [*broker.indexed_dead()[1]] == ["one"]


def test_those_are_counted_that_get_old(broker: Broker) -> None:
    """In the last tenth of their time; they are dropped soon."""
    for number in range(4):
        broker.keep(letter(f"t{number}", bounds=Bounds(1000, 100, 1000)))
    now = broker.now()
    at(broker, t0=now - 1010, t1=now - 990, t2=now - 910, t3=now - 890)
    assert broker.dead_store.prune(broker.server) == Pruned(1, 0, 2, 3, 100)
    assert ids(broker.walk(oldest_first=True)) == ["t1", "t2", "t3"]


def test_new_bounds_are_for_those_that_are_there(broker: Broker) -> None:
    """A setting that is lowered is heeded with the next letter."""
    for number in range(5):
        broker.keep(letter(f"t{number}"))
    assert broker.dead_store.prune(broker.server) == Pruned(0, 0, 0, 5, 100)
    broker.keep(letter("last", bounds=Bounds(60, 2, 1000)))
    assert broker.dead_store.prune(broker.server) == Pruned(0, 4, 0, 2, 2)


def test_a_bound_of_none_drops_all(broker: Broker) -> None:
    """An app may keep no letter at all."""
    broker.keep(letter(bounds=Bounds(60, 0, 1000)))
    assert broker.dead_store.prune(broker.server) == Pruned(0, 1, 0, 0, 0)
    assert [*everything(broker)] == [f"{broker.keys.dead}bounds".encode()]


@pytest.mark.parametrize("by", ["age", "count"])
def test_many_are_dropped_some_at_a_time(broker: Broker, by: str) -> None:
    """The server is blocked for two hundred at most; a repetition drops more."""
    bounds = Bounds(0.05, 1000, 1000) if by == "age" else Bounds(3600, 50, 1000)
    calls = [
        ([broker.keys.dead], letter(f"t{number}", bounds=bounds).arguments(f"e{number}"))
        for number in range(450)
    ]
    load("dead_bury").on_each(broker.server, calls)
    if by == "age":
        broker.let_pass(0.1)
    dropped = []
    while True:
        pruned = broker.dead_store.prune(broker.server)
        dropped.append(pruned.aged if by == "age" else pruned.many)
        if not dropped[-1]:
            break
    assert dropped == ([200, 200, 50, 0] if by == "age" else [200, 200, 0])
    assert len(broker.indexed_dead()[0]) == (0 if by == "age" else 50)


def test_a_letter_that_is_gone_does_not_stop_the_pruning(broker: Broker) -> None:
    """Its entry is dropped as it would be."""
    for number in range(3):
        broker.keep(letter(f"t{number}", bounds=Bounds(60, 1, 1000)))
    broker.server.delete(broker.keys.dead_letter("t0"))
    broker.dead_store.prune(broker.server)
    assert broker.server.zcard(broker.keys.dead + "all") == 1
    assert ids(broker.dead) == ["t2"]


# -- replay ----------------------------------------------------------------------------------


def reserve(
    broker: Broker, token: str, id_: str = "one", window: float = 60.0
) -> tuple[Reservation, str]:
    """Ask to replay a letter, and have nobody else do so for a while (s)."""
    args: list[Any] = [str(uuid4()), token, round(window * 1000)]
    code, new_id = load("dead_reserve").on(broker.server, [broker.keys.dead_letter(id_)], args)
    return Reservation(int(code)), new_id.decode()


def release(broker: Broker, token: str, how: Sent, id_: str = "one", new_id: str = "") -> int:
    """Say how a replay went."""
    keys = [broker.keys.dead, broker.keys.dead_letter(id_)]
    return int(load("dead_release").on(broker.server, keys, [id_, token, how, new_id]))


def test_one_caller_replays(broker: Broker) -> None:
    """Others wait, and learn under which id it is sent; then that it was."""
    broker.keep(letter())
    code, new_id = reserve(broker, "a")
    assert code is Reservation.OURS
    assert new_id not in ("", "one")
    assert reserve(broker, "b") == (Reservation.OTHERS, new_id)
    assert ids(broker.dead) == ["one"]
    assert release(broker, "a", Sent.SENT) == 1
    for token in ("a", "b"):
        assert reserve(broker, token) == (Reservation.SENT, new_id)
    assert ids(broker.dead) == []
    (found,) = broker.walk(replayed=True)
    assert (found.id, found.replayed_as) == ("one", new_id)
    one = broker.dead_store.get(broker.server, "one")
    assert one is not None
    assert one.replayed_as == new_id
    waiting, replayed = broker.indexed_dead()
    assert (waiting, replayed) == ({}, {"one": pytest.approx(broker.now(), abs=2)})
    assert broker.count_dead() == 0


def test_a_letter_that_is_sent_is_not_replayed_yet(broker: Broker) -> None:
    """Until that is over it is one of those that were not."""
    broker.keep(letter())
    reserve(broker, "a")
    (found,) = broker.dead
    assert found.replayed_as is None
    assert ids(broker.walk(replayed=True)) == []
    assert broker.count_dead() == 1


def test_a_repeated_question_has_the_same_answer_but_for_the_doubt(broker: Broker) -> None:
    """Its reply was lost: it is let in, under the same id, and nobody else is."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a")
    assert reserve(broker, "a") == (Reservation.IN_DOUBT, new_id)
    assert reserve(broker, "b") == (Reservation.OTHERS, new_id)


def test_the_next_one_is_let_in_when_the_window_is_over(broker: Broker) -> None:
    """The first one may have sent it: the second sends it under the same id."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a", window=0.2)
    assert reserve(broker, "b")[0] is Reservation.OTHERS
    broker.let_pass(0.25)
    assert reserve(broker, "b") == (Reservation.IN_DOUBT, new_id)
    assert reserve(broker, "c") == (Reservation.OTHERS, new_id)
    assert release(broker, "b", Sent.SENT) == 1
    assert reserve(broker, "a") == (Reservation.SENT, new_id)


def test_the_window_is_a_quarter_of_a_minute(broker: Broker) -> None:
    """As long as a call may take; then whoever asks is let in."""
    broker.keep(letter())
    broker.dead_store.reserve(broker.server, "one", "a")
    until = broker.server.hget(broker.keys.dead_letter("one"), "replay_until")
    assert float(until) / 1000 == pytest.approx(broker.now() + 15, abs=2)


@pytest.mark.parametrize("how", list(Sent))
def test_who_was_let_in_before_changes_nothing(broker: Broker, how: Sent) -> None:
    """Another one replays the letter by now, and says how that goes."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a", window=0.05)
    broker.let_pass(0.1)
    reserve(broker, "b")
    before = everything(broker)
    assert release(broker, "a", how) == 0
    assert release(broker, "nobody", how) == 0
    assert everything(broker) == before
    assert release(broker, "b", Sent.SENT) == 1
    assert reserve(broker, "c") == (Reservation.SENT, new_id)


def test_who_is_in_doubt_lets_the_next_one_in_at_once(broker: Broker) -> None:
    """Under the same id, so that the broker, or the guard, knows the second for what it is."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a")
    for _ in range(2):
        assert release(broker, "a", Sent.IN_DOUBT) == 1
    assert reserve(broker, "b") == (Reservation.IN_DOUBT, new_id)
    assert release(broker, "a", Sent.IN_DOUBT) == 0
    assert reserve(broker, "c") == (Reservation.OTHERS, new_id)
    assert [*broker.indexed_dead()[0]] == ["one"]


def test_who_has_sent_it_under_its_id_has_sent_it(broker: Broker) -> None:
    """Though somebody else was let in since; that one's word counts, too."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a")
    release(broker, "a", Sent.IN_DOUBT)
    reserve(broker, "b")
    assert release(broker, "a", Sent.SENT, new_id="another") == 0
    assert release(broker, "a", Sent.REFUSED, new_id=new_id) == 0
    assert [*broker.indexed_dead()[0]] == ["one"]
    assert release(broker, "a", Sent.SENT, new_id=new_id) == 1
    assert release(broker, "b", Sent.IN_DOUBT) == 1
    assert reserve(broker, "c") == (Reservation.SENT, new_id)


def test_what_was_refused_is_sent_under_a_new_id(broker: Broker) -> None:
    """It was not sent, so nothing is known of that id."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a")
    assert release(broker, "a", Sent.REFUSED) == 1
    assert release(broker, "a", Sent.REFUSED) == 0, "it is nobody's"
    code, another = reserve(broker, "b")
    assert code is Reservation.OURS
    assert another != new_id
    assert release(broker, "b", Sent.SENT) == 1
    assert reserve(broker, "a") == (Reservation.SENT, another)


def test_what_is_refused_after_a_doubt_keeps_its_id(broker: Broker) -> None:
    """The one before may have sent it, and its task may have run: under that id it is known."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a")
    release(broker, "a", Sent.IN_DOUBT)
    assert reserve(broker, "b") == (Reservation.IN_DOUBT, new_id)
    assert release(broker, "b", Sent.REFUSED) == 1
    assert reserve(broker, "c")[1] == new_id


def test_what_is_sent_stays_sent(broker: Broker) -> None:
    """Said twice, it has the time of the first one; a doubt that comes late changes nothing."""
    broker.keep(letter())
    _, new_id = reserve(broker, "a")
    release(broker, "a", Sent.SENT)
    _, replayed = broker.indexed_dead()
    broker.let_pass(0.02)
    for how in (Sent.SENT, Sent.IN_DOUBT):
        assert release(broker, "a", how) == 1
        assert broker.indexed_dead() == ({}, replayed)
        assert reserve(broker, "b") == (Reservation.SENT, new_id)
    assert ids(broker.walk(replayed=True)) == ["one"]


def test_a_letter_that_is_not_there_is_replayed_by_nobody(broker: Broker) -> None:
    """Neither is anything written."""
    assert broker.dead_store.reserve(broker.server, "one", "a") == (Reservation.NOT_FOUND, "")
    for how in Sent:
        assert release(broker, "a", how) == 0
    assert everything(broker) == {}


def test_a_letter_that_is_discarded_during_its_replay_is_gone(broker: Broker) -> None:
    """Its release does not bring a part of it back."""
    broker.keep(letter())
    reserve(broker, "a")
    broker.dead_store.discard(broker.server, "one")
    assert release(broker, "a", Sent.SENT) == 0
    assert broker.indexed_dead() == ({}, {})


def test_two_letters_are_replayed_apart(broker: Broker) -> None:
    """Each has an id of its own, also those of one task's id."""
    for event in ("e0", "e1"):
        broker.keep(letter(), event)
    first, second = replay(broker, "one"), replay(broker, "one.1")
    assert first != second
    assert broker.keep(letter(), "e1") == ("one.1", 0), "it is recognised still"
    assert set(broker.indexed_dead()[1]) == {"one", "one.1"}


# -- walk and count --------------------------------------------------------------------------


def some_letters(broker: Broker) -> float:
    """Keep letters of three kinds, a second apart each; return when the first was kept."""
    begin = round(broker.now()) - 100
    for number in range(9):
        cause = Cause.LOST if number % 3 == 0 else Cause.FAILED
        broker.keep(letter(f"t{number}", cause=cause, task="a" if number < 6 else "b"))
        at(broker, **{f"t{number}": begin + number})
    return float(begin)


@pytest.mark.parametrize("page", [1, 2, 3, 200])
@pytest.mark.parametrize("oldest_first", [False, True])
def test_letters_are_found_by_what_they_are(broker: Broker, oldest_first: bool, page: int) -> None:
    """In their order, however many are read in one go; and as many as are counted."""
    begin = some_letters(broker)
    expected: list[tuple[dict[str, Any], str]] = [
        ({}, "012345678"),
        ({"task": "a"}, "012345"),
        ({"task": "b"}, "678"),
        ({"cause": "lost"}, "036"),
        ({"cause": "failed"}, "124578"),
        ({"task": "a", "cause": "lost"}, "03"),
        ({"since": begin + 4}, "45678"),
        ({"since": begin + 4.001}, "5678"),
        ({"task": "a", "since": begin + 4}, "45"),
        ({"cause": "lost", "since": begin + 4}, "6"),
        ({"task": "a", "cause": "failed", "since": begin}, "1245"),
        ({"task": "c"}, ""),
        ({"cause": "poison"}, ""),
        ({"task": "c", "since": begin}, ""),
        ({"since": begin + 50}, ""),
        ({"before": begin + 4}, "0123"),
        ({"before": begin + 4.001}, "01234"),
        ({"task": "a", "before": begin + 4}, "0123"),
        ({"cause": "lost", "since": begin + 1, "before": begin + 6}, "3"),
        ({"since": begin + 5, "before": begin + 5}, ""),
        ({"task": "c", "before": begin + 5}, ""),
    ]
    for which, numbers in expected:
        in_order = [f"t{n}" for n in (numbers if oldest_first else reversed(numbers))]
        assert ids(broker.walk(**which, oldest_first=oldest_first, page=page)) == in_order
        assert broker.count_dead(**which) == len(numbers)


@pytest.mark.parametrize("page", [1, 2, 200])
@pytest.mark.parametrize("oldest_first", [False, True])
def test_those_that_were_replayed_are_found_apart(
    broker: Broker, oldest_first: bool, page: int
) -> None:
    """By the time of their replay, and by what they are."""
    some_letters(broker)
    for id_ in ("t7", "t0", "t3"):
        replay(broker, id_)
        broker.let_pass(0.005)
    options = {"oldest_first": oldest_first, "page": page}
    order = ["t7", "t0", "t3"] if oldest_first else ["t3", "t0", "t7"]
    assert ids(broker.walk(replayed=True, **options)) == order
    assert sorted(ids(broker.walk(replayed=True, task="a", **options))) == ["t0", "t3"]
    assert ids(broker.walk(replayed=True, cause="failed", **options)) == ["t7"]
    assert ids(broker.walk(replayed=True, since=broker.now() + 1, **options)) == []
    assert len(ids(broker.walk(**options))) == broker.count_dead() == 6
    assert broker.count_dead(cause="lost") == 1
    broker.indexed_dead()


@pytest.mark.parametrize("page", [1, 3, 7, 50])
@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize("which", [{}, {"cause": "failed"}])
def test_many_of_one_millisecond_are_all_found(
    broker: Broker, which: dict[str, Any], oldest_first: bool, page: int
) -> None:
    """More than are read in one go, between others: each is there once."""
    now = broker.now()
    for number in range(20):
        broker.keep(letter(f"t{number}", task="ab"[number % 2]))
        at(broker, **{f"t{number}": now + min(max(number, 3), 16)})
    found = ids(broker.walk(**which, oldest_first=oldest_first, page=page))
    assert len(found) == 20
    assert set(found) == {f"t{number}" for number in range(20)}
    ends = (found[-3:], found[:4]) if oldest_first else (found[:3], found[-4:])
    assert [set(end) for end in ends] == [
        {"t17", "t18", "t19", "t16"} & set(ends[0]),
        {"t0", "t1", "t2", "t3"},
    ]


@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize("page", [1, 2, 3])
def test_letters_may_come_and_go_during_a_walk(
    broker: Broker, oldest_first: bool, page: int
) -> None:
    """Those that stay are all there, none is there twice, and what is gone by then is not."""
    begin = some_letters(broker)
    gone = ["t5", "t2"] if not oldest_first else ["t3", "t6"]
    walk = broker.walk(oldest_first=oldest_first, page=page)
    found = [next(walk).id]
    # Of the same millisecond as the one that was read last, and of others around it.
    last = int(found[0][1:])
    for number, place in enumerate((last, last, last - 1, last + 1, 4)):
        broker.keep(letter(f"new{number}", task="new"))
        at(broker, **{f"new{number}": begin + place})
    broker.dead_store.discard(broker.server, found[0])
    broker.dead_store.discard(broker.server, gone[0])
    found.append(next(walk).id)
    replay(broker, gone[1])
    broker.keep(letter("late", task="new"))
    found += ids(walk)
    assert len(found) == len(set(found))
    stayed = {f"t{n}" for n in range(9)} - set(gone)
    assert stayed <= set(found)
    assert set(found) <= stayed | {*gone, *(f"new{n}" for n in range(5)), "late"}
    # Those that went before they were read, one at a time.
    if page == 1:
        assert not set(gone) & set(found)
    # The one in the middle came before it was its turn.
    assert "new4" in found


def test_who_walks_over_all_may_discard_each(broker: Broker) -> None:
    """As a purge does: it sees all of them."""
    some_letters(broker)
    seen = []
    for one in broker.walk(oldest_first=True, page=2):
        assert broker.dead_store.discard(broker.server, one.id)
        seen.append(one.id)
    assert seen == [f"t{n}" for n in range(9)]
    assert broker.indexed_dead() == ({}, {})


def test_who_walks_over_all_may_replay_each(broker: Broker) -> None:
    """Those that die again meanwhile are letters of their own."""
    some_letters(broker)
    seen = []
    for one in broker.walk(task="a", page=1):
        replay(broker, one.id)
        seen.append(one.id)
    assert seen == [f"t{n}" for n in (5, 4, 3, 2, 1, 0)]
    assert len(broker.indexed_dead()[1]) == 6


def test_an_older_letter_of_a_newer_library_is_read(broker: Broker) -> None:
    """What is not known of it is left out."""
    broker.keep(letter())
    key = broker.keys.dead_letter("one")
    about = json.loads(broker.server.hget(key, "about"))
    broker.server.hset(key, "about", json.dumps({**about, "colour": "blue"}))
    (found,) = broker.dead
    assert found.error == "ValueError: it is broken"


# -- chords ----------------------------------------------------------------------------------


def parts(broker: Broker) -> tuple[int, dict[str, bytes]]:
    """What is kept of the chord."""
    return broker.dead_store.parts(broker.server, "g1")


def keep_part(broker: Broker, task_id: str, raw: bytes = b"m", ttl: float = 60.0) -> int:
    """Keep a part that has succeeded, or its number with ``#``."""
    args: list[Any] = [task_id, raw, round(ttl * 1000)]
    return int(load("chord_keep").on(broker.server, [broker.keys.chord("g1")], args))


def test_a_chord_that_completes_leaves_nothing_behind(broker: Broker) -> None:
    """The last part ends what was kept, and says so; a part that is repeated counts once."""
    broker.dead_store.note_chord(broker.server, "g1", 3, 60)
    for _ in range(3):
        assert keep_part(broker, "p1") == 1
    assert keep_part(broker, "p2", b"\xff") == 1
    assert parts(broker) == (3, {"p1": b"m", "p2": b"\xff"})
    assert broker.server.pttl(broker.keys.chord("g1")) / 1000 == pytest.approx(60, abs=2)
    assert keep_part(broker, "p3") == 0
    assert everything(broker) == {}


@pytest.mark.parametrize("early", [0, 1, 2])
def test_the_size_of_a_chord_may_be_known_late(broker: Broker, early: int) -> None:
    """Its parts may have run before their caller has noted how many they are."""
    for number in range(early):
        assert keep_part(broker, f"p{number}") == 1
    assert parts(broker)[0] == 0
    assert keep_part(broker, "#", b"2") == (1 if early < 2 else 0)
    for number in range(early, 2):
        assert keep_part(broker, f"p{number}") == (0 if number == 1 else 1)
    assert everything(broker) == {}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_chord_with_a_dead_part_is_kept_whole(broker: Broker, place: int) -> None:
    """Whenever that one dies; for as long as the letter is kept, by its id."""
    raws = {"p0": b"m0", "p1": b"m1", "p2": b"m2"}
    broker.dead_store.note_chord(broker.server, "g1", 3, 60)
    for number, (task_id, raw) in enumerate(raws.items()):
        if number == place:
            broker.keep(letter(task_id, chord_id="g1"), "e1")
            left = broker.server.pttl(broker.keys.chord("g1")) / 1000
            assert left == pytest.approx(BOUNDS.max_age, abs=2)
        else:
            assert keep_part(broker, task_id, raw) == 1
    dead = f"p{place}"
    assert parts(broker) == (3, {**raws, dead: f"@{dead}".encode()})
    left = broker.server.pttl(broker.keys.chord("g1")) / 1000
    assert left == pytest.approx(BOUNDS.max_age, abs=2), "a part that succeeds late changes it not"
    broker.dead_store.forget_parts(broker.server, "g1")
    assert parts(broker) == (0, {})


def test_one_begins_to_send_a_chord(broker: Broker) -> None:
    """It says what it sends last; who gives up leaves it to the next."""
    store, server = broker.dead_store, broker.server
    store.note_chord(server, "g1", 2, 60)
    assert store.begun(server, "g1") == ""
    for _ in range(2):
        assert store.begin_chord(server, "g1", "t1", "last of one")
    assert not store.begin_chord(server, "g1", "t2", "another")
    assert store.begun(server, "g1") == "last of one"
    assert parts(broker) == (2, {})
    store.give_up_chord(server, "g1", "t2")
    assert not store.begin_chord(server, "g1", "t2", "another")
    store.give_up_chord(server, "g1", "t1")
    assert store.begin_chord(server, "g1", "t2", "another")


def test_nobody_begins_to_send_what_is_gone(broker: Broker) -> None:
    """Somebody else has sent it, and forgotten its parts; a late copy of one changes nothing."""
    store, server = broker.dead_store, broker.server
    assert not store.begin_chord(server, "g1", "t1", "last")
    assert not server.exists(broker.keys.chord("g1"))
    keep_part(broker, "p0")
    assert not store.begin_chord(server, "g1", "t1", "last")


def test_a_part_that_has_died_stays_dead(broker: Broker) -> None:
    """Whatever a late copy of its message says."""
    broker.dead_store.note_chord(broker.server, "g1", 2, 60)
    broker.keep(letter("p0", chord_id="g1"))
    assert keep_part(broker, "p0") == 1
    assert parts(broker) == (2, {"p0": b"@p0"})


def test_a_chord_whose_size_comes_after_a_death_is_kept(broker: Broker) -> None:
    """It is the caller that is late."""
    broker.keep(letter("p0", chord_id="g1"))
    assert keep_part(broker, "p1") == 1
    assert keep_part(broker, "#", b"2") == 1
    assert parts(broker) == (2, {"p0": b"@p0", "p1": b"m"})


def test_a_part_that_died_before_has_the_name_of_its_letter(broker: Broker) -> None:
    """Another task of its id did so first."""
    broker.keep(letter("p0"), "e0")
    broker.keep(letter("p0", chord_id="g1"), "e1")
    assert parts(broker)[1] == {"p0": b"@p0.1"}


def test_a_delivery_that_dies_is_kept_for_its_chord(broker: Broker) -> None:
    """In the one step that ends it, also beside another broker."""
    delivery = taken(broker)
    broker.die(delivery, letter(chord_id="g1"))
    beside = Beside(broker)
    copy = beside.copy()
    beside.enter(copy)
    die_beside(broker, copy, letter("two", chord_id="g1"))
    assert parts(broker)[1] == {"one": b"@one", "two": b"@two"}


# -- crashes ---------------------------------------------------------------------------------


def started(broker: Broker, delivery: Delivery, starter: Starter) -> None:
    """Count a start, and say whose it is."""
    delivery.starter = starter
    broker.start(delivery)


def crashes(broker: Broker, task_id: str = "one") -> list[Crash]:
    """What is known of a task's crashes."""
    found = broker.server.hmget(broker.keys.run(task_id), "history", "start")
    return Crash.read_all(*found)


def crash(broker: Broker, starter: Starter, how: str = "") -> None:
    """Have a task that waits be started, and crash."""
    delivery = broker.fetch_one()
    started(broker, delivery, starter)
    if how:
        delivery.starter = Starter(starter.pid, starter.host, starter.is_ending, how)
        delivery.has_crashed = True
        assert broker.requeue(delivery)
    else:
        broker.end_lease(delivery)
        assert broker.sweep() == 1


def test_a_start_says_whose_it_is(broker: Broker) -> None:
    """While it runs it stands as a crash whose end nobody saw."""
    delivery = taken(broker)
    started(broker, delivery, Starter(17, "w1@shop"))
    (found,) = broker.messages.runs.crashes(broker.server, delivery)
    assert found == Crash(found.at, 17, "w1@shop", False, "")
    assert found.at == pytest.approx(broker.now(), abs=2)
    assert "history" not in broker.run_of()


def test_a_start_that_is_taken_back_is_not_known(broker: Broker) -> None:
    """Neither while the copy waits on, nor in what is known of those before it."""
    put(broker, "one")
    crash(broker, Starter(1, "w1@shop"), "exitcode 3")
    delivery = broker.fetch_one()
    started(broker, delivery, Starter(2, "w2@shop"))
    assert [one.pid for one in crashes(broker)] == [1, 2]
    broker.server.execute_command(*broker.messages.runs.count_start(delivery, -1))
    assert [one.pid for one in crashes(broker)] == [1]
    started(broker, delivery, Starter(3, "w3@shop"))
    assert [one.pid for one in crashes(broker)] == [1, 3]
    assert broker.run_of()["crashes"] == "2"


@pytest.mark.parametrize("end", ["requeue", "lay aside"])
def test_an_orderly_return_takes_the_start_back(broker: Broker, end: str) -> None:
    """A message that goes back in order has not crashed."""
    delivery = taken(broker)
    started(broker, delivery, Starter(1, "w1@shop"))
    if end == "requeue":
        broker.requeue(delivery)
    else:
        broker.messages.lay_aside(broker.server, delivery, 60)
    assert crashes(broker) == []
    assert broker.run_of()["crashes"] == "0"


def test_a_start_is_explained(broker: Broker) -> None:
    """Its time stays as it was; nothing is counted."""
    delivery = taken(broker)
    started(broker, delivery, Starter(1, "w1@shop"))
    (before,) = crashes(broker)
    broker.let_pass(0.01)
    delivery.starter = Starter(2, "w1@shop", is_ending=True)
    broker.server.execute_command(*broker.messages.runs.count_start(delivery, 0))
    assert crashes(broker) == [Crash(before.at, 2, "w1@shop", True, "")]
    assert broker.run_of()["crashes"] == "1"


def test_the_return_of_a_crash_says_how_it_was(broker: Broker) -> None:
    """The worker lives, and has seen its child's end."""
    put(broker, "one")
    crash(broker, Starter(1, "w 1@shop"), "signal 9 (SIGKILL)")
    (found,) = crashes(broker)
    assert (found.pid, found.host, found.how) == (1, "w_1@shop", "signal 9 (SIGKILL)")


def test_crashes_are_known_in_their_order(broker: Broker) -> None:
    """The latest is the last of them; the end of the task ends it all."""
    put(broker, "one")
    for number in range(4):
        crash(broker, Starter(number, f"w{number}@shop"), "exitcode 3" if number % 2 else "")
    found = crashes(broker)
    assert [one.pid for one in found] == [0, 1, 2, 3]
    assert [one.how for one in found] == ["", "exitcode 3", "", "exitcode 3"]
    delivery = broker.fetch_one()
    assert delivery.copy.crashes == 4
    started(broker, delivery, Starter(4, "w4@shop"))
    broker.die(delivery)
    # It was delivered before, so that it is over is known for a while.
    assert broker.run_of() == {"tag": "over"}


def test_a_zombie_says_nothing_of_a_start(broker: Broker) -> None:
    """Another copy has the run, and its start is its own."""
    zombie, successor = taken_over(broker)
    started(broker, successor, Starter(2, "w2@shop"))
    before = everything(broker)
    zombie.starter = Starter(1, "w1@shop", how="exitcode 3")
    zombie.has_crashed = True
    for by in (1, 0, -1):
        broker.server.execute_command(*broker.messages.runs.count_start(zombie, by))
    assert broker.requeue(zombie) is False
    assert broker.messages.lay_aside(broker.server, zombie, 60) is False
    assert everything(broker) == before


@pytest.mark.parametrize("host", ["w1@shop", "w1@\u2713\u2713\u2713\u2713\u2713"])
@pytest.mark.parametrize("how", ["", "signal 9 (SIGKILL)"])
def test_of_many_crashes_the_latest_are_known(broker: Broker, how: str, host: str) -> None:
    """What is cut off of the oldest is left out, wherever the cut is."""
    put(broker, "one")
    delivery = broker.fetch_one()
    run = broker.keys.run("one")

    def count(pid: int, host: str) -> None:
        load("run_start").on(
            broker.server, [run], [delivery.tag, 1, str(Starter(pid, host, how=how))]
        )

    for number in range(100):
        count(1000 + number, host)
    before = broker.server.hmget(run, "history", "start")
    assert len(before[0]) in range(1900, 2001)
    for shift in range(70):
        broker.server.hset(run, mapping=dict(zip(("history", "start"), before, strict=True)))
        count(1100, host + "h" * shift)
        count(1101, host)
        found = broker.messages.runs.crashes(broker.server, delivery)
        assert len(found) > 20
        assert [one.pid for one in found] == [*range(1102 - len(found), 1102)]
        assert {(one.host, one.how) for one in found} == {(host, how), (host + "h" * shift, how)}
        assert all(one.at == pytest.approx(broker.now(), abs=30) for one in found)


# -- beside another broker -------------------------------------------------------------------


def die_beside(broker: Broker, copy: Delivery, kept: Any = None, *, order: int = 0) -> Buried:
    """End a copy of another broker's as a dead letter; what is over is known for 100 s."""
    copy.letter = kept or letter(copy.task_id)
    return broker.messages.runs.bury(broker.server, copy, order=order, remembers=100.0)


def test_a_run_beside_another_broker_ends_as_a_dead_letter(broker: Broker) -> None:
    """What the broker delivers again of it is known to be over; and repeated, nothing changes."""
    beside = Beside(broker)
    first, copy, new = beside.copy(), beside.copy(), beside.copy()
    beside.enter(first)
    assert die_beside(broker, first, letter(raw=b"m")) == Buried(True, "one", 1)
    assert first.tag not in broker.leases
    assert broker.run_of() == {"tag": "over", "order": "0", "done": "0"}
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(100, abs=2)
    assert broker.dead_store.message(broker.server, "one") == b"m"
    before = everything(broker)
    assert die_beside(broker, first) == Buried(False, "one", 1)
    assert everything(broker) == before
    assert beside.enter(copy, is_copy=True).is_over
    assert everything(broker) == before
    assert (again := beside.enter(new)).may_run, "a new call under its id"
    assert again.crashes == 0
    assert die_beside(broker, new) == Buried(True, "one.1", 2)
    broker.indexed_dead()


@pytest.mark.parametrize("then", ["dies", "hands back"])
def test_a_late_end_beside_another_broker_is_no_end_of_the_task(broker: Broker, then: str) -> None:
    """Nothing is kept, for another copy runs: if that one is lost, the next one is let in."""
    beside = Beside(broker)
    zombie, successor, third = beside.copy(), beside.copy(), beside.copy()
    beside.enter(zombie)
    broker.end_lease(zombie)
    assert beside.enter(successor, is_copy=True).may_run
    if then == "hands back":
        assert beside.leave(successor, goes_back=True)
    assert die_beside(broker, zombie) == NOTHING
    assert ids(broker.dead) == []
    if then == "dies":
        assert broker.run_of()["tag"] == successor.tag
        broker.end_lease(successor)
    assert beside.enter(third, is_copy=True).may_run


def test_a_late_end_beside_another_broker_leaves_the_one_that_runs(broker: Broker) -> None:
    """That one has its lease and its crash count, and ends as a letter of its own."""
    beside = Beside(broker)
    zombie, successor = beside.copy(), beside.copy()
    beside.enter(zombie)
    broker.end_lease(zombie)
    assert beside.enter(successor, is_copy=True).crashes == 1
    assert die_beside(broker, zombie) == NOTHING
    assert broker.run_of()["tag"] == successor.tag
    assert broker.run_of()["crashes"] == "2"
    assert broker.leases[successor.tag] > broker.now()
    assert die_beside(broker, successor) == Buried(True, "one", 1)
    assert die_beside(broker, zombie) == NOTHING
    assert ids(broker.dead) == ["one"]


def test_an_end_after_the_lease_beside_another_broker_is_kept(broker: Broker) -> None:
    """Nobody else was let in; it is said that the lease had ended."""
    beside = Beside(broker)
    copy, late = beside.copy(), beside.copy()
    beside.enter(copy)
    broker.server.zrem(broker.keys.leases, copy.tag)
    assert die_beside(broker, copy) == Buried(False, "one", 1)
    assert beside.enter(late, is_copy=True).is_over


def test_a_run_that_nobody_knows_any_more_is_kept(broker: Broker) -> None:
    """The server lost it; a letter too many is better than none, and repeated it is one."""
    copy = Beside(broker).copy()
    for _ in range(2):
        assert die_beside(broker, copy) == Buried(False, "one", 1)
    assert ids(broker.dead) == ["one"]


def test_a_run_that_was_continued_is_not_kept(broker: Broker) -> None:
    """Its retry is queued: a letter, too, would have it run twice when that is replayed."""
    beside = Beside(broker)
    first, retry = beside.copy(), beside.copy()
    beside.enter(first)
    broker.messages.runs.note_done(broker.server, "one", 0)
    die_beside(broker, first)
    assert ids(broker.dead) == []
    assert beside.enter(retry, order=1).may_run
    assert die_beside(broker, retry, order=1) == Buried(True, "one", 1)


def test_an_entry_that_is_repeated_is_counted_once(broker: Broker) -> None:
    """Its reply was lost; the second answer is that of the first."""
    beside = Beside(broker)
    first, second = beside.copy(), beside.copy()
    first.starter, second.starter = Starter(1, "w1@shop"), Starter(2, "w2@shop")
    for _ in range(2):
        assert beside.enter(first).crashes == 0
        assert [one.pid for one in crashes(broker)] == [1]
    broker.end_lease(first)
    for _ in range(2):
        assert beside.enter(second, is_copy=True).crashes == 1
        assert [one.pid for one in crashes(broker)] == [1, 2]
    assert broker.run_of()["crashes"] == "2"


def test_a_copy_that_goes_back_says_how_it_crashed(broker: Broker) -> None:
    """The child is dead, and its worker has seen that; said twice, it is counted once."""
    beside = Beside(broker)
    first, second = beside.copy(), beside.copy()
    first.starter = Starter(1, "w1@shop")
    beside.enter(first)
    first.starter, first.has_crashed = Starter(1, "w1@shop", how="exitcode 3"), True
    assert beside.leave(first, goes_back=True) is True
    assert beside.leave(first, goes_back=True) is False
    (found,) = crashes(broker)
    assert (found.pid, found.how) == (1, "exitcode 3")
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(7 * 86400, abs=5)
    assert beside.enter(second, is_copy=True).crashes == 1
    assert beside.leave(second) is True
    assert crashes(broker) == []


def test_a_copy_that_goes_back_in_order_has_not_crashed(broker: Broker) -> None:
    """Its start is taken back, those before it are not; repeated, no more is taken."""
    beside = Beside(broker)
    copies = [beside.copy() for _ in range(3)]
    for number, copy in enumerate(copies):
        copy.starter = Starter(number, f"w{number}@shop")
    beside.enter(copies[0])
    broker.end_lease(copies[0])
    beside.enter(copies[1], is_copy=True)
    assert beside.leave(copies[1], goes_back=True) is True
    assert beside.leave(copies[1], goes_back=True) is False
    assert [one.pid for one in crashes(broker)] == [0]
    entered = beside.enter(copies[2], is_copy=True)
    assert (entered.guard, entered.crashes) == (Guard.MAY_RUN, 1)
    assert [one.pid for one in crashes(broker)] == [0, 2]


def test_a_late_return_beside_another_broker_explains_nothing(broker: Broker) -> None:
    """The start that is noted is another copy's."""
    beside = Beside(broker)
    zombie, successor = beside.copy(), beside.copy()
    zombie.starter, successor.starter = Starter(1, "w1@shop"), Starter(2, "w2@shop")
    beside.enter(zombie)
    broker.end_lease(zombie)
    beside.enter(successor, is_copy=True)
    before = broker.run_of()
    zombie.starter, zombie.has_crashed = Starter(1, "w1@shop", how="exitcode 3"), True
    assert beside.leave(zombie, goes_back=True) is False
    assert broker.run_of() == before


def test_a_poison_message_is_kept_beside_another_broker(broker: Broker) -> None:
    """After its crashes nothing of them is left, and a replay under its id begins at none."""
    beside = Beside(broker)
    for _ in range(3):
        copy = beside.copy()
        beside.enter(copy, is_copy=True)
        broker.end_lease(copy)
    last = beside.copy()
    assert beside.enter(last, is_copy=True).crashes == 3
    raw = message().encode()
    assert die_beside(broker, last, letter(cause=Cause.POISON, raw=raw)).is_ended
    assert crashes(broker) == []
    assert beside.enter(beside.copy()).crashes == 0
    assert counts(broker) == {"poison:shop.send_invoice": 1}
