"""What is kept of a task that has failed: which one is, why, and how much of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import time_machine
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, chain, chord
from celery.exceptions import Reject

from reliable_tasks import DuplicateTaskError, ReliableTask, once
from reliable_tasks._dead.letters import cause_of, letter_of_message, letter_of_request, raw_of
from reliable_tasks._dead.options import Options, read_options
from reliable_tasks._dead.original import Original
from reliable_tasks._store.delivery import Copy, Delivery, Guard
from reliable_tasks._store.letters import Cause, DeadLetter, Letter
from reliable_tasks.errors import PoisonPill, RequeuesExhausted
from tests.unit._celery.bench import Bench
from tests.unit.harness import take

#: Sunday noon, in 2026.
NOON = 1_772_366_400.0
CRASH = {"host": "w@h", "pid": 7, "how": "", "at": 5.0}
PILL = PoisonPill("one", 3, 3, [CRASH, {**CRASH, "at": 9.0}])


@pytest.fixture(autouse=True)
def at_noon() -> Iterator[None]:
    """Stop the clock."""
    with time_machine.travel(NOON, tick=False):
        yield


@pytest.fixture
def pay(app: Celery) -> Any:
    """A task."""

    @app.task(base=ReliableTask, name="shop.pay", throws=(KeyError,))
    def pay(n: int = 0, **more: Any) -> int:
        return n

    return app.tasks["shop.pay"]


def letter_of(request: Any, error: BaseException, *args: Any, **changed: Any) -> Letter:
    """The letter that a request becomes."""
    options = replace(read_options(request.app, request.task), **changed)
    found = letter_of_request(request, error, "Traceback", options, *args)
    assert found is not None
    return found


def about(request: Any, error: BaseException, *args: Any, **changed: Any) -> DeadLetter:
    """What is known of it."""
    return letter_of(request, error, *args, **changed).about


# -- why -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "retries", "cause"),
    [
        (PILL, 2, "poison"),
        (RequeuesExhausted("one", 101, 100), 0, "requeues"),
        (TimeLimitExceeded(60), 2, "time_limit"),
        (WorkerLostError("gone"), 2, "lost"),
        (Reject("no", requeue=False), 2, "rejected"),
        (ValueError("no"), 1, "retries"),
        (ValueError("no"), 0, "failed"),
    ],
    ids=repr,
)
def test_an_error_says_why(error: BaseException, retries: int, cause: str) -> None:
    """Whoever was retried has used up its retries, where nothing more is known."""
    assert cause_of(error, retries) == cause


@pytest.mark.parametrize("cause", [*Cause])
def test_only_what_is_asked_for_is_kept(bench: Bench, pay: Any, cause: Cause) -> None:
    """The options name the causes."""
    pay.delay()
    request = bench.receive()
    options = read_options(request.app, pay)
    kept = replace(options, causes=frozenset({cause}))
    dropped = replace(options, causes=frozenset({*Cause} - {cause}))
    assert letter_of_request(request, ValueError(), "", kept, cause)
    assert letter_of_request(request, ValueError(), "", dropped, cause) is None


@pytest.mark.parametrize("error", [KeyError("7"), DuplicateTaskError("k", "two", 1.0)], ids=repr)
def test_an_expected_error_is_no_dead_letter(bench: Bench, pay: Any, error: BaseException) -> None:
    """``throws`` says what is expected, and another task runs for a duplicate."""
    pay.delay()
    request = bench.receive()
    assert letter_of_request(request, error, "", read_options(request.app, pay)) is None


@pytest.mark.parametrize("error", [PILL, RequeuesExhausted("one", 101, 100)], ids=repr)
def test_who_expects_all_errors_does_not_expect_a_verdict(
    bench: Bench, pay: Any, error: BaseException
) -> None:
    """``throws=(Exception,)`` is about what the task itself raises."""
    pay.throws = (Exception,)
    pay.delay()
    request = bench.receive()
    options = read_options(request.app, pay)
    assert letter_of_request(request, ValueError(), "", options) is None
    assert letter_of_request(request, error, "", options) is not None


# -- what is known of a task's -------------------------------------------------------------------


def test_a_letter_says_what_is_known(bench: Bench, pay: Any) -> None:
    """Of the call, of the message and of the worker."""
    result = pay.apply_async((7,), {"to": "me"}, priority=3, retries=2)
    request = bench.receive()
    assert about(request, ValueError("no")) == DeadLetter(
        id=result.id,
        task="shop.pay",
        task_id=result.id,
        cause=Cause.RETRIES,
        error="ValueError: no",
        traceback="Traceback",
        worker="bench@test",
        queue="celery",
        priority=3,
        retries=2,
        first_at=NOON,
        argsrepr="(7,)",
        kwargsrepr="{'to': 'me'}",
        root_id=result.id,
    )


def test_a_letter_names_the_key_that_its_message_owns(bench: Bench, app: Celery) -> None:
    """So that somebody can find both by either."""

    @app.task(base=ReliableTask, name="shop.once")
    @once(key="{n}")
    def pay(n: int) -> None:
        pass

    app.tasks["shop.once"].delay(7)
    request = bench.receive()
    key = request.request_dict["reliable_claim"]["key"]
    assert key
    assert about(request, ValueError()).claim == key


@pytest.mark.parametrize("claim", [None, "key", {}, {"key": None}], ids=repr)
def test_a_letter_without_a_key_names_none(bench: Bench, pay: Any, claim: Any) -> None:
    """Producers of all kinds write headers."""
    pay.delay()
    request = bench.receive()
    request.request_dict["reliable_claim"] = claim
    assert about(request, ValueError()).claim == ""


def test_the_cause_can_be_known_before(bench: Bench, pay: Any) -> None:
    """An expired task has an error of Celery's that says less."""
    pay.delay()
    letter = about(bench.receive(), ValueError(), Cause.EXPIRED, causes=frozenset(Cause))
    assert letter.cause == "expired"


