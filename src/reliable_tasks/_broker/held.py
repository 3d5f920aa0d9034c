"""What this process holds of one broker: its deliveries, whatever becomes of its connections.

A delivery belongs to a process, not to a connection. So a connection that is lost hands nothing
back, and what could not be said to the broker is said when it answers again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any
from uuid import uuid4

import redis

from reliable_tasks._broker.mute import UNREACHABLE, MuteConnection
from reliable_tasks._broker.saying import do, say, tell
from reliable_tasks._store.crashes import Crash, Starter
from reliable_tasks._store.delivery import (
    UNREADABLE,
    Copy,
    Delivery,
    FetchPlan,
    Guard,
    with_header,
)
from reliable_tasks._store.fleet import Fleet
from reliable_tasks._store.letters import Buried
from reliable_tasks._store.messages import Messages
from reliable_tasks._store.scripts import leave_replica

__all__ = ["SILENCE", "UNHEARD", "Held", "all_held", "held_for"]

#: A worker that was not heard of for so long (s) may be taken for dead, a little later.
UNHEARD = 2.0

#: After a failure nothing is said for so long (s) but what the keeper says: the main loop has more
#: to do than to wait for each of many.
SILENCE = 1.0


class Held:
    """The deliveries of one process from one broker.

    Attributes:
        worker: This process' name in tags and beats; never used again.
        host: The worker's name for people, e.g. ``"celery@shop"``.
        messages: The scripts, with the keys they work on.
        fleet: All processes that share the broker, of which this is one.
        lease: Seconds.
        server: The client for settling and putting back; it outlives every channel.
        keepers: The client of the thread that renews.
        detects_deaths: Whether a lost connection may count as a worker's death.
        renewed_at: When the last renewal that the server confirmed was sent (monotonic s).
        loop_seen_at: When the worker's main loop turned last (monotonic s), or ``None`` where it
            is not expected to.
        heard_at: The same of the last beat, and nothing was taken back since the one before.
    """

    def __init__(
        self,
        messages: Messages,
        lease: float,
        server: redis.Redis,
        keepers: redis.Redis,
    ) -> None:
        self.worker = uuid4().hex[:16]
        self.messages = messages
        self.fleet = Fleet(messages.layout, messages.keys)
        self.lease = lease
        self.server = server
        self.keepers = keepers
        self.host = ""
        self.detects_deaths = True
        self.renewed_at = self.heard_at = time.monotonic()
        self.loop_seen_at: float | None = None
        self._deliveries: dict[str, Delivery] = {}
        self._unsaid: dict[str, Callable[[redis.Redis, bool], Any]] = {}
        self._over: set[str] = set()
        self._suspected: set[str] = set()
        self._given_up: set[str] = set()
        self._lost_fetches: deque[FetchPlan] = deque()
        self._silent_until = 0.0
        self._fetches = count(1)
        self._mute = MuteConnection(server)
        # The keeper's thread says it, and at the end whoever stops the worker.
        self._saying = threading.Lock()

    def next_prefix(self) -> str:
        """Return what the tags of the next fetch begin with."""
        return f"{self.worker}:{next(self._fetches)}:"

    def take(self, delivery: Delivery) -> None:
        """Hold a delivery that was fetched."""
        self._deliveries[delivery.tag] = delivery

    def get(self, tag: str) -> Delivery | None:
        """Return a delivery that this process holds."""
        return self._deliveries.get(tag)

    def to_renew(self, now: float) -> list[str]:
        """Return the tags of all that is held, but for runs that have hung."""
        tags = []
        # Not its items: so many pairs at each beat set off the garbage collector.
        for delivery in list(self._deliveries.values()):
            tag = delivery.tag
            if now < delivery.renew_until:
                tags.append(tag)
            elif tag not in self._given_up:
                self._given_up.add(tag)
                say(
                    logging.ERROR,
                    "Task %s has outlived its hard limit and has hung: its lease is not renewed "
                    "any more, and another worker will run it",
                    delivery.task_id or tag,
                )
        return tags

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Expect no turn of the main loop while it waits for others, in bounded time."""
        is_expected = self.loop_seen_at is not None
        self.loop_seen_at = None
        try:
            yield
        finally:
            if is_expected:
                self.loop_seen_at = time.monotonic()

    def is_open(self, tag: str) -> bool:
        """Say whether a delivery is held and has not ended."""
        return tag in self._deliveries and tag not in self._unsaid

    def __len__(self) -> int:
        return len(self._deliveries)

    def settle(self, tag: str) -> None:
        """Acknowledge or discard a delivery; at the latest when the broker answers again."""
        delivery = self._deliveries.get(tag)
        if delivery is not None:
            self._say(
                delivery,
                lambda server, is_repeated: self._settle(server, delivery, is_repeated),
            )

    def requeue(self, tag: str, *, to_back: bool = False) -> None:
        """Put a delivery's message back; at the latest when the broker answers again."""
        delivery = self._deliveries.get(tag)
        if delivery is not None:
            self._say(
                delivery,
                lambda server, _: self.messages.requeue(server, delivery, to_back=to_back),
            )

    def lay_aside(self, tag: str, seconds: float) -> None:
        """Let go of a delivery whose task waits; its message comes back when the time is over."""
        delivery = self._deliveries.get(tag)
        if delivery is not None:
            self._say(
                delivery,
                lambda server, _: self.messages.lay_aside(server, delivery, seconds),
            )

    def note_header(self, delivery: Delivery, name: str, value: Any) -> None:
        """Have a message go back with one more header."""
        delivery.raw = with_header(delivery.raw, name, value)

    def put_back_fetched(self, plan: FetchPlan) -> None:
        """Put back what a fetch took whose answer is lost, now or when the broker answers."""
        try:
            self._put_back(self.server, plan)
        except (*UNREACHABLE, redis.exceptions.ResponseError):
            self._lost_fetches.append(plan)

    def may_be_over(self, delivery: Delivery) -> bool:
        """Say whether the broker may have taken a delivery back: then ask before a start.

        It was not renewed for a whole lease, or the worker was silent for so long that it may
        count as dead.
        """
        now = time.monotonic()
        return (
            now - self.heard_at > UNHEARD
            or now - self.renewed_at > self.lease
            or delivery.tag in self._suspected
        )

    def resume(self, copy: Delivery, run: Delivery) -> bool:
        """Let a run that goes on have its message again, which came back as a copy.

        Returns:
            Whether it has it; the copy is over then.
        """
        try:
            if not self.messages.resume(self.server, copy, run, self.lease):
                return False
        except (redis.exceptions.RedisError, OSError) as error:
            self.be_silent(error)
            return False
        self.forget(copy.tag)
        self._over.discard(run.tag)
        self._suspected.discard(run.tag)
        if not self.is_open(run.tag):
            # It has ended in its thread meanwhile, in vain.
            self.take(run)
            self.settle(run.tag)
        return True

    def forget(self, tag: str) -> None:
        """Let go of a delivery that is over; nothing is said."""
        self._deliveries.pop(tag, None)
        self._over.discard(tag)
        self._given_up.discard(tag)

    def hold(self, delivery: Delivery) -> Copy:
        """Ask the guard again; a broker that does not answer says that the copy must wait."""
        unknown = Copy(Guard.HELD_ELSEWHERE, delivery.copy.crashes, SILENCE)
        if self.is_silent:
            delivery.copy = unknown
            return unknown
        try:
            delivery.copy = self.messages.hold(self.server, delivery, self.lease)
        except (redis.exceptions.RedisError, OSError) as error:
            self.be_silent(error)
            say(logging.WARNING, "The broker does not answer: %s", error)
            delivery.copy = unknown
        return delivery.copy

    def count_start(self, delivery: Delivery) -> None:
        """Count a crash ahead of a start; its orderly end takes it back."""
        if delivery.starter is None:
            self.name_starter(delivery)
        self._count(delivery, 1)

    def name_starter(
        self,
        delivery: Delivery,
        *,
        pid: int | None = None,
        how: str = "",
        is_ending: bool = False,
    ) -> None:
        """Say who starts a delivery's task, or how that ended, before it is counted or goes back.

        Args:
            delivery: The delivery.
            pid: Of the pool child, if it is known.
            how: How that ended, or ``""``.
            is_ending: Whether it runs no more than the task's handlers.
        """
        known = delivery.starter
        is_ending = is_ending or (known is not None and known.is_ending)
        delivery.starter = Starter(pid or os.getpid(), self.host, is_ending, how)

    def explain_start(self, delivery: Delivery) -> None:
        """Say more of a start that is counted."""
        if delivery.is_started:
            self._count(delivery, 0)

    def crashes(self, delivery: Delivery) -> list[Crash] | None:
        """Return what is known of a task's crashes, ``None`` if the server does not say."""
        try:
            return self.messages.runs.crashes(self.server, delivery)
        except (redis.exceptions.RedisError, OSError) as error:
            self.be_silent(error)
            say(logging.WARNING, "Nobody says how task %s crashed: %s", delivery.task_id, error)
            return None

    def uncount_start(self, delivery: Delivery) -> None:
        """Take that back: the copy was started, and waits again."""
        if delivery.is_started:
            self._count(delivery, -1)
        delivery.starter = None
        # Asked again before the next start, for it may have published its continuation.
        delivery.copy = replace(delivery.copy, guard=Guard.UNKNOWN)
        # Of the start that is over; while it waits, it has not hung.
        delivery.renew_until = math.inf
        self._given_up.discard(delivery.tag)

    @property
    def is_silent(self) -> bool:
        """Whether the broker did not answer a moment ago."""
        return time.monotonic() < self._silent_until

    def be_silent(self, error: Exception) -> None:
        """Ask nothing for a moment."""
        if isinstance(error, redis.exceptions.ReadOnlyError):
            leave_replica(self.server)
        self._silent_until = time.monotonic() + SILENCE

    def say_what_is_unsaid(self, server: redis.Redis) -> None:
        """Settle and put back what could not be while the broker was away.

        Raises:
            redis.RedisError: It is away again, or refuses; what is left is kept.
        """
        with self._saying:
            self._say_all(server)

    def _say_all(self, server: redis.Redis) -> None:
        while self._lost_fetches:
            self._put_back(server, self._lost_fetches[0])
            self._lost_fetches.popleft()
        for tag, say_end in list(self._unsaid.items()):
            try:
                say_end(server, True)
            except redis.exceptions.ResponseError as error:
                # What is refused must not keep the others from being said.
                say(logging.ERROR, "The broker does not take the end of %s: %s", tag, error)
                continue
            self._unsaid.pop(tag, None)
            delivery = self._deliveries.get(tag)
            self.forget(tag)
            if delivery is not None and delivery.when_heard_late is not None:
                do(delivery.when_heard_late)

    @property
    def unsaid(self) -> int:
        """How many deliveries ended without the broker having heard of it."""
        return len(self._unsaid) + len(self._lost_fetches)

    def note_over(self, tags: Iterable[str]) -> None:
        """Note deliveries that the broker took back although this process holds them."""
        # Said at the second time: the first may have met one that was ending just then.
        before, self._suspected = self._suspected, set(tags)
        for tag in self._suspected & before - self._over:
            delivery = self._deliveries.get(tag)
            if delivery is None or tag in self._unsaid:
                continue
            self._over.add(tag)
            say(
                logging.ERROR,
                "Task %s lost its lease: this worker was silent for too long, or the broker "
                "lost data. Another copy may run; this one can no longer acknowledge",
                delivery.task_id or tag,
            )

    def _count(self, delivery: Delivery, by: int) -> None:
        if not delivery.task_id:
            return
        was_started, delivery.is_started = delivery.is_started, False
        command = self.messages.runs.count_start(delivery, by)
        try:
            self._mute.send(command)
        except UNREACHABLE as error:
            say(logging.INFO, "A start of task %s is not counted: %s", delivery.task_id, error)
        else:
            delivery.is_started = by > 0 or (by == 0 and was_started)

    def _say(self, delivery: Delivery, tell: Callable[[redis.Redis, bool], Any]) -> None:
        """Tell the broker how a delivery ended.

        Args:
            delivery: It is held until the broker has heard of it: nobody else may run it.
            tell: Takes the client, and whether the broker may have heard it before.
        """
        if self.is_silent:
            self._unsaid[delivery.tag] = tell
            return
        try:
            try:
                tell(self.server, False)
            except redis.exceptions.TimeoutError:
                raise
            except UNREACHABLE as error:
                if isinstance(error, redis.exceptions.ReadOnlyError):
                    leave_replica(self.server)
                # An idle connection that was cut; or the answer alone was lost.
                tell(self.server, True)
        except (redis.exceptions.RedisError, OSError) as error:
            self._unsaid[delivery.tag] = tell
            self.be_silent(error)
            say(
                logging.WARNING,
                "The broker cannot be told now (%s) that task %s has ended; it is tried again",
                error,
                delivery.task_id or delivery.tag,
            )
        else:
            self.forget(delivery.tag)

    def _put_back(self, server: redis.Redis, plan: FetchPlan) -> None:
        for tag, list_, queue, raw, copy in plan.read(plan.repeated().run(server)):
            delivery = Delivery(tag, list_, queue, raw, copy)
            try:
                delivery.describe(json.loads(raw))
            except UNREADABLE:
                continue  # whose lease ends; a fetch sets it apart
            self.messages.requeue(server, delivery)

    def _settle(self, server: redis.Redis, delivery: Delivery, is_repeated: bool) -> None:
        if delivery.letter is None:
            settled = self.messages.settle(server, delivery)
        else:
            settled = self._note_buried(delivery, self.messages.bury(server, delivery))
        if not settled and not is_repeated:
            self._warn_of_lapsed(delivery)

    def _note_buried(self, delivery: Delivery, buried: Buried) -> bool:
        """Tell of a dead letter that was kept; return whether its delivery had not ended."""
        if buried.id and delivery.when_buried is not None:
            tell(partial(delivery.when_buried, buried.id, buried.count))
        return buried.is_ended

    def _warn_of_lapsed(self, delivery: Delivery) -> None:
        if delivery.tag not in self._over:
            say(
                logging.WARNING,
                "Task %s ended after its lease: another copy of it may have run",
                delivery.task_id or delivery.tag,
            )


_helds: dict[Any, Held] = {}
_lock = threading.Lock()


def held_for(identity: Any, make: Callable[[], Held]) -> Held:
    """Return what this process holds of a broker."""
    with _lock:
        held = _helds.get(identity)
        if held is None:
            held = _helds[identity] = make()
        return held


def all_held() -> list[Held]:
    """Return what this process holds of every broker."""
    return list(_helds.values())


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    # A child holds nothing: its parent does.
    _helds.clear()


os.register_at_fork(after_in_child=_after_fork)
