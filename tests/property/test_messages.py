"""Messages against a model of a few lines: whoever does whatever in whatever order."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass

import fakeredis
import time_machine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reliable_tasks._store.delivery import Delivery
from reliable_tasks._store.publication import Publication, Queued
from tests.conformance.broker import STEPS, Broker, list_of, message

QUEUES, WORKERS, LEASE, TOKEN_TTL = ("a", "b"), ("w1", "w2", "w3"), 30, 300

ids = st.sampled_from(["one", "two", "three"])
queues = st.sampled_from(QUEUES)
priorities = st.sampled_from(STEPS)
workers = st.sampled_from(WORKERS)
picks = st.integers(0, 50)


@dataclass
class Message:
    """A message, as the model sees it.

    Attributes:
        number: What it can be told by.
        task_id: Id of its task.
        tag: Of the delivery that has it, or ``None`` while it waits.
        is_over: Whether it was settled, or dropped because its task was continued.
        returns: How often it went back.
    """

    number: int
    task_id: str
    tag: str | None = None
    is_over: bool = False
    returns: int = 0


@dataclass
class Held:
    """A delivery, as its worker and the model see it.

    Attributes:
        delivery: What the worker has.
        message: Its message.
        lease_end: When its lease ends (s).
        may_run: What the guard said last.
        was_silent: Whether its lease ever ended.
        is_continued: Whether it published its task's continuation.
        is_aside: Whether its worker has let go of it for a while.
    """

    delivery: Delivery
    message: Message
    lease_end: float
    may_run: bool
    was_silent: bool = False
    is_continued: bool = False
    is_aside: bool = False

    @property
    def is_current(self) -> bool:
        """Whether the message is this delivery's still."""
        return self.message.tag == self.delivery.tag


