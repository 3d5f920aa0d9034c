"""What a worker of another broker holds, kept in a Redis beside it.

The other broker is RabbitMQ, or kombu's own Redis transport, whose Redis can be the same. RabbitMQ
gives a message to somebody else as soon as a connection is lost, also while its task runs on; stock
kombu does so too, and when its timeout is over. So each run has a lease in the lock Redis: while it
is renewed, no copy of the task is let in; and what is over is known there, for the message comes
back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from celery import Task
from redis.backoff import NoBackoff
from redis.retry import Retry

from reliable_tasks._broker.held import SILENCE, Held, held_for
from reliable_tasks._celery.headers import IS_COPY
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.client import ServerAddress, connect
from reliable_tasks._store.crashes import Crash
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.delivery import Copy, Delivery, Guard, Layout
from reliable_tasks._store.keys import BESIDE, Keys
from reliable_tasks._store.messages import Messages
from reliable_tasks.config import ReliableConfig

__all__ = ["Beside", "Run", "beside", "note_done", "say_unnoted"]

logger = logging.getLogger("reliable_tasks")

#: For how long the end of a task is known (s): a broker may need two heartbeats to find out that
#: the connection is lost on which the acknowledgement was under way.
_OVER_TTL = 300.0
#: The same where the acknowledgement cannot be said, or there were other copies (s).
_COPIES_OVER_TTL = 3600.0
#: Greater than any number of retries.
_NESTING = 1_000_000


@dataclass(slots=True)
class Run(Delivery):
    """One delivery of another broker.

    Attributes:
        order: A number that is greater for each continuation of the task.
        is_copy: Whether its message was delivered before.
        is_lost: Whether its message cannot be acknowledged any more.
    """

    order: int = 0
    is_copy: bool = False
    is_lost: bool = False


class Beside(Held):
    """The runs of one process."""

    def __init__(
        self,
        messages: Messages,
        lease: float,
        server: redis.Redis,
        keepers: redis.Redis,
        on_error: str,
    ) -> None:
        super().__init__(messages, lease, server, keepers)
        #: When a message comes back at the latest that was not acknowledged (s), if that is known.
        self.comes_back_within = 0.0
        self._runs_on = on_error == "proceed"

    def expect(self, headers: Mapping[str, Any], *, is_redelivered: bool) -> Run:
        """Return the run of a message, which is yet to be let in."""
        return Run(
            tag=f"{self.next_prefix()}0:{BESIDE}",
            list=BESIDE,
            queue="",
            raw=b"",
            copy=Copy(Guard.HELD_ELSEWHERE, 0, 0.0),
            task_id=str(headers.get("id") or ""),
            order=_order(headers.get("replaced_task_nesting"), headers.get("retries")),
            is_copy=is_redelivered or bool(headers.get(IS_COPY)),
        )

    def hold(self, delivery: Delivery) -> Copy:
        """Ask the guard; without an answer the copy waits, or runs if the app says so."""
        assert isinstance(delivery, Run)
        if self.is_silent:
            return self._go_without(delivery, "it did not answer a moment ago")
        self.name_starter(delivery)
        try:
            delivery.copy = self.messages.runs.enter(
                self.server,
                delivery,
                order=delivery.order,
                is_copy=delivery.is_copy,
                lease=self.lease,
            )
        except (redis.exceptions.RedisError, OSError) as error:
            self.be_silent(error)
            logger.warning("The lock Redis does not say which copy of a task may run: %s", error)
            return self._go_without(delivery, error)
        if delivery.copy.may_run:
            delivery.is_started = True
            self.take(delivery)
        return delivery.copy

    def _go_without(self, delivery: Delivery, why: object) -> Copy:
        guard = Guard.UNKNOWN
        if self._runs_on:
            logger.error("Task %s runs unguarded: %s", delivery.task_id, why)
            guard = Guard.MAY_RUN
        delivery.copy = Copy(guard, 0, SILENCE)
        return delivery.copy

    def count_start(self, delivery: Delivery) -> None:
        """Do nothing: it was counted when it was let in."""

    def crashes(self, delivery: Delivery) -> list[Crash] | None:
        """Return what is known of a task's crashes; the start of this copy is counted, too."""
        found = super().crashes(delivery)
        return found if found is None or not delivery.is_started else found[:-1]

    def uncount_start(self, delivery: Delivery) -> None:
        """Do nothing: a copy that waits again has left, and its start is taken back."""

    def settle(self, tag: str) -> None:
        """End a run whose task is over; at the latest when the server answers again."""
        self._leave(tag, goes_back=False)

    def requeue(self, tag: str, *, to_back: bool = False) -> None:
        """End a run whose message goes back; at the latest when the server answers again."""
        self._leave(tag, goes_back=True)

    def _leave(self, tag: str, *, goes_back: bool) -> None:
        delivery = self.get(tag)
        if not isinstance(delivery, Run) or not self.is_open(tag):
            return
        run = delivery
        remembers = _COPIES_OVER_TTL if run.is_copy or run.is_lost else _OVER_TTL
        remembers = max(remembers, self.comes_back_within)

        def say(server: redis.Redis, is_repeated: bool) -> None:
            if run.letter is not None and not goes_back:
                was_held = self._note_buried(
                    run,
                    self.messages.runs.bury(server, run, order=run.order, remembers=remembers),
                )
            else:
                was_held = self.messages.runs.leave(
                    server, run, order=run.order, goes_back=goes_back, remembers=remembers
                )
            if not was_held and not is_repeated:
                self._warn_of_lapsed(run)

        self._say(run, say)


