"""Whether a message that waited in the worker may still start."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from celery import Celery

from reliable_tasks._broker.held import Held
from reliable_tasks._celery.request import ReliableRequest
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._store.delivery import Delivery
from tests.conformance.broker import Broker
from tests.unit._celery.bench import Bench, failure
from tests.unit.harness import claims


class TestHeldForTooLong:
    """Stock kombu hands a message on a visibility_timeout after it was fetched."""

    @pytest.fixture
    def hold(self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Receive a message from kombu's Redis transport and hold it for a while."""

        def hold(
            seconds: float, timeout: float = 100, *, is_ours: bool = True, is_up: bool = True
        ) -> tuple[ReliableRequest, list[str]]:
            send.delay(7)
            forgotten: list[str] = []
            fake = fakeredis.FakeServer()
            server = fakeredis.FakeRedis(server=fake)
            channel = SimpleNamespace(
                unacked_key="unacked",
                unacked_index_key="unacked_index",
                visibility_timeout=timeout,
                qos=SimpleNamespace(_quick_ack=forgotten.append),
                conn_or_acquire=lambda: nullcontext(server),
            )
            request = bench.receive(channel=channel)
            if is_ours:
                server.zadd("unacked_index", {request.message.delivery_tag: 1})
            fake.connected = is_up
            monkeypatch.setattr(request, "received_at", time.monotonic() - seconds)
            self.score = lambda: server.zscore("unacked_index", request.message.delivery_tag)
            return request, forgotten

        return hold

    def test_it_starts_while_there_is_time(self, hold: Any) -> None:
        """100 s, less 60 for the run, less half of the margin."""
        request, _ = hold(30)
        assert not request.revoked()
        assert self.score() == 1

    def test_its_time_begins_anew_when_the_rest_is_too_short(self, hold: Any) -> None:
        """As long as the broker counts it as ours."""
        request, _ = hold(40)
        assert not request.revoked()
        assert self.score() == pytest.approx(time.time(), abs=5)

    @pytest.mark.parametrize(
        ("seconds", "options"), [(96, {}), (40, {"is_ours": False}), (40, {"is_up": False})]
    )
    def test_it_is_left_to_its_redelivery(
        self, bench: Bench, app: Celery, hold: Any, seconds: float, options: Any
    ) -> None:
        """Where the broker may have passed it on, it is neither run nor given back."""
        request, forgotten = hold(seconds, **options)
        assert request.revoked()
        assert (bench.ended, forgotten) == ([], [request.message.delivery_tag])
        assert request.acknowledged
        assert len(claims(app)) == 1

    def test_a_timeout_below_the_limit_is_used_as_far_as_it_goes(self, hold: Any) -> None:
        """Refusing whatever cannot end in time would refuse for ever."""
        request, _ = hold(40, timeout=50)
        assert not request.revoked()

    def test_other_transports_hand_nothing_on(
        self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only kombu's Redis transport has the timeout."""
        send.delay(7)
        request = bench.receive()
        monkeypatch.setattr(request, "received_at", -1e9)
        assert not request.revoked()


LEASE = 15.0


class Post:
    """What a worker holds of a Redis broker, and one message in its hands.

    Attributes:
        broker: The broker.
        held: What the worker holds.
        delivery: The message.
        forgotten: The tags of what the worker let go of without a word.
        asked: How many times the broker was asked whether the copy may run.
    """

    def __init__(self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._fake = fakeredis.FakeServer()
        server = fakeredis.FakeRedis(server=self._fake)
        self.broker = Broker(server)
        self.held = Held(self.broker.messages, LEASE, server, server)
        self.forgotten: list[str] = []
        self.asked = 0
        self._bench, self._send = bench, send
        bench.consumer.pool = SimpleNamespace(uses_semaphore=True)
        hold = self.held.hold

        def ask(delivery: Delivery) -> Any:
            self.asked += 1
            return hold(delivery)

        monkeypatch.setattr(self.held, "hold", ask)

    def receive(self, *, runs_elsewhere: bool = False) -> ReliableRequest:
        """Receive a message, whose task may be run by another worker just now."""
        task_id = self._send.delay(7).id
        if runs_elsewhere:
            self.broker.publish(task_id)
            self.other = self.broker.fetch_one("another", lease=LEASE)
        self.broker.publish(task_id)
        self.delivery = self.broker.fetch_one(self.held.worker, lease=LEASE)
        self.held.take(self.delivery)
        qos = SimpleNamespace(_quick_ack=self.forgotten.append)
        channel = SimpleNamespace(held=self.held, qos=qos)
        return self._bench.receive(channel=channel, delivery_tag=self.delivery.tag)

    def be_silent(self) -> None:
        """Let the worker be silent for so long that it may count as dead."""
        self.held.heard_at -= 60

    def cut_off(self) -> None:
        """Let the broker be away."""
        self._fake.connected = False

    @property
    def crashes(self) -> int:
        """How many crashes are counted, that of a run that goes on among them."""
        return int(self.broker.run_of(self.delivery.task_id).get("crashes", 0))


@pytest.fixture
def post(bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch) -> Post:
    """A worker of a Redis broker."""
    return Post(bench, send, monkeypatch)


class TestHeldOnLease:
    """The broker lets one copy run, and is asked again where it may have changed its mind."""

    def test_it_starts_without_a_question(self, post: Post) -> None:
        """The fetch said that it may run, and the worker has been heard of ever since."""
        request = post.receive()
        assert not request.revoked()
        assert (post.asked, post.crashes) == (0, 1)

    def test_it_starts_without_an_answer(self, post: Post) -> None:
        """A broker that is away is not needed for it."""
        request = post.receive()
        post.cut_off()
        assert not request.revoked()
        assert post.asked == 0

    @pytest.mark.parametrize(
        "lapse",
        [
            lambda held, tag: setattr(held, "heard_at", held.heard_at - 2.1),
            lambda held, tag: setattr(held, "renewed_at", held.renewed_at - LEASE - 0.1),
            lambda held, tag: held.note_over([tag]),
        ],
        ids=["not heard of", "not renewed", "not known to a renewal"],
    )
    def test_it_is_asked_about_where_it_may_be_over(
        self, post: Post, lapse: Callable[[Held, str], None]
    ) -> None:
        """It was not, so it starts, on a lease that begins anew."""
        request = post.receive()
        post.broker.server.zadd(post.broker.keys.leases, {post.delivery.tag: 1.0})
        lapse(post.held, post.delivery.tag)
        assert not request.revoked()
        assert (post.asked, post.crashes) == (1, 1)
        lease_end = post.broker.leases[post.delivery.tag]
        assert lease_end == pytest.approx(post.broker.now() + LEASE, abs=5)

    def test_it_waits_while_another_copy_is_alive(self, bench: Bench, post: Post) -> None:
        """Set aside and not counted; it starts when the other one has ended."""
        request = post.receive(runs_elsewhere=True)
        assert request.revoked()
        assert (post.asked, post.crashes) == (1, 0)
        assert (bench.ended, bench.prefetch, post.forgotten) == ([], 1, [])
        assert not request.acknowledged
        assert bench.timer.fire() == 0.05
        assert bench.consumer.again == [request]
        post.broker.settle(post.other)
        assert not request.revoked()
        assert (post.asked, post.crashes, bench.prefetch) == (2, 1, 0)

    def test_it_looks_at_the_other_copy_as_often_as_that_may_die(
        self, bench: Bench, post: Post
    ) -> None:
        """Each 5 s at least, and sooner where the other one's lease is about to end."""
        request = post.receive(runs_elsewhere=True)
        pauses = []
        for _ in range(10):
            assert request.revoked()
            pauses.append(bench.timer.fire())
            bench.consumer.again.clear()
        assert pauses[-1] == 5.0
        soon = (post.broker.now() + 0.5) * 1000
        post.broker.server.zadd(post.broker.keys.leases, {post.other.tag: soon})
        assert request.revoked()
        assert 0 < bench.timer.fire() <= 0.5

    def test_it_waits_while_the_broker_does_not_answer(self, bench: Bench, post: Post) -> None:
        """Nobody can say whether it is over, so it neither starts nor ends."""
        request = post.receive()
        post.be_silent()
        post.cut_off()
        assert request.revoked()
        assert post.asked == 1
        assert (bench.ended, post.forgotten, len(bench.timer.calls)) == ([], [], 1)
        assert post.held.is_open(post.delivery.tag)

    def test_it_is_forgotten_where_it_is_over(self, bench: Bench, post: Post) -> None:
        """Its message was put back for others: it is neither run nor acknowledged here."""
        request = post.receive()
        post.broker.end_lease(post.delivery)
        assert post.broker.sweep() == 1
        post.be_silent()
        assert request.revoked()
        assert (bench.ended, post.forgotten) == ([], [post.delivery.tag])
        assert post.held.get(post.delivery.tag) is None
        assert request.acknowledged
        assert bench.timer.calls == []
        assert post.broker.waiting_ids() == [post.delivery.task_id]

    def test_it_is_acknowledged_where_it_has_continued(self, bench: Bench, post: Post) -> None:
        """An earlier start of it has published the task's next attempt, and was set aside."""
        request = post.receive()
        task_id, tag = post.delivery.task_id, post.delivery.tag
        assert post.broker.messages.runs.note_continued(post.broker.server, task_id, tag)
        post.be_silent()
        assert request.revoked()
        assert (bench.ended, bench.timer.calls, post.crashes) == (["ack"], [], 0)

    def test_it_is_left_where_it_was_given_back(self, bench: Bench, post: Post) -> None:
        """A worker that shuts down has put its message back, and says no more about it."""
        request = post.receive()
        post.held.requeue(post.delivery.tag)
        assert request.revoked()
        assert (bench.ended, bench.timer.calls, post.asked) == ([], [], 0)
        assert request.acknowledged
        assert post.broker.waiting_ids() == [post.delivery.task_id]

    def test_an_early_ack_needs_no_lease(self, post: Post, send: Any) -> None:
        """What is acknowledged before it runs is not held while it does."""
        send.acks_late = False
        request = post.receive()
        post.be_silent()
        assert not request.revoked()
        assert (post.asked, post.crashes) == (0, 0)

    def test_a_run_may_last_as_long_as_its_limit(self, post: Post) -> None:
        """And 30 s more, from when a child has it: a job may wait until there is one."""
        request = post.receive()
        assert not request.revoked()
        assert post.delivery.renew_until == float("inf")
        request.on_accepted(1, time.monotonic())
        assert post.delivery.renew_until == pytest.approx(time.monotonic() + 60 + 30, abs=5)
        request.on_failure(failure(SetAside("busy", 1.0, 5.0)), return_ok=True)
        assert post.delivery.renew_until == float("inf")
        assert post.crashes == 0

    def test_in_a_pool_that_queues_it_starts_later(self, bench: Bench, post: Post) -> None:
        """Threads and greenlets say when it does: then it is counted, without any limit."""
        bench.consumer.pool.uses_semaphore = False
        request = post.receive()
        assert not request.revoked()
        assert post.crashes == 0
        request.on_accepted(1, time.monotonic())
        assert post.crashes == 1
        assert post.delivery.renew_until == float("inf")

    @pytest.mark.parametrize("is_given_back", [False, True])
    def test_in_a_pool_that_queues_it_may_be_over_when_it_starts(
        self, bench: Bench, post: Post, is_given_back: bool
    ) -> None:
        """Nobody can be asked there: the task's body is told, and says no.

        It is no start that could crash: one that is counted while a worker that ends gives the
        message back would never be taken back.
        """
        bench.consumer.pool.uses_semaphore = False
        request = post.receive()
        assert not request.revoked()
        if is_given_back:
            post.delivery.is_ended = True
        else:
            post.be_silent()
        request.on_accepted(1, time.monotonic())
        assert request.request_dict["reliable_in_doubt"]
        assert post.crashes == 0

    def test_where_a_child_has_it_already_its_start_is_counted(self, post: Post) -> None:
        """It cannot be told any more, so it runs: a count that did not get through is made up."""
        request = post.receive()
        assert not request.revoked()
        post.held.uncount_start(post.delivery)
        post.be_silent()
        request.on_accepted(1, time.monotonic())
        assert "reliable_in_doubt" not in request.request_dict
        assert post.crashes == 1
