"""``reliable_tasks.dead_letters``: what can be asked, with a Redis and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis
import time_machine
from celery import Celery, current_app

from reliable_tasks import ReliableTask, dead_letters
from reliable_tasks._dead.letters import raw_of
from reliable_tasks._dead.queue import bury_in_queue
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from reliable_tasks.errors import (
    DeadLetterError,
    DeadLetterNotFound,
    ReplayRefused,
    StoreError,
    StoreUnavailable,
)
from tests.unit.harness import take

#: Sunday noon, in 2026.
NOON = 1_772_366_400.0
BOUNDS = Bounds(3600, 1000, 10_000)


@pytest.fixture(autouse=True)
def clock() -> Iterator[time_machine.Traveller]:
    """The clock of the Redis."""
    with time_machine.travel(NOON, tick=False) as traveller:
        yield traveller


@pytest.fixture
def bury(clock: time_machine.Traveller) -> Any:
    """Keep a letter, a second after the one before; its id is returned."""

    def bury(app: Celery, id_: str, *, max_body: int = 10_000, **about: Any) -> str:
        clock.shift(1)
        if "shop.pay" not in app.tasks:

            @app.task(base=ReliableTask, name="shop.pay", shared=False)
            def pay(n: int = 0) -> int:
                return n

        app.tasks["shop.pay"].apply_async((7,), task_id=id_)
        known: dict[str, Any] = {
            "task": "shop.pay",
            "task_id": id_,
            "cause": Cause.FAILED,
            "error": "ValueError: no",
            **about,
        }
        bounds = Bounds(BOUNDS.max_age, BOUNDS.max_count, max_body)
        letter = Letter(DeadLetter(id=id_, **known), raw_of(take(app)), bounds)
        place = dead_place(app)
        if place is None:
            bury_in_queue(app, letter)
        else:
            place.store.bury(place.server, letter, uuid4().hex)
        return id_

    return bury


@pytest.fixture(params=["with a Redis", "with RabbitMQ alone"])
def both(request: pytest.FixtureRequest, app: Celery) -> Celery:
    """An app of either kind: what is asked has the same answers."""
    if request.param == "with a Redis":
        return app
    found: Celery = request.getfixturevalue("rabbit")
    return found


def ids(app: Celery, **filters: Any) -> list[str]:
    """The ids of letters, the oldest first."""
    return [one.id for one in dead_letters.list(oldest_first=True, app=app, **filters)]


def sent(app: Celery) -> list[str]:
    """The ids of the tasks in the queue."""
    found = []
    while (message := take(app)) is not None:
        found.append(message.headers["id"])
    return found


# -- with a Redis and without --------------------------------------------------------------------


def test_letters_are_listed_and_counted(both: Celery, bury: Any) -> None:
    """In the order in which they were kept."""
    assert (dead_letters.count(app=both), ids(both)) == (0, [])
    for id_ in ("one", "two", "three"):
        bury(both, id_)
    assert dead_letters.count(app=both) == 3
    assert ids(both) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"task": "shop.other"}, ["two"]),
        ({"cause": "poison"}, ["three"]),
        ({"cause": Cause.POISON, "task": "shop.other"}, []),
        ({"since": 1}, ["two", "three"]),
        ({"since": timedelta(seconds=0)}, ["three"]),
        ({"before": 1}, ["one"]),
        ({"limit": 2}, ["one", "two"]),
        ({"limit": 0}, []),
        ({"limit": 1, "cause": "failed", "since": 1}, ["two"]),
    ],
)
def test_letters_are_found_by_what_they_are(
    both: Celery, bury: Any, filters: dict[str, Any], found: list[str]
) -> None:
    """By task, cause and time, and only so many."""
    bury(both, "one")
    bury(both, "two", task="shop.other")
    bury(both, "three", cause=Cause.POISON)
    assert ids(both, **filters) == found


@pytest.mark.parametrize("function", ["count", "list", "replay_all", "purge"])
def test_a_cause_that_does_not_exist_is_refused(both: Celery, function: str) -> None:
    """At once, and not when the first letter is read."""
    with pytest.raises(ValueError, match=r"cause = 'posion'; did you mean 'poison'"):
        getattr(dead_letters, function)(cause="posion", app=both)


def test_what_is_raised_where_it_is_told_is_not_a_refusal(app: Celery, bury: Any) -> None:
    """Of a letter that was sent."""
    bury(app, "one")

    def tell(letter: Any, new_id: str | None, reason: str) -> None:
        raise ReplayRefused(letter.id, "mine")

    with pytest.raises(ReplayRefused, match="mine"):
        dead_letters.replay_all(on_each=tell, app=app)
    assert dead_letters.get("one", app=app).replayed_as


@pytest.mark.parametrize("before", [None, -3600])
@pytest.mark.parametrize("do", [dead_letters.replay_all, dead_letters.purge])
def test_what_comes_meanwhile_is_not_among_them(
    app: Celery, bury: Any, do: Any, before: float | None
) -> None:
    """Also where it is asked for until later: it would never end."""
    for number in range(250):
        bury(app, f"letter-{number}")
    seen: list[str] = []

    def bury_another(letter: Any, *_: Any) -> None:
        assert len(seen) < 300
        seen.append(letter.id)
        time.sleep(0.002 if len(seen) < 3 else 0)
        bury(app, f"another-{len(seen)}")

    do(before=before, on_each=bury_another, app=app)
    assert len(seen) == 250


def test_a_limit_below_zero_is_refused(both: Celery) -> None:
    """At once."""
    with pytest.raises(ValueError, match=r"limit = -1: give a number of dead letters, 0 or more"):
        dead_letters.list(limit=-1, app=both)
    with pytest.raises(ValueError, match=r"limit = -1: give a number of dead letters, 0 or more"):
        dead_letters.replay_all(limit=-1, app=both)


@pytest.mark.parametrize("rate", [0, -1, -0.5, float("nan")])
def test_a_rate_that_is_none_is_refused(both: Celery, bury: Any, rate: float) -> None:
    """Nothing is sent."""
    bury(both, "one")
    with pytest.raises(ValueError, match=f"rate = {rate}: give a number of dead letters per"):
        dead_letters.replay_all(rate=rate, app=both)
    assert sent(both) == []


def test_all_are_replayed(both: Celery, bury: Any) -> None:
    """The oldest first; those that cannot be are named with the reason, and stay."""
    bury(both, "one")
    bury(both, "large", max_body=10)
    bury(both, "two")
    told: list[tuple[str, str | None, str]] = []
    outcome = dead_letters.replay_all(
        on_each=lambda letter, new_id, why: told.append((letter.id, new_id, why)), app=both
    )
    reason = "its message was too large to be kept (reliable_dead_letter_max_body)"
    assert list(outcome.sent) == ["one", "two"]
    assert outcome.refused == {"large": reason}
    assert told == [
        ("one", outcome.sent["one"], ""),
        ("large", None, reason),
        ("two", outcome.sent["two"], ""),
    ]
    assert sent(both) == list(outcome.sent.values())
    assert ids(both) == ["large"]


ASKED_FOR: list[tuple[dict[str, Any], list[str]]] = [
    ({"task": "shop.other"}, ["two"]),
    ({"where": lambda letter: letter.id > "p"}, ["two", "three"]),
    ({"where": lambda letter: letter.id > "p", "cause": "poison"}, ["three"]),
    ({"before": 1}, ["one"]),
    ({"since": 1}, ["two", "three"]),
]


@pytest.mark.parametrize(("filters", "found"), [*ASKED_FOR, ({"limit": 2}, ["one", "two"])])
def test_those_that_are_asked_for_are_replayed(
    both: Celery, bury: Any, filters: dict[str, Any], found: list[str]
) -> None:
    """The others stay."""
    bury(both, "one")
    bury(both, "two", task="shop.other")
    bury(both, "three", cause=Cause.POISON)
    assert list(dead_letters.replay_all(**filters, app=both).sent) == found
    assert ids(both) == [id_ for id_ in ("one", "two", "three") if id_ not in found]


@pytest.mark.parametrize(("filters", "found"), ASKED_FOR)
def test_those_that_are_asked_for_are_removed(
    both: Celery, bury: Any, filters: dict[str, Any], found: list[str]
) -> None:
    """Each of them is told; the others stay."""
    bury(both, "one")
    bury(both, "two", task="shop.other")
    bury(both, "three", cause=Cause.POISON)
    told: list[str] = []
    number = dead_letters.purge(**filters, on_each=lambda letter: told.append(letter.id), app=both)
    assert (number, told) == (len(found), found)
    assert ids(both) == [id_ for id_ in ("one", "two", "three") if id_ not in found]


def test_all_are_removed(both: Celery, bury: Any) -> None:
    """Without anybody who is told of each."""
    bury(both, "one")
    bury(both, "two")
    assert dead_letters.purge(app=both) == 2
    assert dead_letters.purge(app=both) == 0
    assert ids(both) == []


@pytest.mark.parametrize("function", ["list", "replay_all", "purge"])
def test_a_cause_of_a_newer_version_is_its_name(both: Celery, bury: Any, function: str) -> None:
    """While a fleet is upgraded; it is shown, replayed and removed as all others are."""
    bury(both, "one", cause="of the future")
    bury(both, "two")
    if function == "list":
        found = {one.id: one.cause for one in dead_letters.list(app=both)}
        assert found == {"one": "of the future", "two": "failed"}
        assert found["two"] is Cause.FAILED
        assert ids(both, cause="failed") == ["two"]
    else:
        getattr(dead_letters, function)(app=both)
        assert ids(both) == []


# -- with a Redis --------------------------------------------------------------------------------


def test_the_current_app_is_meant_where_none_is_named(app: Celery, bury: Any) -> None:
    """Also where somebody gives the proxy of it."""
    bury(app, "one")
    app.set_current()
    assert dead_letters.count() == dead_letters.count(app=current_app) == 1
    assert dead_letters.get("one").id == "one"


def test_the_newest_is_the_first(app: Celery, bury: Any) -> None:
    """Unless it is asked for the other way round."""
    bury(app, "one")
    bury(app, "two")
    assert [one.id for one in dead_letters.list(app=app)] == ["two", "one"]
    assert [one.id for one in dead_letters.list(limit=1, app=app)] == ["two"]


@pytest.mark.parametrize(
    ("filters", "number"),
    [({}, 3), ({"task": "shop.other"}, 1), ({"since": 1}, 2), ({"before": 1, "cause": "lost"}, 0)],
)
def test_some_are_counted(app: Celery, bury: Any, filters: dict[str, Any], number: int) -> None:
    """As they are listed."""
    bury(app, "one")
    bury(app, "two", task="shop.other")
    bury(app, "three", cause=Cause.LOST)
    assert dead_letters.count(**filters, app=app) == number


def test_one_is_read_with_its_traceback(app: Celery, bury: Any) -> None:
    """And its message, if that is asked for."""
    bury(app, "one", traceback="Traceback")
    assert dead_letters.get("one", app=app).traceback == "Traceback"
    assert '"task": "shop.pay"' in dead_letters.message("one", app=app)


def test_one_that_was_replayed_is_said_to_be(app: Celery, bury: Any) -> None:
    """Nothing is checked any more, and nothing sent."""
    bury(app, "one")
    assert dead_letters.check("one", app=app).replayed_as is None
    new_id = dead_letters.replay("one", app=app)
    assert dead_letters.check("one", app=app).replayed_as == new_id
    assert [one.replayed_as for one in dead_letters.list(replayed=True, app=app)] == [new_id]
    assert dead_letters.count(app=app) == 0


def test_one_that_cannot_be_replayed_is_said_to_be(app: Celery, bury: Any) -> None:
    """Without sending anything."""
    bury(app, "large", max_body=10)
    with pytest.raises(ReplayRefused, match="too large"):
        dead_letters.check("large", app=app)


def test_one_is_discarded(app: Celery, bury: Any) -> None:
    """For good."""
    bury(app, "one")
    dead_letters.discard("one", app=app)
    with pytest.raises(DeadLetterNotFound):
        dead_letters.get("one", app=app)


@pytest.mark.parametrize("function", ["get", "message", "replay", "check", "discard"])
def test_one_that_is_not_there_is_not_found(app: Celery, function: str) -> None:
    """The error is a LookupError, too, and names it."""
    with pytest.raises(LookupError) as caught:
        getattr(dead_letters, function)("gone", app=app)
    assert isinstance(caught.value, DeadLetterNotFound)
    assert caught.value.id == "gone"


@pytest.mark.parametrize("does", ["replay_all", "purge"])
def test_those_that_come_meanwhile_are_left(
    app: Celery, bury: Any, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a task that dies at once would be replayed for ever."""
    monkeypatch.setattr(dead_letters, "_PAGE", 1)
    bury(app, "one")
    came: list[str] = []

    def where(letter: DeadLetter) -> bool:
        assert len(came) < 5, "it goes on for ever"
        came.append(bury(app, f"new {len(came)}"))
        return True

    getattr(dead_letters, does)(where, app=app)
    assert ids(app) == came == ["new 0"]


