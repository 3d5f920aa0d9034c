"""Dead letters of an app without a Redis: they are in a queue, and worked off in its order."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from amqp.exceptions import (
    AccessRefused,
    MessageNacked,
    NotAllowed,
    NotFound,
    PreconditionFailed,
    RecoverableConnectionError,
)
from celery import Celery, chord
from kombu import Producer
from kombu.exceptions import OperationalError
from kombu.transport import memory, pyamqp

from reliable_tasks import ReliableTask
from reliable_tasks._celery.queues import DEAD, dead_queue
from reliable_tasks._dead.letters import raw_of
from reliable_tasks._dead.queue import Pace, Queued, bury_in_queue, is_in_queue
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from reliable_tasks.instrumentation.signals import dead_letter_replayed
from tests.unit.harness import take

Told = list[tuple[str, str | None, str]]
#: The letter of a message that is none.
ANY = Letter(
    DeadLetter(id="x", task="", task_id="", cause=Cause.UNDECODABLE, error="no message"),
    b"\xff\x00\xfe",
    Bounds(60, 10, 100),
)


@pytest.fixture
def rabbit(rabbit: Celery) -> Celery:
    """The same with a task."""

    @rabbit.task(base=ReliableTask, name="shop.pay")
    def pay(n: int) -> int:
        return n

    return rabbit


def bury(app: Celery, n: int, *, max_body: int = 10_000, headers: Any = None, **about: Any) -> str:
    """Have a task die; return the id of its letter.

    Of one with a ``task_id`` that has died already it is the same message again, or another call.
    """
    task = app.tasks["shop.pay"]
    result = task.apply_async((n,), task_id=about.get("task_id"))
    message = take(app)
    raw = raw_of(message, headers={**message.headers, **(headers or {})})
    known: dict[str, Any] = {
        "task": "shop.pay",
        "task_id": result.id,
        "cause": Cause.FAILED,
        "error": "ValueError: no",
        "queue": "celery",
        "root_id": result.id,
        **about,
    }
    letter = Letter(DeadLetter(id=known["task_id"], **known), raw, Bounds(60, 10, max_body))
    bury_in_queue(app, letter)
    return str(known["task_id"])


def drop(app: Celery, headers: Any, body: Any = ([7], {}, {})) -> None:
    """Have RabbitMQ drop a message."""
    how = {"content_type": "application/json", "content_encoding": "utf-8"}
    with app.connection_for_write() as connection:
        Producer(connection).publish(
            body,
            **(how if isinstance(body, bytes) else {"serializer": "json"}),
            exchange=dead_queue().exchange,
            routing_key="celery",
            headers=headers,
            declare=[dead_queue()],
        )


def replay(app: Celery, matches: Any = lambda letter: True, **options: Any) -> Told:
    """Replay letters; return what was told of each."""
    told: Told = []
    known: dict[str, Any] = {"limit": None, "pace": Pace(None), "queue": None, **options}
    Queued(app).replay(
        matches, lambda letter, new_id, why: told.append((letter.id, new_id, why)), **known
    )
    return told


def ids(app: Celery) -> list[str]:
    """The ids of the letters in their order."""
    return [letter.id for letter in Queued(app).walk()]


def speak_amqp(patch: pytest.MonkeyPatch) -> None:
    """Have the queues in memory tell errors as those of RabbitMQ do."""
    for kind in ("connection_errors", "channel_errors"):
        for name in (kind, f"recoverable_{kind}"):
            patch.setattr(memory.Transport, name, getattr(pyamqp.Transport, name), raising=False)


def is_7(letter: DeadLetter) -> bool:
    """Say whether a letter is that of one call."""
    return letter.argsrepr == "(7,)"


# -- where they are ------------------------------------------------------------------------------


def test_letters_are_in_a_queue_where_there_is_no_redis(rabbit: Celery, app: Celery) -> None:
    """With RabbitMQ as the broker; and nowhere where the broker is none either."""
    assert is_in_queue(rabbit)
    assert not is_in_queue(app)
    with Celery("shop", broker="memory://", set_as_current=False) as without:
        assert not is_in_queue(without)


def test_a_redis_is_preferred() -> None:
    """There they can be found by their ids."""
    with Celery("shop", broker="amqp://", backend="redis://r/1", set_as_current=False) as app:
        assert not is_in_queue(app)


def test_they_are_kept_where_workers_read(rabbit: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks may be sent to another broker than that whose queues RabbitMQ drops messages of."""
    rabbit.conf.broker_write_url = "amqp://write//"
    used: list[str] = []
    publish = Producer.publish

    def note(producer: Any, *args: Any, **options: Any) -> Any:
        used.append(producer.connection.hostname)
        return publish(producer, *args, **options)

    monkeypatch.setattr(Producer, "publish", note)
    id_ = bury(rabbit, 1)
    assert used == ["write", "rabbit"]
    assert ids(rabbit) == [id_]