@pytest.mark.parametrize(
    ("headers", "error", "first_at"),
    [
        ({}, ValueError(), NOON),
        ({"reliable_first_failed": 7.0}, ValueError(), 7.0),
        ({"reliable_first_failed": 7.0}, PILL, 7.0),
        ({}, PILL, 5.0),
        ({}, PoisonPill("one", 3, 3), NOON),
    ],
)
def test_when_it_failed_first(
    bench: Bench, pay: Any, headers: dict[str, Any], error: BaseException, first_at: float
) -> None:
    """As its retries say, or its crashes; else it is now."""
    pay.delay()
    request = bench.receive()
    request.request_dict.update(headers)
    assert about(request, error).first_at == first_at


@pytest.mark.parametrize(("counted", "crashes"), [(0, 3), (5, 5), (None, 3)])
def test_crashes_are_those_of_whom_knows_more(
    bench: Bench, pay: Any, counted: int | None, crashes: int
) -> None:
    """The message says how many there were when it came; the verdict how many there are."""
    pay.delay()
    request = bench.receive()
    request.request_dict["crashes"] = counted
    assert about(request, PILL).crashes == crashes


@pytest.mark.parametrize(("count", "deliveries"), [(4, 4), (None, 0), ("4", 0)])
def test_deliveries_are_counted_as_far_as_the_broker_does(
    bench: Bench, pay: Any, count: Any, deliveries: int
) -> None:
    """What is no number is none of its."""
    pay.delay()
    request = bench.receive()
    request.request_dict["x-delivery-count"] = count
    assert about(request, ValueError()).deliveries == deliveries


def test_long_texts_are_cut(bench: Bench, pay: Any) -> None:
    """Of an error the beginning is kept, of a traceback the end."""
    pay.delay()
    request = bench.receive()
    options = read_options(request.app, pay)
    trace = "first" + "x" * 30_000 + "last"
    letter = letter_of_request(request, ValueError("y" * 5_000), trace, options)
    assert letter is not None
    assert letter.about.error == "ValueError: " + "y" * 988
    assert len(letter.about.traceback) == 20_000
    assert letter.about.traceback.endswith("last")


def test_a_part_of_a_group_names_it(bench: Bench, app: Celery, pay: Any) -> None:
    """And who called it; no chord waits for it."""
    pay.apply_async(group_id="g", root_id="r", parent_id="p")
    letter = about(bench.receive(), ValueError())
    assert (letter.group_id, letter.root_id, letter.parent_id) == ("g", "r", "p")
    assert letter.chord_id is None


