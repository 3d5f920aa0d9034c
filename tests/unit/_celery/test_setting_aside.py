"""A copy that is set aside: where it waits, for how long, and what becomes of it."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from celery import Celery
from celery.exceptions import Reject
from celery.worker import state as worker_state
from kombu import disable_insecure_serializers, enable_insecure_serializers
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask
from reliable_tasks._broker.beside import Beside
from reliable_tasks._broker.held import Held
from reliable_tasks._celery import delivery, setting_aside, stock
from reliable_tasks._celery.request import ReliableRequest
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._store.delivery import Layout
from reliable_tasks._store.messages import Messages
from tests.conformance.broker import Broker
from tests.unit._celery.bench import Bench, failure
from tests.unit.harness import claims, take

BUSY = SetAside("busy", 1.0, 5.0)


@pytest.fixture
def on_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take messages for those of kombu's Redis transport, which can wait in a worker."""
    monkeypatch.setattr(stock, "visibility_timeout", lambda message: 3600.0)


@pytest.fixture
def accepts_pickle(app: Celery) -> Iterator[None]:
    """Accept pickle, as an app that sends it must."""
    app.conf.accept_content = ["json", "pickle"]
    enable_insecure_serializers(["pickle"])
    yield
    disable_insecure_serializers()


def send_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the broker be away for what is sent."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OperationalError("away")

    monkeypatch.setattr(setting_aside.Task, "apply_async", refuse)


@pytest.mark.usefixtures("on_redis")
def test_a_copy_that_is_set_aside_waits_without_a_slot(
    bench: Bench, app: Celery, send: Any
) -> None:
    """It is run again after its pause, and another message is fetched meanwhile."""
    send.delay(7)
    request = bench.receive()
    request.on_failure(failure(BUSY), return_ok=True)
    assert (bench.ended, bench.prefetch) == ([], 1)
    assert request not in worker_state.reserved_requests
    bench.timer.fire()
    assert (bench.ended, bench.prefetch) == ([], 0)
    assert bench.consumer.again == [request]
    assert len(claims(app)) == 1


@pytest.mark.usefixtures("on_redis")
def test_the_pauses_of_a_copy_grow(bench: Bench, send: Any) -> None:
    """From the first to the longest."""
    send.delay(7)
    request = bench.receive()
    pauses = []
    for _ in range(5):
        request.on_failure(failure(BUSY), return_ok=True)
        pauses.append(bench.timer.fire())
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


@pytest.mark.usefixtures("on_redis")
def test_a_pause_stays_a_number_however_often_it_comes(bench: Bench, send: Any) -> None:
    """A lock Redis can be away for hours, and 2 ** 1100 is more than a float holds."""
    send.delay(7)
    request = bench.receive()
    request._times_set_aside = 1100
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.timer.calls[-1][0] == 5.0


