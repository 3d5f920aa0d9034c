"""``celery -A proj reliable dead``."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import click
import pytest
import redis
import time_machine
from celery import Celery
from celery.signals import import_modules
from click.testing import CliRunner, Result
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask, dead_letters, once
from reliable_tasks._cli import output, reliable
from reliable_tasks._cli.dead import _moment
from reliable_tasks._dead.queue import bury_in_queue
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from reliable_tasks.errors import DeadLetterError, StoreUnavailable
from tests.conformance.broker import message
from tests.unit.harness import take

Invoke = Callable[..., Result]
Bury = Callable[..., str]

#: Sunday noon, in 2026.
NOON = 1_772_366_400
BOUNDS = Bounds(max_age=90 * 86400.0, max_count=10_000, max_body=10_000)

#: Why a letter without its message is refused.
TOO_LARGE = "its message was too large to be kept (reliable_dead_letter_max_body)"


def invoke_on(app: Celery) -> Invoke:
    """Run the command as Celery does, which puts the app into click's context."""

    def invoke(*args: str, answer: str | None = None) -> Result:
        context = SimpleNamespace(app=app)
        return CliRunner().invoke(reliable, ["dead", *args], obj=context, input=answer)

    return invoke


@pytest.fixture
def invoke(app: Celery) -> Invoke:
    """Run the command for an app with a Redis."""
    return invoke_on(app)


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    """The clock of the Redis and of the command."""
    with time_machine.travel(NOON, tick=False) as traveller:
        yield traveller


@pytest.fixture
def bury(app: Celery, clock: time_machine.Traveller) -> Bury:
    """Keep a dead letter, a second after the one before; its id is returned."""

    def bury(id_: str, *, raw: str | None = None, max_body: int = 10_000, **about: Any) -> str:
        clock.shift(1)
        known = {
            "task": "shop.pay",
            "task_id": id_,
            "cause": Cause.FAILED,
            "error": "ValueError: no money",
            "argsrepr": "(7,)",
            "kwargsrepr": "{'currency': 'EUR'}",
            "queue": "celery",
            **about,
        }
        whole = message(id_, task=known["task"]) if raw is None else raw
        bounds = Bounds(BOUNDS.max_age, BOUNDS.max_count, max_body)
        letter = Letter(DeadLetter(id=id_, **known), whole.encode(), bounds)
        store, server = store_of(app)
        return store.bury(server, letter, uuid4().hex)[0]

    return bury


def die(app: Celery, id_: str, **about: Any) -> str:
    """Keep a dead letter of an app with RabbitMQ alone; its id is returned."""
    known = {"task": "shop.pay", "task_id": id_, "cause": Cause.FAILED, "error": "", **about}
    raw = message(id_, task=known["task"]).encode()
    bury_in_queue(app, Letter(DeadLetter(id=id_, **known), raw, BOUNDS))
    return id_


def store_of(app: Celery) -> tuple[DeadStore, redis.Redis]:
    """The dead letters of an app, and their client."""
    place = dead_place(app)
    assert place is not None
    return place.store, place.server


def ids(app: Celery, **filters: Any) -> list[str]:
    """The ids of those that were not replayed, the oldest first."""
    return [one.id for one in dead_letters.list(oldest_first=True, app=app, **filters)]


def sent(app: Celery) -> list[str]:
    """The ids of the tasks in the queue."""
    found = []
    while (one := take(app)) is not None:
        found.append(one.headers["id"])
    return found


def lines(result: Result) -> list[Any]:
    """What was written for programs, and nothing else is there."""
    return [json.loads(line) for line in result.stdout.splitlines()]


# -- list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("list",)])
def test_the_list(
    invoke: Invoke, bury: Bury, clock: time_machine.Traveller, command: tuple[str, ...]
) -> None:
    """A line for each dead letter, the newest first."""
    bury("one", retries=3, error="ValueError: no\n  money \x1b[31m")
    clock.shift(7200)
    bury("two", task="", error="", argsrepr="", kwargsrepr="", cause=Cause.UNDECODABLE)
    result = invoke(*command)
    assert result.exit_code == 0
    heading, second, first = result.stdout.splitlines()
    assert heading.split() == ["id", "task", "cause", "age", "retries", "error", "arguments"]
    assert re.split(" {2,}", first) == [
        "one",
        "shop.pay",
        "failed",
        "2h 0m",
        "3",
        "ValueError: no money ?[31m",
        "(7,) {'currency': 'EUR'}",
    ]
    assert re.split(" {2,}", second) == ["two", "-", "undecodable", "0s", "0", "-"]
    assert first.index("failed") == second.index("undecodable") == heading.index("cause")
    assert result.stderr == ""


def test_a_long_error_is_cut(invoke: Invoke, bury: Bury) -> None:
    """So are the arguments: the list has a line for each."""
    bury("one", error="x" * 500, argsrepr="y" * 500)
    row = invoke().stdout.splitlines()[1]
    assert row.split()[-2:] == ["x" * 57 + "...", "y" * 57 + "..."]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "there are no dead letters"),
        (("--task", "shop.pay"), "there are no such dead letters"),
        (("--replayed",), "there are no dead letters that were replayed"),
    ],
)
def test_an_empty_list(invoke: Invoke, options: tuple[str, ...], text: str) -> None:
    """It says so, and is no lines of JSON."""
    assert invoke("list", *options).output == f"{text}\n"
    assert invoke("list", "--json", *options).output == ""