def test_a_part_of_a_chord_names_that(bench: Bench, app: Celery, pay: Any) -> None:
    """The chord has counted its failure: it cannot be replayed alone."""
    result = chord([pay.s(1), pay.s(2)], pay.s()).apply_async()
    letter = about(bench.receive(), ValueError())
    assert result.parent is not None
    assert letter.chord_id == letter.group_id == result.parent.id


def test_a_chain_in_a_chord_names_it_before_its_last_step(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """Its first step knows of the chord by what follows; when it dies, the chord is told, too."""
    result = chord([chain(pay.si(1), pay.si(2), pay.si(3)), pay.si(4)], pay.s()).apply_async()
    letter = about(bench.receive(), ValueError())
    assert result.parent is not None
    assert letter.chord_id == result.parent.id


def test_a_chain_of_its_own_names_none(bench: Bench, app: Celery, pay: Any) -> None:
    """Nobody counts its steps."""
    chain(pay.si(1), pay.si(2)).apply_async()
    assert about(bench.receive(), ValueError()).chord_id is None


def test_the_message_of_this_librarys_transport_is_kept_as_it_was(bench: Bench, pay: Any) -> None:
    """With its queue, which its routing key does not say."""
    pay.delay()
    held = Delivery("t", "list", "slow", b"the message", Copy(Guard.MAY_RUN, 0, 0.0))
    channel = SimpleNamespace(held=SimpleNamespace(get=lambda tag: held))
    letter = letter_of(bench.receive(channel=channel), ValueError())
    assert letter.message == b"the message"
    assert letter.about.queue == "slow"


def test_the_message_of_another_broker_is_written_anew(bench: Bench, app: Celery, pay: Any) -> None:
    """So that it can be read as that of this library's."""
    pay.apply_async((7,), headers={"x": "1"})
    letter = letter_of(bench.receive(), ValueError())
    original = Original.read(app, "one", letter.message)
    assert (original.task, original.args, original.headers["x"]) == ("shop.pay", [7], "1")


def test_it_has_the_bounds_of_the_options(bench: Bench, app: Celery, pay: Any) -> None:
    """They go with it, for the store knows no app."""
    app.conf.reliable_dead_letter_max_body = 10
    pay.delay()
    letter = letter_of(bench.receive(), ValueError(), bounds=read_options(app).bounds)
    assert letter.is_too_large


# -- of a message that is no task's --------------------------------------------------------------


def amqp_message(headers: Any = None, body: Any = b"body", **properties: Any) -> Any:
    """A message as py-amqp reads one."""
    return SimpleNamespace(
        channel=None,
        delivery_tag=1,
        headers=headers,
        body=body,
        content_type="application/json",
        content_encoding="utf-8",
        properties={"delivery_tag": 1, "application_headers": headers, **properties},
        delivery_info={"routing_key": "0.1.1.slow", "exchange": "delay", "consumer_tag": "c"},
    )


def letter_without_task(message: Any, options: Options, error: Any = None) -> Letter | None:
    """The letter of a message that nobody can run."""
    return letter_of_message(
        message,
        error,
        Cause.UNKNOWN_TASK,
        options,
        queue="slow",
        worker="w@h",
        event="the event",
        raw=b"raw",
    )


def test_of_an_unknown_task_as_much_is_known(app: Celery) -> None:
    """Its headers are those of a task."""
    headers = {
        "id": "one",
        "task": "shop.new",
        "retries": 2,
        "x-delivery-count": 4,
        "argsrepr": "(7,)",
        "kwargsrepr": "{}",
        "reliable_claim": {"key": "k"},
        "root_id": "r",
        "parent_id": "p",
        "group": "g",
    }
    error = KeyError("shop.new")
    letter = letter_without_task(amqp_message(headers, priority=5), read_options(app), error)
    assert letter is not None
    assert letter.message == b"raw"
    assert letter.about == DeadLetter(
        id="one",
        task="shop.new",
        task_id="one",
        cause=Cause.UNKNOWN_TASK,
        error="KeyError: 'shop.new'",
        worker="w@h",
        queue="slow",
        priority=5,
        retries=2,
        deliveries=4,
        first_at=NOON,
        argsrepr="(7,)",
        kwargsrepr="{}",
        claim="k",
        root_id="r",
        parent_id="p",
        group_id="g",
    )


@pytest.mark.parametrize("headers", [None, [], {}, "headers", {"id": None, "retries": "x"}])
def test_of_a_message_without_headers_its_delivery_is_known(app: Celery, headers: Any) -> None:
    """It has a name all the same."""
    letter = letter_without_task(amqp_message(headers), read_options(app))
    assert letter is not None
    found = letter.about
    assert (found.id, found.task, found.task_id) == ("the event", "", "")
    assert (found.error, found.retries, found.root_id) == ("no task's message", 0, "")
    assert (found.parent_id, found.group_id, found.priority) == (None, None, None)


def test_it_is_not_kept_where_its_cause_is_not(app: Celery) -> None:
    """The app says so, for there is no task."""
    app.conf.reliable_dead_letter = {"unknown_task": False}
    assert letter_without_task(amqp_message({}), read_options(app)) is None


# -- the whole message ---------------------------------------------------------------------------


def read_raw(message: Any) -> tuple[dict[str, Any], bytes]:
    """A message as it is kept, and its body."""
    found = json.loads(raw_of(message))
    return found, base64.b64decode(found["body"])


def test_a_message_of_amqp_is_kept_as_one_of_redis() -> None:
    """Without what is of its delivery alone."""
    headers = {"id": "one", "task": "shop.pay"}
    found, body = read_raw(amqp_message(headers, priority=5, correlation_id="one"))
    assert body == b"body"
    assert (found["content-type"], found["content-encoding"]) == ("application/json", "utf-8")
    assert found["headers"] == headers
    assert found["properties"] == {
        "priority": 5,
        "correlation_id": "one",
        "body_encoding": "base64",
        "delivery_info": {"exchange": "delay", "routing_key": "0.1.1.slow"},
    }


def test_a_body_that_was_unpacked_is_not_called_packed() -> None:
    """kombu unpacks it when it comes, and leaves the header."""
    found, _ = read_raw(amqp_message({"id": "one", "compression": "application/x-gzip"}))
    assert found["headers"] == {"id": "one"}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b"\xff\x00", b"\xff\x00"),
        (memoryview(b"view"), b"view"),
        ("täxt", "täxt".encode()),
        ("\ud800", b"\xed\xa0\x80"),
        (None, b""),
        ([[7], {}, {}], b"[[7], {}, {}]"),
        ({"a": 1}, b'{"a": 1}'),
        (10**12, b"1000000000000"),
    ],
)
def test_a_body_of_any_kind_is_kept(body: Any, kept: bytes) -> None:
    """Transports hand it over as bytes or as text; one that is not of kombu's making is JSON."""
    assert read_raw(amqp_message({}, body))[1] == kept