@pytest.mark.usefixtures("on_redis")
def test_who_waits_for_another_one_begins_anew(
    bench: Bench, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its turn may come soon, for the one that it waited for has ended; that alone is news."""
    caplog.set_level(logging.DEBUG, logger="reliable_tasks")
    send.delay(7)
    request = bench.receive()
    pauses = []
    for waits_for in ("one", "one", "one", "two", "two"):
        answer = SetAside("busy", 0.2, 5.0, waits_for)
        request.on_failure(failure(pickle.loads(pickle.dumps(answer))), return_ok=True)
        pauses.append(bench.timer.calls[-1][0])
    assert pauses == [0.2, 0.4, 0.8, 0.2, 0.4]
    lines = [record for record in caplog.records if "is set aside: busy" in record.message]
    assert [record.levelname for record in lines] == ["INFO", "DEBUG", "DEBUG", "INFO", "DEBUG"]


@pytest.mark.usefixtures("on_redis")
def test_the_worker_does_not_take_in_the_whole_queue(
    bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a bound a copy that waits uses up the prefetch."""
    monkeypatch.setattr(setting_aside, "_MOST_WAITING", 0)
    send.delay(7)
    request = bench.receive()
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.prefetch == 0
    bench.timer.fire()
    assert (bench.prefetch, bench.consumer.again) == (0, [request])


@pytest.mark.usefixtures("on_redis")
def test_a_run_that_is_over_is_not_killed_again(bench: Bench, send: Any) -> None:
    """A revoke with terminate would hit the child's next task."""
    send.delay(7)
    request = bench.receive()
    request.on_accepted(4242, time.monotonic())
    request.on_failure(failure(BUSY), return_ok=True)
    assert (request.time_start, request.worker_pid) == (None, None)


def test_with_another_broker_the_copy_is_sent_again(
    bench: Bench, app: Celery, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker cannot raise its prefetch for quorum queues: what waits in it would stop it."""
    result = send.apply_async((7,), headers={"x": "1"})
    request = bench.receive()
    request.on_failure(failure(BUSY), return_ok=True)
    assert (bench.ended, bench.timer.calls) == (["ack"], [])
    again = take(app)
    assert again.headers["id"] == result.id
    assert again.headers["retries"] == 0
    assert again.headers["x"] == "1"
    assert again.headers["eta"]
    assert again.headers["reliable_claim"] == request.request_dict["reliable_claim"]
    assert len(claims(app)) == 1


@pytest.mark.usefixtures("accepts_pickle")
@pytest.mark.parametrize("number", [(2,), {2, 3}], ids=["what JSON changes", "what it refuses"])
def test_what_is_sent_again_is_the_same_call(bench: Bench, app: Celery, number: object) -> None:
    """Its arguments are what they were, what was to be hidden is hidden, and no option is lost."""

    @app.task(base=ReliableTask, name="work", time_limit=60, ignore_result=False)
    def work(*args: Any, **kwargs: Any) -> None:
        pass

    task = app.tasks["work"]
    task.apply_async(
        ({1: number}, "4111"),
        {"pin": number},
        serializer="pickle",
        compression="gzip",
        argsrepr="(a card)",
        kwargsrepr="{a pin}",
        priority=3,
        headers={"x": "1"},
        shadow="a shadow",
        ignore_result=True,
        time_limit=30,
        soft_time_limit=20,
        expires=600,
        link=task.si(1),
        link_error=task.si(2),
        chain=[task.si(3)],
        root_id="root",
        parent_id="parent",
        group_id="group",
        group_index=4,
        stamped_headers=["stamp"],
        stamp="a stamp",
    )
    request = bench.receive()
    before = request.message
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == ["ack"]
    again = take(app)
    assert again.decode() == before.decode()
    assert again.content_type == before.content_type == "application/x-python-serialize"
    of_its_wait = {"eta", "reliable_set_aside"}
    assert of_its_wait <= set(again.headers)
    assert _without(again.headers, of_its_wait) == _without(before.headers, of_its_wait)
    for name in ("priority", "reply_to", "correlation_id"):
        assert again.properties[name] == before.properties[name]


def _without(headers: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if name not in names}


def test_a_copy_that_cannot_be_sent_again_waits(
    bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is acknowledged that is not queued."""
    send.delay(7)
    request = bench.receive()
    send_nothing(monkeypatch)
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == []
    bench.timer.fire()
    assert bench.consumer.again == [request]


@pytest.mark.usefixtures("on_redis")
def test_after_a_reconnection_a_copy_is_left_to_the_broker(bench: Bench, send: Any) -> None:
    """Its message went back with the channel that it came by."""
    send.delay(7)
    request = bench.receive()
    for channel in (None, SimpleNamespace(channel=object())):
        request.on_failure(failure(BUSY), return_ok=True)
        bench.consumer.task_consumer = channel
        bench.timer.fire()
    assert bench.consumer.again == []
    assert bench.ended == []


@pytest.mark.usefixtures("on_redis")
@pytest.mark.parametrize("acks_late", [True, False])
def test_a_copy_that_may_not_take_a_slot_yet(
    bench: Bench, app: Celery, send: Any, acks_late: bool
) -> None:
    """It follows another task: it waits as one that came back from its child does.

    Its message is not acknowledged, so after a reconnection the broker has that.
    """
    send.acks_late = acks_late
    send.delay(7)
    take(app)
    send.apply_async((7,), link=send.si(8))
    request = bench.receive()
    worker_state.task_reserved(request)
    assert request.revoked()
    assert (bench.ended, bench.prefetch) == ([], 1)
    bench.consumer.task_consumer = SimpleNamespace(channel=request.message.channel)
    bench.timer.fire()
    assert bench.consumer.again == [request]
    worker_state.task_reserved(request)
    assert request.revoked()
    bench.consumer.task_consumer = SimpleNamespace(channel=object())
    bench.timer.fire()
    assert (bench.ended, bench.consumer.again) == ([], [request])


def test_without_a_consumer_it_goes_back_at_once(bench: Bench, send: Any) -> None:
    """There is nothing to wait with."""
    delivery._consumers.clear()
    send.delay(7)
    bench.receive().on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == ["requeue"]


def test_a_consumer_that_is_gone_is_none(bench: Bench, send: Any) -> None:
    """A worker that was stopped in this process is not kept alive."""
    send.delay(7)
    request = bench.receive()
    del bench.consumer
    gc.collect()
    request.on_failure(failure(BUSY), return_ok=True)
    assert bench.ended == ["requeue"]


@pytest.mark.usefixtures("on_redis")
def test_an_error_may_come_without_its_traceback(bench: Bench, send: Any) -> None:
    """Pools without processes hand it over as it is."""
    send.delay(7)
    bench.receive().on_failure(SimpleNamespace(exception=BUSY), return_ok=True)
    assert len(bench.timer.calls) == 1


def test_a_set_aside_survives_the_way_from_the_child() -> None:
    """It is pickled between the pool's processes."""
    error: Any = pickle.loads(pickle.dumps(BUSY))
    assert isinstance(error, Reject)
    assert (error.first, error.longest, error.requeue) == (1.0, 5.0, True)
    assert str(error) == repr(error) == "set aside: busy"


# -- a task that puts itself back ----------------------------------------------------------------

PUTS_BACK = Reject("later", requeue=True)


@pytest.fixture
def on_amqp(bench: Bench) -> None:
    """Have the consumer speak AMQP."""
    transport = SimpleNamespace(driver_type="amqp")
    bench.consumer.connection = SimpleNamespace(transport=transport)


class Post:
    """What a worker holds of a Redis broker.

    Attributes:
        broker: The broker.
        held: What the worker holds.
    """

    def __init__(self, bench: Bench, send: Any) -> None:
        server = fakeredis.FakeRedis(server=fakeredis.FakeServer())
        self.broker = Broker(server)
        self.held = Held(self.broker.messages, 15.0, server, server)
        self._bench, self._send = bench, send

    def receive(self, n: int = 7, **headers: Any) -> ReliableRequest:
        """Receive a message."""
        result = self._send.apply_async((n,), headers=headers)
        self.broker.publish(result.id)
        delivery = self.broker.fetch_one(self.held.worker, lease=15.0)
        self.held.take(delivery)
        qos = SimpleNamespace(_quick_ack=lambda tag: None)
        channel = SimpleNamespace(held=self.held, qos=qos)
        request = self._bench.receive(channel=channel, delivery_tag=delivery.tag)
        self._bench.consumer.task_consumer = SimpleNamespace(channel=channel)
        return request


@pytest.fixture
def post(bench: Bench, send: Any) -> Post:
    """A worker of a Redis broker."""
    return Post(bench, send)


def put_back(request: ReliableRequest) -> None:
    """Have a task ask to be put back."""
    request.on_failure(failure(PUTS_BACK), return_ok=True)


def test_a_message_that_is_put_back_says_how_often(bench: Bench, post: Post) -> None:
    """At first it goes back at once."""
    request = post.receive()
    put_back(request)
    assert bench.ended == ["requeue"]
    post.held.requeue(request._delivery.tag)
    (again,) = post.broker.waiting()
    assert again["headers"]["reliable_requeues"] == 1


def test_a_count_that_is_none_begins_anew(bench: Bench, post: Post) -> None:
    """Anybody can have written it; an error here would keep the message for ever."""
    request = post.receive(reliable_requeues="many")
    put_back(request)
    assert request.request_dict["reliable_requeues"] == 1
    assert bench.ended == ["requeue"]


@pytest.mark.parametrize(("before", "pause"), [(1, 1), (2, 2), (5, 16), (50, 60)])
def test_the_pauses_of_one_that_puts_itself_back_grow(
    bench: Bench, post: Post, before: int, pause: int
) -> None:
    """From its second time on: the broker keeps it so long, and no slot or prefetch is taken."""
    request = post.receive(reliable_requeues=before)
    tag, now = request._delivery.tag, post.broker.now()
    put_back(request)
    assert (bench.ended, bench.timer.calls, bench.prefetch) == ([], [], 0)
    assert request.acknowledged
    assert not post.held.is_open(tag)
    assert post.broker.leases[tag] == pytest.approx(now + pause, abs=0.5)
    assert post.broker.waiting() == []
    (entry,) = post.broker.unacked.values()
    assert entry[0]["headers"]["reliable_requeues"] == before + 1


def test_one_that_was_given_back_is_not_put_behind(
    bench: Bench, post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that shuts down has said it already."""
    request = post.receive(reliable_requeues=5)
    post.held.requeue(request._delivery.tag)
    with caplog.at_level("INFO", "reliable_tasks"):
        put_back(request)
    assert bench.ended == ["requeue"]
    assert "goes back to its queue" not in caplog.text


@pytest.mark.usefixtures("on_amqp")
def test_on_rabbitmq_it_is_sent_again(bench: Bench, app: Celery, send: Any) -> None:
    """A requeue would count towards the delivery limit, and come back at once."""
    result = send.delay(7)
    request = bench.receive()
    request.request_dict.update({"reliable_requeues": 3, "x-delivery-count": 1})
    put_back(request)
    again = take(app)
    assert bench.ended == ["ack"]
    assert again.headers["id"] == result.id
    assert again.headers["reliable_requeues"] == 4
    assert again.headers["reliable_counted"] == 1
    assert again.headers["eta"]


@pytest.mark.usefixtures("on_amqp")
def test_what_cannot_be_sent_again_waits_in_the_worker(
    bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were it requeued, it would come back at once, and its count would be lost."""
    send.delay(7)
    request = bench.receive()
    send_nothing(monkeypatch)
    for times, pause in enumerate([1.0, 1.0, 2.0, 4.0], 1):
        put_back(request)
        assert request not in worker_state.reserved_requests
        assert request.request_dict["reliable_requeues"] == times
        assert bench.timer.fire() == pause
        assert bench.consumer.again == [request] * times
    assert bench.ended == []
    assert request._crashes == 0
    assert f"{request.id}] cannot be sent again, and waits in the worker" in caplog.text


@pytest.mark.usefixtures("on_redis")
def test_on_stock_kombu_it_waits_in_the_worker(bench: Bench, send: Any) -> None:
    """Its message stays, for there a requeue would be the next one to be fetched."""
    send.delay(7)
    request = bench.receive()
    for times in (1, 2, 3):
        put_back(request)
        assert request.request_dict["reliable_requeues"] == times
        assert bench.timer.fire() == 2.0 ** (times - 1)
    assert bench.ended == []


def test_on_another_broker_it_goes_back(bench: Bench, send: Any) -> None:
    """There is nothing to wait with."""
    send.delay(7)
    put_back(bench.receive())
    assert bench.ended == ["requeue"]


def test_one_that_was_acknowledged_is_not_put_behind(bench: Bench, post: Post, send: Any) -> None:
    """With an early ack there is no message any more."""
    send.acks_late = False
    request = post.receive(reliable_requeues=5)
    request.acknowledge()
    put_back(request)
    assert bench.ended == ["ack"]
    assert request.request_dict["reliable_requeues"] == 5


# -- what is said of a start that is over --------------------------------------------------------


def test_a_copy_that_is_sent_again_carries_no_verdict(bench: Bench, app: Celery, send: Any) -> None:
    """It is decided anew when that one comes; so is how often it has crashed."""
    send.delay(7)
    request = bench.receive()
    of_this_start = {
        "reliable_condemned": ("PoisonPill", ("one", 3, 3)),
        "reliable_delivery": "tag",
        "crashes": 3,
    }
    request.request_dict.update(of_this_start)
    request._set_aside(BUSY)
    again = take(app)
    assert not {*of_this_start, "reliable_counted"} & set(again.headers)


def test_one_that_waits_for_its_turn_waits_in_the_broker_where_many_do(
    bench: Bench, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the worker it would take the room of tasks that wait for nothing."""
    monkeypatch.setattr(setting_aside, "_MOST_WAITING", 0)
    request = post.receive()
    tag, now = request._delivery.tag, post.broker.now()
    request._set_aside(SetAside("not its turn", 0.05, 1.0, waits_for="a turn"))
    assert (bench.ended, bench.timer.calls) == ([], [])
    assert not post.held.is_open(tag)
    assert now + 9 < post.broker.leases[tag] < now + 21


def test_one_that_is_held_no_more_is_not_run_when_its_pause_is_over(
    bench: Bench, post: Post
) -> None:
    """Its worker has given it back meanwhile; the room for it is taken back."""
    request = post.receive()
    request._set_aside(BUSY)
    assert bench.prefetch == 1
    post.held.requeue(request._delivery.tag)
    bench.timer.fire()
    assert (bench.consumer.again, bench.prefetch) == ([], 0)


def test_a_start_that_is_over_is_not_counted(bench: Bench, post: Post) -> None:
    """Who waits again has not crashed."""
    bench.consumer.pool = SimpleNamespace(uses_semaphore=True)
    request = post.receive()
    assert not request.revoked()
    task_id = request.id
    assert post.broker.run_of(task_id)["crashes"] == "1"
    request._set_aside(BUSY)
    assert post.broker.run_of(task_id)["crashes"] == "0"


class TestBesideRabbitMQ:
    """A Redis beside RabbitMQ says which copy of a task may run."""

    @pytest.fixture(autouse=True)
    def beside(self, bench: Bench, on_amqp: None) -> Beside:
        """What the worker holds there."""
        server = fakeredis.FakeRedis(server=fakeredis.FakeServer())
        messages = Messages(Layout("", "unacked", "unacked_index", ""), "reliable:beside:")
        made = Beside(messages, 15.0, server, server, "raise")
        bench.consumer.beside = made  # type: ignore[attr-defined]
        bench.consumer.pool = SimpleNamespace(uses_semaphore=True)
        return made

    def start(self, bench: Bench, send: Any) -> ReliableRequest:
        """Receive a message, and let its task in."""
        send.delay(7)
        request = bench.receive()
        request.message.channel.connection = object()
        assert not request.revoked()
        return request

    def test_a_copy_that_waits_for_long_is_sent_again(
        self, bench: Bench, app: Celery, send: Any, beside: Beside
    ) -> None:
        """It says that it is a copy, and how long it has waited; nothing of it runs here."""
        request = self.start(bench, send)
        before = request._delivery.tag
        request.on_failure(failure(SetAside("busy", 2.0, 5.0, waits_for="one")), return_ok=True)
        again = take(app)
        assert (bench.ended, bench.timer.calls, len(beside)) == (["ack"], [], 0)
        assert request._delivery.tag != before
        assert again.headers["reliable_copy"] is True
        assert again.headers["reliable_set_aside"] == 1
        assert again.headers["reliable_waits_for"] == "one"

    def test_a_copy_that_waits_for_a_moment_waits_here(
        self, bench: Bench, app: Celery, send: Any
    ) -> None:
        """Native delayed delivery knows whole seconds; the prefetch stands."""
        request = self.start(bench, send)
        request.on_failure(failure(SetAside("busy", 0.05, 5.0)), return_ok=True)
        assert (take(app), bench.ended, bench.prefetch) == (None, [], 0)
        assert bench.timer.fire() == 0.05
        assert bench.consumer.again == [request]

    def test_one_that_puts_itself_back_and_cannot_be_sent_again_waits_here(
        self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch, beside: Beside
    ) -> None:
        """It is let in anew, and has crashed no more often than before."""
        request = self.start(bench, send)
        before = request._delivery.tag
        send_nothing(monkeypatch)
        put_back(request)
        assert (bench.ended, bench.prefetch, len(beside)) == ([], 0, 0)
        assert request._delivery.tag == request.request_dict["reliable_delivery"] != before
        assert bench.timer.fire() == 1.0
        assert bench.consumer.again == [request]
        assert not request.revoked()
        assert (request._crashes, request.request_dict["reliable_requeues"]) == (0, 1)

    def test_one_that_puts_itself_back_without_a_connection_is_left_to_the_broker(
        self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was lost while the copy was to be sent."""
        request = self.start(bench, send)

        def lose(*args: Any, **options: Any) -> None:
            request.message.channel.connection = None
            raise OperationalError("away")

        monkeypatch.setattr(setting_aside.Task, "apply_async", lose)
        put_back(request)
        assert (bench.ended, bench.timer.calls) == ([], [])
        assert request.acknowledged

    def test_one_whose_connection_is_lost_is_left_to_the_broker(
        self, bench: Bench, app: Celery, send: Any
    ) -> None:
        """It has made a copy of it, and that one will run."""
        request = self.start(bench, send)
        request.message.channel.connection = None
        request.on_failure(failure(BUSY), return_ok=True)
        assert (take(app), bench.ended, bench.timer.calls) == (None, [], [])
        assert request.acknowledged


def test_a_timer_that_a_thread_sets_outlives_the_connection(
    bench: Bench, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop sets it, when it turns."""
    soon: list[Any] = []
    bench.consumer.hub = SimpleNamespace(call_soon=soon.append)  # type: ignore[assignment]
    monkeypatch.setattr(threading, "main_thread", lambda: None)
    request = post.receive()
    request._set_aside(BUSY)
    assert bench.timer.calls == []
    soon.pop()()
    assert bench.timer.fire() == 1.0
    assert bench.consumer.again == [request]
