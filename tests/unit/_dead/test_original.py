"""The message of a dead letter, read again: what is called, and how."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from kombu.compression import compress

from reliable_tasks import ReliableTask
from reliable_tasks._dead.letters import raw_of
from reliable_tasks._dead.original import Original, text_of
from reliable_tasks.errors import ReplayRefused
from tests.unit.harness import take


def written(
    body: Any = b'[[7], {"to": "me"}, null]',
    headers: Any = None,
    content_type: Any = "application/json",
    **properties: Any,
) -> bytes:
    """A message as kombu's Redis transport writes it."""
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-type": content_type,
            "content-encoding": "utf-8" if "json" in str(content_type) else "binary",
            "headers": {"id": "old", "task": "shop.pay"} if headers is None else headers,
            "properties": {"body_encoding": "base64", **properties},
        }
    ).encode()


@pytest.fixture
def pay(app: Celery) -> Any:
    """A task."""

    @app.task(base=ReliableTask, name="shop.pay")
    def pay(n: int = 0, **more: Any) -> int:
        return n

    return app.tasks["shop.pay"]


def read(app: Celery, raw: bytes | None = None) -> Original:
    """The message, or the next one in the queue."""
    return Original.read(app, "one", raw_of(take(app)) if raw is None else raw)


def reason(app: Celery, raw: bytes) -> str:
    """Why a message is refused."""
    with pytest.raises(ReplayRefused) as caught:
        read(app, raw)
    assert caught.value.id == "one"
    return caught.value.reason


def plain(body: Any) -> bytes:
    """A message whose body is written as it is, as by clients that are not kombu."""
    found = json.loads(written())
    del found["properties"]["body_encoding"]
    return json.dumps({**found, "body": body}).encode()


def test_a_body_that_is_written_as_it_is_is_read(app: Celery, pay: Any) -> None:
    """kombu, and so the worker that ran it, has read it; and so can people."""
    raw = plain('[[7], {"to": "me"}, null]')
    original = read(app, raw)
    assert (original.args, original.kwargs) == ([7], {"to": "me"})
    assert json.loads(text_of(raw))["body"] == [[7], {"to": "me"}, None]


@pytest.mark.parametrize("body", [{"a": 1}, 5, None, "no JSON"], ids=repr)
def test_a_body_that_is_none_is_refused(app: Celery, pay: Any, body: Any) -> None:
    """No worker could have run it, either."""
    assert reason(app, plain(body)).startswith("its message cannot be read")


# -- reading -------------------------------------------------------------------------------------


def test_a_message_says_what_is_called(app: Celery) -> None:
    """The task, its arguments, and how it was written."""
    original = read(app, written(priority=3))
    assert (original.task, original.args, original.kwargs) == ("shop.pay", [7], {"to": "me"})
    assert (original.serializer, original.priority, original.id) == ("json", 3, "one")
    assert (original.group_id, original.chord, dict(original.embed)) == (None, None, {})


def test_a_message_that_was_not_kept_is_refused(app: Celery) -> None:
    """The reason names the setting."""
    assert reason(app, b"") == (
        "its message was too large to be kept (reliable_dead_letter_max_body)"
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe",
        b"no json",
        b"[]",
        b"7",
        b"{}",
        json.dumps({**json.loads(written()), "body": "?"}).encode(),
        json.dumps({**json.loads(written()), "properties": None}).encode(),
        written(b"no json"),
        written(b"[]"),
        written(b"[[], {}]"),
        written(b"[null, {}, {}]"),
        written(b"[[], [1], {}]"),
        written(b'[[], {}, ["embedded"]]'),
        written(headers={}),
        written(headers={"id": "old", "task": None}),
        written(headers={"id": "old", "task": 7}),
        written(b"no gzip", {"task": "shop.pay", "compression": "application/x-gzip"}),
        written(b"[[], {}, {}]", content_type="text/plain"),
        b"[" * 100_000,
        written(b"[" * 100_000),
        written(headers={"id": "old", "task": "shop.pay", "stamped_headers": 1}),
        written(headers={"id": "old", "task": "shop.pay", "stamps": ["a"], "stamped_headers": "a"}),
        written(b'[[], {}, {"chain": ["shop.pay"]}]'),
        written(b'[[], {}, {"chord": "shop.pay"}]'),
    ],
)
def test_a_message_that_cannot_be_read_is_refused(app: Celery, raw: bytes) -> None:
    """It was no task's, or is broken: a refusal, and no error that would end a whole replay."""
    assert reason(app, raw).startswith("its message cannot be read: ")


