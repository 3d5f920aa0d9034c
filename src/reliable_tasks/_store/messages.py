"""Messages on lease: taken, renewed, settled and put back, each in one script.

The lists, ``unacked`` and ``unacked_index`` are stock kombu's own, so that stock and reliable
workers share queues. What is ours stands beside them: see ``keys.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from typing import Any
from uuid import uuid4

import redis

from reliable_tasks._store.keys import Keys
from reliable_tasks._store.publication import Publication, Published, Queued
from reliable_tasks._store.scripts import Argument, execute, load

__all__ = ["Copy", "Delivery", "FetchPlan", "Guard", "Layout", "Messages"]

#: How long a repeated publish is recognised (s): longer than any client goes on trying.
_TOKEN_TTL = 300.0
#: How long a run is known if nobody ends it (s): a task may wait for its ETA for days.
_RUN_TTL = 7 * 86400.0
#: How long a task that had other copies is known to be over (s).
_OVER_TTL = 3600.0
#: How many tags one renewal takes: each ZADD blocks the server for well under 1 ms.
_RENEWED_AT_ONCE = 500
#: How much later than a third of the lease a keeper may come to renew (s).
_RENEWAL_SLACK = 3.0
#: How long a queue is looked after that no worker names any more (s).
_QUEUE_TTL = 60.0


class Guard(IntEnum):
    """What the guard says of a copy; the numbers are those of the scripts."""

    UNKNOWN = 0
    MAY_RUN = 1
    OVER = 2
    HELD_ELSEWHERE = 3


@dataclass(frozen=True, slots=True)
class Copy:
    """What is known of a copy before it runs.

    Attributes:
        guard: Whether it may run.
        crashes: How many times the task was started before and ended by no word of its own.
        seconds: How long the lease of the copy lasts that runs elsewhere.
    """

    guard: Guard
    crashes: int
    seconds: float

    @property
    def may_run(self) -> bool:
        """Whether no other copy is alive."""
        return self.guard is Guard.MAY_RUN

    @property
    def is_over(self) -> bool:
        """Whether another copy has ended, or was continued."""
        return self.guard is Guard.OVER

    @property
    def is_unknown(self) -> bool:
        """Whether nobody could say."""
        return self.guard is Guard.UNKNOWN

    @classmethod
    def of(cls, answer: Sequence[Any]) -> Copy:
        """Read what `hold_run` returned."""
        guard, crashes, milliseconds = answer
        return cls(Guard(int(guard)), int(crashes), max(int(milliseconds), 0) / 1000)


@dataclass(slots=True)
class Delivery:
    """One message in the hands of one worker.

    Attributes:
        tag: Its own, never used again: ``<worker>:<fetch>:<number>:<list>``.
        list: The list it came from, without kombu's prefix.
        queue: The queue of that list.
        raw: The message as it was in the list.
        copy: What the guard said when it was taken.
        task_id: Id of the task, or ``""``.
        is_redelivered: Whether the task may have had other copies.
        is_started: Whether a crash was counted ahead.
        has_crashed: Whether that crash stands, for the child that ran it is dead.
        renew_until: When to stop renewing its lease (monotonic s): the run has hung.
    """

    tag: str
    list: str
    queue: str
    raw: bytes
    copy: Copy
    task_id: str = ""
    is_redelivered: bool = False
    is_started: bool = False
    has_crashed: bool = False
    renew_until: float = math.inf

    def describe(self, message: Mapping[str, Any]) -> None:
        """Take over what the decoded message says of its task."""
        headers = _mapping(message.get("headers"))
        self.task_id = str(headers.get("id") or "")
        self.is_redelivered = bool(headers.get("redelivered"))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where kombu keeps its messages.

    Attributes:
        prefix: kombu's ``global_keyprefix``.
        unacked: Key of the messages that were delivered.
        index: Key of the times by which stock workers sweep.
        sep: What separates a queue's name from a priority.
    """

    prefix: str
    unacked: str
    index: str
    sep: str


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """The command that takes messages, and what is needed to read its answer."""

    prefix: str
    lists: Sequence[str]
    queues: Sequence[str]
    keys: Sequence[str]
    args: Sequence[Argument]
    count: int = field(default=1)

    @property
    def sha(self) -> str:
        """The hash of the script."""
        return load("message_fetch").sha

    @property
    def source(self) -> str:
        """The script, for a server that does not know it."""
        return load("message_fetch").source

    def repeated(self) -> FetchPlan:
        """Return the plan that asks again for what this one took."""
        args = [*self.args]
        args[5] = "1"
        return FetchPlan(self.prefix, self.lists, self.queues, self.keys, args, self.count)

    def run(self, server: redis.Redis) -> list[Any]:
        """Take messages now."""
        return list(load("message_fetch").on(server, self.keys, self.args))

    def read(self, answer: Iterable[Sequence[Any]]) -> Iterator[tuple[str, str, str, bytes, Copy]]:
        """Yield tag, list, queue, message and copy of each that was taken."""
        for place, message, *held, number in answer:
            list_ = self.lists[int(place) - 1]
            queue = self.queues[(int(place) - 1) % len(self.queues)]
            yield f"{self.prefix}{int(number)}:{list_}", list_, queue, message, Copy.of(held)