def beside(claims: Claims, config: ReliableConfig) -> Beside:
    """Return what this process holds of a broker.

    Args:
        claims: Those of the lock Redis.
        config: The app's settings.
    """
    address = claims.address

    def make() -> Held:
        def client(name: str) -> redis.Redis:
            timeout = min(address.timeout, config.lease / 3)
            # The keeper keeps one connection for itself: nobody else may have its client.
            options = {**address.options, "used_by": name}
            found = connect(ServerAddress(address.url, timeout, options)).redis
            # Held itself tries again where a connection was cut, and not where it timed out.
            found.connection_pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
            return found

        held = Beside(
            _messages(address.key_prefix, config),
            config.lease,
            client("guard"),
            client("keeper"),
            config.on_store_error,
        )
        held.detects_deaths = config.death_detection != "lease"
        return held

    identity = (BESIDE, address.identity, config.key_prefix, config.lease, config.on_store_error)
    held = held_for(identity, make)
    assert isinstance(held, Beside)
    return held


def note_done(task: Task[..., Any], claims: Claims, config: ReliableConfig) -> None:
    """Note in a child that its task has published all of its continuation."""
    request = task.request
    order = _order(request.get("replaced_task_nesting"), request.retries)
    messages = _messages(claims.address.key_prefix, config)
    try:
        messages.runs.note_done(claims.client.redis, str(request.id), order)
    except (redis.exceptions.RedisError, OSError) as error:
        say_unnoted(task, error)


def say_unnoted(task: Task[..., Any], error: Exception) -> None:
    """Say that a task's continuation is published, and nobody could be told."""
    logger.warning(
        "Task %s[%s] has continued, and may run again should its worker die now: %s",
        task.name,
        task.request.id,
        error,
    )


def _messages(prefix: str, config: ReliableConfig) -> Messages:
    own = Keys(config.key_prefix).beside.prefix
    layout = Layout(prefix, f"{own}unacked", f"{own}unacked_index", "")
    return Messages(layout, own, dead=DeadStore(Keys(prefix + config.key_prefix)))


def _order(nesting: Any, retries: Any) -> int:
    return int(nesting or 0) * _NESTING + int(retries or 0)
