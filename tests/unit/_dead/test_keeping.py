"""Dead letters are kept, or said in the log with all that there is; and crashes are told."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from amqp.exceptions import NotFound
from celery import Celery
from kombu.exceptions import OperationalError

from reliable_tasks._dead import keeping
from reliable_tasks._dead.keeping import bury, keep_part, note_chord, tell_crash
from reliable_tasks._dead.queue import Queued
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter


class Sender:
    """Stands for a task."""

    name = "shop.pay"


TASK = Sender()


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be long ago that somebody was warned of many."""
    monkeypatch.setattr(keeping, "_said_at", -1e9)
    monkeypatch.setattr(keeping, "_silent_until", 0.0)


@pytest.fixture
def without_redis() -> Iterator[Celery]:
    """An app whose broker and backend keep nothing."""
    with Celery("shop", broker="memory://", set_as_current=False) as app:
        yield app


def letter(id_: str = "one", *, message: bytes = b"the message", **bounds: Any) -> Letter:
    """A letter that is to be kept."""
    about = DeadLetter(
        id=id_, task="shop.pay", task_id=id_, cause=Cause.FAILED, error="ValueError: " + "x" * 500
    )
    known = {"max_age": 60.0, "max_count": 100, "max_body": 1000, **bounds}
    return Letter(about, message, Bounds(**known))


def letters(app: Celery) -> list[DeadLetter]:
    """Those that are kept, the oldest first."""
    place = dead_place(app)
    assert place is not None
    found = place.store.walk(place.server, task=None, cause=None, since=None, oldest_first=True)
    return list(found)