class Machine(RuleBasedStateMachine):
    """A few tasks, workers that live and die, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        server = self.stack.enter_context(fakeredis.FakeRedis(server=fakeredis.FakeServer()))
        clock = self.stack.enter_context(time_machine.travel(1_800_000_000.5, tick=False))
        self.broker = Broker(server, clock)
        self.messages: list[Message] = []
        self.known: list[Held] = []
        self.tokens: dict[str, float] = {}

    def teardown(self) -> None:
        """End the fake server."""
        self.stack.close()

    # -- helpers -------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The server's clock."""
        return self.broker.now()

    def held(self, pick: int) -> Held:
        """Choose a delivery of all there ever were: zombies act too."""
        return self.known[pick % len(self.known)]

    def note_time(self) -> None:
        """Note whose lease has ended by now."""
        for held in self.known:
            if held.is_current and held.lease_end <= self.now:
                held.was_silent = True

    def send(
        self,
        task_id: str,
        queue: str,
        priority: int,
        token: str,
        publication: Publication | None = None,
        *,
        is_other: bool = False,
    ) -> Queued:
        """Publish; the model learns of the message if it was queued."""
        new = Message(len(self.messages), task_id)
        raw = json.loads(message(task_id, queue))
        raw["headers"]["number"] = new.number
        code = self.broker.publish(
            queue=queue,
            priority=priority,
            token=token,
            publication=publication,
            raw=json.dumps(raw),
        ).code
        seen = f"{token} {queue}"
        if code is Queued.QUEUED:
            self.messages.append(new)
        if code in (Queued.QUEUED, Queued.REPEATED) and not is_other:
            self.tokens[seen] = self.now + TOKEN_TTL
        return code

    def was_seen(self, token: str, queue: str) -> bool:
        """Say whether a publish into a queue is remembered."""
        return self.tokens.get(f"{token} {queue}", 0.0) > self.now

    def gone_back(self, held: Held) -> bool:
        """Note that a delivery ended without a settle; return whether its message waits."""
        held.message.tag = None
        if held.is_continued:
            held.message.is_over = True
            return False
        held.message.returns += 1
        return True

    # -- what happens --------------------------------------------------------------------------

    @rule(task_id=ids, queue=queues, priority=priorities, token=st.integers(0, 9))
    def publish(self, task_id: str, queue: str, priority: int, token: int) -> None:
        """A call is published, some for the second time."""
        expected = Queued.REPEATED if self.was_seen(f"t{token}", queue) else Queued.QUEUED
        assert self.send(task_id, queue, priority, f"t{token}") is expected

    @rule(
        worker=workers,
        asked=st.lists(queues, min_size=1, unique=True),
        count=st.integers(1, 4),
        rotates=st.booleans(),
        replies_lost=st.integers(0, 2),
    )
    def fetch(
        self, worker: str, asked: list[str], count: int, rotates: bool, replies_lost: int
    ) -> None:
        """A worker that was woken takes messages; replies to it may be lost."""
        for queue in asked:
            self.broker.silence(queue)
        waiting = sum(len(self.broker.waiting(q, step)) for q in asked for step in STEPS)
        plan = self.broker.plan(worker, asked, count=count, rotates=rotates, lease=LEASE)
        deliveries = self.broker.run(plan)
        for _ in range(replies_lost):
            plan = plan.repeated()
            assert self.broker.run(plan) == deliveries
        assert len(deliveries) == min(waiting, count)
        for delivery in deliveries:
            number = json.loads(delivery.raw)["headers"]["number"]
            found = self.messages[number]
            assert (found.tag, found.is_over) == (None, False)
            assert delivery.is_redelivered is (found.returns > 0)
            found.tag = delivery.tag
            may_run = delivery.copy.may_run
            self.known.append(Held(delivery, found, self.now + LEASE, may_run))

    @precondition(lambda self: self.known)
    @rule(pick=picks)
    def settle(self, pick: int) -> None:
        """A task has ended, at whatever time."""
        held = self.held(pick)
        if held.is_aside:
            return
        assert self.broker.settle(held.delivery) is held.is_current
        if held.is_current:
            held.message.tag, held.message.is_over = None, True

    @precondition(lambda self: self.known)
    @rule(pick=picks, how=st.sampled_from(["front", "back", "sweep"]))
    def requeue(self, pick: int, how: str) -> None:
        """A worker gives back, or a sweeper puts back."""
        held = self.held(pick)
        if held.is_aside:
            return
        lapsed = held.lease_end <= self.now
        answer = self.broker.requeue(held.delivery, to_back=how == "back", if_lapsed=how == "sweep")
        if held.is_current and (lapsed or how != "sweep"):
            assert answer is self.gone_back(held)
        else:
            assert answer is False

    @precondition(lambda self: self.known)
    @rule(pick=picks, seconds=st.sampled_from([1, 14]), replies_lost=st.integers(0, 1))
    def lay_aside(self, pick: int, seconds: int, replies_lost: int) -> None:
        """A worker lets go of a copy for a while; it comes back, unless it was continued."""
        held = self.held(pick)
        if held.is_aside:
            return
        lay_aside = self.broker.messages.lay_aside
        assert lay_aside(self.broker.server, held.delivery, seconds) is held.is_current
        if not held.is_current:
            return
        held.is_aside, held.may_run, held.lease_end = True, False, self.now + seconds
        if held.is_continued:
            held.message.tag, held.message.is_over = None, True
        for _ in range(replies_lost):
            assert lay_aside(self.broker.server, held.delivery, seconds) is held.is_current

    @precondition(lambda self: self.known)
    @rule(pick=picks)
    def start(self, pick: int) -> None:
        """A worker dispatches what may run."""
        held = self.held(pick)
        if held.may_run and not held.delivery.is_started:
            self.broker.start(held.delivery)

    @precondition(lambda self: self.known)
    @rule(pick=picks)
    def ask(self, pick: int) -> None:
        """A copy that waits asks again."""
        held = self.held(pick)
        if held.is_current and not held.may_run and not held.is_aside:
            held.may_run = self.broker.hold(held.delivery).may_run
            if held.may_run:
                # Lest it be put back in the moment in which it starts.
                held.lease_end = self.now + LEASE

    @precondition(lambda self: self.known)
    @rule(
        pick=picks,
        queue=queues,
        priority=priorities,
        again=st.booleans(),
        token=st.sampled_from(["retries", "begins again"]),
    )
    def retry(self, pick: int, queue: str, priority: int, again: bool, token: str) -> None:
        """A run publishes its task's continuation, perhaps for the second time; a zombie tries."""
        held = self.held(pick)
        if not held.may_run:
            return
        token = f"{held.delivery.tag} {token}"
        run = self.broker.run_of(held.delivery.task_id)
        wish = Publication(continues=held.delivery.tag, task_id=held.delivery.task_id, is_only=True)
        expected = Queued.QUEUED
        is_other = run.get(f"continued:{held.delivery.tag}", token) != token
        if self.was_seen(token, queue) or is_other:
            expected = Queued.REPEATED
        elif run and run["tag"] != held.delivery.tag:
            expected = Queued.SUPERSEDED
        for _ in range(1 + again):
            answer = self.send(
                held.delivery.task_id, queue, priority, token, wish, is_other=is_other
            )
            assert answer is expected
            if expected is Queued.QUEUED:
                held.is_continued = True
                expected = Queued.REPEATED

    @rule(worker=workers)
    def renew(self, worker: str) -> None:
        """A keeper renews all that its worker thinks it holds."""
        theirs = [
            held
            for held in self.known
            if held.delivery.tag.startswith(f"{worker}:") and not held.is_aside
        ]
        over = self.broker.messages.renew(
            self.broker.server, [held.delivery.tag for held in theirs], LEASE
        )
        assert over == [held.delivery.tag for held in theirs if not held.is_current]
        for held in theirs:
            held.lease_end = self.now + LEASE

    @rule(worker=workers)
    def die(self, worker: str) -> None:
        """A worker is found dead."""
        theirs = [
            held
            for held in self.known
            if held.is_current and held.delivery.tag.startswith(f"{worker}:")
        ]
        count = self.broker.bury(worker)
        assert count == len(theirs)
        for held in theirs:
            held.lease_end = 0.0
        self.note_time()

    @rule()
    def sweep(self) -> None:
        """The elected worker puts back what has lapsed."""
        lapsed = [held for held in self.known if held.is_current and held.lease_end <= self.now]
        waits = [self.gone_back(held) for held in lapsed]
        assert self.broker.sweep() == sum(waits)

    @rule(seconds=st.sampled_from([0.001, 1, 14, 31]))
    def wait(self, seconds: float) -> None:
        """Time passes, and the one that sweeps rings."""
        self.broker.let_pass(seconds)
        self.note_time()
        lists = {queue: [list_of(queue, step) for step in STEPS] for queue in QUEUES}
        self.broker.fleet.name_queues(self.broker.server, self.now, lists)
        self.broker.fleet.ring(self.broker.server)

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def every_message_is_in_one_place(self) -> None:
        """Waiting or delivered, until it is over; and counted right."""
        waiting = [
            found
            for queue in QUEUES
            for step in STEPS
            for found in self.broker.waiting(queue, step)
        ]
        numbers = [found["headers"]["number"] for found in waiting]
        expected = [m.number for m in self.messages if m.tag is None and not m.is_over]
        assert sorted(numbers) == expected
        for found in waiting:
            returns = self.messages[found["headers"]["number"]].returns
            assert found["headers"].get("x-delivery-count", 0) == returns
        held = {m.tag: m.number for m in self.messages if m.tag is not None}
        unacked = self.broker.unacked
        assert {tag: entry[0]["headers"]["number"] for tag, entry in unacked.items()} == held
        assert set(self.broker.index) == set(self.broker.leases) == set(held)

    @invariant()
    def one_copy_runs(self) -> None:
        """Of each task, among those whose worker was never silent for a whole lease."""
        running = [
            held.delivery.task_id
            for held in self.known
            if held.is_current and held.may_run and not held.was_silent
        ]
        assert len(running) == len(set(running))

    @invariant()
    def whoever_runs_holds_the_run(self) -> None:
        """So nobody else can be let in, and its continuation is accepted."""
        for held in self.known:
            if held.is_current and held.may_run and not held.was_silent:
                assert self.broker.run_of(held.delivery.task_id)["tag"] == held.delivery.tag

    @invariant()
    def messages_that_wait_have_rung(self) -> None:
        """An idle worker does not sleep while there is work."""
        for queue in QUEUES:
            is_waiting = any(self.broker.waiting(queue, step) for step in STEPS)
            assert self.broker.tokens(queue) <= 1
            assert self.broker.tokens(queue) or not is_waiting

    @invariant()
    def a_task_that_is_over_leaves_nothing_for_ever(self) -> None:
        """Each run has a time to live."""
        for task_id in ("one", "two", "three"):
            assert self.broker.server.ttl(self.broker.keys.run(task_id)) != -1


TestMessages = Machine.TestCase
TestMessages.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
