"""Claims against a model of a few lines: whatever happens in whatever order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import redis
import time_machine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from reliable_tasks._store.claims import Claims, Entry, Publish, Release
from reliable_tasks._store.client import ServerAddress
from reliable_tasks._store.publication import Taking
from reliable_tasks.demo._server import EmbeddedServer
from reliable_tasks.testing import fake_redis
from tests.support.claims import abandon, confirm

NAME, TTL, LEASE, MEMORY, DOUBT = "name", 100, 30, 50, 30

owners = st.sampled_from(["one", "two", "three"])
attempts = st.integers(0, 2)
tokens = st.sampled_from(["t1", "t2", "call a", "call b"])
holders = st.sampled_from(["h1", "h2", "h3"])
hows = st.sampled_from(get_args(Taking))


@dataclass
class Record:
    """A claim, as the model sees it."""

    owner: str
    attempt: int
    token: str
    expires: float
    since: float
    holder: str | None = None
    holder_attempt: int = -1
    lease_end: float = 0.0
    holder_owner: str | None = None
    next_attempt: int | None = None
    replaces: tuple[str, int, bool] | None = None
    allowance: float | None = None
    unconfirmed: str | None = None
    seen: bool = False

    def is_made_by(self, owner: str, token: str) -> bool:
        """Say whether a call is the one that has the claim, by whoever it is made."""
        call, has_others, _ = token.rpartition(" ")
        same = self.token == token or (has_others and self.token.startswith(f"{call} "))
        return self.owner == owner and bool(same)

    @property
    def is_in_doubt(self) -> bool:
        """Say whether nobody knows that the owner's message is queued."""
        return self.unconfirmed == self.owner

    def let_go(self) -> None:
        """Nobody holds it any more."""
        self.holder = self.holder_owner = None
        self.holder_attempt = -1


