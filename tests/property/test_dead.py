"""Dead letters against a model of a few lines: whoever does whatever in whatever order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice

import fakeredis
import time_machine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reliable_tasks._store.dead import Pruned, Reservation, Sent
from reliable_tasks._store.letters import Bounds, Buried, Cause, DeadLetter, Letter
from tests.conformance.broker import Broker, letter

TASK_IDS, TASKS, TOKENS = ("one", "two", "three", "four"), ("a", "b"), ("t1", "t2", "t3")
CAUSES = (Cause.FAILED, Cause.POISON)
WINDOW = 15

tasks = st.sampled_from(TASKS)
causes = st.sampled_from(CAUSES)
tokens = st.sampled_from(TOKENS)
picks = st.integers(0, 50)


@dataclass
class Kept:
    """A dead letter, as the model sees it.

    Attributes:
        id: Its own.
        event: What it was kept for.
        letter: What was kept.
        at: When it was kept (ms).
        new_id: Id of the task that is sent in its place, or ``""``.
        token: Who sends it, or ``""``.
        until: Until when nobody else may (ms).
        may_be_sent: Whether somebody may have sent it.
        replayed: When it was sent (ms), or ``None``.
    """

    id: str
    event: str
    letter: Letter
    at: int
    new_id: str = ""
    token: str = ""
    until: int = 0
    may_be_sent: bool = False
    replayed: int | None = None

    @property
    def score(self) -> int:
        """By what it is ordered."""
        return self.at if self.replayed is None else self.replayed

    @property
    def place(self) -> tuple[int, str]:
        """Its place in the order of those that are dropped."""
        return self.score, self.id


@dataclass
class Which:
    """What somebody asks for.

    Attributes:
        task: The task's name, or any.
        cause: Why it is dead, or any.
        since: When it was kept at the earliest (s), or any time.
    """

    task: str | None
    cause: str | None
    since: float | None

    def has(self, one: Kept) -> bool:
        """Whether a letter is meant."""
        about = one.letter.about
        is_kind = self.task in (None, about.task) and self.cause in (None, about.cause)
        return is_kind and (self.since is None or one.score >= self.since * 1000)


@dataclass
class Walk:
    """A walk that goes on while others do what they do.

    Attributes:
        which: What is walked over.
        replayed: Whether it is those that were replayed.
        letters: It.
        before: Those that are to be found if they stay.
        seen: Those that were found: their errors, which tell them from others of the same id.
    """

    which: Which
    replayed: bool
    letters: Iterator[DeadLetter]
    before: list[Kept]
    seen: list[str]


whichs = st.builds(
    Which,
    task=st.none() | tasks,
    cause=st.none() | causes,
    since=st.none() | st.sampled_from([1_800_000_000.5, 1_800_000_001.5, 1_800_000_020.501]),
)


class Machine(RuleBasedStateMachine):
    """Tasks that die, people who look, replay and discard, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        server = self.stack.enter_context(fakeredis.FakeRedis(server=fakeredis.FakeServer()))
        clock = self.stack.enter_context(time_machine.travel(1_800_000_000.5, tick=False))
        self.broker = Broker(server, clock)
        self.store, self.server = self.broker.dead_store, server
        self.letters: dict[str, Kept] = {}
        self.others: dict[str, int] = {}
        self.bounds: Bounds | None = None
        self.events = 0
        self.gone: list[Kept] = []
        self.walks: list[Walk] = []

    def teardown(self) -> None:
        """End the fake server."""
        self.stack.close()

    # -- helpers -------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """The server's clock (ms)."""
        seconds, micros = self.server.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def those(self, *, replayed: bool) -> list[Kept]:
        """Those that were replayed, or those that were not, the oldest first."""
        found = [one for one in self.letters.values() if (one.replayed is not None) == replayed]
        return sorted(found, key=lambda one: one.place)

    def chosen(self, pick: int) -> Kept:
        """Choose one of those that are there."""
        return list(self.letters.values())[pick % len(self.letters)]

    def next_id(self, task_id: str) -> str:
        """Return the id under which the next death of a task is kept."""
        if task_id not in self.letters:
            return task_id
        while True:
            self.others[task_id] = self.others.get(task_id, 0) + 1
            if (id_ := f"{task_id}.{self.others[task_id]}") not in self.letters:
                return id_

    def drop(self, letters: list[Kept]) -> int:
        """Have letters be gone; return how many."""
        for one in letters:
            self.gone.append(self.letters.pop(one.id))
            self.others.pop(one.id, None)
        return len(letters)

    # -- what happens --------------------------------------------------------------------------

    @rule(
        task_id=st.sampled_from(TASK_IDS),
        task=tasks,
        cause=causes,
        max_count=st.sampled_from([2, 5, 100]),
        max_age=st.sampled_from([20, 300]),
        raw=st.sampled_from([b"text", b"\xff", b""]),
        times=st.integers(1, 3),
        how=st.sampled_from(["delivery", "event", "zombie"]),
    )
    def die(
        self,
        task_id: str,
        task: str,
        cause: Cause,
        max_count: int,
        max_age: int,
        raw: bytes,
        times: int,
        how: str,
    ) -> None:
        """A task dies, and replies to who says so may be lost; a zombie says so, too."""
        self.events += 1
        event = f"e{self.events}"
        bounds = Bounds(max_age, max_count, 1000)
        kept = letter(task_id, task=task, cause=cause, raw=raw and raw + b" %d" % self.events)
        about = replace(kept.about, error=event)
        kept = replace(kept, about=about, bounds=bounds)
        delivery = None
        if how != "event":
            self.broker.publish(task_id)
            delivery = self.broker.fetch_one(count=1)
            event = delivery.tag
        if how == "zombie":
            assert delivery is not None
            self.broker.end_lease(delivery)
            assert self.broker.sweep() == 1
            assert self.broker.die(delivery, kept) == Buried(False, "", 0)
            assert self.broker.settle(self.broker.fetch_one("w2", count=1))
            return
        self.bounds = bounds
        id_ = self.next_id(task_id)
        self.letters[id_] = Kept(id_, event, kept, self.now)
        count = len(self.those(replayed=False))
        for number in range(times):
            if delivery is None:
                assert self.broker.keep(kept, event) == (id_, count)
            else:
                assert self.broker.die(delivery, kept) == Buried(number == 0, id_, count)

    @precondition(lambda self: self.letters)
    @rule(pick=picks)
    def repeat(self, pick: int) -> None:
        """Somebody says once more, late, that a task has died: the first one, or the latest."""
        one = self.chosen(pick)
        task_id = one.letter.about.id
        if task_id in self.letters and one.id in (task_id, f"{task_id}.{self.others.get(task_id)}"):
            count = len(self.those(replayed=False))
            assert self.broker.keep(one.letter, one.event) == (one.id, count)

    @precondition(lambda self: self.letters)
    @rule(pick=picks, others=st.integers(0, 2))
    def discard(self, pick: int, others: int) -> None:
        """Somebody throws letters away, some for the second time."""
        chosen = {one.id: one for one in (self.chosen(pick + n) for n in range(others + 1))}
        ids = [*chosen, *chosen, "nobody"]
        if others:
            assert self.store.discard_each(self.server, ids) == len(chosen)
        else:
            assert [self.store.discard(self.server, id_) for id_ in ids] == [True, False, False]
        self.drop(list(chosen.values()))

    @precondition(lambda self: self.letters)
    @rule(pick=picks, token=tokens)
    def reserve(self, pick: int, token: str) -> None:
        """Somebody wants to replay a letter."""
        one = self.chosen(pick)
        code, new_id = self.store.reserve(self.server, one.id, token)
        assert new_id == one.new_id or code is Reservation.OURS
        if one.replayed is not None:
            assert code is Reservation.SENT
        elif one.token not in ("", token) and one.until > self.now:
            assert code is Reservation.OTHERS
        else:
            assert code is (Reservation.IN_DOUBT if one.new_id else Reservation.OURS)
            one.may_be_sent = bool(one.new_id)
            one.new_id, one.token, one.until = new_id, token, self.now + WINDOW * 1000

    @precondition(lambda self: self.letters)
    @rule(pick=picks, token=tokens, how=st.sampled_from(Sent), times=st.integers(1, 2))
    def release(self, pick: int, token: str, how: Sent, times: int) -> None:
        """Who was let in says how it went, or who was not any more."""
        one = self.chosen(pick)
        if how is Sent.REFUSED and (one.may_be_sent or one.replayed is not None):
            # Not what a caller should say: an id that may be a task's is not given up.
            how = Sent.IN_DOUBT
        for _ in range(times):
            self.store.release(self.server, one.id, token, how)
        if token != one.token:
            return
        if how is Sent.IN_DOUBT:
            one.until, one.may_be_sent = 0, True
        elif how is Sent.REFUSED:
            one.new_id, one.token, one.until = "", "", 0
        elif one.replayed is None:
            one.replayed = self.now

    @precondition(lambda self: self.gone)
    @rule(pick=picks, token=tokens, how=st.sampled_from(Sent))
    def replay_what_is_gone(self, pick: int, token: str, how: Sent) -> None:
        """Somebody was slow."""
        id_ = self.gone[pick % len(self.gone)].id
        if id_ not in self.letters:
            assert self.store.reserve(self.server, id_, token) == (Reservation.NOT_FOUND, "")
            self.store.release(self.server, id_, token, how)
            assert self.store.get(self.server, id_) is None
            assert self.store.message(self.server, id_) == b""

    @rule()
    def prune(self) -> None:
        """A worker drops what is too old, or too many."""
        found = self.store.prune(self.server)
        if self.bounds is None:
            assert found == Pruned(0, 0, 0, 0, 0)
            return
        age, most = self.bounds.max_age * 1000, self.bounds.max_count
        old = [one for one in self.letters.values() if one.score < self.now - age]
        aged = sum(one.replayed is None for one in old)
        self.drop(old)
        self.drop(self.those(replayed=True)[: max(len(self.letters) - most, 0)])
        many = self.drop(self.those(replayed=False)[: max(len(self.letters) - most, 0)])
        left = self.those(replayed=False)
        soon = sum(one.score < self.now - age * 0.9 for one in left)
        assert found == Pruned(aged, many, soon, len(left), most)

    @rule(seconds=st.sampled_from([0.001, 1, 4, 14.999, 15, 271]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.broker.let_pass(seconds)

    @rule(which=whichs, replayed=st.booleans(), oldest_first=st.booleans(), page=st.integers(1, 4))
    def begin_walk(self, which: Which, replayed: bool, oldest_first: bool, page: int) -> None:
        """Somebody begins to look at letters, and sees some of them."""
        letters = self.broker.walk(
            **vars(which), replayed=replayed, oldest_first=oldest_first, page=page
        )
        before = [one for one in self.those(replayed=replayed) if which.has(one)]
        # What is walked over is found with the first one.
        first = [*islice(letters, 1)]
        assert bool(first) == bool(before)
        seen = [one.error for one in first]
        self.walks.append(Walk(which, replayed, letters, before, seen))

    @precondition(lambda self: self.walks)
    @rule(pick=picks, count=st.integers(1, 3))
    def walk_on(self, pick: int, count: int) -> None:
        """Who looks sees more, and then the rest; no letter twice."""
        walk = self.walks[pick % len(self.walks)]
        found = list(walk.letters if count == 3 else islice(walk.letters, count))
        walk.seen += [one.error for one in found]
        assert len(walk.seen) == len(set(walk.seen))
        known = {one.letter.about.error: one for one in (*self.gone, *self.letters.values())}
        for error in walk.seen:
            one = known[error]
            assert walk.which.has(one) or one.replayed is not None
            assert not walk.replayed or one.replayed is not None
        if count == 3:
            stayed = {one.letter.about.error for one in walk.before if self.stayed(one, walk)}
            assert stayed <= set(walk.seen)
            self.walks.remove(walk)

    def stayed(self, one: Kept, walk: Walk) -> bool:
        """Whether a letter has been there all the time for who walks."""
        return self.letters.get(one.id) is one and (one.replayed is not None) == walk.replayed

    @rule(which=whichs, oldest_first=st.booleans(), page=st.integers(1, 4))
    def look(self, which: Which, oldest_first: bool, page: int) -> None:
        """Somebody looks at all letters of a kind, in their order, and counts them."""
        for replayed in (False, True):
            found = self.broker.walk(
                **vars(which), replayed=replayed, oldest_first=oldest_first, page=page
            )
            rows = [(one.id, one.replayed_as) for one in found]
            expected = [one for one in self.those(replayed=replayed) if which.has(one)]
            assert Counter(rows) == Counter(
                (one.id, one.new_id if replayed else None) for one in expected
            )
            times = [self.letters[id_].score for id_, _ in rows]
            assert times == sorted(times, reverse=not oldest_first)
            if not replayed:
                assert self.broker.count_dead(**vars(which)) == len(expected)

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def indexes_counts_and_letters_agree(self) -> None:
        """And are those of the model: none is lost, and none is there twice."""
        waiting, replayed = self.broker.indexed_dead()
        for found, expected in (
            (waiting, self.those(replayed=False)),
            (replayed, self.those(replayed=True)),
        ):
            times = {id_: round(seconds * 1000) for id_, seconds in found.items()}
            assert times == {one.id: one.score for one in expected}

    @invariant()
    def each_is_kept_whole(self) -> None:
        """Its message, what is known of it, and who replays it."""
        for one in self.letters.values():
            assert self.store.message(self.server, one.id) == one.letter.message
            found = self.store.get(self.server, one.id)
            assert found is not None
            about = one.letter.about
            assert (found.task, found.cause, found.task_id) == (
                about.task,
                about.cause,
                about.task_id,
            )
            assert found.replayed_as == (one.new_id if one.replayed is not None else None)

    @invariant()
    def two_letters_are_not_replayed_as_one(self) -> None:
        """Each has an id of its own."""
        given = [one.new_id for one in (*self.gone, *self.letters.values()) if one.new_id]
        assert len(given) == len(set(given))

    @invariant()
    def no_delivery_is_left(self) -> None:
        """What has died is over."""
        assert self.broker.unacked == self.broker.leases == self.broker.index == {}
        assert self.broker.waiting() == []


TestDead = Machine.TestCase
TestDead.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