def test_one_that_goes_meanwhile_is_named(app: Celery, bury: Any) -> None:
    """Somebody else has removed it."""
    bury(app, "one")
    bury(app, "two")

    def where(letter: DeadLetter) -> bool:
        if letter.id == "one":
            dead_letters.discard("one", app=app)
        return True

    outcome = dead_letters.replay_all(where, app=app)
    assert outcome.refused == {"one": "there is no dead letter one"}
    assert list(outcome.sent) == ["two"]


def test_those_that_were_replayed_are_removed_on_their_own(app: Celery, bury: Any) -> None:
    """The others stay."""
    bury(app, "one")
    bury(app, "two")
    dead_letters.replay("one", app=app)
    assert dead_letters.purge(replayed=True, app=app) == 1
    assert ids(app) == ["two"]
    assert ids(app, replayed=True) == []


def test_many_are_removed_some_at_a_time(
    app: Celery, bury: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that Redis is blocked for nobody; each is told when it is gone."""
    monkeypatch.setattr(dead_letters, "_REMOVED_AT_ONCE", 2)
    for n in range(5):
        bury(app, f"t{n}")
    left: list[int] = []
    assert dead_letters.purge(on_each=lambda _: left.append(len(ids(app))), app=app) == 5
    assert left == [3, 3, 1, 1, 0]


def test_they_are_not_sent_faster_than_asked(
    app: Celery, bury: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers may have more to do."""
    for n in range(3):
        bury(app, f"t{n}")
    now, slept = [50.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert len(dead_letters.replay_all(rate=4, app=app).sent) == 3
    assert slept == [0.0, 0.25, 0.25]


def asks(app: Celery) -> list[Any]:
    """Everything that can be asked."""
    return [
        lambda: dead_letters.count(app=app),
        lambda: list(dead_letters.list(app=app)),
        lambda: dead_letters.get("one", app=app),
        lambda: dead_letters.message("one", app=app),
        lambda: dead_letters.check("one", app=app),
        lambda: dead_letters.replay("one", app=app),
        lambda: dead_letters.discard("one", app=app),
        lambda: dead_letters.replay_all(app=app),
        lambda: dead_letters.purge(app=app),
    ]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (redis.ConnectionError("gone"), StoreUnavailable, r"redis://fake/0.*gone"),
        (redis.TimeoutError("slow"), StoreUnavailable, r"redis://fake/0.*slow"),
        (OSError("no route"), StoreUnavailable, r"redis://fake/0.*no route"),
        (redis.ResponseError("WRONGTYPE"), StoreError, "refused: WRONGTYPE"),
    ],
    ids=repr,
)
def test_a_redis_that_does_not_answer_is_an_error_of_this_library(
    app: Celery, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: Any, text: str
) -> None:
    """Whatever is asked; it names the server, or what that has said."""

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    for name in ("count", "walk", "get", "discard", "now"):
        monkeypatch.setattr(DeadStore, name, fail)
    for ask in asks(app):
        with pytest.raises(kind, match=text) as caught:
            ask()
        assert caught.value.__cause__ is error