class Machine(RuleBasedStateMachine):
    """Some tasks, their attempts and copies, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.now = 0.0
        self.claims = Claims(ServerAddress(self.start_server(), 5.0), "p:")
        self.claim: Record | None = None
        self.ended: tuple[str, int, float] | None = None
        self.replaced: dict[str, tuple[str, float]] = {}
        self.fence = 0
        self.last_holder: str | None = None

    def start_server(self) -> str:
        """Return the URL of an empty server."""
        self.stack.enter_context(fake_redis())
        self.clock = self.stack.enter_context(time_machine.travel(1_800_000_000.5, tick=False))
        return "redis://fake/0"

    def move_on(self, seconds: float) -> None:
        """Let time pass for the server."""
        self.clock.shift(seconds)

    def teardown(self) -> None:
        """End the fake server."""
        self.stack.close()

    def tick(self, seconds: float = 0.001) -> None:
        """Let time pass; each operation takes some."""
        self.now += seconds
        self.move_on(seconds)
        if self.claim and self.now >= self.claim.expires:
            self.claim = None
        self.replaced = {one: by for one, by in self.replaced.items() if self.now < by[1]}

    def saw(self, fence: int, *, new: bool) -> None:
        """A claim that changed hands has a greater fence, any other the same."""
        if new:
            assert fence > self.fence
        else:
            assert fence == self.fence
        self.fence = fence

    def holder_lives(self) -> bool:
        """Say whether a copy runs, as far as its lease tells."""
        return bool(self.claim and self.claim.holder and self.claim.lease_end > self.now)

    def remembers(self, owner: str, attempt: int) -> bool:
        """Say whether this attempt of a task, or a later one, is known to have ended."""
        if self.ended is None:
            return False
        ended, last, until = self.ended
        return ended == owner and last >= attempt and until > self.now

    @rule(seconds=st.sampled_from([1, 7, 29, 31, 70, 101]))
    def wait(self, seconds: int) -> None:
        """Time passes, and never so that something lapses in this very moment."""
        self.tick(seconds + 0.01)

    @rule(owner=owners, attempt=attempts, token=tokens, how=hows, holder=holders | st.just(""))
    def acquire(self, owner: str, attempt: int, token: str, how: Taking, holder: str) -> None:
        """A call is published."""
        self.tick()
        answer = self.claims.acquire(
            NAME,
            owner=owner,
            attempt=attempt,
            token=token,
            ttl=TTL,
            task="t",
            how=how,
            holder=holder,
        )
        claim, expires = self.claim, self.now + TTL
        if claim is None:
            self.claim = Record(owner, attempt, token, expires, self.now)
            self.replaced.pop(owner, None)
            assert answer.code is Publish.CLAIMED
            self.saw(answer.fence, new=True)
            return
        expires = max(expires, claim.expires)
        hands_on = bool(holder) and claim.holder == holder and claim.holder_owner is None
        if claim.is_made_by(owner, token) and not claim.is_in_doubt:
            claim.token = token if claim.token == token else "call "
            assert answer.code is (Publish.TAKEN_OVER if claim.replaces else Publish.CLAIMED)
            assert answer.owner == (claim.replaces[0] if claim.replaces else owner)
            claim.expires = claim.expires if how == "window" else expires
        elif claim.owner == owner and claim.is_in_doubt:
            assert (answer.code, answer.owner) == (Publish.CLAIMED, owner)
            claim.token, claim.attempt = token, attempt
            claim.unconfirmed, claim.expires = f"again:{owner}", expires
        elif claim.owner != owner and (hands_on or claim.is_in_doubt or how == "replace"):
            assert (answer.code, answer.owner) == (Publish.TAKEN_OVER, claim.owner)
            self.saw(answer.fence, new=True)
            claim.replaces = claim.replaces or (claim.owner, claim.attempt, hands_on)
            if claim.holder and claim.holder_owner is None:
                claim.holder_owner = claim.owner
            claim.owner, claim.attempt, claim.token = owner, attempt, token
            claim.next_attempt, claim.allowance, claim.seen = None, TTL, False
            claim.expires, claim.since = expires, self.now
            self.replaced.pop(owner, None)
            return
        else:
            assert (answer.code, answer.owner) == (Publish.DUPLICATE, claim.owner)
        self.saw(answer.fence, new=False)

    def is_confirmed(self) -> None:
        """The message of the owner is queued."""
        claim = self.claim
        assert claim is not None
        claim.unconfirmed = None
        if claim.replaces is not None:
            replaced, _, hands_on = claim.replaces
            if not hands_on:
                self.replaced[replaced] = (claim.owner, claim.expires)
            claim.replaces = None

    @rule(owner=owners, attempt=attempts)
    def confirm(self, owner: str, attempt: int) -> None:
        """A message that took the claim over is queued."""
        self.tick()
        confirm(self.claims, NAME, owner=owner, attempt=attempt)
        claim = self.claim
        has_started = self.ended and self.ended[0] == owner and self.ended[2] > self.now
        if claim is not None and claim.owner == owner:
            self.is_confirmed()
        elif claim is None or has_started:
            return
        elif claim.replaces is None:
            self.replaced[owner] = (claim.owner, claim.expires)
        elif claim.replaces[0] != owner:
            replaced, _, hands_on = claim.replaces
            if not hands_on:
                self.replaced[replaced] = (owner, claim.expires)
            claim.replaces = (owner, attempt, False)

    @rule(owner=owners, attempt=attempts, token=tokens, holder=holders | st.just(""))
    def continue_(self, owner: str, attempt: int, token: str, holder: str) -> None:
        """A retry is published."""
        self.tick()
        answer = self.claims.continue_(
            NAME, owner=owner, attempt=attempt, token=token, ttl=TTL, task="t", holder=holder
        )
        claim = self.claim
        if claim is None:
            self.claim = Record(owner, attempt - 1, token, self.now + TTL, self.now)
            self.claim.next_attempt = attempt
            assert answer.code is Publish.CLAIMED
            self.saw(answer.fence, new=True)
            return
        self.saw(answer.fence, new=False)
        published = claim.attempt if claim.next_attempt is None else claim.next_attempt
        if (claim.owner, claim.token, published) == (owner, token, attempt):
            assert answer.code is Publish.CLAIMED
            claim.expires = self.now + TTL
            return
        if (
            claim.owner != owner
            or claim.attempt >= attempt
            or (claim.holder and holder and claim.holder != holder)
        ):
            assert (answer.code, answer.owner) == (Publish.DUPLICATE, claim.owner)
            return
        assert answer.code is Publish.CLAIMED
        claim.next_attempt, claim.token = attempt, token
        claim.expires = self.now + TTL

    def is_replaced(self, owner: str) -> bool:
        """Say whether a task finds another one in its place."""
        return owner in self.replaced and (self.claim is None or self.claim.owner != owner)

    def waits_for_replacement(self, owner: str) -> bool:
        """Say whether it is not known yet if a task has been replaced."""
        claim = self.claim
        if claim is None or claim.owner == owner or claim.replaces is None:
            return False
        return claim.replaces[0] == owner and self.now - claim.since < DOUBT

    @rule(owner=owners, attempt=attempts)
    def start(self, owner: str, attempt: int) -> None:
        """A copy starts and gives its key up."""
        self.tick()
        answer = self.claims.start(NAME, owner=owner, attempt=attempt, remember=MEMORY)
        claim = self.claim
        if self.is_replaced(owner):
            assert (answer.code, answer.owner) == (Entry.REPLACED, self.replaced[owner][0])
        elif claim is None or (claim.owner != owner and self.has_started(owner, attempt)):
            assert answer.code is Entry.ENTERED
        elif self.waits_for_replacement(owner):
            assert (answer.code, answer.owner) == (Entry.PREDECESSOR_RUNNING, claim.owner)
        elif (claim.owner != owner and claim.replaces and claim.replaces[0] == owner) or (
            claim.owner != owner and claim.is_in_doubt
        ):
            assert answer.code is Entry.ENTERED
        elif claim.owner != owner:
            assert (answer.code, answer.owner) == (Entry.DUPLICATE, claim.owner)
        elif claim.attempt > attempt:
            assert answer.code is Entry.CONTINUED
        else:
            assert answer.code is Entry.ENTERED
            self.is_confirmed()
            self.ended = (owner, attempt, self.now + MEMORY)
            self.claim = None

    def has_started(self, owner: str, attempt: int) -> bool:
        """Say whether this very attempt is the one that is known to have started last."""
        if self.ended is None:
            return False
        started, last, until = self.ended
        return (started, last) == (owner, attempt) and until > self.now

    @rule(owner=owners, attempt=attempts, holder=holders, takes=st.booleans())
    def enter(self, owner: str, attempt: int, holder: str, takes: bool) -> None:
        """A copy starts."""
        self.tick()
        answer = self.claims.enter(
            NAME,
            owner=owner,
            attempt=attempt,
            holder=holder,
            lease=LEASE,
            ttl=TTL,
            task="t",
            takes=takes,
        )
        claim, runs = self.claim, self.holder_lives()
        is_other = claim is None or claim.owner != owner
        hands_on = False
        if claim and is_other and runs and claim.holder_owner == owner:
            assert answer.code is (Entry.ENTERED if claim.holder == holder else Entry.RUNNING)
            self.saw(answer.fence, new=False)
            return
        if self.is_replaced(owner):
            assert (answer.code, answer.owner) == (Entry.REPLACED, self.replaced[owner][0])
            return
        if claim and is_other and claim.holder_owner == owner:
            hands_on = True
        elif self.waits_for_replacement(owner):
            assert answer.code is Entry.PREDECESSOR_RUNNING
            return
        elif claim and is_other and claim.replaces and claim.replaces[0] == owner:
            claim.owner, claim.attempt, claim.replaces = owner, attempt, None
        elif is_other and self.remembers(owner, attempt):
            assert (answer.code, answer.owner) == (Entry.CONTINUED, owner)
            return
        elif claim and is_other and claim.is_in_doubt and claim.holder is None:
            self.replaced[claim.owner] = (owner, claim.expires)
            claim = None
        is_other = claim is None or claim.owner != owner
        if claim and is_other and not hands_on and takes and not runs:
            claim = None
        if claim and is_other and not hands_on:
            assert (answer.code, answer.owner) == (Entry.DUPLICATE, claim.owner)
        elif claim and not takes and not hands_on and claim.attempt > attempt:
            assert answer.code is Entry.CONTINUED
        elif claim and claim.holder != holder and runs:
            before = bool(claim.holder_owner) or claim.holder_attempt < attempt
            assert answer.code is (Entry.PREDECESSOR_RUNNING if before else Entry.RUNNING)
        else:
            assert (answer.code, answer.owner) == (Entry.ENTERED, owner)
            self.saw(answer.fence, new=claim is None or claim.holder != holder)
            if claim is None:
                claim = self.claim = Record(owner, attempt, "", 0.0, self.now)
            if not hands_on:
                self.is_confirmed()
                claim.owner, claim.attempt = owner, attempt
                claim.next_attempt = claim.holder_owner = claim.allowance = None
            claim.expires = self.now + TTL
            claim.holder, claim.holder_attempt, claim.seen = holder, attempt, True
            claim.lease_end = self.now + LEASE
            return
        self.saw(answer.fence, new=False)

    @rule(
        owner=owners,
        attempt=attempts,
        holder=holders,
        keep_for=st.sampled_from([0, 50]),
        may_be_unentered=st.booleans(),
    )
    def release(
        self, owner: str, attempt: int, holder: str, keep_for: int, may_be_unentered: bool
    ) -> None:
        """A copy ends."""
        self.tick()
        code, other = self.claims.release(
            NAME,
            owner=owner,
            attempt=attempt,
            holder=holder,
            keep_for=keep_for,
            may_be_unentered=may_be_unentered,
            remember=MEMORY,
        )
        claim = self.claim
        if claim is None:
            assert code is Release.LAPSED
            return
        assert other == (claim.owner if claim.owner != owner else owner)
        if claim.owner != owner:
            is_holder = (claim.holder, claim.holder_owner) == (holder, owner)
            ends = not keep_for and (is_holder or may_be_unentered)
            if claim.replaces and claim.replaces[0] == owner and ends:
                claim.replaces = None
            assert code is (Release.KEPT if is_holder else Release.NOT_OURS)
            if is_holder and keep_for:
                claim.lease_end = 0.0
            elif is_holder:
                claim.let_go()
            if is_holder and claim.allowance is not None:
                claim.expires = self.now + claim.allowance
            return
        latest = max(claim.attempt, claim.next_attempt or 0)
        runner = claim.holder_owner
        is_last = claim.holder != holder and may_be_unentered and not keep_for
        if runner and is_last and (self.holder_lives() or runner not in self.replaced):
            assert code is Release.FREED
            self.replaced.pop(runner, None)
            claim.owner, claim.attempt = runner, claim.holder_attempt
            claim.holder_owner = claim.next_attempt = claim.replaces = None
            claim.token, claim.allowance = "", None
        elif claim.holder != holder and (self.holder_lives() or not may_be_unentered):
            assert code is (Release.KEPT if runner and keep_for else Release.NOT_OURS)
        elif keep_for or latest > attempt:
            assert code is Release.KEPT
            if keep_for:
                claim.expires = max(claim.expires, self.now + keep_for)
            else:
                claim.attempt = latest
            claim.let_go()
            claim.next_attempt = None
        else:
            assert code is Release.FREED
            if latest > 0:
                self.ended = (owner, latest, self.now + MEMORY)
            self.claim = None

    @rule(owner=owners, ttl=st.sampled_from([0, 10, 500]))
    def keep(self, owner: str, ttl: float) -> None:
        """A message waits in a worker."""
        self.tick()
        answer = self.claims.keep(NAME, owner=owner, ttl=ttl)
        claim = self.claim
        if claim and claim.owner == owner:
            assert (answer.code, answer.owner) == (Entry.ENTERED, owner)
            self.is_confirmed()
            claim.seen = True
            claim.expires = max(claim.expires, self.now + ttl)
        elif owner in self.replaced:
            assert (answer.code, answer.owner) == (Entry.REPLACED, self.replaced[owner][0])
        elif self.waits_for_replacement(owner):
            assert answer.code is Entry.PREDECESSOR_RUNNING
        else:
            assert (answer.code, answer.owner) == (Entry.DUPLICATE, claim.owner if claim else "")

    @rule(owner=owners, token=tokens, in_doubt=st.booleans())
    def abandon(self, owner: str, token: str, in_doubt: bool) -> None:
        """A publish failed, or perhaps it did."""
        self.tick()
        answer = abandon(self.claims, NAME, owner=owner, token=token, in_doubt=in_doubt)
        claim = self.claim
        if claim is None or (claim.owner, claim.token) != (owner, token):
            assert not answer
        elif claim.next_attempt is not None:
            assert answer
            claim.next_attempt, claim.token = None, ""
        elif claim.replaces is not None:
            assert answer
            if in_doubt and not claim.replaces[2] and claim.replaces[0] != claim.unconfirmed:
                self.replaced[owner] = (claim.replaces[0], claim.expires)
            claim.owner, claim.attempt, _ = claim.replaces
            claim.token, claim.replaces = "", None
            if claim.holder_owner in (None, claim.owner):
                claim.holder_owner = claim.allowance = None
        elif claim.holder or claim.seen:
            assert not answer
        elif in_doubt or claim.unconfirmed == f"again:{owner}":
            assert answer
            claim.unconfirmed = owner
        else:
            assert answer
            self.claim = None

    @invariant()
    def the_record_is_the_models(self) -> None:
        """After every step both know the same."""
        record: dict[str, Any] = self.claims.read(NAME)
        if self.claim is None:
            assert record == {}
            return
        assert record["owner"] == self.claim.owner
        assert int(record["attempt"]) == self.claim.attempt
        assert record.get("token", "") == self.claim.token
        assert record.get("holder") == self.claim.holder
        assert record.get("holder_owner") == self.claim.holder_owner
        assert record.get("unconfirmed") == self.claim.unconfirmed
        assert bool(record.get("seen")) is self.claim.seen
        next_attempt = self.claim.next_attempt
        assert record.get("next_attempt") == (None if next_attempt is None else str(next_attempt))


class RealMachine(Machine):
    """The same on a real server, whose clock is moved on by making all that it keeps older."""

    url = ""

    def start_server(self) -> str:
        """Return the URL of the module's server, empty."""
        self.server = self.stack.enter_context(
            redis.Redis.from_url(self.url, decode_responses=True)
        )
        self.server.flushall()
        return self.url

    def move_on(self, seconds: float) -> None:
        """Let each key and each time in a claim be that much older."""
        passed = round(seconds * 1000)
        for key in self.server.keys("*"):
            if self.server.type(key) == "hash":
                for field in ("since", "lease_end"):
                    then = int(self.server.hget(key, field) or 0)
                    if then:
                        self.server.hset(key, field, then - passed)
            self.server.pexpire(key, self.server.pttl(key) - passed)


@pytest.fixture(scope="module", autouse=True)
def _real_server() -> Iterator[None]:
    with EmbeddedServer() as server:
        RealMachine.url = server.url
        yield


TestClaims = Machine.TestCase
TestClaims.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

TestClaimsOnAServer = RealMachine.TestCase
TestClaimsOnAServer.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
