"""Claims: which task owns a ``@once`` key, and which copy of it runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

import redis

from reliable_tasks._store.client import Client, ServerAddress, connect
from reliable_tasks._store.delivery import Thrown
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.publication import Publication, Taking
from reliable_tasks._store.scripts import NO_REPLICAS, Argument, Call, Key, Replicas, load
from reliable_tasks._store.values import ms
from reliable_tasks.errors import StoreError, StoreUnavailable

__all__ = ["Claims", "End", "Entry", "Follow", "Following", "Publish", "Release", "Ticket"]


Code = TypeVar("Code", bound=IntEnum)
#: So many keys are remembered that were taken when they were called with.
_MOST_DUPLICATES = 1024


class Publish(IntEnum):
    """Answers to a publish; the numbers are those of the scripts.

    What is taken over is to be confirmed when the message is queued.
    """

    DUPLICATE = 0
    CLAIMED = 1
    TAKEN_OVER = 2


class Entry(IntEnum):
    """Answers to a start; the numbers are those of ``claim_enter.lua`` and ``claim_start.lua``."""

    DUPLICATE = 0
    ENTERED = 1
    CONTINUED = 2
    RUNNING = 3
    PREDECESSOR_RUNNING = 4
    REPLACED = 5


class Release(IntEnum):
    """Answers to a release; the numbers are those of ``claim_release.lua``."""

    NOT_OURS = 0
    FREED = 1
    KEPT = 2
    LAPSED = 3


class Follow(IntEnum):
    """Answers to a task that follows; the numbers are those of ``claim_follow.lua``."""

    FREE = 0
    WAITS = 1
    ENDED = 2
    OURS = 3


@dataclass(frozen=True, slots=True)
class End:
    """How a task ended, for those that follow it.

    Attributes:
        name: Name of the claim that they wait for.
        state: The task's state.
        ttl: How long that is known (s); ``None``: for as long as somebody follows.
    """

    name: str
    state: str
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Following:
    """What a task learns of the one that it follows.

    Attributes:
        code: Whether nobody has the key, it waits, that one has ended, or the key is its own.
        followed: Id of the task that it follows by now.
        seconds: For how long it still follows.
        until: When that is over (ms by the server's clock).
        state: In which state the followed one ended, or ``""``.
    """

    code: Follow
    followed: str
    seconds: float
    until: int
    state: str


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Code]):
    """What a script answered.

    Attributes:
        code: The outcome.
        owner: Id of the task that owns the claim; of the one that had it, where it was taken over.
        seconds: Until the claim, or the run that holds it, lapses.
        fence: A number that grows each time the claim changes hands.
    """

    code: Code
    owner: str
    seconds: float
    fence: int


class Claims:
    """The claims in one Redis.

    Every method but `names` is one round trip; each raises ``StoreUnavailable`` or another
    ``StoreError``, and can be repeated when its reply was lost.

    Args:
        address: The server.
        key_prefix: ``reliable_key_prefix``.
        replicas: Those that must have a claim before it counts as made.
        is_beside: Whether the broker is another one.

    Attributes:
        keys: The keys that they are kept under.
        leases: The key of the leases that workers renew for the tasks they run.
    """

    def __init__(
        self,
        address: ServerAddress,
        key_prefix: str,
        replicas: Replicas = NO_REPLICAS,
        *,
        is_beside: bool = False,
    ) -> None:
        self._address = address
        self._replicas = replicas
        self._duplicates: OrderedDict[str, None] = OrderedDict()
        self.keys = Keys(address.key_prefix + key_prefix)
        self.leases = self.keys.beside.leases if is_beside else self.keys.leases

    @property
    def address(self) -> ServerAddress:
        """Where the claims are."""
        return self._address

    @property
    def client(self) -> Client:
        """This process' client."""
        return connect(self._address)

    def look(self, wish: Publication) -> Ticket[Publish] | None:
        """Look whether a key is taken, if it was when this process called with it last.

        Where the broker makes the claim with the message, that would have to be made first.
        """
        name = wish.claim
        if name not in self._duplicates or wish.holder or wish.how not in ("acquire", "window"):
            return None
        keys = [self.keys.claim(name), self.leases]
        ticket = _ticket(Publish, self._ask("claim_look", keys, [ms(wish.ttl)]))
        if ticket.code is Publish.DUPLICATE:
            return ticket
        self._duplicates.pop(name, None)
        return None

    def expect_duplicates(self, wish: Publication) -> None:
        """Note that a key was taken when this process called with it."""
        self._duplicates[wish.claim] = None
        if len(self._duplicates) > _MOST_DUPLICATES:
            # The oldest.
            self._duplicates.popitem(last=False)

    def take(self, wish: Publication, token: str) -> Ticket[Publish]:
        """Take the claim that a publish wishes for, or keep it, by a token made once for it."""
        common: dict[str, Any] = {
            "owner": wish.owner,
            "attempt": wish.claim_attempt,
            "token": token,
            "ttl": wish.ttl,
            "task": wish.task,
            "holder": wish.holder,
        }
        if wish.how == "continue":
            return self.continue_(wish.claim, **common)
        return self.acquire(wish.claim, how=wish.how, **common)

    def acquire(
        self,
        name: str,
        *,
        owner: str,
        attempt: int,
        token: str,
        ttl: float,
        task: str,
        how: Taking = "acquire",
        holder: str = "",
    ) -> Ticket[Publish]:
        """Take a claim for a new call.

        Args:
            name: The claim's name.
            owner: The task's id.
            attempt: Which continuation of the task it is.
            token: Made once per publish.
            ttl: How long the message may wait (s).
            task: The task's name.
            how: ``"acquire"`` a free one; ``"window"``, the same, to be freed by nobody; or
                ``"replace"`` the owner's call.
            holder: Token of the run that makes the call: it hands its own claim on.
        """
        asked = self._acquiring(name, owner, attempt, token, ttl, task, how, holder)
        return _ticket(Publish, self._ask("claim_acquire", *asked, self._replicas))

    def take_each(self, wishes: Sequence[tuple[Publication, str]]) -> list[Ticket[Publish]]:
        """Take the claims of calls, each by a token of its own, in their order.

        Where there are several, they are new calls.
        """
        if len(wishes) == 1:
            return [self.take(*wishes[0])]
        calls = [
            self._acquiring(
                *(wish.claim, wish.owner, wish.claim_attempt, token, wish.ttl, wish.task),
                *(wish.how, wish.holder),
            )
            for wish, token in wishes
        ]
        answers = self._ask_each("claim_acquire", calls, self._replicas)
        return [_ticket(Publish, answer) for answer in answers]

    def _acquiring(
        self,
        name: str,
        owner: str,
        attempt: int,
        token: str,
        ttl: float,
        task: str,
        how: str,
        holder: str,
    ) -> Call:
        keys = [self.keys.claim(name), self.keys.replaced(name), self.leases]
        return keys, [owner, attempt, token, ms(ttl), task, how, holder]

    def continue_(
        self,
        name: str,
        *,
        owner: str,
        attempt: int,
        token: str,
        ttl: float,
        task: str,
        holder: str,
    ) -> Ticket[Publish]:
        """Keep the claim for the owner's own retry or replacement."""
        args: list[str | int] = [owner, attempt, token, ms(ttl), task, holder]
        return _ticket(
            Publish, self._ask("claim_continue", [self.keys.claim(name)], args, self._replicas)
        )

    def abandon_each(self, wishes: Iterable[tuple[Publication, str, bool]]) -> list[bool]:
        """Take back publishes that failed; return for each whether there was something to take.

        Args:
            wishes: Each with the token of its claim, and with whether it is in doubt: it may have
                queued its message. Until that is seen, its claim is unconfirmed, and the next
                call takes its place.
        """
        calls: list[Call] = [
            (
                [self.keys.claim(wish.claim), self.keys.replaced(wish.claim)],
                [wish.owner, token, "1" if in_doubt else ""],
            )
            for wish, token, in_doubt in wishes
        ]
        return [bool(answer) for answer in self._ask_each("claim_abandon", calls)]

    def confirm_each(self, wishes: Iterable[Publication]) -> None:
        """Note that the messages are queued of calls that took claims over."""
        calls: list[Call] = [
            (
                [
                    self.keys.claim(wish.claim),
                    self.keys.replaced(wish.claim),
                    self.keys.ended(wish.claim),
                ],
                [wish.owner, wish.claim_attempt],
            )
            for wish in wishes
        ]
        self._ask_each("claim_confirm", calls)

    def discard_each(self, thrown: Iterable[Thrown]) -> None:
        """Free the claims of messages that are gone."""
        self._ask_each("claim_discard", [one.discarding(self.keys, self.leases) for one in thrown])

    def uncover(self, name: str, *, holder: str, grace: float) -> bool:
        """Cover a run by its own lease alone, and for ``grace`` (s) at least."""
        args: list[str | int] = [holder, ms(grace)]
        return bool(self._ask("claim_uncover", [self.keys.claim(name)], args))

    def keep(self, name: str, *, owner: str, ttl: float = 0) -> Ticket[Entry]:
        """Keep the claim of a message that is seen, for another while (s), or learn who has it."""
        keys = [self.keys.claim(name), self.keys.replaced(name)]
        return _ticket(Entry, self._ask("claim_keep", keys, [owner, ms(ttl)]))

    def keep_each(self, kept: Sequence[tuple[str, str, float]]) -> None:
        """Keep the claims of some messages: for each its name, its owner, and for how long (s).

        One that cannot be read keeps none of the others from being kept.
        """
        calls: list[Call] = [
            ([self.keys.claim(name), self.keys.replaced(name)], [owner, ms(ttl)])
            for name, owner, ttl in kept
        ]
        try:
            self._ask_each("claim_keep", calls)
        except StoreUnavailable:
            raise
        except StoreError:
            for call in calls:
                with suppress(StoreError):
                    self._ask("claim_keep", *call)

    def enter(
        self,
        name: str,
        *,
        owner: str,
        attempt: int,
        holder: str,
        lease: float,
        ttl: float,
        task: str,
        delivery: str = "",
        takes: bool = False,
    ) -> Ticket[Entry]:
        """Start a copy of the task, or learn why it must not run.

        With the tag of its ``delivery`` the run is covered for as long as that is on lease, and
        for ``lease`` (s) where that is not known. One
        that ``takes`` does not leave a claim to a task whose copy died, either.
        """
        args: list[str | int] = [
            *(owner, attempt, holder, ms(lease), ms(ttl), task, delivery),
            "takes" if takes else "",
        ]
        keys = [*self._both(name), self.leases, self.keys.replaced(name)]
        return _ticket(Entry, self._ask("claim_enter", keys, args, self._replicas))

    def start(self, name: str, *, owner: str, attempt: int, remember: float) -> Ticket[Entry]:
        """Free the claim of a copy that starts, or learn why it must not start.

        One that has started is known for ``remember`` seconds.
        """
        keys = [self.keys.claim(name), self.keys.replaced(name), self.keys.ended(name)]
        keys.append(self.keys.followed(name))
        args: list[str | int] = [owner, attempt, ms(remember)]
        return _ticket(Entry, self._ask("claim_start", keys, args, self._replicas))

    def release(
        self,
        name: str,
        *,
        owner: str,
        attempt: int,
        holder: str,
        keep_for: float = 0,
        may_be_unentered: bool = False,
        remember: float = 0,
        end: End | None = None,
    ) -> tuple[Release, str]:
        """End a run; with ``keep_for`` (seconds) the claim waits for the copy that follows.

        The last attempt of a task that was continued is remembered for ``remember`` seconds, and
        its ``end`` is noted for those that follow it.
        """
        args: list[str | int] = [
            *(owner, attempt, holder, ms(keep_for), int(may_be_unentered), ms(remember)),
            *(("", "") if end is None else (end.state, "" if end.ttl is None else ms(end.ttl))),
        ]
        followed = self.keys.followed(name if end is None else end.name)
        keys = [*self._both(name), self.keys.replaced(name), self.leases, followed]
        code, other = self._ask("claim_release", keys, args)
        return Release(int(code)), str(other)

    def follow(
        self, name: str, *, task_id: str, followed: str, until: int | None, ttl: float
    ) -> Following:
        """Have a task follow another one, or learn how that one ended.

        Args:
            name: The claim's name.
            task_id: The task that follows.
            followed: Whom it follows; itself if that is the owner, whoever it is.
            until: Until when (ms by the server's clock); ``None``: for the ``ttl`` from now on.
            ttl: For how long a task follows (s).
        """
        keys = [self.keys.claim(name), self.keys.followed(name)]
        args: list[str | int] = [task_id, followed, "" if until is None else until, ms(ttl)]
        code, other, left, ends, state = self._ask("claim_follow", keys, args)
        return Following(Follow(int(code)), other, int(left) / 1000, int(ends), state)

    def note_end(self, end: End, *, owner: str) -> None:
        """Note how a task ended that has freed its key before, for those that follow it."""
        self._ask("claim_note_end", [self.keys.followed(end.name, owner)], [end.state])

    def _ask(
        self,
        script: str,
        keys: Sequence[Key],
        args: Sequence[Argument],
        replicas: Replicas = NO_REPLICAS,
    ) -> Any:
        return load(script)(self.client, keys, args, replicas)

    def _ask_each(
        self, script: str, calls: Sequence[Call], replicas: Replicas = NO_REPLICAS
    ) -> list[Any]:
        return load(script).for_each(self.client, calls, replicas)

    def _both(self, name: str) -> list[str]:
        return [self.keys.claim(name), self.keys.ended(name)]

    def read(self, name: str) -> dict[str, str]:
        """Return the claim's record, empty where nobody holds the key."""
        with self.reading("read") as server:
            found: dict[str, str] = server.hgetall(self.keys.claim(name))  # type: ignore[assignment]
            return found

    def replaced_by(self, name: str, task_id: str) -> str | None:
        """Return the task whose call has replaced that of another one, or ``None``."""
        with self.reading("read") as server:
            found: str | None = server.get(self.keys.replaced(name, task_id))  # type: ignore[assignment]
            return found

    def free(self, name: str, *, owner: str, fence: str) -> bool:
        """Free a claim by hand, unless it changed hands meanwhile."""
        return bool(self._ask("claim_free", [self.keys.claim(name)], [owner, fence]))

    def names(self) -> list[str]:
        """Return the keys of all claims; walks with ``SCAN``, so it blocks nobody."""
        with self.reading("list") as server:
            return sorted(server.scan_iter(match=self.keys.claims_pattern(), count=500))

    @contextmanager
    def reading(self, what: str) -> Iterator[redis.Redis]:
        """Give the client to who reads without a script; errors are those of scripts."""
        client = self.client
        try:
            yield client.redis
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise StoreUnavailable(client.shown_url, str(error)) from error
        except redis.ResponseError as error:
            raise StoreError(f"the lock Redis refused to {what} claims: {error}") from error


def _ticket(codes: type[Code], answer: list[str]) -> Ticket[Code]:
    code, owner, milliseconds, fence = answer
    return Ticket(codes(int(code)), str(owner), max(int(milliseconds), 0) / 1000, int(fence))
