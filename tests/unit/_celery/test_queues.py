"""A worker does not start on queues that RabbitMQ has as something else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue, binding
from kombu.exceptions import OperationalError

from reliable_tasks import ConfigError
from reliable_tasks._celery import queues
from reliable_tasks._celery.channels import queue_of
from reliable_tasks._celery.queues import (
    DEAD,
    check_queues,
    dead_queue,
    is_kept_by_rabbitmq,
    keep_what_is_dropped,
)


class ChannelError(Exception):
    """What a broker answers."""

    def __init__(self, reply_code: int) -> None:
        super().__init__(f"answer {reply_code}")
        self.reply_code = reply_code


class Broker:
    """An app, its connection and its only queue.

    Attributes:
        answer: What a declaration is answered with, if not with success.
        reachable: Whether there is a broker.
        closed: How many channels were closed.
    """

    channel_errors = (ChannelError,)
    name = "celery"

    def __init__(self) -> None:
        self.answer: Exception | None = None
        self.reachable = True
        self.closed = 0
        self.amqp = SimpleNamespace(queues={"celery": self})

    def connection_for_read(self) -> AbstractContextManager[Any]:
        """Connect."""
        return nullcontext(self)

    def ensure_connection(self, **options: Any) -> None:
        """Fail where there is no broker."""
        if not self.reachable:
            raise OperationalError("refused")

    def channel(self) -> Any:
        """Open a channel."""
        return self

    def __call__(self, channel: Any) -> Any:
        """Bind the queue."""
        return self

    def declare(self) -> None:
        """Answer."""
        if self.answer is not None:
            raise self.answer

    def close(self) -> None:
        """Count."""
        self.closed += 1


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A broker that has nothing against anything."""
    made = Broker()
    # The queue of dead letters is as good as any other one.
    monkeypatch.setattr(queues, "dead_queue", lambda: made)
    return made


def test_a_queue_that_fits_is_declared(broker: Any) -> None:
    """And its channel is closed again."""
    check_queues(broker)
    assert broker.closed == 2


def test_a_queue_of_another_type_is_refused(broker: Any) -> None:
    """The message names it and what can be done."""
    broker.answer = ChannelError(406)
    with pytest.raises(ConfigError, match=r"queue 'celery'.*answer 406.*task_default_queue"):
        check_queues(broker)


def test_another_refusal_is_the_brokers_own(broker: Any) -> None:
    """Missing rights are nothing that a new queue would mend."""
    broker.answer = ChannelError(403)
    with pytest.raises(ChannelError):
        check_queues(broker)


def test_a_broker_that_is_not_there_is_waited_for(broker: Any) -> None:
    """By the worker, as always."""
    broker.reachable = False
    check_queues(broker)


QUORUM = {"x-queue-type": "quorum"}
OURS = {"x-dead-letter-exchange": "reliable.dead", "x-delivery-limit": 1000}


@pytest.fixture
def kept(app: Celery) -> Celery:
    """An app of which RabbitMQ drops nothing."""
    keep_what_is_dropped(app)
    return app


def arguments(app: Celery, name: str) -> Any:
    """What a queue is declared with."""
    queues: Any = app.amqp.queues
    return queues[name].queue_arguments


def test_a_quorum_queue_keeps_what_is_dropped(kept: Celery) -> None:
    """It has a place for it, and a limit that comes after the crash budget."""
    kept.conf.task_queues = [Queue("jobs", queue_arguments=dict(QUORUM))]
    assert arguments(kept, "jobs") == {**QUORUM, **OURS}


@pytest.mark.parametrize(
    "own",
    [
        {"x-dead-letter-exchange": "mine"},
        {"x-delivery-limit": 5},
        {"x-dead-letter-exchange": "", "x-delivery-limit": -1, "x-max-length": 10},
    ],
)
def test_what_the_user_has_declared_stays(kept: Celery, own: dict[str, Any]) -> None:
    """Only what was left open is filled in."""
    kept.conf.task_queues = [Queue("jobs", queue_arguments={**QUORUM, **own})]
    assert arguments(kept, "jobs") == {**QUORUM, **OURS, **own}


@pytest.mark.parametrize("own", [None, {}, {"x-queue-type": "classic"}, {"x-max-priority": 9}])
def test_another_queue_is_left_as_it_is(kept: Celery, own: Any) -> None:
    """RabbitMQ refuses one that exists with other arguments."""
    kept.conf.task_queues = [Queue("jobs", queue_arguments=own)]
    assert arguments(kept, "jobs") == own


def test_queues_that_are_made_later_keep_it_too(kept: Celery) -> None:
    """By a name alone, or by a worker that is told to consume from one more."""
    kept.conf.task_create_missing_queue_type = "quorum"
    queues: Any = kept.amqp.queues
    queues.add(Queue("added", queue_arguments=dict(QUORUM)))
    queues.select_add("selected", queue_arguments=dict(QUORUM))
    for name in ("missing", "added", "selected"):
        assert arguments(kept, name) == {**QUORUM, **OURS}


def test_the_arguments_that_the_user_gave_are_not_changed(kept: Celery) -> None:
    """They may be those of other queues, too."""
    given = dict(QUORUM)
    kept.conf.task_queues = [Queue("jobs", queue_arguments=given)]
    assert arguments(kept, "jobs") == {**QUORUM, **OURS}
    assert given == QUORUM


def test_an_app_that_has_made_its_queues_makes_them_anew(app: Celery) -> None:
    """Whatever reads its configuration first can have made them; it goes on with the same app."""
    app.conf.task_queues = [Queue("jobs", queue_arguments=dict(QUORUM))]
    amqp, router = app.amqp, app.amqp.router
    assert arguments(app, "jobs") == QUORUM
    keep_what_is_dropped(app)
    assert app.amqp is amqp
    assert app.amqp.router is not router
    assert arguments(app, "jobs") == {**QUORUM, **OURS}


