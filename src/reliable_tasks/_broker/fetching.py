"""How a channel takes messages: it asks, waits for a bell, and asks again.

One command at a time is under way: a fetch, or a wait where the last fetch found nothing. A fetch
whose answer was lost is asked for again before anything else.
"""

# Mixed into kombu's classes, of which the type stubs know little.
# mypy: disable-error-code="attr-defined, misc, no-untyped-call, override"

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from queue import Empty
from time import monotonic
from typing import Any

import redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from kombu.utils.scheduling import priority_cycle, round_robin_cycle, sorted_cycle
from redis.exceptions import NoScriptError, ResponseError

from reliable_tasks._broker.keeper import Keeper
from reliable_tasks._store.delivery import UNREADABLE, Delivery, FetchPlan

__all__ = ["FetchingChannel"]

logger = logging.getLogger("reliable_tasks")

#: So many messages at most in one script, which blocks the server meanwhile.
_FETCHED_AT_ONCE = 16
#: A worker that waits is woken by its bell; it looks by itself as rarely as this (s).
_WAIT = 5
#: The same for queues that the sweeper does not look after (s).
_WAIT_FOR_REPLIES = 0.1
#: Strategies whose order the script can follow within one fetch; with others it takes one.
_ROTATES = {round_robin_cycle: True, priority_cycle: False, sorted_cycle: False}