@pytest.mark.parametrize(
    "error",
    [NotFound, AccessRefused, PreconditionFailed, NotAllowed, RecoverableConnectionError],
    ids=lambda one: one.__name__,
)
def test_whatever_the_broker_says_is_one_error(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Not many times; and the next letter is kept."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise error("not so")

    with monkeypatch.context() as patch:
        speak_amqp(patch)
        patch.setattr(memory.Channel, "queue_declare", refuse)
        with pytest.raises(OperationalError, match="not so"):
            bury_in_queue(rabbit, ANY)
    bury_in_queue(rabbit, ANY)
    assert ids(rabbit) == ["x"]


def test_a_queue_that_refuses_is_not_asked_again_at_once(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full, and kombu takes that for a lost connection; the worker has more to do."""
    asked: list[Any] = []

    def refuse(channel: Any, message: Any, **options: Any) -> None:
        asked.append(message)
        raise MessageNacked

    speak_amqp(monkeypatch)
    monkeypatch.setattr(memory.Channel, "basic_publish", refuse)
    with pytest.raises(OperationalError, match="refuses it"):
        bury_in_queue(rabbit, ANY)
    assert len(asked) == 1


# -- reading -------------------------------------------------------------------------------------


def test_a_letter_is_read_as_it_was_kept(rabbit: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time at which it was."""
    monkeypatch.setattr(time, "time", lambda: 1_772_366_400.0)
    id_ = bury(rabbit, 7, traceback="Traceback", retries=2, argsrepr="(7,)", chord_id="c")
    (letter,) = Queued(rabbit).walk()
    assert letter == DeadLetter(
        id=id_,
        task="shop.pay",
        task_id=id_,
        cause=Cause.FAILED,
        error="ValueError: no",
        traceback="Traceback",
        queue="celery",
        retries=2,
        at=1_772_366_400.0,
        argsrepr="(7,)",
        root_id=id_,
        chord_id="c",
        size=letter.size,
    )
    assert letter.size > 100


def test_looking_at_them_leaves_them_in_their_order(rabbit: Celery) -> None:
    """However often, and also by one who looks at the first alone."""
    buried = [bury(rabbit, n) for n in range(4)]
    assert ids(rabbit) == buried
    looking = Queued(rabbit).walk()
    assert next(looking).id == buried[0]
    looking.close()  # type: ignore[attr-defined]
    assert ids(rabbit) == buried
    assert Queued(rabbit).count() == 4


def test_an_empty_queue_is_made_when_it_is_asked_for(rabbit: Celery) -> None:
    """Nobody has died yet."""
    assert Queued(rabbit).count() == 0
    assert ids(rabbit) == []
    assert replay(rabbit) == []
    assert Queued(rabbit).purge(lambda _: True, lambda _: None) == 0


def test_what_another_one_takes_meanwhile_is_not_waited_for(rabbit: Celery) -> None:
    """Two people may look at once."""
    for n in range(3):
        bury(rabbit, n)
    looking = Queued(rabbit).walk()
    next(looking)
    with rabbit.connection_for_write() as connection:
        queue: Any = dead_queue()(connection.default_channel)
        queue.purge()
    assert list(looking) == []


def test_what_came_back_just_now_is_not_overlooked(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ counts what is on its disk, and learns of it no later than it hands one out."""
    buried = [bury(rabbit, n) for n in range(3)]
    size, get = memory.Channel._size, memory.Channel._get
    known: dict[str, int] = {}

    def hand_out(channel: Any, queue: str, timeout: Any = None) -> Any:
        message = get(channel, queue, timeout)
        known[queue] = size(channel, queue)
        return message

    monkeypatch.setattr(memory.Channel, "_size", lambda channel, queue: known.get(queue, 0))
    monkeypatch.setattr(memory.Channel, "_get", hand_out)
    assert ids(rabbit) == buried


def test_one_of_another_version_is_read(rabbit: Celery) -> None:
    """With fields that this one does not know."""
    bury(rabbit, 7)
    with rabbit.connection_for_write() as connection:
        queue: Any = dead_queue()(connection.default_channel)
        message = queue.get(no_ack=True)
        body = message.decode()
        body["about"]["of_the_future"] = 1
        Producer(connection).publish(
            body, serializer="json", exchange=DEAD, headers=message.headers, routing_key=DEAD
        )
    (letter,) = Queued(rabbit).walk()
    assert letter.task == "shop.pay"


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("delivery_limit", "poison"),
        ("rejected", "rejected"),
        ("expired", "expired"),
        ("maxlen", "rejected"),
    ],
)
def test_what_rabbitmq_dropped_says_why(rabbit: Celery, reason: str, cause: str) -> None:
    """It knows its queue, its time and the task's own headers."""
    died = datetime(2026, 3, 1, 12, tzinfo=UTC)
    headers = {
        "id": "one",
        "task": "shop.pay",
        "retries": 2,
        "argsrepr": "(7,)",
        "kwargsrepr": "{}",
        "root_id": "r",
        "x-delivery-count": 5,
        "x-death": [{"reason": reason, "queue": "slow", "time": died}, {"reason": "other"}],
    }
    drop(rabbit, headers)
    (letter,) = Queued(rabbit).walk()
    assert letter == DeadLetter(
        id="one",
        task="shop.pay",
        task_id="one",
        cause=Cause(cause),
        error=f"dropped by RabbitMQ: {reason}",
        queue="slow",
        retries=2,
        deliveries=5,
        at=died.timestamp(),
        argsrepr="(7,)",
        kwargsrepr="{}",
        root_id="r",
        size=letter.size,
    )


def test_what_is_no_tasks_has_an_id_all_the_same(rabbit: Celery) -> None:
    """The same each time that it is looked at, and another one for another message."""
    drop(rabbit, {}, {"no": "task"})
    drop(rabbit, {}, {"no": "task's"})
    first, second = ids(rabbit)
    assert first
    assert first != second
    assert ids(rabbit) == [first, second]
    letter = next(Queued(rabbit).walk())
    assert (letter.task, letter.cause, letter.at) == ("", "rejected", 0.0)


def test_the_id_of_what_is_no_tasks_stays_when_it_is_looked_at(rabbit: Celery) -> None:
    """RabbitMQ counts each look."""
    drop(rabbit, {"x-delivery-count": 1}, {"no": "task"})
    drop(rabbit, {"x-delivery-count": 2}, {"no": "task"})
    drop(rabbit, {"of": "another"}, {"no": "task"})
    first, second, third = ids(rabbit)
    assert first == second != third


def test_rabbitmqs_time_is_that_of_no_place(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """py-amqp reads it without a time zone, and whoever looks is in one."""
    died = datetime(2026, 3, 1, 12)  # noqa: DTZ001
    drop(rabbit, {"id": "one", "task": "shop.pay", "x-death": [{"time": died}]})
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        (letter,) = Queued(rabbit).walk()
    time.tzset()
    assert letter.at == 1_772_366_400.0


# -- strange messages ----------------------------------------------------------------------------

OURS: dict[str, Any] = {
    "id": "one",
    "task": "shop.pay",
    "task_id": "one",
    "cause": "failed",
    "error": "ValueError: no",
    "at": 1.0,
}


def kept(about: Any, message: Any = "{}") -> bytes:
    """The body of a letter of ours, or nearly."""
    return json.dumps({"about": about, "message": message}).encode()


ODD_HEADERS = [
    {"retries": "many"},
    {"retries": [1]},
    {"retries": 1e400},
    {"x-delivery-count": "x"},
    {"x-death": "yesterday"},
    {"x-death": {"reason": "rejected"}},
    {"x-death": ["rejected"]},
    {"x-death": [{"routing-keys": 5, "reason": ["rejected"], "time": "noon", "queue": {}}]},
    {"x-death": [{"routing-keys": [{}], "time": 5, "exchange": 7}]},
    {"argsrepr": [7], "kwargsrepr": 7, "root_id": {"r": 1}},
]


@pytest.mark.parametrize("odd", ODD_HEADERS, ids=repr)
def test_headers_of_strange_types_are_left_out(rabbit: Celery, odd: dict[str, Any]) -> None:
    """Whoever published it may have put anything there; its task can be called all the same."""
    drop(rabbit, {"id": "one", "task": "shop.pay", **odd})
    (letter,) = Queued(rabbit).walk()
    assert (letter.id, letter.task, letter.cause) == ("one", "shop.pay", Cause.REJECTED)
    assert (letter.retries, letter.deliveries, letter.at) == (0, 0, 0.0)
    json.dumps(letter.as_dict())
    ((id_, new_id, _),) = replay(rabbit)
    assert id_ == "one"
    assert new_id is not None


UNREADABLE = [
    ({"reliable-dead-letter": "x"}, b"hello", "JSONDecodeError"),
    ({"reliable-dead-letter": "x"}, b"[]", "TypeError"),
    ({"reliable-dead-letter": "x"}, b"\xff", "UnicodeDecodeError"),
    ({"reliable-dead-letter": "x"}, b'{"about": {}}', "KeyError"),
    ({"reliable-dead-letter": "x"}, kept({}), "KeyError"),
    ({"reliable-dead-letter": "x"}, kept([]), "AttributeError"),
    ({"reliable-dead-letter": "x"}, kept({"cause": "failed"}), "TypeError"),
    ({"reliable-dead-letter": "x"}, kept({**OURS, "at": "noon"}), "TypeError: at is 'noon'"),
    ({"reliable-dead-letter": "x"}, kept({**OURS, "at": float("nan")}), "TypeError: at is nan"),
    ({"reliable-dead-letter": "x"}, kept({**OURS, "cause": 7}), "TypeError: cause is 7"),
    ({"reliable-dead-letter": "x"}, kept({**OURS, "error": None}), "TypeError: error is None"),
    ({"reliable-dead-letter": "x"}, b"[" * 20_000, "RecursionError"),
]


@pytest.mark.parametrize(("headers", "body", "why"), UNREADABLE, ids=lambda one: repr(one)[-50:])
def test_what_cannot_be_read_hides_nothing(
    rabbit: Celery, headers: Any, body: bytes, why: str
) -> None:
    """It is listed and removed as all others; it cannot be replayed, and the reason is told."""
    first = bury(rabbit, 1)
    drop(rabbit, headers, body)
    last = bury(rabbit, 2)
    _, odd, _ = letters = list(Queued(rabbit).walk())
    assert [letter.id for letter in letters] == [first, odd.id, last] == ids(rabbit)
    assert (odd.cause, odd.at, odd.size) == (Cause.UNDECODABLE, 0.0, 0)
    assert odd.id
    assert odd.error.startswith("its message cannot be read: ")
    assert why in odd.error
    assert len(odd.error) <= 1_000
    told = replay(rabbit)
    assert [(id_, new_id is None) for id_, new_id, _ in told] == [
        (first, False),
        (odd.id, True),
        (last, False),
    ]
    assert told[1][2] == odd.error
    assert ids(rabbit) == [odd.id]
    assert Queued(rabbit).purge(lambda _: True, lambda _: None) == 1
    assert ids(rabbit) == []


def test_what_kombu_cannot_unpack_hides_nothing(rabbit: Celery) -> None:
    """Its headers can be read, and say whose message it is."""
    death = {"reason": "rejected", "queue": "slow", "routing-keys": ["slow"]}
    headers = {"id": "one", "task": "shop.pay", "x-death": [death], "compression": "zlib"}

    def between() -> tuple[str, str]:
        """Put it between two others."""
        first = bury(rabbit, 1)
        drop(rabbit, headers, b"not packed")
        return first, bury(rabbit, 2)

    between()
    _, odd, _ = Queued(rabbit).walk()
    assert (odd.id, odd.task, odd.queue, odd.cause) == ("one", "shop.pay", "slow", "undecodable")
    assert odd.error.startswith("its message cannot be read: error: ")
    # kombu's own queues in memory, and not RabbitMQ, forget that what comes back is packed.
    Queued(rabbit).purge(lambda _: True, lambda _: None)
    first, last = between()
    told = replay(rabbit)
    assert [(id_, new_id is None) for id_, new_id, _ in told] == [
        (first, False),
        ("one", True),
        (last, False),
    ]
    assert told[1][2] == odd.error
    between()
    assert Queued(rabbit).purge(lambda _: True, lambda _: None) == 4


def test_an_unreadable_one_is_not_taken_for_its_namesake(rabbit: Celery) -> None:
    """The same id twice is the same letter, but not if nobody knows what is in it."""
    drop(rabbit, {"id": "one", "task": "shop.pay"})
    drop(rabbit, {"id": "one", "task": "shop.pay", "compression": "no such"}, b"[]")
    assert [new_id is None for _, new_id, _ in replay(rabbit)] == [False, True]
    assert ids(rabbit) == ["one"]


# -- replaying -----------------------------------------------------------------------------------


def test_letters_are_replayed_in_their_order(rabbit: Celery) -> None:
    """And are gone then; the tasks have new ids, and say of what they are replays."""
    buried = [bury(rabbit, n) for n in range(3)]
    told = replay(rabbit)
    assert [(id_, why) for id_, _, why in told] == [(id_, "") for id_ in buried]
    assert ids(rabbit) == []
    for n, (id_, new_id, _) in enumerate(told):
        message = take(rabbit)
        assert message.headers["id"] == new_id != id_
        assert message.headers["reliable-replay-of"] == id_
        assert message.headers["root_id"] == id_
        assert message.decode()[0] == [n]


def test_what_rabbitmq_dropped_is_replayed_too(rabbit: Celery) -> None:
    """Under a new id, which counts anew."""
    drop(rabbit, {"id": "one", "task": "shop.pay", "x-delivery-count": 5, "x-death": [{}]})
    ((id_, new_id, _),) = replay(rabbit)
    message = take(rabbit)
    assert (id_, message.headers["id"]) == ("one", new_id)
    assert not {"x-death", "x-delivery-count"} & set(message.headers)


def test_only_those_that_are_asked_for(rabbit: Celery) -> None:
    """The others stay in their order."""
    one, two, three = (bury(rabbit, n, argsrepr=f"({n},)") for n in (6, 7, 8))
    assert [id_ for id_, _, _ in replay(rabbit, is_7)] == [two]
    assert ids(rabbit) == [one, three]


def test_only_so_many(rabbit: Celery) -> None:
    """That are sent; those that are refused, or not asked for, do not count."""
    buried = [
        bury(rabbit, 1),
        bury(rabbit, 2, max_body=0, argsrepr="(7,)"),
        bury(rabbit, 3, argsrepr="(7,)"),
        bury(rabbit, 4, argsrepr="(7,)"),
    ]
    assert [(id_, new_id is None) for id_, new_id, _ in replay(rabbit, is_7, limit=2)] == [
        (buried[1], True),
        (buried[2], False),
        (buried[3], False),
    ]
    assert ids(rabbit) == [buried[0], buried[1]]
    assert replay(rabbit, limit=0) == []


def test_a_letter_that_cannot_be_replayed_stays(rabbit: Celery) -> None:
    """The reason is told."""
    large = bury(rabbit, 1, max_body=0)
    small = bury(rabbit, 2)
    (first, second) = replay(rabbit)
    assert first == (
        large,
        None,
        "its message was too large to be kept (reliable_dead_letter_max_body)",
    )
    assert second[0] == small
    assert ids(rabbit) == [large]


def test_a_part_of_a_chord_is_refused(rabbit: Celery) -> None:
    """Without a Redis nobody knows its other parts."""
    pay = rabbit.tasks["shop.pay"]
    rabbit.conf.result_backend = "cache+memory://"
    chord([pay.si(1)], pay.si(2)).apply_async()
    message = take(rabbit)
    drop(rabbit, dict(message.headers), message.decode())
    ((_, new_id, why),) = replay(rabbit)
    assert (new_id, why) == (None, "its chord has counted its failure")
    assert take(rabbit) is None
    assert len(ids(rabbit)) == 1


def test_a_task_that_cannot_be_called_any_more_is_refused(rabbit: Celery) -> None:
    """Its signature has changed since."""
    drop(rabbit, {"id": "one", "task": "shop.pay"}, ([1, 2, 3], {}, {}))
    ((id_, new_id, why),) = replay(rabbit)
    assert (id_, new_id) == ("one", None)
    assert why.startswith("it cannot be called any more: TypeError(")
    assert ids(rabbit) == ["one"]


def test_the_same_letter_twice_is_sent_once(rabbit: Celery) -> None:
    """Its worker kept it, and died before it had acknowledged the message."""
    id_ = bury(rabbit, 1)
    bury(rabbit, 1, task_id=id_)
    first, second = replay(rabbit)
    assert first == second
    assert take(rabbit) is not None
    assert take(rabbit) is None
    assert ids(rabbit) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"x-delivery-count": 2, "x-acquired-count": 3},
        {"x-death": [{"reason": "delivery_limit"}], "x-first-death-queue": "celery"},
        {"redelivered": True, "crashes": 1, "reliable_set_aside": 2, "reliable_requeues": 1},
    ],
    ids=["counted", "dropped", "by its worker"],
)
def test_the_same_letter_twice_is_known_by_its_message(rabbit: Celery, headers: Any) -> None:
    """Of which each delivery adds something of its own."""
    id_ = bury(rabbit, 1)
    bury(rabbit, 1, task_id=id_, headers=headers)
    first, second = replay(rabbit)
    assert first == second
    assert take(rabbit) is not None
    assert take(rabbit) is None


def test_two_calls_with_one_id_are_two_letters(rabbit: Celery) -> None:
    """Callers may have ids of their own, the same each day: none of them is lost."""
    drop(rabbit, {"id": "report", "task": "shop.pay"}, ([1], {}, {}))
    for n in (2, 3):
        bury(rabbit, n, task_id="report")
    told = replay(rabbit)
    assert [(id_, why) for id_, _, why in told] == [("report", "")] * 3
    assert len({new_id for _, new_id, _ in told}) == 3
    messages = [take(rabbit) for _ in told]
    assert [message.decode()[0] for message in messages] == [[1], [2], [3]]
    assert [message.headers["id"] for message in messages] == [new_id for _, new_id, _ in told]
    assert ids(rabbit) == []


def test_headers_that_nobody_of_ours_writes_can_be_replayed(rabbit: Celery) -> None:
    """They can be read as some."""
    rabbit.tasks["shop.pay"].delay(1)
    message = json.loads(raw_of(take(rabbit)))
    message["headers"] = [["task", "shop.pay"], ["id", "one"]]
    drop(rabbit, {"reliable-dead-letter": "x"}, kept(OURS, json.dumps(message)))
    last = bury(rabbit, 2)
    told = replay(rabbit)
    assert [(id_, why) for id_, _, why in told] == [(OURS["id"], ""), (last, "")]


def test_a_letter_that_was_not_taken_away_has_the_same_new_id(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends it again sends a copy, of which one runs."""
    bury(rabbit, 1)
    with monkeypatch.context() as patch:
        patch.setattr(memory.Channel, "basic_ack", lambda *args, **options: None)
        ((_, first, _),) = replay(rabbit)
    assert first is not None
    messages = [take(rabbit)]
    bury(rabbit, 1, task_id=messages[0].headers["reliable-replay-of"])
    ((_, second, _),) = replay(rabbit)
    messages.append(take(rabbit))
    assert first == second == messages[0].headers["id"] == messages[1].headers["id"]
    assert all(message.headers["reliable_copy"] for message in messages)


def test_where_the_broker_goes_away_the_rest_stays(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken away that was not sent."""
    buried = [bury(rabbit, n) for n in range(3)]
    pay = rabbit.tasks["shop.pay"]
    send = pay.apply_async

    def send_one(args: Any, *more: Any, **options: Any) -> Any:
        if args != [0]:
            raise OperationalError("away")
        return send(args, *more, **options)

    monkeypatch.setattr(pay, "apply_async", send_one)
    with pytest.raises(OperationalError, match="away"):
        replay(rabbit)
    assert ids(rabbit) == buried[1:]


def test_a_replay_is_told_to_who_listens(rabbit: Celery) -> None:
    """With the letter and the new id."""
    told: list[Any] = []

    def receive(sender: Any, letter: DeadLetter, task_id: str, **_: Any) -> None:
        told.append((sender, letter.id, task_id))

    dead_letter_replayed.connect(receive)
    id_ = bury(rabbit, 7)
    ((_, new_id, _),) = replay(rabbit)
    assert told == [(rabbit.tasks["shop.pay"], id_, new_id)]


@pytest.mark.parametrize("queue", [None, "other"])
def test_they_go_to_the_queue_that_is_named(rabbit: Celery, queue: str | None) -> None:
    """By default to that which they came by."""
    bury(rabbit, 7)
    replay(rabbit, queue=queue)
    assert (take(rabbit) is None) is (queue == "other")


@pytest.mark.parametrize(("rate", "slept"), [(4.0, [0.0, 0.25, 0.25]), (None, [])])
def test_they_are_not_sent_faster_than_asked(
    rabbit: Celery, monkeypatch: pytest.MonkeyPatch, rate: float | None, slept: list[float]
) -> None:
    """The workers may have more to do."""
    waits: list[float] = []
    for n in range(3):
        bury(rabbit, n)
    now = [50.0]

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert len(replay(rabbit, pace=Pace(rate))) == 3
    assert waits == slept


def test_after_a_pause_no_more_are_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate is not made up for."""
    now = [0.0]
    waits: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", waits.append)
    pace = Pace(2.0)
    pace.wait()
    now[0] = 60.0
    pace.wait()
    pace.wait()
    assert waits == [0.0, 0.0, 0.5]


# -- only saying what would be sent --------------------------------------------------------------


def check(app: Celery, matches: Any = lambda letter: True, limit: int | None = None) -> Told:
    """Check letters; return what was told of each."""
    told: Told = []
    Queued(app).check(matches, lambda letter, why: told.append((letter.id, None, why)), limit=limit)
    return told


def test_it_is_said_what_would_be_replayed(rabbit: Celery) -> None:
    """With the reasons for which others would not; nothing is sent, and all stay."""
    rabbit.conf.result_backend = "cache+memory://"
    pay = rabbit.tasks["shop.pay"]
    buried = [bury(rabbit, 1), bury(rabbit, 2, max_body=0), bury(rabbit, 3, chord_id="c")]
    chord([pay.si(1)], pay.si(2)).apply_async()
    message = take(rabbit)
    drop(rabbit, {**message.headers, "id": "part", "x-death": [{"reason": "expired"}]}, b"no JSON")
    drop(rabbit, {**message.headers, "id": "whole"}, message.decode())
    expired = {**message.headers, "id": "expired", "x-death": [{"reason": "expired"}]}
    drop(rabbit, expired, message.decode())
    checked = check(rabbit)
    assert [id_ for id_, _, _ in checked] == [*buried, "part", "whole", "expired"] == ids(rabbit)
    assert take(rabbit) is None
    assert checked[0][2] == ""
    assert all(why for _, _, why in checked[1:])
    told = replay(rabbit)
    assert [(id_, why) for id_, _, why in told] == [(id_, why) for id_, _, why in checked]


def test_only_those_are_checked_that_are_asked_for(rabbit: Celery) -> None:
    """And only so many."""
    one, two, three = (bury(rabbit, n, argsrepr="(7,)" if n else "") for n in range(3))
    assert check(rabbit, is_7) == [(two, None, ""), (three, None, "")]
    assert check(rabbit, is_7, limit=1) == [(two, None, "")]
    assert check(rabbit, limit=0) == []
    assert ids(rabbit) == [one, two, three]


def test_the_same_letter_twice_would_be_sent_once(rabbit: Celery) -> None:
    """Both would be gone."""
    id_ = bury(rabbit, 1)
    bury(rabbit, 1, task_id=id_)
    assert check(rabbit) == [(id_, None, ""), (id_, None, "")]


# -- removing ------------------------------------------------------------------------------------


def test_letters_are_removed_for_good(rabbit: Celery) -> None:
    """Those that are asked for, each of which is told; the others stay in their order."""
    one, two, three = (bury(rabbit, n, argsrepr=f"({n},)") for n in (6, 7, 8))
    told: list[str] = []
    assert Queued(rabbit).purge(is_7, lambda letter: told.append(letter.id)) == 1
    assert told == [two]
    assert ids(rabbit) == [one, three]
    assert Queued(rabbit).purge(lambda _: True, lambda _: None) == 2
    assert ids(rabbit) == []


def test_what_is_kept_of_a_message_of_any_bytes(rabbit: Celery) -> None:
    """The queue's own messages are JSON, which has text alone."""
    bury_in_queue(rabbit, ANY)
    (letter,) = Queued(rabbit).walk()
    assert (letter.id, letter.size) == ("x", 3)
    ((_, new_id, why),) = replay(rabbit)
    assert new_id is None
    assert why.startswith("its message cannot be read")