def test_a_pickled_message_is_not_unpacked_by_default(app: Celery) -> None:
    """Who writes to the queue could have any code run."""

    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("it was unpickled",)

    body = pickle.dumps(([Trap()], {}, None))
    found = reason(app, written(body, content_type="application/x-python-serialize"))
    assert "ContentDisallowed" in found
    assert "pickle" in found


def test_a_pickled_message_is_read_where_the_app_takes_such(app: Celery) -> None:
    """It is sent again as it was written."""
    app.conf.accept_content = ["json", "pickle"]
    body = pickle.dumps(([{7}], {}, None))
    original = read(app, written(body, content_type="application/x-python-serialize"))
    assert original.args == [{7}]
    assert original.serializer == original.options()["serializer"] == "pickle"


def test_a_packed_body_is_unpacked_and_packed_again(app: Celery) -> None:
    """The header says how."""
    body, kind = compress(b"[[7], {}, null]", "gzip")
    original = read(app, written(body, {"task": "shop.pay", "compression": kind}))
    assert original.args == [7]
    assert original.options()["compression"] == kind


# -- how it was called ---------------------------------------------------------------------------


def test_a_plain_call_has_few_options(app: Celery, pay: Any) -> None:
    """What is reset, or not set, is left out."""
    pay.delay(7)
    options = read(app).options()
    assert set(options) <= {"serializer", "priority", "argsrepr", "kwargsrepr", "ignore_result"}
    assert (options["serializer"], options["argsrepr"]) == ("json", "(7,)")


def test_what_the_caller_asked_for_is_kept(app: Celery, pay: Any) -> None:
    """Limits, a name to show, priority, texts, and whether the result is kept."""
    pay.apply_async(
        (7,),
        priority=4,
        shadow="pay.big",
        time_limit=60,
        soft_time_limit=50,
        argsrepr="(...)",
        kwargsrepr="{...}",
        ignore_result=True,
    )
    options = read(app).options()
    assert options == {
        "priority": 4,
        "shadow": "pay.big",
        "time_limit": 60,
        "soft_time_limit": 50,
        "argsrepr": "(...)",
        "kwargsrepr": "{...}",
        "ignore_result": True,
        "serializer": "json",
    }


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (None, {}),
        ([None, None], {}),
        ([60, None], {"time_limit": 60}),
        ([60], {"time_limit": 60}),
        ([None, 5], {"soft_time_limit": 5}),
    ],
)
def test_limits_are_those_that_were_set(app: Celery, limits: Any, expected: dict[str, Any]) -> None:
    """The hard one first, as in the protocol."""
    options = read(app, written(headers={"task": "shop.pay", "timelimit": limits})).options()
    assert {k: v for k, v in options.items() if k.endswith("limit")} == expected


def test_what_begins_anew_is_not_kept(app: Celery, pay: Any) -> None:
    """When it was to run and until when, its retries, and its id."""
    pay.apply_async((7,), countdown=60, expires=3600, retries=2, task_id="old")
    original = read(app)
    assert original.headers["expires"]
    assert original.headers["eta"]
    assert not {"expires", "eta", "countdown", "retries", "task_id"} & set(original.options())


def test_headers_of_the_callers_own_are_kept(app: Celery) -> None:
    """Not those of the protocol, of one delivery, or of this library."""
    headers = {
        "task": "shop.pay",
        "id": "old",
        "lang": "py",
        "origin": "gen1@host",
        "retries": 1,
        "tenant": "t7",
        "traceparent": "00-1-2-01",
        "x-shop": "berlin",
        "redelivered": True,
        "crashes": 2,
        "compression": None,
        "x-delivery-count": 3,
        "x-death": [{}],
        "reliable_claim": {"key": "k"},
        "reliable_requeues": 9,
        "reliable-replay-of": "before",
        "stamped_headers": ["by"],
        "stamps": {"by": ["me"]},
        "by": "me",
    }
    options = read(app, written(headers=headers)).options()
    own = {"tenant": "t7", "traceparent": "00-1-2-01", "x-shop": "berlin"}
    assert options["headers"] == own