class FetchingChannel:
    """The part of a channel that takes messages; mixed into kombu's by ``ReliableChannel``."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._plan: FetchPlan | None = None
        self._must_repeat = False
        self._is_empty = False
        self._was_woken = False
        self._is_fetching = False
        self._must_send_source = False
        self._refused_until = 0.0
        self._unleased: set[str] = set()
        self._undelivered: deque[tuple[Delivery, dict[str, Any]]] = deque()
        super().__init__(*args, **kwargs)
        if self.connection.polling_interval is None:
            self.brpop_timeout = _WAIT

    def basic_consume(
        self: Any, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Consume from a queue."""
        if no_ack or not self.ack_emulation:
            self._unleased.add(queue)
        else:
            self._unleased.discard(queue)
        consumed = super().basic_consume(queue, no_ack, *args, **kwargs)
        self._stop_waiting()
        if not no_ack and queue not in self.active_fanout_queues:
            Keeper.of(self.held).look_after(queue, self._lists([queue]))
        return consumed

    def _stop_waiting(self: Any) -> None:
        """End a wait for the bells of other queues than those that are active now."""
        self._is_empty = False
        if self._in_poll and not self._is_fetching:
            # By a bell that nobody else waits for. Should it not be heard, so is _WAIT.
            with suppress(*self.connection_errors, ResponseError):
                self.held.messages.ring(self.held.server, self._own_bell)

    @cached_property
    def _own_bell(self: Any) -> str:
        return str(self.held.messages.keys.bell(self.held.next_prefix()))

    def basic_get(self: Any, queue: str, no_ack: bool = False, **_: Any) -> Any:
        """Take one message now, or return ``None``."""
        unleased = {queue} if no_ack or not self.ack_emulation else ()
        plan = self._plan_for([queue], 1, unleased=unleased)
        answer = self._take_now(plan)
        waiting = len(self._undelivered)
        self._accept(plan, answer, unleased=unleased)
        with self.conn_or_acquire() as client:
            self._maybe_update_queues_expire(client, queue)
        if len(self._undelivered) == waiting:
            return None
        # What is before it was left by a consumer that raised an error.
        _, raw = self._undelivered.pop()
        message = self.Message(raw, channel=self)
        if not no_ack:
            Keeper.of(self.held).start()
            self.qos.append(message, message.delivery_tag)
        return message

    def _take_now(self: Any, plan: FetchPlan) -> list[Any]:
        try:
            return plan.run(self.held.server)
        except self.connection_errors:
            # The same script again would take other messages under the same tags.
            found = plan.repeated().run(self.held.server)
            if not found:
                raise
            return found

    def _get(self: Any, queue: str) -> Any:
        message = self.basic_get(queue, no_ack=True)
        if message is None:
            raise Empty
        return message._raw

    def _brpop_start(self: Any, timeout: float | None = None) -> None:
        """Send the next command: fetch, or wait for a bell where the last fetch found nothing."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or monotonic() < self._refused_until:
            return
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        if self._is_empty:
            self._is_fetching = False
            bells = [self.held.messages.keys.bell(queue) for queue in queues]
            # Nobody rings for replies that stock workers send.
            wait = _WAIT_FOR_REPLIES if self._unleased.intersection(queues) else self.brpop_timeout
            connection.send_command("BLPOP", *bells, self._own_bell, timeout or wait)
            return
        if self._must_repeat and self._plan is not None:
            plan = self._plan.repeated()
        else:
            plan = self._plan = self._plan_for(queues, self._most(queues))
        self._is_fetching = True
        script = ("EVAL", plan.source) if self._must_send_source else ("EVALSHA", plan.sha)
        connection.send_command(*script, len(plan.keys), *plan.keys, *plan.args)

    def _brpop_read(self: Any, **options: Any) -> bool:
        """Read the answer to that command; deliver what it brought."""
        was_fetching, was_repeat = self._is_fetching, self._must_repeat
        # Until the answer is here, what the script took is known to the broker alone.
        self._must_repeat = was_fetching
        try:
            answer = self.client.parse_response(
                self.client.connection, "EVALSHA" if was_fetching else "BLPOP", **options
            )
        except NoScriptError:
            self._must_send_source, self._must_repeat = True, was_repeat
            raise Empty from None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except ResponseError as error:
            # A fetch that failed half-way has taken something; after a wait, one may well succeed.
            self._is_empty = False
            self._on_refusal(error)
            raise Empty from None
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self._must_repeat = self._must_send_source = False
        if not was_fetching:
            self._is_empty, self._was_woken = False, bool(answer)
            raise Empty
        if not answer:
            # What a repeated fetch no longer finds was put back by a sweep: fetch anew.
            self._is_empty = not was_repeat
            raise Empty
        self._was_woken = False
        if monotonic() - self._brpop_sent_at > self.held.lease / 3:
            answer = self._without_lapsed(answer)
        self._accept(self._plan, answer, unleased=self._unleased)
        if not self._undelivered:
            raise Empty
        while self._undelivered:
            delivery, raw = self._undelivered.popleft()
            self._queue_cycle.rotate(delivery.queue)
            self.connection._deliver(raw, delivery.queue)
        return True

    def _without_lapsed(self: Any, answer: Sequence[Any]) -> list[Any]:
        """Leave out what was put back while the answer lay unread: nobody renewed it."""
        found = list(self._plan.read(answer))
        leased = [tag for tag, _, queue, *_ in found if queue not in self._unleased]
        # Should the broker not answer, the end of this channel puts it back.
        self._must_repeat = True
        over = set(self.held.messages.renew(self.held.server, leased, self.held.lease))
        self._must_repeat = False
        return [one for one, (tag, *_) in zip(answer, found, strict=True) if tag not in over]

    def _on_refusal(self: Any, error: ResponseError) -> None:
        """Go on when the server refuses a fetch: it is full, or read only."""
        if isinstance(error, redis.exceptions.ReadOnlyError):
            # The master became a replica: connect again, to the one that is master now.
            self.client.connection.disconnect()
            raise redis.exceptions.ConnectionError(str(error)) from error
        if monotonic() > self._refused_until + 30:
            logger.error("The broker refuses to hand out messages, trying each second: %s", error)
        self._refused_until = monotonic() + 1.0

    def _accept(self: Any, plan: FetchPlan, answer: Sequence[Any], *, unleased: Any) -> None:
        for tag, list_, queue, message, copy in plan.read(answer):
            try:
                decoded = loads(bytes_to_str(message))
                decoded["properties"]["delivery_tag"] = tag
                delivery = Delivery(tag, list_, queue, message, copy)
                delivery.describe(decoded)
                self.Message(decoded, channel=self)
            except UNREADABLE:
                logger.error("A message in %s cannot be read: %r", list_, message[:200])
                # Should that fail, it stays on lease, and the sweeper does it.
                with suppress(*self.connection_errors, ResponseError):
                    self.held.messages.set_apart(self.held.server, tag, message)
                continue
            if queue not in unleased:
                self.held.take(delivery)
            self._undelivered.append((delivery, decoded))

    def _plan_for(self: Any, queues: Sequence[str], count: int, unleased: Any = None) -> FetchPlan:
        plan: FetchPlan = self.held.messages.plan_fetch(
            self.held.next_prefix(),
            queues=queues,
            lists=self._lists(queues),
            unleased=self._unleased if unleased is None else unleased,
            count=count,
            rotates=_ROTATES.get(type(self._queue_cycle), False),
            lease=self.held.lease,
        )
        return plan

    def _most(self: Any, queues: Sequence[str]) -> int:
        # worker_disable_prefetch puts its own can_consume into the instance.
        if "can_consume" in vars(self.qos):
            return 1
        if len(queues) > 1 and type(self._queue_cycle) not in _ROTATES:
            return 1
        # One bell is for one message: others that wait are woken for the rest.
        if self._was_woken:
            return 1
        # Each call of drain_events delivers one message; an event loop takes what there is.
        if self.connection.cycle._in_protected_read:
            return 1
        room = self.qos.can_consume_max_estimate()
        return max(1, min(_FETCHED_AT_ONCE if room is None else room, _FETCHED_AT_ONCE))

    def _lists(self: Any, queues: Sequence[str]) -> list[str]:
        return [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]

    def _give_back(self: Any) -> None:
        """Put back what was fetched and not delivered, also by an answer that is still to come."""
        # Also one whose answer was lost together with the connection.
        has_fetch_under_way = self._must_repeat or bool(self._in_poll and self._is_fetching)
        if self._in_poll:
            # kombu would read its answer, which may never come.
            connection, self._in_poll = self._in_poll, None
            with suppress(*self.connection_errors):
                connection.disconnect()
        plan, self._plan, self._must_repeat = self._plan, None, False
        if has_fetch_under_way and plan is not None:
            self.held.put_back_fetched(plan)
        while self._undelivered:
            self.held.requeue(self._undelivered.popleft()[0].tag)
