"""kombu's Redis transport, with its fetch, publish and acknowledgement made atomic.

The private parts of kombu's channel that this builds on are pinned by
``tests/integration/test_kombu_internals.py``.
"""

# Mixed into kombu's classes, of which the type stubs know little.
# mypy: disable-error-code="attr-defined, misc, no-untyped-call, override"

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty
from time import monotonic
from typing import Any
from uuid import uuid4

import redis
from kombu import transport as transports
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from kombu.utils.scheduling import priority_cycle, round_robin_cycle, sorted_cycle
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ResponseError
from redis.retry import Retry

from reliable_tasks._broker.held import Held, held_for
from reliable_tasks._broker.keeper import Keeper
from reliable_tasks._celery.threads import is_patched
from reliable_tasks._store.messages import (
    Delivery,
    FetchPlan,
    Layout,
    Messages,
)
from reliable_tasks._store.publication import publication_of
from reliable_tasks._store.scripts import execute

__all__ = ["OPTION", "Channel", "SentinelTransport", "Transport", "install"]

logger = logging.getLogger("reliable_tasks")

#: The entry of ``broker_transport_options`` that turns this transport on: a mapping with
#: ``key_prefix``, ``lease`` (s), ``death_detection`` and ``wait_replicas``.
OPTION = "reliable"
_TOKEN = "reliable_token"  # noqa: S105 - not a secret
#: So many messages at most in one script, which blocks the server meanwhile.
_FETCHED_AT_ONCE = 16
#: A worker that waits is woken by its bell; it looks by itself as rarely as this (s).
_WAIT = 5
#: The same for queues that the sweeper does not look after (s).
_WAIT_FOR_REPLIES = 0.1
#: Strategies whose order the script can follow within one fetch; with others it takes one.
_ROTATES = {round_robin_cycle: True, priority_cycle: False, sorted_cycle: False}


class QoS(virtual.QoS):
    """What a channel holds; the broker knows it already, by the script that fetched it."""

    channel: Any

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a delivery."""
        self.channel.held.settle(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Discard a delivery or put its message behind all others."""
        if requeue:
            self.channel.held.requeue(delivery_tag, to_back=True)
        else:
            self.channel.held.settle(delivery_tag)
        super().ack(delivery_tag)

    def restore_unacked(self) -> list[Any]:
        """Put back all that is held, in front of what waits."""
        self._flush()
        while self._delivered:
            tag, _ = self._delivered.popitem()
            self.channel.held.requeue(tag)
        return []

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Do nothing: the sweep is the keeper's."""