def test_asking_again_changes_nothing(kept: Celery) -> None:
    """A configuration is applied more than once."""
    queues: Any = kept.amqp.queues
    keep_what_is_dropped(kept)
    assert kept.amqp.queues is queues


def test_it_is_known_which_queues_keep_what_is_rejected(kept: Celery) -> None:
    """Then it is not rejected beside a letter of its own."""
    kept.conf.task_queues = [
        Queue("jobs", queue_arguments=dict(QUORUM)),
        Queue("classic"),
        Queue("mine", queue_arguments={**QUORUM, "x-dead-letter-exchange": "mine"}),
    ]
    found = {name: is_kept_by_rabbitmq(kept, name) for name in ("jobs", "classic", "mine", "other")}
    assert found == {"jobs": True, "classic": False, "mine": False, "other": False}


# -- the queue that a message came by ------------------------------------------------------------


def came_by(app: Celery, exchange: str, routing_key: str) -> str:
    """The queue of a message that was sent to an exchange with a routing key."""
    info = {"exchange": exchange, "routing_key": routing_key}
    return queue_of(app, SimpleNamespace(channel=None, delivery_tag=1, delivery_info=info))


@pytest.fixture
def shop(app: Celery) -> Celery:
    """An app with queues of all kinds, most of which have another name than their routing key."""
    topic, direct = Exchange("shop", type="topic"), Exchange("direct", type="direct")
    app.conf.task_queues = [
        Queue("orders", topic, routing_key="order.created"),
        Queue("feeds", topic, routing_key="feed.*.new"),
        Queue("videos", topic, routing_key="video.#"),
        Queue("stocks", topic, routing_key="1.stock"),
        Queue("mails", direct, routing_key="mail"),
        Queue("many", [binding(direct, routing_key="one"), binding(direct, routing_key="two")]),
        Queue("all", Exchange("news", type="fanout")),
        Queue("same", Exchange("same", type="topic"), routing_key="same"),
    ]
    return app


@pytest.mark.parametrize(
    ("exchange", "routing_key", "queue"),
    [
        ("shop", "order.created", "orders"),
        ("shop", "feed.rss.new", "feeds"),
        ("shop", "feed.new", "feed.new"),
        ("shop", "feed.rss.atom.new", "feed.rss.atom.new"),
        ("shop", "video", "videos"),
        ("shop", "video.cat.long", "videos"),
        ("shop", "mail", "mail"),
        ("direct", "mail", "mails"),
        ("direct", "order.created", "order.created"),
        ("direct", "feed.*.new", "feed.*.new"),
        ("direct", "one", "many"),
        ("direct", "two", "many"),
        ("news", "whatever", "all"),
        ("same", "same", "same"),
        # To a queue by its name.
        ("", "orders", "orders"),
        ("", "order.created", "order.created"),
        # Behind a delay.
        ("celery_delayed_delivery", "0.1.0.order.created", "orders"),
        ("celery_delayed_delivery", "0.1.1.video.cat", "videos"),
        ("celery_delayed_delivery", "0.1.1.unknown", "unknown"),
        ("celery_delayed_delivery", "0.1.1.mail", "mails"),
        # Which this is not.
        ("shop", "1.stock", "stocks"),
        # The app does not know it.
        ("other", "order.created", "order.created"),
    ],
)
def test_a_queue_is_found_by_exchange_and_routing_key(
    shop: Celery, exchange: str, routing_key: str, queue: str
) -> None:
    """RabbitMQ does not say which queue a message came by; the key is its name in most apps."""
    assert came_by(shop, exchange, routing_key) == queue


def test_a_message_came_by_a_queue_that_is_consumed(shop: Celery) -> None:
    """More than one may have got a copy of it."""
    queues: Any = shop.amqp.queues
    queues.add(Queue("audit", Exchange("shop", type="topic"), routing_key="order.#"))
    assert came_by(shop, "shop", "order.created") == "orders"
    queues.select(["audit"])
    assert came_by(shop, "shop", "order.created") == "audit"


def test_of_two_queues_that_has_the_name(app: Celery) -> None:
    """It is bound by it, as all are that Celery makes."""
    exchange = Exchange("celery", type="topic")
    app.conf.task_queues = [
        Queue("all", exchange, routing_key="#"),
        Queue("jobs", exchange, routing_key="jobs"),
    ]
    assert came_by(app, "celery", "jobs") == "jobs"
    assert came_by(app, "celery", "other") == "all"


def test_the_queue_of_what_is_dropped_takes_all(kept: Celery) -> None:
    """Whatever it was sent with; it outlives the broker and each look at it."""
    queue: Any = dead_queue()
    assert (queue.name, queue.durable) == (DEAD, True)
    assert (queue.exchange.name, queue.exchange.type, queue.exchange.durable) == (
        OURS["x-dead-letter-exchange"],
        "fanout",
        True,
    )
    assert queue.queue_arguments["x-queue-type"] == "quorum"
    assert queue.queue_arguments["x-delivery-limit"] >= 1_000_000


def test_the_place_of_what_is_dropped_is_declared_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped before it is there is gone."""
    declared: list[str] = []

    class Known(Broker):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def declare(self) -> None:
            declared.append(self.name)

    app: Any = Known("celery")
    monkeypatch.setattr(queues, "dead_queue", lambda: Known(DEAD))
    check_queues(app)
    assert declared == [DEAD, "celery"]