def test_stamps_are_kept(app: Celery, pay: Any) -> None:
    """The message that is sent anew has the same."""
    canvas = pay.s(7)
    canvas.stamp(customer="c7", stamped_headers=["customer"])
    canvas.apply_async()
    first = take(app)
    original = read(app, raw_of(first))
    pay.apply_async(original.args, original.kwargs, **original.options())
    second = take(app)
    assert first.headers["stamps"]
    assert second.headers["stamps"] == first.headers["stamps"]
    assert second.headers["stamped_headers"] == first.headers["stamped_headers"]


def test_callbacks_are_kept(app: Celery, pay: Any) -> None:
    """Of a success and of a failure; the next message has the same."""
    pay.apply_async((7,), link=pay.si(1), link_error=[pay.si(2), pay.si(3)])
    original = read(app)
    pay.apply_async(original.args, original.kwargs, **original.options())
    _, _, embed = take(app).decode()
    assert [one["args"] for one in embed["callbacks"]] == [[1]]
    assert [one["args"] for one in embed["errbacks"]] == [[2], [3]]


# -- where it was called -------------------------------------------------------------------------


def test_a_call_of_its_own_has_no_place(app: Celery) -> None:
    """Nothing is made up."""
    assert read(app, written()).place() == {}


def test_a_part_of_a_canvas_knows_its_place(app: Celery, pay: Any) -> None:
    """Who called it, its group, and what comes after it."""
    pay.apply_async(
        (7,), root_id="r", parent_id="p", group_id="g", group_index=0, chain=[pay.si(8)]
    )
    original = read(app)
    place = original.place()
    chained = place.pop("chain")
    assert place == {"root_id": "r", "parent_id": "p", "group_id": "g", "group_index": 0}
    assert [step["args"] for step in chained] == [[8]]
    assert original.group_id == "g"
    assert original.chord is None


def test_a_part_of_a_chord_knows_it(app: Celery, pay: Any) -> None:
    """By its message, or by the last step of the chain that it begins."""
    body = pay.s(after="all")
    for header in (pay.si(1), chain(pay.si(1), pay.si(2), pay.si(3))):
        chord([header, pay.si(4)], body).apply_async()
        found = read(app).chord
        assert found is not None
        assert (found["task"], found["kwargs"]) == ("shop.pay", {"after": "all"})
        while take(app) is not None:
            pass


def test_a_chain_or_a_group_alone_is_no_chord(app: Celery, pay: Any) -> None:
    """Nobody has counted its failure."""
    chain(pay.si(1), pay.si(2)).apply_async()
    assert read(app).chord is None
    group(pay.si(1), pay.si(2)).apply_async()
    assert read(app).chord is None


def test_it_can_be_called_anew_in_a_canvas(app: Celery, pay: Any) -> None:
    """With its arguments, to which a canvas adds none, and its options."""
    pay.apply_async((7,), {"to": "me"}, headers={"tenant": "t7"}, time_limit=60)
    made = read(app).signature(app)
    assert (made.task, list(made.args), made.kwargs) == ("shop.pay", [7], {"to": "me"})
    assert made.immutable
    assert made.options["headers"] == {"tenant": "t7"}
    assert made.options["time_limit"] == 60


# -- as text -------------------------------------------------------------------------------------


def test_a_message_is_shown_with_its_body() -> None:
    """As JSON, where it was written so."""
    shown = json.loads(text_of(written()))
    assert shown["body"] == [[7], {"to": "me"}, None]
    assert shown["headers"]["task"] == "shop.pay"


def test_a_body_of_another_kind_is_shown_as_bytes() -> None:
    """It is not unpickled to be looked at."""
    body = pickle.dumps([7])
    shown = json.loads(text_of(written(body, content_type="application/x-python-serialize")))
    assert shown["body"] == repr(body)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"no json", "no json"),
        (b"\xff!", "\\xff!"),
        (b"[]", "[]"),
        (b'{"body": "?"}', '{"body": "?"}'),
        (b'{"body": "e30="}', '{"body": "e30="}'),
        (b"", ""),
    ],
)
def test_what_is_no_message_is_shown_as_it_is(raw: bytes, text: str) -> None:
    """Somebody has to see what it is."""
    assert text_of(raw) == text


def test_a_body_that_is_broken_is_shown_as_it_is() -> None:
    """With all that is around it."""
    raw = written(b"no json")
    assert text_of(raw) == raw.decode()


@pytest.mark.parametrize("raw", [b"[" * 100_000, written(b"[" * 100_000)])
def test_what_is_nested_too_deeply_is_shown_as_it_is(raw: bytes) -> None:
    """Whoever looks at it must not meet an error."""
    assert text_of(raw) == raw.decode()