def test_an_app_without_any_place_is_told_what_to_set() -> None:
    """Whatever is asked."""
    with Celery("shop", broker="memory://", set_as_current=False) as app:
        for ask in asks(app):
            with pytest.raises(DeadLetterError, match=r"no Redis for .*: set reliable_redis_url"):
                ask()


# -- without a Redis -----------------------------------------------------------------------------


def test_without_a_redis_none_is_found_by_its_id(rabbit: Celery, bury: Any) -> None:
    """The error says what can be done, and what to set."""
    bury(rabbit, "one")
    for function in ("get", "message", "replay", "check", "discard"):
        with pytest.raises(DeadLetterError, match=r"in the queue reliable\.dead.*set reliable_red"):
            getattr(dead_letters, function)("one", app=rabbit)
    assert ids(rabbit) == ["one"]


def test_without_a_redis_all_are_counted_or_none(rabbit: Celery, bury: Any) -> None:
    """The queue knows its length, and no more."""
    bury(rabbit, "one")
    with pytest.raises(DeadLetterError, match="there all are counted, or none"):
        dead_letters.count(task="shop.pay", app=rabbit)


def test_without_a_redis_nothing_is_known_of_replays(rabbit: Celery, bury: Any) -> None:
    """What was sent is gone from the queue."""
    bury(rabbit, "one")
    with pytest.raises(DeadLetterError, match="what was replayed is not kept there"):
        list(dead_letters.list(replayed=True, app=rabbit))
    with pytest.raises(DeadLetterError, match="what was replayed is not kept there"):
        dead_letters.purge(replayed=True, app=rabbit)
    assert ids(rabbit) == ["one"]


# -- from a result -------------------------------------------------------------------------------


def test_a_result_knows_the_task_in_its_place(app: Celery, bury: Any) -> None:
    """Once its dead letter was replayed, and as long as that is there."""
    bury(app, "one")
    result = app.tasks["shop.pay"].AsyncResult("one")
    assert result.replayed_id is None
    new_id = dead_letters.replay("one", app=app)
    assert result.replayed_id == new_id
    dead_letters.discard("one", app=app)
    assert result.replayed_id is None


def test_a_result_without_a_redis_knows_none(rabbit: Celery, bury: Any) -> None:
    """It is no error to ask."""
    bury(rabbit, "one")
    assert rabbit.tasks["shop.pay"].AsyncResult("one").replayed_id is None
