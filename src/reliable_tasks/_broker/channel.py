"""Channels that publish, take and acknowledge by scripts; built on kombu's Redis channels."""

# Mixed into kombu's classes, of which the type stubs know little.
# mypy: disable-error-code="attr-defined, misc, no-untyped-call, override"

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any
from uuid import uuid4

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import dumps
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry

from reliable_tasks._broker import listeners
from reliable_tasks._broker.fetching import FetchingChannel
from reliable_tasks._broker.held import Held, held_for
from reliable_tasks._broker.saying import tell
from reliable_tasks._store.delivery import Layout
from reliable_tasks._store.letters import Bounds
from reliable_tasks._store.lines import Lines
from reliable_tasks._store.messages import Messages
from reliable_tasks._store.publication import (
    Published,
    PutOff,
    note_answer,
    publication_of,
    put_off,
)
from reliable_tasks._store.scripts import Replicas

__all__ = ["OPTION", "Channel", "QoS", "ReliableChannel", "SentinelChannel"]

#: The entry of ``broker_transport_options`` that turns this transport on: a mapping with
#: ``key_prefix``, ``lease`` (s), ``death_detection``, ``wait_replicas``, ``store_timeout`` (s), and
#: ``undecodable``: `Bounds` of what is kept of messages that nobody can read, or ``None``.
OPTION = "reliable"
_TOKEN = "reliable_token"  # noqa: S105 - not a secret


def _of_this_process() -> None:
    global _tokens
    _tokens = (uuid4().hex, count())


_tokens = (uuid4().hex, count())
os.register_at_fork(after_in_child=_of_this_process)


def _next_token() -> str:
    """Return what no other publish has."""
    process, numbers = _tokens
    return f"{process}:{next(numbers)}"


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


class ReliableChannel(FetchingChannel):
    """What a channel of ours does otherwise; mixed into each of kombu's."""

    QoS = QoS
    reliable: dict[str, Any]

    _own_lines: Lines | None = None
    _own_lines_of: Any = None

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        properties.setdefault(_TOKEN, _next_token())
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
        call = self.held.messages.prepare_publish(
            token=token,
            list_=list_,
            queue=queue,
            message=dumps({**message, "properties": sent}),
            publication=publication,
            expires=(int(expiry), self._lists([queue])) if expiry else None,
        )
        if put_off(message["headers"], call):
            return
        published = self.held.messages.publish(self._lines(), call, self._replicas())
        note_answer(message["headers"], published)

    def publish_put_off(self: Any, messages: list[PutOff]) -> list[Published]:
        """Queue messages that were put off, in their order."""
        calls = [message.call for message in messages]
        published: list[Published] = self.held.messages.publish_each(
            self._lines(), calls, self._replicas()
        )
        return published

    def _lines(self: Any) -> Lines:
        # Of the pool that the channel has now; its end is theirs.
        if self._own_lines is None or self._own_lines_of is not self.pool:
            self._own_lines, self._own_lines_of = Lines(self.pool), self.pool
        lines: Lines = self._own_lines
        return lines

    def _purge(self: Any, queue: str) -> int:
        with self.conn_or_acquire() as client:
            purge = self.held.messages.purge
            purged = [purge(client, one, listeners.thrown.tell) for one in self._lists([queue])]
        return sum(purged)

    def _replicas(self: Any) -> Replicas:
        return Replicas(
            int(self.reliable.get("wait_replicas") or 0),
            float(self.reliable.get("store_timeout") or 5.0),
        )

    # -- the end of a channel ----------------------------------------------------------------

    def close(self: Any) -> None:
        """Close the channel and put back what it holds, also over a connection that is dead."""
        self._give_back()
        self._delete_fanout_queues()
        super().close()

    def _delete_fanout_queues(self: Any) -> None:
        """Do what kombu's close does, which a broker that is away would end half-way."""
        client = vars(self).get("client")
        if self.closed or client is None:
            return
        for queue in set(self.auto_delete_queues).intersection(self._fanout_queues):
            self.auto_delete_queues.remove(queue)
            with suppress(*self.connection_errors, ResponseError):
                self.queue_delete(queue, client=client)

    # -- what this process holds ----------------------------------------------------------------

    def _identity(self: Any) -> Any:
        to = self._connparams()
        master = getattr(self, "master_name", None)
        # With Sentinels the address is that of the one which is asked now.
        where = (
            (master, *sorted(self.connection.client.alt))
            if master
            else (
                to.get("path"),
                to.get("host"),
                to.get("port"),
            )
        )
        return (
            where,
            to.get("db"),
            str(to.get("username")),
            repr(sorted(self.reliable.items())),
            self.global_keyprefix,
            self.unacked_key,
            self.unacked_index_key,
            self.sep,
        )

    def _make_held(self: Any) -> Held:
        layout = Layout(self.global_keyprefix, self.unacked_key, self.unacked_index_key, self.sep)
        lease = float(self.reliable.get("lease") or 15.0)
        kept = self.reliable.get("undecodable")
        messages = Messages(
            layout,
            str(self.reliable.get("key_prefix") or "reliable:"),
            bounds=Bounds(**kept) if kept else None,
            when_set_apart=lambda *what: tell(partial(listeners.set_apart.tell, *what)),
        )

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
