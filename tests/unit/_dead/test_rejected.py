"""Messages that are no task's of a worker are kept where somebody can look at them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue

from reliable_tasks import dead_letters
from reliable_tasks._dead.rejected import Rejected
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import Sent
from reliable_tasks._store.delivery import Copy, Delivery, Guard


def message(held: Any = None, tag: Any = "tag", body: bytes = b"[]", **headers: Any) -> Any:
    """A message as a worker receives one."""
    return SimpleNamespace(
        channel=SimpleNamespace(held=held),
        delivery_tag=tag,
        headers=headers,
        body=body,
        content_type="application/json",
        content_encoding="utf-8",
        properties={"priority": 3},
        delivery_info={"routing_key": "celery", "exchange": ""},
    )


def keep(app: Celery, *args: Any, is_unknown: bool = True, **options: Any) -> bool:
    """Have a message kept."""
    return Rejected(app, "w@h").keep(*args, is_unknown=is_unknown, **options)


def test_a_message_of_an_unknown_task_is_kept_at_once(app: Celery) -> None:
    """On another broker than ours; it is to be acknowledged then."""
    assert keep(app, message(id="one", task="shop.new"), KeyError("shop.new"))
    letter = dead_letters.get("one", app=app)
    assert (letter.task, letter.cause, letter.worker) == ("shop.new", "unknown_task", "w@h")
    assert (letter.error, letter.queue, letter.priority) == ("KeyError: 'shop.new'", "celery", 3)


def test_its_queue_is_found_by_where_it_was_sent(app: Celery) -> None:
    """Its routing key need not be the queue's name."""
    app.conf.task_queues = [Queue("orders", Exchange("shop"), "order.created")]
    received = message(id="one", task="shop.new")
    received.delivery_info = {"exchange": "shop", "routing_key": "order.created"}
    assert keep(app, received, None)
    assert dead_letters.get("one", app=app).queue == "orders"


def test_a_message_that_is_no_tasks_is_kept_as_such(app: Celery) -> None:
    """Without an id it has that of its delivery."""
    assert keep(app, message(), None, is_unknown=False)
    (letter,) = dead_letters.list(app=app)
    assert (letter.cause, letter.task, letter.error) == ("undecodable", "", "no task's message")
    assert re.fullmatch("[0-9a-f]{32}", letter.id)


def test_the_same_message_that_comes_back_is_one_letter(app: Celery) -> None:
    """RabbitMQ counts its tags anew on each connection; another message is another letter."""
    for tag in (1, 2, 3):
        assert keep(app, message(id="one", tag=tag, **{"x-delivery-count": tag}), None)
    assert keep(app, message(id="one", tag=1, body=b"{}"), None)
    assert dead_letters.count(app=app) == 2


def test_messages_without_an_id_are_letters_each(app: Celery) -> None:
    """Two can say the same: none of them is taken for the other one."""
    for tag in (1, 2):
        assert keep(app, message(tag=tag), None)
    assert dead_letters.count(app=app) == 2


def test_the_same_message_again_after_a_replay_is_another_letter(app: Celery) -> None:
    """Somebody gives a task the same id each night: it was sent again, and not replayed now."""
    assert keep(app, message(id="nightly", task="shop.new", tag=1), None)
    place = dead_place(app)
    assert place is not None
    place.store.reserve(place.server, "nightly", "token")
    place.store.release(place.server, "nightly", "token", Sent.SENT)
    assert dead_letters.count(app=app) == 0
    assert keep(app, message(id="nightly", task="shop.new", tag=1), None)
    (letter,) = dead_letters.list(app=app)
    assert letter.id == "nightly.1"


def test_the_same_message_of_kombus_redis_transport_is_one_letter(app: Celery) -> None:
    """It has a tag of its own, and says when it comes again; another one may say the same."""
    for headers in ({}, {"redelivered": True}):
        assert keep(app, message(tag="t1", **headers), None)
    assert keep(app, message(tag="t2"), None)
    assert dead_letters.count(app=app) == 2


def test_a_message_of_which_nothing_can_be_made_is_rejected(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would end its worker, and the next one; the log has what there is."""
    strange = message()
    del strange.properties
    assert not keep(app, strange, None)
    assert "A message cannot be kept" in caplog.text
    assert dead_letters.count(app=app) == 0


def test_with_this_librarys_transport_it_is_kept_when_it_ends(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """In the step that acknowledges it; it is told when that is done."""
    delivery = Delivery("tag", "celery", "slow", b"the message", Copy(Guard.MAY_RUN, 0, 0.0))
    held = SimpleNamespace(get={"tag": delivery}.get)
    assert keep(app, message(held, id="one", task="shop.new"), KeyError("shop.new"))
    assert dead_letters.count(app=app) == 0
    letter = delivery.letter
    assert letter is not None
    assert (letter.message, letter.about.queue) == (b"the message", "slow")
    assert caplog.records == []
    assert delivery.when_buried is not None
    delivery.when_buried("one", 1)
    assert "it is dead letter one" in caplog.text


def test_a_delivery_that_is_over_is_kept_as_another_brokers(app: Celery) -> None:
    """Its tag is not held any more."""
    assert keep(app, message(SimpleNamespace(get={}.get), id="one"), None)
    assert dead_letters.count(app=app) == 1


@pytest.mark.parametrize("is_unknown", [True, False])
def test_what_is_not_to_be_kept_is_rejected(app: Celery, is_unknown: bool) -> None:
    """As without this library; the other cause is kept."""
    app.conf.reliable_dead_letter = ["unknown_task"]
    assert keep(app, message(id="one"), None, is_unknown=is_unknown) is is_unknown
    assert dead_letters.count(app=app) == int(is_unknown)


def test_what_cannot_be_kept_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    """RabbitMQ may have a place for it; and the log has all of it."""
    with Celery("shop", broker="memory://", set_as_current=False) as app:
        assert not keep(app, message(id="one", body=b"[7]"), None)
    assert "cannot be kept as a dead letter" in caplog.text