def test_a_list_for_programs(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """All that is known but the traceback, one object a line."""
    bury("one", traceback="secret", priority=3, error="a\nb")
    bury("two")
    result = invoke("list", "--json")
    assert result.stderr == ""
    assert lines(result) == [one.as_dict() for one in dead_letters.list(app=app)]
    first = lines(result)[1]
    assert (first["id"], first["cause"], first["priority"]) == ("one", "failed", 3)
    assert (first["error"], first["traceback"]) == ("a\nb", "")
    assert first["at"] == NOON + 1


def test_a_list_that_is_cut(invoke: Invoke, bury: Bury) -> None:
    """It says how many more there are, where that is in nobody's way."""
    for n in range(53):
        bury(f"t{n}", task="shop.pay" if n else "shop.other")
    result = invoke()
    assert len(result.stdout.splitlines()) == 51
    assert result.stderr == "3 more: see them with --limit 53\n"
    result = invoke("list", "--json", "--limit", "2", "--task", "shop.pay")
    assert [one["id"] for one in lines(result)] == ["t52", "t51"]
    assert result.stderr == "50 more: see them with --limit 52\n"
    result = invoke("list", "--limit", "53")
    assert len(result.stdout.splitlines()) == 54
    assert result.stderr == ""


def test_the_filters_of_the_list(invoke: Invoke, bury: Bury, clock: time_machine.Traveller) -> None:
    """By task, by cause, by age, and by all of them."""
    bury("one")
    bury("two", task="shop.other")
    clock.shift(3600)
    bury("three", cause=Cause.POISON)
    bury("four", task="shop.other", cause=Cause.POISON)

    def found(*options: str) -> list[str]:
        return [one["id"] for one in lines(invoke("list", "--json", *options))]

    assert found("--task", "shop.other") == ["four", "two"]
    assert found("--cause", "poison") == ["four", "three"]
    assert found("--since", "30m") == ["four", "three"]
    assert found("--since", "2h") == ["four", "three", "two", "one"]
    assert found("--before", "30m") == ["two", "one"]
    assert found("--since", "2h", "--before", "30m") == ["two", "one"]
    assert found("--since", "30m", "--cause", "poison", "--task", "shop.pay") == ["three"]
    noon = datetime.fromtimestamp(NOON + 1800).astimezone()
    assert found("--since", noon.isoformat()) == ["four", "three"]
    assert found("--since", noon.replace(tzinfo=None).isoformat(" ")) == ["four", "three"]


def test_a_list_of_those_that_were_replayed(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """They are no longer among the others, and name the task in their place."""
    for id_ in ("one", "two", "three"):
        bury(id_)
    new_ids = [dead_letters.replay(id_, app=app) for id_ in ("one", "two")]
    assert [one["id"] for one in lines(invoke("list", "--json"))] == ["three"]
    result = invoke("list", "--replayed")
    heading, *rows = result.stdout.splitlines()
    assert "replayed as" in heading
    assert {(row.split()[0], row.split()[5]) for row in rows} == {
        ("one", new_ids[0]),
        ("two", new_ids[1]),
    }
    result = invoke("list", "--replayed", "--json", "--limit", "1")
    assert len(lines(result)) == 1
    assert result.stderr == "1 more: see them with --limit 2\n"


@pytest.mark.parametrize(
    "args",
    [
        ("show", ""),
        ("discard", " ", "--yes"),
        ("replay", ""),
        ("replay", "one", "--queue", ""),
        ("list", "--task", ""),
    ],
    ids=" ".join,
)
def test_a_name_that_is_empty_is_refused(invoke: Invoke, bury: Bury, args: Any) -> None:
    """It comes of a variable that is not set; nothing is done, and nothing guessed."""
    bury("one")
    result = invoke(*args)
    assert result.exit_code == 2
    assert "names nothing" in result.output
    assert "one" not in result.output.split()


def test_a_name_that_is_no_text_is_refused(invoke: Invoke) -> None:
    """A shell can hand on any bytes."""
    result = invoke("show", b"\xff".decode(errors="surrogateescape"))
    assert result.exit_code == 2
    assert "is no UTF-8" in result.output


@pytest.mark.parametrize("dry_run", [True, False])
def test_tasks_are_imported_before_they_are_asked(
    app: Celery, invoke: Invoke, bury: Bury, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run that knows no task would promise what is refused."""
    bury("one")
    imported: list[str] = []
    monkeypatch.setattr(app.loader, "import_default_modules", lambda: imported.append("all"))
    assert invoke("replay", "one", *(["--dry-run"] if dry_run else [])).exit_code == 0
    assert imported == ["all"]


@pytest.mark.parametrize(
    "value", ["yesterday", "5", "5w", "-5m", "", "2026-13-01", "99999999999d", "m", "5 m 3 s"]
)
def test_a_time_that_is_none(invoke: Invoke, value: str) -> None:
    """The error names it, and what to give."""
    result = invoke("list", f"--since={value}")
    assert result.exit_code == 2
    assert "Invalid value for '--since'" in result.output
    assert f"{value!r} is no time: give how long ago, as 30s, 15m, 2h or 7d" in result.output
    assert "2026-03-01T08:30" in result.output


@pytest.mark.parametrize(
    ("value", "seconds"), [("30s", 30), ("15m", 900), ("2h", 7200), ("7d", 604800), ("1.5h", 5400)]
)
def test_how_long_ago(clock: time_machine.Traveller, value: str, seconds: float) -> None:
    """A number and a unit."""
    assert _moment(value).timestamp() == NOON - seconds


def test_a_date_is_one_of_here() -> None:
    """What names a time zone is in that one; what names none is in that of this host."""
    assert _moment("2026-03-01T12:00Z").timestamp() == NOON
    here = _moment("2026-03-01")
    assert here.replace(tzinfo=None) == datetime(2026, 3, 1)  # noqa: DTZ001 - no time zone is meant
    assert here.tzinfo is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--cause", "bad luck"), "'bad luck' is not one of 'poison', 'requeues'"),
        (("--limit", "0"), "0 is not in the range"),
    ],
)
def test_options_that_are_no_good(invoke: Invoke, options: tuple[str, str], text: str) -> None:
    """The error says what is."""
    result = invoke("list", *options)
    assert result.exit_code == 2
    assert text in result.output


# -- show ----------------------------------------------------------------------------------------


def test_one_dead_letter(invoke: Invoke, bury: Bury, clock: time_machine.Traveller) -> None:
    """All that is known, one fact a line, and the traceback last."""
    bury(
        "one",
        error="ValueError: no\nmoney",
        traceback="Traceback:\n  File x\nValueError: \x1b[31mno",
        first_at=float(NOON - 60),
        priority=3,
        claim="shop.pay:7",
        worker="w@h",
        crashes=2,
        group_id="g",
    )
    clock.shift(120)
    result = invoke("show", "one")
    assert result.exit_code == 0
    facts, _, trace = result.stdout.partition("\n\n")
    shown = dict(re.split(" {2,}", line, maxsplit=1) for line in facts.splitlines())
    at = datetime.fromtimestamp(NOON + 1).astimezone().isoformat(" ")
    first = datetime.fromtimestamp(NOON - 60).astimezone().isoformat(" ")
    size = shown.pop("message")
    assert re.fullmatch(r"\d+ bytes", size)
    assert shown == {
        "id": "one",
        "task": "shop.pay",
        "task id": "one",
        "cause": "failed",
        "error": "ValueError: no money",
        "kept at": f"{at} (2m 0s ago)",
        "first failed": first,
        "args": "(7,)",
        "kwargs": "{'currency': 'EUR'}",
        "retries": "0",
        "crashes": "2",
        "redelivered": "0",
        "queue": "celery",
        "priority": "3",
        "worker": "w@h",
        "@once key": "shop.pay:7",
        "group": "g",
    }
    assert trace == "traceback:\nTraceback:\n  File x\nValueError: ?[31mno\n"


def test_one_for_programs(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """With its traceback, and without its message unless that is asked for."""
    bury("one", traceback="Traceback")
    (found,) = lines(invoke("show", "--json", "one"))
    assert found == dead_letters.get("one", app=app).as_dict()
    assert found["traceback"] == "Traceback"
    (more,) = lines(invoke("show", "--json", "--body", "one"))
    assert more == {**found, "message": dead_letters.message("one", app=app)}


def test_the_message_is_shown_if_asked_for(invoke: Invoke, bury: Bury) -> None:
    """It holds the arguments as they are, and comes before the traceback."""
    bury("one", traceback="Traceback")
    assert "delivery_tag" not in invoke("show", "one").stdout
    shown = invoke("show", "one", "--body").stdout
    body, _, trace = shown.partition("\n\nmessage:\n")[2].partition("\n\ntraceback:\n")
    assert json.loads(body)["body"] == [[7], {}, {}]
    assert trace == "Traceback\n"


def test_a_message_that_was_not_kept(invoke: Invoke, bury: Bury) -> None:
    """It says so."""
    bury("one", max_body=10)
    shown = invoke("show", "one", "--body").stdout
    assert re.search(r"^message +not kept: it was too large$", shown, re.MULTILINE)
    assert "message:" not in shown


def test_one_that_was_replayed(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """It says as which task."""
    bury("one")
    assert "replayed" not in invoke("show", "one").stdout
    new_id = dead_letters.replay("one", app=app)
    assert f"replayed as   {new_id} " in invoke("show", "one").stdout


@pytest.mark.parametrize(
    "command", [("show",), ("discard",), ("discard", "--yes", "other"), ("replay",)]
)
def test_an_id_that_is_not_found(
    app: Celery, invoke: Invoke, bury: Bury, command: tuple[str, ...]
) -> None:
    """The error names it, and ids that are like it; those that begin so come first."""
    bury("other")
    for n in range(4):
        bury(f"ab{n}")
        bury(f"x-ab{n}")
    dead_letters.replay("ab0", app=app)
    result = invoke(*command, "ab")
    assert result.exit_code == 1
    assert "there is no dead letter ab; perhaps you mean" in result.stderr
    similar = [line.strip() for line in result.stderr.splitlines() if line.startswith("  ")]
    assert set(similar[:4]) == {"ab0", "ab1", "ab2", "ab3"}
    assert len(similar) == 5
    assert similar[4].startswith("x-ab")
    assert result.stdout == ""
    assert "perhaps" not in invoke(*command, "nothing like it").output
    assert len(ids(app)) == 8, "nothing was removed"


# -- replay --------------------------------------------------------------------------------------


def test_dead_letters_are_replayed_by_id(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """Without a question; and each once, however often it is given."""
    for id_ in ("one", "two", "three"):
        bury(id_)
    result = invoke("replay", "one", "two", "one")
    assert result.exit_code == 0
    pairs = [line.split(" -> ") for line in result.stdout.splitlines()]
    assert [old for old, _ in pairs] == ["one", "two"]
    assert sent(app) == [new for _, new in pairs]
    assert ids(app) == ["three"]
    assert invoke("replay", "one").stdout == f"one -> {pairs[0][1]}\n"
    assert sent(app) == []


def test_a_refusal_is_told_and_the_others_are_sent(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """On stderr, with the reason, and with an exit code."""
    bury("large", max_body=10)
    bury("one")
    result = invoke("replay", "large", "gone", "one", "gone too")
    assert result.exit_code == 1
    assert [line.split(" -> ")[0] for line in result.stdout.splitlines()] == ["one"]
    assert result.stderr.splitlines() == [
        f"dead letter large is not replayed: {TOO_LARGE}",
        "there is no dead letter gone",
        "there is no dead letter gone too",
    ]
    assert len(sent(app)) == 1


def test_a_replay_for_programs(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """One object a line, for refusals too."""
    bury("large", max_body=10)
    bury("one")
    result = invoke("replay", "--json", "one", "large", "gone")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert lines(result) == [
        {"id": "one", "replayed_as": sent(app)[0]},
        {"id": "large", "refused": TOO_LARGE},
        {"id": "gone", "refused": "there is no dead letter gone"},
    ]


def test_a_part_of_a_chord(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """It is refused alone, and sent with the whole chord."""
    bury("one", chord_id="c")
    result = invoke("replay", "one")
    assert result.exit_code == 1
    assert "one is not replayed: chord c has counted its failure" in result.stderr
    bury("two")
    result = invoke("replay", "--whole-chord", "two")
    assert "it is no part of a chord" in result.stderr
    assert invoke("replay", "--whole-chord", "--dry-run", "two").stderr == result.stderr
    assert sent(app) == []


def test_a_whole_chord_is_asked_for(
    app: Celery, invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given is handed on."""
    asked: dict[str, Any] = {}

    def replay(id_: str, **options: Any) -> str:
        asked.update(options, id=id_)
        return "new"

    monkeypatch.setattr(dead_letters, "replay", replay)
    assert invoke("replay", "--whole-chord", "--queue", "q", "one").stdout == "one -> new\n"
    assert asked == {"id": "one", "whole_chord": True, "queue": "q", "app": app}


@pytest.mark.parametrize("which", [("one",), ("--all", "--yes")])
def test_another_queue(app: Celery, invoke: Invoke, bury: Bury, which: tuple[str, ...]) -> None:
    """They go where they are sent to."""
    bury("one", queue="elsewhere")
    assert invoke("replay", "--queue", "celery", *which).exit_code == 0
    assert len(sent(app)) == 1


def test_the_rate(
    invoke: Invoke, bury: Bury, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many a second, by their ids and all of them."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.shift(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    for n in range(6):
        bury(f"t{n}")
    assert invoke("replay", "--rate", "4", "t0", "t1", "t2").exit_code == 0
    assert slept == [0.25, 0.25]
    slept.clear()
    assert invoke("replay", "--rate", "0.01", "--all", "--yes").exit_code == 0
    assert sum(slept) == pytest.approx(200, abs=20), "less what a slow machine takes for them"


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast", "1e-9"])
def test_a_rate_that_is_none(invoke: Invoke, rate: str) -> None:
    """The error names it."""
    result = invoke("replay", f"--rate={rate}", "one")
    assert result.exit_code == 2
    assert f"{rate!r}: give a number of dead letters per second, 0.001 or more" in result.output


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "give the ids of dead letters, or --all"),
        (("one", "--all"), "give the ids of dead letters, or --all"),
        (("one", "--task", "t"), "--task is for --all"),
        (("one", "--cause", "lost"), "--cause is for --all"),
        (("one", "--since", "1h"), "--since is for --all"),
        (("one", "--limit", "1"), "--limit is for --all"),
        (("--all", "--whole-chord"), "--whole-chord is for ids, not for --all"),
    ],
)
def test_what_does_not_go_together(
    app: Celery, invoke: Invoke, bury: Bury, args: tuple[str, ...], text: str
) -> None:
    """Nothing is sent."""
    bury("one")
    result = invoke("replay", "--yes", *args)
    assert result.exit_code == 2
    assert text in result.output
    assert ids(app) == ["one"]


def test_all_are_replayed_when_somebody_says_yes(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """The question names their number, and is not among the results."""
    bury("one")
    bury("large", max_body=10)
    result = invoke("replay", "--all", answer="n\n")
    assert result.exit_code == 1
    assert result.stdout.strip("n\n") == ""
    assert "Send all 2 dead letters again? [y/N]" in result.stderr
    assert sent(app) == []
    result = invoke("replay", "--all", answer="y\n")
    assert result.exit_code == 1
    assert "dead letter large is not replayed: its message was too large" in result.stderr
    assert result.stderr.endswith("\n1 sent, 1 refused\n")
    assert result.stdout.splitlines()[-1] == f"one -> {sent(app)[0]}"
    assert ids(app) == ["large"]


def test_all_for_programs(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """One object a line; the exit code is 0 when all were sent."""
    bury("one")
    bury("two")
    result = invoke("replay", "--all", "--yes", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert lines(result) == [
        {"id": id_, "replayed_as": new_id}
        for id_, new_id in zip(["one", "two"], sent(app), strict=True)
    ]
    assert invoke("replay", "--all", "--yes", "--json").output == ""


def test_the_filters_of_a_replay(
    app: Celery, invoke: Invoke, bury: Bury, clock: time_machine.Traveller
) -> None:
    """The question names them."""
    bury("old", cause=Cause.LOST)
    clock.shift(7200)
    bury("one", cause=Cause.LOST)
    bury("two", cause=Cause.LOST)
    bury("three", cause=Cause.LOST, task="shop.other")
    bury("four")
    filters = ("--all", "--task", "shop.pay", "--cause", "lost", "--since", "1h")
    result = invoke("replay", *filters, answer="n\n")
    since = datetime.fromtimestamp(time.time() - 3600).astimezone().isoformat(" ")
    question = f"2 dead letters of task shop.pay with cause lost kept since {since} again?"
    assert f"Send {question}" in result.stderr
    result = invoke("replay", *filters, "--limit", "1", answer="y\n")
    assert f"Send the oldest 1 of {question}" in result.stderr
    assert ids(app) == ["old", "two", "three", "four"]
    assert invoke("replay", *filters, "--yes").exit_code == 0
    assert ids(app) == ["old", "three", "four"]
    assert invoke("replay", *filters, "--yes").output == "there are no such dead letters\n"
    assert len(sent(app)) == 2


def test_nothing_to_replay(invoke: Invoke) -> None:
    """It says so, and asks nothing."""
    result = invoke("replay", "--all")
    assert (result.exit_code, result.output) == (0, "there are no dead letters\n")
    assert invoke("replay", "--all", "--dry-run").output == "there are no dead letters\n"


@pytest.mark.parametrize("command", [("replay", "--all"), ("purge",)])
def test_what_came_during_the_question_stays(
    app: Celery,
    invoke: Invoke,
    bury: Bury,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    """What is done is what was asked for."""
    bury("one")

    def confirm(*args: Any, **options: Any) -> bool:
        bury("two")
        return True

    monkeypatch.setattr(click, "confirm", confirm)
    assert invoke(*command).exit_code == 0
    assert ids(app) == ["two"]


@pytest.mark.parametrize("command", [("replay", "--all", "--yes"), ("purge", "--yes")])
def test_the_clock_of_the_redis_counts(
    app: Celery,
    invoke: Invoke,
    bury: Bury,
    clock: time_machine.Traveller,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    """That of the host may be behind it: what was kept just now is asked about, too."""
    bury("one")
    clock.shift(-5)
    monkeypatch.setattr(DeadStore, "now", lambda *args: time.time() + 5)
    assert invoke(*command).exit_code == 0
    assert ids(app) == []


@pytest.mark.parametrize("command", [("replay", "--all"), ("purge",)])
def test_in_rabbitmq_those_are_meant_that_were_there(
    rabbit: Celery,
    clock: time_machine.Traveller,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    """Each bears the clock of the host that has kept it, which may be before this one or behind."""
    for ahead in (3600, -3600):
        clock.shift(ahead)
        die(rabbit, f"{ahead} s ahead")
        clock.shift(-ahead)

    def confirm(question: str, **options: Any) -> bool:
        assert "all 2 dead letters" in question
        for ahead in (3600, -3600):
            clock.shift(ahead)
            die(rabbit, f"{ahead} s ahead, too late")
            clock.shift(-ahead)
        return True

    monkeypatch.setattr(click, "confirm", confirm)
    assert invoke_on(rabbit)(*command).exit_code == 0
    assert ids(rabbit) == ["3600 s ahead, too late", "-3600 s ahead, too late"]


def test_in_rabbitmq_each_counts(rabbit: Celery) -> None:
    """The same twice is one that was kept, and not acknowledged: both are in the queue."""
    for id_ in ("one", "one", "two"):
        die(rabbit, id_, task="shop.other" if id_ == "two" else "shop.pay")
    result = invoke_on(rabbit)("purge", "--task", "shop.pay", answer="y\n")
    assert "Remove 2 dead letters of task shop.pay for good?" in result.stderr
    assert "removed 2 dead letters" in result.stdout
    assert ids(rabbit) == ["two"]


def test_what_would_be_replayed(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """It says what would be sent and what would not, and sends nothing."""
    bury("large", max_body=10)
    bury("one")
    bury("done")
    new_id = dead_letters.replay("done", app=app)
    sent(app)
    result = invoke("replay", "--dry-run", "one", "large", "done", "gone")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "one would be sent again: shop.pay",
        f"done -> {new_id}",
    ]
    first, second = result.stderr.splitlines()
    assert first.startswith("dead letter large is not replayed: its message was too large")
    assert second == "there is no dead letter gone"
    assert lines(invoke("replay", "--dry-run", "--json", "one", "done", "gone")) == [
        {"id": "one", "replayed_as": None},
        {"id": "done", "replayed_as": new_id},
        {"id": "gone", "refused": "there is no dead letter gone"},
    ]
    result = invoke("replay", "--dry-run", "--all")
    assert result.stdout == "one would be sent again: shop.pay\n"
    assert result.stderr.endswith("\n1 would be sent, 1 would be refused\n")
    bury("two")
    result = invoke("replay", "--dry-run", "--all", "--limit", "1")
    assert result.stdout == "one would be sent again: shop.pay\n"
    assert result.stderr.endswith("\n1 would be sent, 1 would be refused\n")
    assert sent(app) == []
    assert ids(app) == ["large", "one", "two"]


def test_what_would_be_replayed_of_rabbitmqs_queue(rabbit: Celery) -> None:
    """It is read in its order, as by a replay; ids are not found there."""
    die(rabbit, "one")
    die(rabbit, "two", task="shop.other")
    die(rabbit, "part", chord_id="c")
    invoke = invoke_on(rabbit)
    result = invoke("replay", "--all", "--dry-run")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "one would be sent again: shop.pay",
        "two would be sent again: shop.other",
    ]
    assert result.stderr.splitlines() == [
        "dead letter part is not replayed: its chord has counted its failure",
        "2 would be sent, 1 would be refused",
    ]
    result = invoke("replay", "--all", "--dry-run", "--task", "shop.pay", "--limit", "1")
    assert result.stdout == "one would be sent again: shop.pay\n"
    assert lines(invoke("replay", "--all", "--dry-run", "--json", "--task", "shop.other")) == [
        {"id": "two", "replayed_as": None}
    ]
    assert invoke("replay", "--dry-run", "one").stderr.startswith("Error: without a Redis")
    assert sent(rabbit) == []
    assert ids(rabbit) == ["one", "two", "part"]


def test_a_task_is_imported_before_it_is_replayed(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """Else its @once key would not be claimed; Celery imports tasks for its workers alone."""

    def find_tasks(**_: Any) -> None:
        @app.task(base=ReliableTask, name="shop.pay")
        @once(key="invoice:{n}")
        def pay(n: int) -> None:
            pass

    import_modules.connect(find_tasks, sender=app)
    bury("one")
    bury("two")
    result = invoke("replay", "one", "two")
    assert result.exit_code == 1
    assert [line.split(" -> ")[0] for line in result.stdout.splitlines()] == ["one"]
    assert "dead letter two is not replayed" in result.stderr
    assert "has its @once key" in result.stderr
    assert len(sent(app)) == 1


@pytest.mark.parametrize("error", [OperationalError("no broker"), KeyboardInterrupt()])
def test_what_was_sent_is_told_though_it_ends_halfway(
    app: Celery,
    invoke: Invoke,
    bury: Bury,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    """The broker goes away, or somebody has seen enough."""
    for id_ in ("large", "one", "two"):
        bury(id_, max_body=10 if id_ == "large" else 10_000)
    replay = dead_letters.replay

    def replay_some(id_: str, **options: Any) -> str:
        if id_ == "two":
            raise error
        return replay(id_, **options)

    monkeypatch.setattr(dead_letters, "replay", replay_some)
    result = invoke("replay", "--all", "--yes", "--json")
    assert result.exit_code == 1
    large, one = lines(result)
    assert (large["id"], one) == ("large", {"id": "one", "replayed_as": sent(app)[0]})
    assert "too large" in large["refused"]
    told = "Aborted!" if isinstance(error, KeyboardInterrupt) else "Error: no broker"
    assert told in result.stderr
    assert ids(app) == ["large", "two"]


# -- discard -------------------------------------------------------------------------------------


def test_a_dead_letter_is_discarded(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """When somebody says yes."""
    bury("one")
    bury("two", task="")
    bury("three")
    result = invoke("discard", "one", "two", "one", answer="n\n")
    assert result.exit_code == 1
    assert "one: shop.pay, failed 2s ago\ntwo: no task, failed 1s ago\n" in result.stderr
    assert "Discard 2 dead letters for good? [y/N]" in result.stderr
    assert "discarded" not in result.output
    assert len(ids(app)) == 3
    result = invoke("discard", "one", "two", answer="y\n")
    assert result.exit_code == 0
    assert result.stdout.endswith("one is discarded\ntwo is discarded\n")
    assert ids(app) == ["three"]


def test_a_dead_letter_is_discarded_without_a_question(
    app: Celery, invoke: Invoke, bury: Bury
) -> None:
    """For scripts."""
    bury("one")
    assert invoke("discard", "--yes", "one").output == "one is discarded\n"
    assert ids(app) == []


def test_what_would_be_discarded(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """It is named, and stays."""
    bury("one")
    assert invoke("discard", "--dry-run", "one").output == "one would be discarded\n"
    assert ids(app) == ["one"]


def test_many_are_not_all_named(invoke: Invoke, bury: Bury) -> None:
    """The question stays on the screen."""
    found = [bury(f"t{n}") for n in range(13)]
    result = invoke("discard", *found, answer="n\n")
    assert "t9: " in result.stderr
    assert "t10: " not in result.stderr
    assert "and 3 more\n" in result.stderr


def test_one_that_is_gone_meanwhile(
    app: Celery, invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody was faster; the others are discarded."""
    bury("one")
    bury("two")

    def confirm(*args: Any, **options: Any) -> bool:
        dead_letters.discard("one", app=app)
        return True

    monkeypatch.setattr(click, "confirm", confirm)
    result = invoke("discard", "one", "two")
    assert (result.exit_code, result.stdout) == (0, "two is discarded\n")
    assert result.stderr.endswith("one is gone already\n")


def test_discard_needs_ids(invoke: Invoke) -> None:
    """All are removed by another command."""
    assert invoke("discard", "--yes").exit_code == 2


# -- purge ---------------------------------------------------------------------------------------


def test_all_are_purged_when_somebody_says_yes(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """The question says that it is all of them; those that were replayed stay."""
    for id_ in ("one", "two", "three"):
        bury(id_)
    dead_letters.replay("three", app=app)
    result = invoke("purge", answer="n\n")
    assert result.exit_code == 1
    assert "Remove all 2 dead letters for good? [y/N]" in result.stderr
    assert "removed" not in result.output
    assert len(ids(app)) == 2
    result = invoke("purge", answer="y\n")
    assert result.exit_code == 0
    assert result.stdout.endswith("removed 2 dead letters\n")
    assert ids(app) == []
    assert ids(app, replayed=True) == ["three"]


def test_the_only_one_is_purged(invoke: Invoke, bury: Bury) -> None:
    """The question says so."""
    bury("one")
    result = invoke("purge", answer="y\n")
    assert "Remove the only dead letter for good?" in result.stderr
    assert result.stdout.endswith("removed 1 dead letter\n")


def test_the_filters_of_a_purge(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """The question names them, and the others stay."""
    bury("one", cause=Cause.LOST)
    bury("two")
    bury("three", task="shop.other")
    result = invoke("purge", "--task", "shop.pay", answer="n\n")
    assert "Remove 2 dead letters of task shop.pay for good?" in result.stderr
    assert invoke("purge", "--yes", "--cause", "lost").output == "removed 1 dead letter\n"
    assert ids(app) == ["two", "three"]
    assert invoke("purge", "--yes", "--since", "1s").output == "removed 2 dead letters\n"
    assert invoke("purge", "--yes", "--task", "x").output == "there are no such dead letters\n"


def test_a_purge_of_those_that_were_replayed(
    app: Celery, invoke: Invoke, bury: Bury, clock: time_machine.Traveller
) -> None:
    """The others stay."""
    for id_ in ("one", "two", "three"):
        bury(id_)
    dead_letters.replay("one", app=app)
    clock.shift(60)
    dead_letters.replay("two", app=app)
    result = invoke("purge", "--replayed", answer="n\n")
    assert "Remove all 2 dead letters that were replayed for good?" in result.stderr
    result = invoke("purge", "--replayed", "--since", "30s", answer="y\n")
    assert re.search("Remove 1 dead letter replayed since .* for good", result.stderr)
    aged = invoke("purge", "--before", "1000d", "--yes")
    assert aged.output == "there are no such dead letters\n"
    assert ids(app, replayed=True) == ["one"]
    assert invoke("purge", "--replayed", "--yes").output == "removed 1 dead letter\n"
    assert ids(app) == ["three"]
    assert invoke("purge", "--replayed").output == "there are no dead letters that were replayed\n"


def test_what_would_be_purged(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """It says how many, and they stay."""
    bury("one")
    bury("two", task="shop.other")
    assert invoke("purge", "--dry-run").output == "would remove all 2 dead letters\n"
    assert invoke("purge", "--dry-run", "--task", "shop.pay").output == (
        "would remove 1 dead letter of task shop.pay\n"
    )
    assert len(ids(app)) == 2


def test_a_purge_of_many(app: Celery, invoke: Invoke, bury: Bury) -> None:
    """All go, however many steps it takes."""
    for n in range(420):
        bury(f"t{n}")
    assert invoke("purge", "--yes").output == "removed 420 dead letters\n"
    assert ids(app) == []


# -- all of them ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """What takes itself for a terminal."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


@pytest.mark.parametrize(
    ("command", "label"), [(("replay", "--all"), "Replaying"), (("purge",), "Removing")]
)
def test_the_progress_on_a_terminal(
    invoke: Invoke,
    bury: Bury,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    label: str,
) -> None:
    """It ends when all is done, and is not among the results."""
    terminal = Terminal()
    monkeypatch.setattr(output, "_stderr", lambda: terminal)
    for n in range(3):
        bury(f"t{n}")
    result = invoke(*command, "--yes")
    assert result.exit_code == 0
    assert re.search(rf"{label} .*3/3", terminal.getvalue())
    assert label not in result.output


def test_no_progress_for_programs(
    invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read what they asked for."""
    terminal = Terminal()
    monkeypatch.setattr(output, "_stderr", lambda: terminal)
    bury("one")
    assert len(lines(invoke("replay", "--all", "--yes", "--json"))) == 1
    assert terminal.getvalue() == ""


def test_no_progress_without_a_terminal(invoke: Invoke, bury: Bury) -> None:
    """Not a line of it is in a log."""
    bury("one")
    assert invoke("replay", "--all", "--yes").stderr == "1 sent, 0 refused\n"
    bury("two")
    assert invoke("purge", "--yes").stderr == ""


COMMANDS = [
    (),
    ("list",),
    ("list", "--replayed"),
    ("show", "one"),
    ("show", "one", "--body"),
    ("replay", "one"),
    ("replay", "--all"),
    ("replay", "--all", "--dry-run"),
    ("discard", "one"),
    ("purge",),
    ("purge", "--replayed"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_redis(
    invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """An error, and no traceback."""
    bury("one")

    def away(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("away")

    for name in ("_read", "_pages", "_kinds"):
        monkeypatch.setattr(DeadStore, name, away)
    result = invoke(*command)
    assert result.exit_code == 1
    assert "redis://fake/0 is not available: away" in result.stderr
    assert result.stdout == ""
    assert result.exc_info is not None
    assert result.exc_info[0] is SystemExit


def test_the_redis_goes_away_during_a_replay(
    invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the error which is told, behind what was sent."""
    bury("one")
    bury("two")
    get = DeadStore.get
    seen: list[str] = []

    def get_once(self: DeadStore, server: redis.Redis, id_: str) -> DeadLetter | None:
        seen.append(id_)
        if len(seen) > 1:
            raise redis.ConnectionError("away")
        return get(self, server, id_)

    monkeypatch.setattr(DeadStore, "get", get_once)
    result = invoke("replay", "--all", "--yes")
    assert result.exit_code == 1
    assert result.stderr.endswith("redis://fake/0 is not available: away\n")
    assert result.stdout.startswith("one -> ")
    assert seen == ["one", "two"]


def test_without_the_broker(
    app: Celery, invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, and no traceback; what was sent before is told, and the rest stays."""
    bury("one")
    bury("two")
    replay = dead_letters.replay

    def replay_some(id_: str, **options: Any) -> str:
        if id_ == "two":
            raise OperationalError("no broker")
        return replay(id_, **options)

    monkeypatch.setattr(dead_letters, "replay", replay_some)
    result = invoke("replay", "one", "two")
    assert result.exit_code == 1
    assert result.stdout == f"one -> {sent(app)[0]}\n"
    assert result.stderr == "Error: no broker\n"
    assert ids(app) == ["two"]


def test_what_cannot_be_counted_is_read(
    app: Celery, invoke: Invoke, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue with dead letters tells the number of all of them alone."""

    def refuse(**options: Any) -> int:
        raise DeadLetterError("not there")

    bury("one")
    bury("two", task="shop.other")
    bury("three")
    monkeypatch.setattr(dead_letters, "count", refuse)
    result = invoke("purge", "--task", "shop.pay", answer="y\n")
    assert "Remove 2 dead letters of task shop.pay for good?" in result.stderr
    assert ids(app) == ["two"]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_app_without_a_redis(app: Celery, invoke: Invoke, command: tuple[str, ...]) -> None:
    """The error says what to set."""
    app.conf.reliable_redis_url = None
    result = invoke(*command)
    assert result.exit_code == 1
    assert "this app has no Redis for its dead letters: set reliable_redis_url" in result.stderr


def test_an_error_of_the_library_is_no_traceback() -> None:
    """Its text is the command's error."""
    with pytest.raises(click.ClickException, match="h is not available"), output.errors_told():
        raise StoreUnavailable("redis://h", "away")


@pytest.mark.parametrize(
    ("text", "width", "line"),
    [
        ("a\n b\t\tc", None, "a b c"),
        ("\x1b[2J\x07\udc80", None, "?[2J??"),
        ("été ✓", None, "été ✓"),
        ("0123456789", 10, "0123456789"),
        ("0123456789x", 10, "0123456..."),
    ],
)
def test_a_line_for_a_terminal(text: str, width: int | None, line: str) -> None:
    """Nothing in it is a command, or breaks the line."""
    assert output.one_line(text, width) == line
