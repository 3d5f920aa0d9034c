"""Messages on lease: taken, renewed, settled and put back, each in one script.

The lists, ``unacked`` and ``unacked_index`` are stock kombu's own, so that stock and reliable
workers share queues. What is ours stands beside them: see ``keys.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import redis

from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.delivery import (
    UNREADABLE,
    Copy,
    Delivery,
    FetchPlan,
    Guard,
    Layout,
    Thrown,
    redelivered,
)
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.letters import Bounds, Buried, Letter, undecodable
from reliable_tasks._store.publication import Publication, Published, Queued
from reliable_tasks._store.runs import OVER_TTL, RUN_TTL, Runs
from reliable_tasks._store.scripts import (
    NO_REPLICAS,
    Argument,
    Call,
    Replicas,
    Server,
    checked,
    execute,
    load,
    pipelined,
)
from reliable_tasks._store.values import ms, text

__all__ = ["Messages"]

#: How long a repeated publish is recognised (s): longer than any client goes on trying.
_TOKEN_TTL = 300.0
#: The same where another caller may repeat it, and may be a person (s).
_OTHERS_TOKEN_TTL = 7 * 86400.0
#: How long a bell rings that nobody hears (s), as in ``ring_bell.lua``.
_BELL_TTL = 60.0
#: After so many bytes a fetch takes no more: reading a message blocks the server.
_FETCHED_BYTES = 1_000_000
#: So many bytes of messages, at most, are put back in one go, but at least one message.
_FOUND_BYTES = 8_000_000
#: How many tags one renewal takes: each ZADD blocks the server for well under 1 ms.
_RENEWED_AT_ONCE = 250
#: Answers of ``message_requeue.lua``.
_PUT_BACK, _CONTINUED, _WAS_ASIDE = 1, 2, 3
#: How many messages are thrown away in one go.
_PURGED_AT_ONCE = 200


class Messages:
    """The messages of one Redis database behind one prefix.

    Every method takes the client to use, raises redis-py's own errors, and can be repeated when
    its reply was lost.

    Args:
        layout: Where kombu keeps its messages.
        key_prefix: What our keys begin with, behind kombu's prefix.
        dead: The dead letters, where those have other keys.
        bounds: How much is kept of messages that nobody can read; ``None`` to discard them.
        when_set_apart: Called with the letter of one that was kept, and what is `Buried`.
    """

    def __init__(
        self,
        layout: Layout,
        key_prefix: str,
        *,
        dead: DeadStore | None = None,
        bounds: Bounds | None = None,
        when_set_apart: Callable[[Letter, Buried], object] = lambda *_: None,
    ) -> None:
        self.layout = layout
        self.keys = Keys(layout.prefix + key_prefix)
        self.dead = dead or DeadStore(self.keys)
        self.runs = Runs(self.keys, self.dead)
        self._bounds = bounds
        self._when_set_apart = when_set_apart
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
            ms(lease),
            prefix,
            count,
            len(queues),
            int(rotates),
            0,
            self.keys.runs,
            ms(RUN_TTL),
            self.layout.prefix,
            _FETCHED_BYTES,
            *endings,
        ]
        return FetchPlan(prefix, lists, queues, keys, args, count)

    def prepare_publish(
        self,
        *,
        token: str,
        list_: str,
        queue: str,
        message: str,
        publication: Publication | None = None,
        expires: tuple[int, Sequence[str]] | None = None,
    ) -> Call:
        """Prepare to queue a message, unless one with this token was queued before.

        Args:
            token: Of this publish, the same for each queue that the message is routed to; unless
                the ``publication`` has one.
            list_: The list of its priority, without kombu's prefix.
            queue: The queue.
            message: The whole message.
            publication: What else to do in the same step.
            expires: The queue's own expiry (ms), and the lists that it concerns.
        """
        with_ = publication or Publication()
        token = with_.token or token
        key = self.layout.prefix + list_
        expiry, lists = expires or (0, ())
        keys = [
            self.keys.sent(f"{token}:{queue}"),
            key,
            self.keys.bell(queue),
            self.keys.run(with_.task_id) if with_.continues else key,
            self.keys.claim(with_.claim) if with_.claim else key,
            self.keys.replaced(with_.claim) if with_.claim else key,
            self.keys.leases,
        ]
        args: list[Argument] = [
            message,
            ms(_OTHERS_TOKEN_TTL if with_.token else _TOKEN_TTL),
            with_.continues,
            with_.how if with_.claim else "",
            with_.owner,
            with_.claim_attempt,
            ms(with_.ttl),
            with_.task,
            with_.holder,
            expiry,
            token,
            ms(RUN_TTL),
            int(with_.is_only),
            *(self.layout.prefix + one for one in lists),
        ]
        return keys, args

    def publish(self, server: Server, call: Call, replicas: Replicas = NO_REPLICAS) -> Published:
        """Queue a message, as it was prepared; some ``replicas`` must have it, too."""
        return _published(load("message_publish").on(server, *call, replicas))

    def publish_each(
        self, server: Server, calls: Sequence[Call], replicas: Replicas = NO_REPLICAS
    ) -> list[Published]:
        """Queue some messages, all under way at once."""
        answers = load("message_publish").on_each(server, calls, replicas)
        return [_published(answer) for answer in answers]

    def purge(self, server: redis.Redis, list_: str, tell: Callable[[list[Thrown]], None]) -> int:
        """Throw away what waits in a list, and free the claims; return how many that were.

        Those whose claims are not here are told.
        """
        begins = (self.keys.claims, self.keys.replacements)
        args: list[Argument] = [_PURGED_AT_ONCE, _FETCHED_BYTES, *begins]
        keys = [self.layout.prefix + list_, self.keys.leases]
        purged = 0
        while True:
            count, *elsewhere = load("message_purge").on(server, keys, args)
            if elsewhere:
                tell(
                    [
                        Thrown(text(key), text(owner), int(attempt), text(task))
                        for key, owner, attempt, task in elsewhere
                    ]
                )
            if not count:
                return purged
            purged += int(count)

    def hold(self, server: redis.Redis, delivery: Delivery, lease: float) -> Copy:
        """Ask again whether a copy may run, and renew its lease (s)."""
        keys = [self.keys.leases, self.keys.run(delivery.task_id), *self._held]
        args: list[Argument] = [delivery.tag, ms(RUN_TTL), ms(lease)]
        return Copy.of(load("message_hold").on(server, keys, args))

    def settle(self, server: redis.Redis, delivery: Delivery) -> bool:
        """Acknowledge or discard; return False if the delivery was over already."""
        keys = [*self._held, self.keys.leases, self.keys.run(delivery.task_id)]
        remembers = ms(OVER_TTL) if delivery.is_redelivered else 0
        args: list[Argument] = [delivery.tag, int(delivery.is_started), remembers]
        return bool(load("message_settle").on(server, keys, args))

    def bury(self, server: redis.Redis, delivery: Delivery) -> Buried:
        """Acknowledge, and keep the message as a dead letter."""
        assert delivery.letter is not None
        keys = [*self._held, self.keys.leases, self.keys.run(delivery.task_id)]
        remembers = ms(OVER_TTL) if delivery.is_redelivered else 0
        args: list[Argument] = [delivery.tag, int(delivery.is_started), remembers]
        args += delivery.letter.arguments(delivery.tag)
        return Buried.of(load("message_bury").on(server, [*keys, self.dead.keys.dead], args))

    def requeue(self, server: redis.Redis, delivery: Delivery, *, to_back: bool = False) -> bool:
        """Put a message back; return False if it was over, or has continued itself.

        Args:
            server: The client.
            delivery: Its message is marked as redelivered and its deliveries are counted.
            to_back: Behind all that wait, not in front of them.
        """
        keys, args = self._requeue(delivery, to_back=to_back)
        return int(load("message_requeue").on(server, keys, args)) == _PUT_BACK

    def requeue_lapsed(
        self,
        server: redis.Redis,
        deliveries: Sequence[Delivery],
        longest: float,
        tell: Callable[[list[Thrown]], None],
    ) -> list[Delivery]:
        """Put back the messages whose lease has ended, of which none is longer (s).

        One whose task had been continued is not, and its claim is freed: its run has ended. Those
        of these whose claims are not here are told.

        Returns:
            Those that were put back.
        """
        calls = [self._requeue(delivery, if_lapsed_of=longest) for delivery in deliveries]
        answers = load("message_requeue").on_each(server, calls)
        put_back, gone = [], []
        for delivery, code in zip(deliveries, answers, strict=True):
            delivery.was_aside = int(code) == _WAS_ASIDE
            if int(code) in (_PUT_BACK, _WAS_ASIDE):
                put_back.append(delivery)
            elif int(code) == _CONTINUED and (thrown := Thrown.of_dead_run(delivery.raw)):
                gone.append(thrown)
        discarded = load("claim_discard").on_each(
            server, [one.discarding(self.keys, self.keys.leases) for one in gone]
        )
        elsewhere = [one for one, is_freed in zip(gone, discarded, strict=True) if not is_freed]
        if elsewhere:
            tell(elsewhere)
        return put_back

    def lay_aside(self, server: redis.Redis, delivery: Delivery, seconds: float) -> bool:
        """Let go of a delivery whose task waits; its message is put back when the time is over."""
        keys = [*self._held, self.keys.leases, self.keys.run(delivery.task_id)]
        is_started = int(delivery.is_started and not delivery.has_crashed)
        entry = f'[{delivery.raw.decode()},"",{json.dumps(delivery.queue)}]'
        args: list[Argument] = [delivery.tag, ms(seconds), is_started, entry]
        return bool(load("message_lay_aside").on(server, keys, args))

    def _requeue(
        self, delivery: Delivery, *, to_back: bool = False, if_lapsed_of: float = 0.0
    ) -> Call:
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
            ms(if_lapsed_of),
            delivery.crash,
        ]
        return keys, args

    def resume(self, server: redis.Redis, copy: Delivery, run: Delivery, lease: float) -> bool:
        """Let a run that lost its message have it again, from a copy; return whether it has."""
        keys = [*self._held, self.keys.leases, self.keys.run(run.task_id)]
        return bool(load("message_resume").on(server, keys, [copy.tag, run.tag, ms(lease)]))

    def renew(
        self, server: redis.Redis, tags: Sequence[str], lease: float, *, turn: int | None = None
    ) -> list[str]:
        """Renew leases; return the tags whose delivery is over.

        Args:
            server: The client.
            tags: Of the deliveries.
            lease: In seconds.
            turn: A number that grows by one with each renewal: then what stock sweepers go by is
                renewed for one half of the tags, and the next time for the other one. They
                look at nothing that was renewed in the last lease, and it is half of the work.
        """
        keys = [self.keys.leases, self._held[1]]
        in_turn = [turn is None or (hash(tag) + turn) % 2 == 0 for tag in tags]
        calls: list[Call] = []
        for has_index in (True, False):
            some = (tag for tag, is_now in zip(tags, in_turn, strict=True) if is_now is has_index)
            while batch := list(islice(some, _RENEWED_AT_ONCE)):
                calls.append((keys, [ms(lease), json.dumps(batch), int(has_index)]))
        answers = load("message_renew").on_each(server, calls)
        return [text(tag) for answer in answers for tag in answer]

    def find(self, server: redis.Redis, tags: Sequence[str]) -> list[Delivery | str]:
        """Return the deliveries of tags; of one whose message is gone only the tag.

        Those of the last tags are left out where messages are large. One that cannot be read is
        set apart: it must not keep the others from being found.
        """
        few = list(self._not_too_large(server, tags))
        if not few:
            return []
        entries = execute(server, "HMGET", self._held[0], *few)
        found: list[Delivery | str] = []
        for tag, entry in zip(few, entries, strict=True):
            if entry is None:
                found.append(tag)
                continue
            try:
                found.append(self._delivery(tag, entry))
            except UNREADABLE:
                self.set_apart(server, tag, entry)
        return found

    def _not_too_large(self, server: redis.Redis, tags: Sequence[str]) -> Iterator[str]:
        sizes = checked(pipelined(server, [("HSTRLEN", self._held[0], tag) for tag in tags]))
        left = _FOUND_BYTES
        for tag, size in zip(tags, sizes, strict=True):
            if left <= 0:
                return
            yield tag
            left -= int(size)

    def drop(self, server: redis.Redis, tag: str) -> None:
        """Forget a lease without a message: that of another broker, or of a lost write."""
        execute(server, "ZREM", self.keys.leases, tag)
        execute(server, "ZREM", self._held[1], tag)

    def set_apart(self, server: redis.Redis, tag: str, raw: bytes) -> None:
        """End the delivery of a message that nobody can read, and keep it as a dead letter."""
        list_ = tag.split(":", 3)[-1]
        queue = list_.partition(self.layout.sep)[0] if self.layout.sep else list_
        delivery = Delivery(tag, list_, queue, raw, Copy(Guard.UNKNOWN, 0, 0.0))
        if self._bounds is None:
            self.settle(server, delivery)
            return
        delivery.letter = undecodable(raw, event=tag, queue=queue, bounds=self._bounds)
        buried = self.bury(server, delivery)
        if buried.id:
            self._when_set_apart(delivery.letter, buried)

    def ring(self, server: redis.Redis, bell: str) -> None:
        """Wake the one that waits for a bell of its own."""
        commands = [("RPUSH", bell, "1"), ("PEXPIRE", bell, ms(_BELL_TTL))]
        checked(pipelined(server, commands, is_atomic=True))

    def _delivery(self, tag: str, entry: bytes) -> Delivery:
        message, _, queue = json.loads(entry)
        copy = Copy(Guard.MAY_RUN, 0, 0.0)
        list_ = tag.split(":", 3)[3]
        delivery = Delivery(tag, list_, queue, json.dumps(message).encode(), copy)
        delivery.describe(message)
        return delivery


_QUEUED = Published(Queued.QUEUED, "", 0.0, 0)


def _published(answer: Any) -> Published:
    if answer == _QUEUED.code:
        return _QUEUED
    code, owner, milliseconds, fence = answer
    return Published(
        Queued(int(code)),
        text(owner),
        max(int(milliseconds), 0) / 1000,
        int(text(fence) or 0),
    )