def go_away(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the Redis not answer any more."""

    def away(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("away")

    for name in names:
        monkeypatch.setattr(DeadStore, name, away)


def at(level: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of a level."""
    return [one.getMessage() for one in caplog.records if one.levelname == level]


# -- keeping -------------------------------------------------------------------------------------


def test_a_letter_is_kept_and_told(
    app: Celery, heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In the log as an error, and to who listens as it is kept."""
    assert bury(app, TASK, letter(), "event")
    (kept,) = letters(app)
    ((name, sender, told),) = heard
    assert (name, sender) == ("dead_letter_kept", TASK)
    assert (told["letter"].id, told["letter"].size) == (kept.id, kept.size) == ("one", 11)
    (line,) = at("ERROR", caplog)
    assert line == (
        "Task shop.pay[one] will not run again by itself "
        f"(failed: ValueError: {'x' * 188}); it is dead letter one"
    )
    assert len(caplog.records) == 1


def test_the_same_event_is_one_letter(app: Celery) -> None:
    """It is kept again where nobody knows whether it was; another event is another letter."""
    for event in ("event", "event", "another"):
        assert bury(app, TASK, letter(), event)
    assert len(letters(app)) == 2


def test_a_message_that_is_too_large_is_told(
    app: Celery, heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The line names its size and the setting; the letter is kept without it."""
    assert bury(app, TASK, letter(max_body=10), "event")
    (kept,) = letters(app)
    assert kept.size == heard[0][2]["letter"].size == 0
    assert at("ERROR", caplog)[1] == (
        "The message of dead letter one is not kept, for it has 11 bytes "
        "(reliable_dead_letter_max_body is 10): it cannot be replayed"
    )


def test_a_message_without_a_task_is_told_as_one(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """It has neither a name nor an id."""
    about = DeadLetter(id="d", task="", task_id="", cause=Cause.UNDECODABLE, error="no json")
    assert bury(app, None, Letter(about, b"x", Bounds(60, 10, 10)), "event")
    assert at("ERROR", caplog) == [
        "Task ?[?] will not run again by itself (undecodable: no json); it is dead letter d"
    ]


def test_without_a_redis_rabbitmq_keeps_it(rabbit: Celery, heard: list[Any]) -> None:
    """In a queue of its own."""
    assert bury(rabbit, TASK, letter(), "event")
    (kept,) = Queued(rabbit).walk()
    assert (kept.id, kept.cause) == ("one", "failed")
    assert [name for name, _, _ in heard] == ["dead_letter_kept"]


def test_where_nothing_keeps_it_the_log_has_it(
    without_redis: Celery, heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With its whole message, for there is no other trace of it."""
    assert not bury(without_redis, TASK, letter(), "event")
    (line,) = at("CRITICAL", caplog)
    assert line == (
        "Task shop.pay[one] will not run again, and cannot be kept as a dead letter "
        "(no Redis is configured): b'the message'"
    )
    assert heard == []


def test_where_the_redis_is_away_the_log_has_it(
    app: Celery, heard: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no error of whoever ends a task."""
    go_away(monkeypatch, "bury")
    assert not bury(app, TASK, letter(), "event")
    (line,) = at("CRITICAL", caplog)
    assert "cannot be kept as a dead letter (away): b'the message'" in line
    assert heard == []


@pytest.mark.parametrize("error", [OperationalError("no"), NotFound("no"), AttributeError("no")])
def test_where_rabbitmq_does_not_keep_it_the_log_has_it(
    rabbit: Celery,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """The worker goes on, whatever its client raises."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(keeping, "bury_in_queue", refuse)
    assert not bury(rabbit, TASK, letter(), "event")
    (line,) = at("CRITICAL", caplog)
    assert line.endswith(f"({error}): b'the message'")


# -- how many there are --------------------------------------------------------------------------


def test_when_there_are_many_somebody_is_warned(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From four fifths on, each ten minutes: there is time left to do something."""
    now = [100_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keeping, "_said_at", -600.0)

    def warned_after(seconds: float) -> list[str]:
        now[0] += seconds
        caplog.clear()
        assert bury(app, TASK, letter(max_count=10), f"event {now[0]}")
        return at("WARNING", caplog)

    for _ in range(7):
        assert warned_after(1) == []
    (line,) = warned_after(1)
    assert line == (
        "There are 8 dead letters, and may be 10 (reliable_dead_letter_max_count): replay or "
        "discard some, or the oldest are dropped"
    )
    assert warned_after(599) == []
    assert warned_after(1)[0].startswith("There are 10 dead letters, and may be 10")


def test_one_too_many_drops_the_oldest(app: Celery, heard: list[Any]) -> None:
    """At once, and it is told; the newest stays."""
    for number in range(4):
        assert bury(app, TASK, letter(f"t{number}", max_count=3), f"event {number}")
    assert len(letters(app)) == 3
    assert "t3" in [one.id for one in letters(app)]
    assert [told for name, _, told in heard if name == "dead_letters_dropped"] == [
        {"count": 1, "reason": "count"}
    ]


def test_where_none_can_be_dropped_it_is_said(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The letter is kept all the same."""
    assert bury(app, TASK, letter("one", max_count=1), "event")
    go_away(monkeypatch, "prune")
    caplog.clear()
    assert bury(app, TASK, letter("two", max_count=1), "another")
    assert len(letters(app)) == 2
    assert "There are too many dead letters, and none can be dropped: away" in caplog.text


def test_without_a_redis_none_is_dropped(
    without_redis: Celery, heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The count that was told was another server's."""
    keeping.tell_buried(without_redis, None, letter(max_count=1), "one", 2)
    assert [name for name, _, _ in heard] == ["dead_letter_kept"]
    assert "none can be dropped" not in caplog.text


# -- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crashes", "limit", "how", "text"),
    [
        (2, 3, "exitcode 3", "has crashed (2 of 3 times): on w@h, process 7 (exitcode 3)"),
        (2, None, "exitcode 3", "has crashed (2 times): on w@h, process 7 (exitcode 3)"),
        (None, 3, "exitcode 3", "has crashed: on w@h, process 7 (exitcode 3)"),
        (1, 3, "", "has crashed (1 of 3 times): on w@h, process 7, whose end nobody saw"),
    ],
)
def test_a_crash_is_told(
    heard: list[Any],
    caplog: pytest.LogCaptureFixture,
    crashes: int | None,
    limit: int | None,
    how: str,
    text: str,
) -> None:
    """How often by now, of how often it may, and what is known of its end."""
    crash = {"host": "w@h", "pid": 7, "how": how, "at": 5.0}
    tell_crash(TASK, "one", crashes, limit, crash)
    assert at("WARNING", caplog) == [f"Task shop.pay[one] {text}"]
    told = {"task_id": "one", "crashes": crashes, "limit": limit, **crash}
    assert heard == [("task_crashed", TASK, told)]


# -- chords --------------------------------------------------------------------------------------


def request(task_id: str, group: str | None, raw: bytes | None = b"held") -> Any:
    """A request whose task has succeeded."""
    message = SimpleNamespace(
        body=b"[]",
        content_type="application/json",
        content_encoding="utf-8",
        headers={},
        properties={},
        delivery_info={},
    )
    held = None if raw is None else SimpleNamespace(raw=raw)
    return SimpleNamespace(
        id=task_id, request_dict={"group": group}, _delivery=held, message=message
    )


def parts(app: Celery, group: str = "g") -> tuple[int, dict[str, bytes]]:
    """What is kept of a chord."""
    place = dead_place(app)
    assert place is not None
    return place.store.parts(place.server, group)


def test_the_parts_of_a_chord_are_kept_while_another_one_may_die(app: Celery) -> None:
    """As the broker had them, or written anew; when all have succeeded they are gone."""
    note_chord(app, "g", 3)
    keep_part(app, request("one", "g"))
    assert parts(app) == (3, {"one": b"held"})
    keep_part(app, request("two", "g", raw=None))
    assert b'"body": "W10="' in parts(app)[1]["two"]
    keep_part(app, request("three", "g", raw=b""))
    assert parts(app) == (0, {})


@pytest.mark.parametrize("group", [None, ""])
def test_what_is_no_part_of_a_group_is_not_kept(app: Celery, group: str | None) -> None:
    """It is replayed alone."""
    keep_part(app, request("one", group))
    place = dead_place(app)
    assert place is not None
    assert place.server.keys("*") == []


def test_without_a_redis_no_chord_is_kept(
    without_redis: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of one cannot be replayed there, and a task that ends does not fail for it."""
    keep_part(without_redis, request("one", "g"))
    note_chord(without_redis, "g", 2)
    assert caplog.records == []


def test_a_chord_that_cannot_be_kept_is_said(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is wrong with it: the call and the end of a part go on."""
    caplog.set_level(logging.WARNING, logger="reliable_tasks")
    monkeypatch.setattr(keeping, "_silent_until", 0.0)
    with monkeypatch.context() as away:
        go_away(away, "note_chord", "keep_part")
        note_chord(app, "g", 2)
        keep_part(app, request("one", "g"))
    line = "Chord g, and others of the next 5 s, cannot be replayed as a whole: away"
    # No task waits for it again soon.
    assert at("WARNING", caplog) == [line]
    keep_part(app, request("one", "g"))
    assert parts(app) == (0, {})
    monkeypatch.setattr(keeping, "_silent_until", 0.0)
    keep_part(app, request("one", "g"))
    assert parts(app) == (0, {"one": b"held"})