class Messages:
    """The messages of one Redis database behind one prefix.

    Every method takes the client to use, raises redis-py's own errors, and can be repeated when
    its reply was lost.
    """

    def __init__(self, layout: Layout, key_prefix: str) -> None:
        self.layout = layout
        self.keys = Keys(layout.prefix + key_prefix)
        self._held = [layout.prefix + layout.unacked, layout.prefix + layout.index]

    def plan_fetch(
        self,
        prefix: str,
        *,
        queues: Sequence[str],
        lists: Sequence[str],
        unleased: Iterable[str],
        count: int,
        rotates: bool,
        lease: float,
    ) -> FetchPlan:
        """Prepare to take messages.

        Args:
            prefix: What the tags begin with; never used before.
            queues: In the order in which they are served.
            lists: Of each queue for the first priority, of each for the second, and so on.
            unleased: Queues whose messages are not acknowledged.
            count: How many messages at most.
            rotates: Serve the queues in turn rather than emptying the first one first.
            lease: In seconds.
        """
        without = frozenset(unleased)
        bells = [self.keys.bell(queue) for queue in queues]
        keys = [*self._held, self.keys.leases, *bells, *(self.layout.prefix + q for q in lists)]
        endings = ["" if q in without else f',"",{json.dumps(q)}]' for q in queues]
        args: list[Argument] = [
            _ms(lease),
            prefix,
            count,
            len(queues),
            int(rotates),
            0,
            self.keys.runs,
            _ms(_RUN_TTL),
            self.layout.prefix,
            *endings,
        ]
        return FetchPlan(prefix, lists, queues, keys, args, count)

    def publish(
        self,
        server: redis.Redis,
        *,
        token: str,
        list_: str,
        queue: str,
        message: str,
        publication: Publication | None = None,
        expires: tuple[int, Sequence[str]] | None = None,
    ) -> Published:
        """Queue a message, unless one with this token was queued before.

        Args:
            server: The client.
            token: Of this publish.
            list_: The list of its priority, without kombu's prefix.
            queue: The queue.
            message: The whole message.
            publication: What else to do in the same step.
            expires: The queue's own expiry (ms), and the lists that it concerns.
        """
        with_ = publication or Publication()
        key = self.layout.prefix + list_
        expiry, lists = expires or (0, ())
        keys = [
            self.keys.sent(token),
            key,
            self.keys.bell(queue),
            self.keys.run(with_.task_id) if with_.continues else key,
            self.keys.claim(with_.claim) if with_.claim else key,
        ]
        wish = ("continue" if with_.keeps else "acquire") if with_.claim else ""
        args: list[Argument] = [
            message,
            _ms(_TOKEN_TTL),
            with_.continues,
            wish,
            with_.owner,
            with_.claim_attempt,
            _ms(with_.ttl),
            with_.task,
            with_.holder,
            expiry,
            token,
            _ms(_RUN_TTL),
            *(self.layout.prefix + one for one in lists),
        ]
        code, owner, milliseconds, fence = load("message_publish").on(server, keys, args)
        return Published(
            Queued(int(code)),
            _text(owner),
            max(int(milliseconds), 0) / 1000,
            int(_text(fence) or 0),
        )

    def hold(self, server: redis.Redis, delivery: Delivery) -> Copy:
        """Ask again whether a copy may run."""
        keys = [self.keys.leases, self.keys.run(delivery.task_id), self._held[0]]
        args: list[Argument] = [delivery.tag, _ms(_RUN_TTL)]
        return Copy.of(load("message_hold").on(server, keys, args))

    def enter(
        self, server: redis.Redis, delivery: Delivery, *, order: int, is_copy: bool, lease: float
    ) -> Copy:
        """Let in a copy of another broker's task, with a lease, and count its start as a crash.

        Args:
            server: The client.
            delivery: The copy.
            order: A number that is greater for each continuation of the task.
            is_copy: Whether its message was delivered before.
            lease: In seconds.
        """
        keys = [self.keys.leases, self.keys.run(delivery.task_id)]
        args: list[Argument] = [delivery.tag, order, int(is_copy), _ms(_RUN_TTL), _ms(lease)]
        return Copy.of(load("run_enter").on(server, keys, args))

    def leave_run(
        self,
        server: redis.Redis,
        delivery: Delivery,
        *,
        order: int,
        goes_back: bool,
        remembers: float,
    ) -> bool:
        """End a copy that was let in so; return False if its lease had ended."""
        keys = [self.keys.leases, self.keys.run(delivery.task_id)]
        args: list[Argument] = [
            delivery.tag,
            order,
            "back" if goes_back else "over",
            int(not delivery.has_crashed),
            _ms(remembers),
        ]
        return bool(load("run_leave").on(server, keys, args))

    def note_done(self, server: redis.Redis, task_id: str, order: int) -> None:
        """Note that the copy of this order has published its task's continuation."""
        load("run_done").on(server, [self.keys.run(task_id)], [order, _ms(_OVER_TTL)])

    def settle(self, server: redis.Redis, delivery: Delivery) -> bool:
        """Acknowledge or discard; return False if the delivery was over already."""
        keys = [*self._held, self.keys.leases, self.keys.run(delivery.task_id)]
        remembers = _ms(_OVER_TTL) if delivery.is_redelivered else 0
        args: list[Argument] = [delivery.tag, int(delivery.is_started), remembers]
        return bool(load("message_settle").on(server, keys, args))

    def requeue(
        self,
        server: redis.Redis,
        delivery: Delivery,
        *,
        to_back: bool = False,
        if_lapsed: bool = False,
    ) -> bool:
        """Put a message back; return False if it was over, or has continued itself.

        Args:
            server: The client.
            delivery: Its message is marked as redelivered and its deliveries are counted.
            to_back: Behind all that wait, not in front of them.
            if_lapsed: Only if the lease has ended.
        """
        keys = [
            *self._held,
            self.keys.leases,
            self.keys.run(delivery.task_id),
            self.layout.prefix + delivery.list,
            self.keys.bell(delivery.queue),
        ]
        args: list[Argument] = [
            delivery.tag,
            redelivered(delivery.raw),
            "back" if to_back else "front",
            int(delivery.is_started and not delivery.has_crashed),
            int(if_lapsed),
        ]
        return int(load("message_requeue").on(server, keys, args)) == 1

    def note_continued(self, server: redis.Redis, task_id: str, tag: str) -> bool:
        """Note that a delivery has published its task's whole continuation."""
        return bool(load("message_continue").on(server, [self.keys.run(task_id)], [tag]))

    def renew(self, server: redis.Redis, tags: Iterable[str], lease: float) -> list[str]:
        """Renew leases; return the tags whose delivery is over."""
        over: list[str] = []
        keys = [self.keys.leases, self._held[1]]
        rest = iter(tags)
        while batch := list(islice(rest, _RENEWED_AT_ONCE)):
            answer = load("message_renew").on_full(server, keys, [_ms(lease), *batch])
            over += [_text(tag) for tag in answer]
        return over

    # -- what the sweeper does -----------------------------------------------------------------

    def beat(
        self,
        server: redis.Redis,
        *,
        worker: str,
        connection: str,
        server_id: str,
        lease: float,
        elapsed: float,
        term: float,
        gap: float,
    ) -> tuple[float, bool, float]:
        """Say that a worker lives; return the server's time, whether it sweeps, and the hold."""
        keys = [self.keys.beats, self.keys.keepers, self.keys.sweeper]
        args: list[Argument] = [
            worker,
            connection,
            server_id,
            _ms(lease),
            _ms(elapsed),
            _ms(term),
            _ms(gap),
            _ms(min(lease, lease / 3 + _RENEWAL_SLACK)),
        ]
        now, sweeps, held = load("worker_beat").on_full(server, keys, args)
        return int(now) / 1000, bool(sweeps), int(held) / 1000

    def leave(self, server: redis.Redis, worker: str) -> None:
        """Forget a worker."""
        keys = [self.keys.beats, self.keys.keepers, self.keys.sweeper]
        load("worker_leave").on(server, keys, [worker])

    def name_queues(
        self, server: redis.Redis, now: float, queues: Mapping[str, Sequence[str]]
    ) -> None:
        """Have these queues looked after; for each its lists, without kombu's prefix."""
        names = {
            json.dumps([self.keys.bell(queue), *(self.layout.prefix + q for q in lists)]): now
            * 1000
            for queue, lists in queues.items()
        }
        scores = [x for name, at in names.items() for x in (at, name)]
        execute(server, "ZADD", self.keys.queues, *scores)

    def ring(self, server: redis.Redis) -> int:
        """Wake a worker for each queue with messages; return how many were woken."""
        return int(load("queues_ring").on(server, [self.keys.queues], [_ms(_QUEUE_TTL)]))

    def silent(self, server: redis.Redis, before: float) -> dict[str, float]:
        """Return the workers that were last heard of before a server's time, and when."""
        found = execute(
            server, "ZRANGEBYSCORE", self.keys.beats, "-inf", f"({before * 1000:.0f}", "WITHSCORES"
        )
        return {_text(name): at / 1000 for name, at in _pairs(found)}

    def keepers(self, server: redis.Redis, workers: Sequence[str]) -> dict[str, str]:
        """Return how to tell the connections of workers."""
        if not workers:
            return {}
        found = execute(server, "HMGET", self.keys.keepers, *workers)
        return {
            worker: _text(value)
            for worker, value in zip(workers, found, strict=True)
            if value is not None
        }

    def end_leases_of(self, server: redis.Redis, worker: str) -> int:
        """End all leases of a dead worker; return how many there were."""
        ended = 0
        cursor: Any = "0"
        while True:
            cursor, found = execute(
                server, "ZSCAN", self.keys.leases, cursor, "MATCH", f"{worker}:*", "COUNT", 500
            )
            tags = [_text(tag) for tag, _ in _pairs(found)]
            if tags:
                scores = [x for tag in tags for x in (0, tag)]
                execute(server, "ZADD", self.keys.leases, "XX", *scores)
                ended += len(tags)
            if _text(cursor) == "0":
                return ended

    def lapsed(self, server: redis.Redis, now: float, *, beyond: float, limit: int) -> list[str]:
        """Return tags whose lease has ended, or ends after ``beyond``, which no lease does."""
        ended = execute(
            server,
            "ZRANGEBYSCORE",
            self.keys.leases,
            "-inf",
            f"{now * 1000:.0f}",
            "LIMIT",
            0,
            limit,
        )
        if len(ended) < limit:
            ended += execute(
                server,
                "ZRANGEBYSCORE",
                self.keys.leases,
                f"({beyond * 1000:.0f}",
                "+inf",
                "LIMIT",
                0,
                limit - len(ended),
            )
        return [_text(tag) for tag in ended]

    def find(self, server: redis.Redis, tags: Sequence[str]) -> list[Delivery | str]:
        """Return the deliveries of tags; of one whose message is gone only the tag.

        A message that cannot be read is set apart: it must not keep the others from being found.
        """
        if not tags:
            return []
        entries = execute(server, "HMGET", self._held[0], *tags)
        found: list[Delivery | str] = []
        for tag, entry in zip(tags, entries, strict=True):
            if entry is None:
                found.append(tag)
                continue
            try:
                found.append(self._delivery(tag, entry))
            except (ValueError, TypeError, AttributeError, IndexError):
                self.set_apart(server, tag, entry)
        return found

    def drop(self, server: redis.Redis, tag: str) -> None:
        """Forget a lease without a message: that of another broker, or of a lost write."""
        execute(server, "ZREM", self.keys.leases, tag)
        execute(server, "ZREM", self._held[1], tag)

    def set_apart(self, server: redis.Redis, tag: str, message: bytes) -> None:
        """Keep a message that nobody can read where somebody can look at it."""
        keys = [*self._held, self.keys.leases, self.keys.undecodable]
        load("message_set_apart").on(server, keys, [tag, message])

    def count_start(self, delivery: Delivery, by: int) -> tuple[Argument, ...]:
        """Return the command that counts a start as a crash, or takes that back."""
        script = load("run_start")
        # Nobody waits for an answer that says NOSCRIPT.
        return ("EVAL", script.source, 1, self.keys.run(delivery.task_id), delivery.tag, by)

    def _delivery(self, tag: str, entry: bytes) -> Delivery:
        message, _, queue = json.loads(entry)
        copy = Copy(Guard.MAY_RUN, 0, 0.0)
        list_ = tag.split(":", 3)[3]
        delivery = Delivery(tag, list_, queue, json.dumps(message).encode(), copy)
        delivery.describe(message)
        return delivery


def redelivered(raw: bytes) -> str:
    """Return a message as it goes back: marked as kombu does, its deliveries counted."""
    message: dict[str, Any] = json.loads(raw)
    headers = dict(_mapping(message.get("headers")))
    headers["redelivered"] = True
    count = headers.get("x-delivery-count")
    headers["x-delivery-count"] = (count if isinstance(count, int) else 0) + 1
    properties = dict(_mapping(message.get("properties")))
    # A tag is of one delivery: a stock worker takes the one that it finds here.
    properties["delivery_tag"] = str(uuid4())
    properties["delivery_info"] = {
        **_mapping(properties.get("delivery_info")),
        "redelivered": True,
    }
    return json.dumps({**message, "headers": headers, "properties": properties})


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return what is a mapping as it stands; producers of all kinds write messages."""
    return value if isinstance(value, Mapping) else {}


def _pairs(found: Any) -> Iterator[tuple[Any, float]]:
    """Read members and scores, which redis-py gives as pairs or as one flat list."""
    rows = list(found)
    if rows and not isinstance(rows[0], (tuple, list)):
        rows = list(zip(rows[::2], rows[1::2], strict=True))
    for name, score in rows:
        yield name, float(score)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