def test_what_json_has_not_is_kept_as_text() -> None:
    """AMQP's headers have times, bytes and tables."""
    died = datetime(2026, 3, 1, tzinfo=UTC)
    headers = {"when": died, "bytes": b"\x00", "table": {"a": [1]}, "nested": {"t": died}, 7: "n"}
    found, _ = read_raw(amqp_message(headers, timestamp=died, message_id=UUID(int=7)))
    assert found["headers"] == {
        "when": str(died),
        "bytes": str(b"\x00"),
        "table": {"a": [1]},
        "nested": str({"t": died}),
        "7": "n",
    }
    assert found["properties"]["timestamp"] == str(died)
    assert found["properties"]["message_id"] == str(UUID(int=7))


def test_a_message_without_headers_is_kept() -> None:
    """Who wrote it was no Celery."""
    assert read_raw(amqp_message(None))[0]["headers"] == {}


def test_a_message_that_is_kept_can_be_read(app: Celery, pay: Any) -> None:
    """By who replays it."""
    pay.apply_async((7,), {"to": "me"}, serializer="json", priority=2)
    original = Original.read(app, "one", raw_of(take(app)))
    assert (original.args, original.kwargs, original.priority) == ([7], {"to": "me"}, 2)


# -- redaction -----------------------------------------------------------------------------------