class ReliableChannel:
    """What a channel of ours does otherwise; mixed into each of kombu's."""

    QoS = QoS
    reliable: dict[str, Any]

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
        self.held = held_for(self._identity(), self._make_held)

    # -- publish -----------------------------------------------------------------------------

    #: A pipeline of pushes could not tell a repeated message.
    supports_batch_publish = False

    def prepare_message(
        self: Any,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> Any:
        """Prepare a message; one that is published again for want of a reply keeps its token."""
        # Producer.publish makes one mapping for all its tries, while kombu's delivery_tag is
        # new in each.
        properties = {} if properties is None else properties
        properties.setdefault(_TOKEN, uuid4().hex)
        return super().prepare_message(
            body, priority, content_type, content_encoding, headers, properties
        )

    def _put(self: Any, queue: str, message: dict[str, Any], **_: Any) -> None:
        if self.closed:
            # kombu goes on with a channel that it closed while it declared the queue anew.
            raise redis.exceptions.ConnectionError("the connection was lost and made anew")
        properties = message["properties"]
        publication = publication_of(message["headers"])
        token = properties.get(_TOKEN) or properties["delivery_tag"]
        sent = {k: v for k, v in properties.items() if k != _TOKEN}
        expiry = self._expires.get(queue) if self._expires else None
        list_ = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        with self.conn_or_acquire() as client:
            published = self.held.messages.publish(
                client,
                # A message can be routed to several queues.
                token=f"{token}:{queue}",
                list_=list_,
                queue=queue,
                message=dumps({**message, "properties": sent}),
                publication=publication,
                expires=(int(expiry), self._lists([queue])) if expiry else None,
            )
            self._wait_for_replicas(client)
        published.check()

    def _wait_for_replicas(self: Any, client: redis.Redis) -> None:
        wanted = int(self.reliable.get("wait_replicas") or 0)
        if not wanted:
            return
        timeout = float(self.reliable.get("store_timeout") or 5.0)
        reached = int(execute(client, "WAIT", wanted, round(timeout * 1000)))
        if reached < wanted:
            raise redis.exceptions.ConnectionError(
                f"only {reached} of {wanted} replicas have the message after {timeout:g} s "
                "(reliable_wait_replicas)"
            )

    # -- fetch -------------------------------------------------------------------------------

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
        """Give up a wait for the bells of other queues than those that are active now."""
        self._is_empty = False
        if self._in_poll and not self._is_fetching:
            connection, self._in_poll = self._in_poll, None
            connection.disconnect()

    def basic_get(self: Any, queue: str, no_ack: bool = False, **_: Any) -> Any:
        """Take one message now, or return ``None``."""
        unleased = {queue} if no_ack or not self.ack_emulation else ()
        plan = self._plan_for([queue], 1, unleased=unleased)
        answer = self._take_now(plan)
        with self.conn_or_acquire() as client:
            self._maybe_update_queues_expire(client, queue)
        waiting = len(self._undelivered)
        self._accept(plan, answer, unleased=unleased)
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
            connection.send_command("BLPOP", *bells, timeout or wait)
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
            self._must_repeat = was_repeat
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
        self._accept(self._plan, answer, unleased=self._unleased)
        while self._undelivered:
            delivery, raw = self._undelivered.popleft()
            self._queue_cycle.rotate(delivery.queue)
            self.connection._deliver(raw, delivery.queue)
        return True

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
            except (ValueError, TypeError, KeyError, AttributeError):
                logger.error(
                    "A message in %s cannot be read and is kept in %s: %r",
                    list_,
                    self.held.messages.keys.undecodable,
                    message[:200],
                )
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

    # -- the end of a channel ----------------------------------------------------------------

    def close(self: Any) -> None:
        """Close the channel and put back what it holds, also over a connection that is dead."""
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
        self._delete_fanout_queues()
        super().close()

    def _delete_fanout_queues(self: Any) -> None:
        """Do what kombu's close does, which a broker that is away would end half-way."""
        client = vars(self).get("client")
        if self.closed or client is None:
            return
        for queue in self.auto_delete_queues.intersection(self._fanout_queues):
            self.auto_delete_queues.discard(queue)
            with suppress(*self.connection_errors, ResponseError):
                self.queue_delete(queue, client=client)

    # -- what this process holds ----------------------------------------------------------------

    def _identity(self: Any) -> Any:
        client = self.connection.client
        master = getattr(self, "master_name", None)
        # With Sentinels the address is that of the one which is asked now.
        where = (master, *sorted(client.alt)) if master else (str(client.hostname), client.port)
        return (
            where,
            str(client.virtual_host),
            str(client.userid),
            repr(sorted(self.reliable.items())),
            self.global_keyprefix,
            self.unacked_key,
            self.unacked_index_key,
            self.sep,
        )

    def _make_held(self: Any) -> Held:
        layout = Layout(self.global_keyprefix, self.unacked_key, self.unacked_index_key, self.sep)
        lease = float(self.reliable.get("lease") or 15.0)
        messages = Messages(layout, str(self.reliable.get("key_prefix") or "reliable:"))

        def client() -> redis.Redis:
            pool = self._get_pool()
            # Those who use it decide themselves what to repeat and when.
            pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
            pool.connection_kwargs["socket_timeout"] = min(
                lease / 3, self.socket_timeout or lease / 3
            )
            provider = pool.connection_kwargs.get("credential_provider")
            return redis.Redis(
                connection_pool=pool,
                **({} if provider is None else {"credential_provider": provider}),
            )

        # Made here, for they outlive this channel; they connect when they are used.
        held = Held(messages, lease, client(), client())
        # A channel that closes closes the Sentinels that it knows of.
        self._sentinel_manager = None
        held.detects_deaths = self.reliable.get("death_detection") != "lease"
        return held


class Channel(ReliableChannel, stock.Channel):
    """A channel to one Redis."""

    from_transport_options = (*stock.Channel.from_transport_options, OPTION)


class SentinelChannel(ReliableChannel, stock.SentinelChannel):
    """A channel to the master that Sentinels name."""

    from_transport_options = (*stock.SentinelChannel.from_transport_options, OPTION)


class Transport(stock.Transport):
    """kombu's Redis transport: ours where the app asks for it, else stock."""

    _reliable_channel: Any = Channel
    Channel: Any = stock.Channel

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        if client.transport_options.get(OPTION):
            self.Channel = self._reliable_channel
            # With these kombu tries a publish again as often as its policy says, which is safe
            # here; without, a second error in a row is the last.
            self.recoverable_connection_errors = self.connection_errors + self.channel_errors
            self.recoverable_channel_errors = ()

    @property
    def supports_batch_publish(self) -> bool:
        """Whether publishes may be collected; a pipeline of ours could tell no repeated one."""
        return self.Channel is not self._reliable_channel and super().supports_batch_publish

    def drain_events(self, connection: Any, timeout: float | None = None) -> Any:
        """Wait for messages; a socket that was closed meanwhile is a lost connection."""
        try:
            return super().drain_events(connection, timeout=timeout)
        except RuntimeError as error:
            # eventlet's hub, when another green thread lost the connection that this one polls.
            # It is no connection error, and would end the worker.
            if is_patched() == "eventlet" and "simultaneous read" in str(error):
                raise redis.exceptions.ConnectionError(str(error)) from error
            raise


class SentinelTransport(Transport):
    """The same by Sentinel."""

    default_port = stock.SentinelTransport.default_port
    _reliable_channel: Any = SentinelChannel
    Channel: Any = stock.SentinelChannel


def install() -> None:
    """Have kombu use these transports; an app that does not ask for ours keeps stock's.

    kombu goes back to the transport of a URL's scheme when it fails over to the next URL, so
    the schemes themselves must lead here.
    """
    for scheme, name in (
        ("redis", "Transport"),
        ("rediss", "Transport"),
        ("sentinel", "SentinelTransport"),
    ):
        transports.TRANSPORT_ALIASES[scheme] = f"{__name__}:{name}"
        transports._transport_cache.pop(scheme, None)