def test_what_must_not_be_read_is_taken_out(bench: Bench, app: Celery, pay: Any) -> None:
    """Of a task's letter and of one that is no task's; the message itself stays whole."""

    def redact(letter: DeadLetter) -> DeadLetter:
        return replace(letter, argsrepr="(...)", error=letter.error.replace("4111", "****"))

    app.conf.reliable_dead_letter_redact = redact
    pay.delay(4111)
    request = bench.receive()
    options = read_options(app, pay)
    letter = letter_of_request(request, ValueError("card 4111"), "", options)
    assert letter is not None
    assert (letter.about.argsrepr, letter.about.error) == ("(...)", "ValueError: card ****")
    assert Original.read(app, "one", letter.message).args == [4111]
    other = letter_without_task(amqp_message({"argsrepr": "(4111,)"}), options)
    assert other is not None
    assert other.about.argsrepr == "(...)"


def refuse(letter: DeadLetter) -> DeadLetter:
    """Fail to redact."""
    raise RuntimeError("cannot redact")


@pytest.mark.parametrize(
    ("redact", "why"),
    [
        (refuse, "cannot redact"),
        (lambda letter: None, "'NoneType' object has no attribute"),
        (lambda letter: replace(letter, error=None), "error is no text: None"),
    ],
    ids=["raises", "returns nothing", "returns no text"],
)
def test_where_redaction_fails_nothing_can_be_read(
    bench: Bench, app: Celery, pay: Any, caplog: pytest.LogCaptureFixture, redact: Any, why: str
) -> None:
    """The task is kept all the same, and the log says why it shows nothing."""
    app.conf.reliable_dead_letter_redact = redact
    pay.delay(4111, to="me")
    request = bench.receive()
    request.request_dict["reliable_claim"] = {"key": "4111"}
    letter = letter_of(request, ValueError("4111"), redact=redact)
    assert "4111" not in repr(letter.about)
    assert "'me'" not in repr(letter.about)
    hidden = "(not redacted)"
    assert (letter.about.error, letter.about.traceback) == (hidden, hidden)
    assert (letter.about.task, letter.about.cause) == ("shop.pay", "failed")
    assert "reliable_dead_letter_redact failed for task" in caplog.text
    assert why in caplog.text
    assert letter.arguments("event")


def test_redaction_changes_nothing_that_letters_are_found_by(
    bench: Bench, app: Celery, pay: Any
) -> None:
    """It is about what can be read."""

    def redact(letter: DeadLetter) -> DeadLetter:
        return replace(letter, id="", task="hidden", claim="", chord_id="x", error="")

    app.conf.reliable_dead_letter_redact = redact
    pay.delay(4111)
    request = bench.receive()
    letter = letter_of(request, ValueError("4111"), redact=redact)
    assert (letter.about.id, letter.about.task) == (request.id, "shop.pay")
    assert (letter.about.error, letter.about.chord_id) == ("", None)


def test_a_secret_is_found_before_it_is_cut(bench: Bench, pay: Any) -> None:
    """What is kept of an error, or of a traceback, begins or ends anywhere."""

    def redact(letter: DeadLetter) -> DeadLetter:
        shown = {name: getattr(letter, name) for name in ("error", "traceback")}
        return replace(letter, **{k: v.replace("4111222", "*") for k, v in shown.items()})

    pay.delay()
    request = bench.receive()
    options = replace(read_options(request.app, pay), redact=redact)
    error = ValueError("x" * 985 + "4111222")
    letter = letter_of_request(request, error, "4111222" + "y" * 19_997, options)
    assert letter is not None
    assert letter.about.error == f"ValueError: {'x' * 985}*"
    assert letter.about.traceback == "*" + "y" * 19_997


def test_an_error_that_cannot_be_shown_is_kept_by_its_kind(bench: Bench, pay: Any) -> None:
    """Its class is the user's."""

    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("unspeakable")

    pay.delay()
    error = about(bench.receive(), Unspeakable()).error
    assert error == "Unspeakable: (it cannot be shown: RuntimeError)"


@pytest.mark.parametrize("strange", ["x", None, [], {}], ids=repr)
def test_headers_that_are_no_numbers_are_left_out(bench: Bench, pay: Any, strange: Any) -> None:
    """Anybody can have written them."""
    pay.delay()
    request = bench.receive()
    for name in ("retries", "crashes", "reliable_first_failed", "x-delivery-count"):
        request.request_dict[name] = strange
    letter = about(request, ValueError("no"))
    assert (letter.retries, letter.crashes, letter.deliveries) == (0, 0, 0)
    assert letter.first_at == NOON
