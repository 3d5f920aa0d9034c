"""Each private part of kombu, and of Celery's consumer, that our transport rests on, pinned.

A test that fails here after an upgrade says which assumption of ``_broker/channel.py``,
``_broker/fetching.py``, ``_broker/transport.py`` or ``_celery/consumer.py`` has moved.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import redis
from celery.bootsteps import StartStopStep
from celery.worker import loops, state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.consumer import tasks
from celery.worker.request import Request
from kombu import Connection, Consumer, Producer, Queue, transport
from kombu.asynchronous.hub import Hub
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from kombu.common import QoS as PrefetchCount
from kombu.exceptions import OperationalError
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.scheduling import (
    cycle_by_name,
    priority_cycle,
    round_robin_cycle,
    sorted_cycle,
)

from reliable_tasks._broker import fetching
from reliable_tasks._broker import transport as ours
from reliable_tasks._broker.channel import ReliableChannel
from reliable_tasks._celery.versions import CLEARS_TIMERS


@pytest.fixture
def connection(redis_url: str) -> Iterator[Connection]:
    """A connection by kombu's own transport."""
    with patch.dict(transport.TRANSPORT_ALIASES):
        transport.TRANSPORT_ALIASES["redis"] = "kombu.transport.redis:Transport"
        transport._transport_cache.pop("redis", None)
        with Connection(redis_url) as connection:
            yield connection
    transport._transport_cache.pop("redis", None)


@pytest.fixture
def channel(connection: Connection) -> Any:
    """A channel of kombu's own, with one queue that has a consumer."""
    channel = connection.default_channel
    assert type(channel) is stock.Channel
    consumer = Consumer(channel, [Queue("pin")], accept=["json"], callbacks=[_ignore])
    consumer.consume()
    return channel


def _ignore(_body: Any, _message: Any) -> None:
    pass


def _takes(function: Callable[..., Any], *names: str) -> None:
    found = list(inspect.signature(function).parameters)
    where = f"{function.__module__}.{function.__qualname__}"
    assert found == list(names), f"{where} takes {found} now; ours is called or calls with {names}"


def _says(function: Any, *lines: str) -> None:
    source = " ".join(inspect.getsource(function).split())
    for line in lines:
        assert line in source, f"{function.__module__}.{function.__qualname__} has no `{line}` now"


class TestWhatIsOverridden:
    """What ours replace of kombu's; kombu calls it by these names, with these arguments."""

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("_put", ["queue", "message", "kwargs"]),
            ("_get", ["queue"]),
            ("basic_get", ["queue", "no_ack", "kwargs"]),
            ("_brpop_start", ["timeout"]),
            ("_brpop_read", ["options"]),
            ("close", []),
            (
                "prepare_message",
                [
                    *("body", "priority", "content_type", "content_encoding", "headers"),
                    "properties",
                ],
            ),
        ],
    )
    def test_channel(self, name: str, parameters: list[str]) -> None:
        """The channel's."""
        _takes(getattr(stock.Channel, name), "self", *parameters)

    def test_basic_consume(self) -> None:
        """no_ack is the second argument, for all that is not named goes through."""
        _takes(stock.Channel.basic_consume, "self", "queue", "args", "kwargs")
        _takes(
            virtual.Channel.basic_consume,
            *("self", "queue", "no_ack", "callback", "consumer_tag", "kwargs"),
        )

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("ack", ["delivery_tag"]),
            ("reject", ["delivery_tag", "requeue"]),
            ("restore_unacked", []),
            ("restore_visible", ["args", "kwargs"]),
            ("append", ["message", "delivery_tag"]),
            ("can_consume", []),
            ("can_consume_max_estimate", []),
            ("_flush", []),
        ],
    )
    def test_qos(self, name: str, parameters: list[str]) -> None:
        """What a channel holds: the class below Redis' own, which writes nothing."""
        _takes(getattr(virtual.QoS, name), "self", *parameters)

    def test_nothing_else_in_redis_qos_is_called_from_outside(self) -> None:
        """Ours leaves out restore_by_tag and the like, which only Redis' own methods call."""
        own = {name for name in vars(stock.QoS) if name not in vars(virtual.QoS)} - {"__module__"}
        own -= {"__doc__", "__firstlineno__", "__static_attributes__"}
        assert own == {
            *("pipe_or_acquire", "_remove_from_indices", "restore_by_tag", "unacked_key"),
            *("unacked_index_key", "unacked_mutex_key", "unacked_mutex_expire"),
            "visibility_timeout",
        }
        for user in (stock.Channel, stock.MultiChannelPoller, stock.Transport):
            source = inspect.getsource(user)
            for name in own - {"unacked_key", "visibility_timeout"}:
                assert f"qos.{name}" not in source, f"{user.__qualname__} uses qos.{name} now"

    def test_both_end_in_what_is_held(self) -> None:
        """A channel's end puts back what it holds, by restore_unacked."""
        _says(virtual.Channel.close, "self._qos.restore_unacked_once()")
        _says(virtual.QoS.restore_unacked_once, "self.restore_unacked()")
        _says(virtual.Channel.basic_recover, "self.qos.restore_unacked()")

    def test_a_class_of_our_own_for_the_channel(self) -> None:
        """The transport asks the instance which channel to make, and the channel which QoS."""
        _says(virtual.Transport.create_channel, "self.Channel(connection)")
        _says(virtual.Channel.qos.fget, "self.QoS(self)")
        _takes(stock.Transport.__init__, "self", "args", "kwargs")
        _takes(virtual.Transport.__init__, "self", "client", "kwargs")

    def test_transport_options_become_attributes(self) -> None:
        """Those that from_transport_options names; ours adds one."""
        _says(virtual.Channel.__init__, "for opt_name in self.from_transport_options:")
        assert ours.OPTION not in stock.Channel.from_transport_options
        assert "master_name" in stock.SentinelChannel.from_transport_options

    def test_the_sentinel_classes(self) -> None:
        """They differ from the others by how they find a server, and by nothing that ours have."""
        assert issubclass(stock.SentinelChannel, stock.Channel)
        assert issubclass(stock.SentinelTransport, stock.Transport)
        own = {*vars(ReliableChannel), *vars(fetching.FetchingChannel)}
        assert not own & set(vars(stock.SentinelChannel)) - {
            *("__module__", "__doc__", "__init__", "__firstlineno__", "__static_attributes__")
        }
        assert {name for name in vars(stock.SentinelTransport) if not name.startswith("__")} == {
            *("default_port", "Channel")
        }


class TestChannel:
    """Parts of kombu's channel that ours use as they are."""

    def test_what_a_new_channel_has(self, channel: Any) -> None:
        """Attributes by the names and with the values that ours expect."""
        found = {
            name: getattr(channel, name)
            for name in (
                *("global_keyprefix", "unacked_key", "unacked_index_key", "sep"),
                *("_expires", "_in_poll", "_sentinel_manager", "socket_timeout", "closed"),
                *("brpop_timeout", "ack_emulation", "priority_steps", "active_fanout_queues"),
            )
        }
        assert found == {
            "global_keyprefix": "",
            "unacked_key": "unacked",
            "unacked_index_key": "unacked_index",
            "sep": "\x06\x16",
            "_expires": {},
            "_in_poll": False,
            "_sentinel_manager": None,
            "socket_timeout": None,
            "closed": False,
            "brpop_timeout": 1,
            "ack_emulation": True,
            "priority_steps": [0, 3, 6, 9],
            "active_fanout_queues": set(),
        }
        assert channel.active_queues == ["pin"]
        assert stock.Channel._brpop_sent_at is None

    def test_queue_names(self, channel: Any) -> None:
        """_q_for_pri names the list of a priority, _get_message_priority reads it."""
        _takes(stock.Channel._q_for_pri, "self", "queue", "pri")
        assert channel._q_for_pri("pin", 0) == "pin"
        assert channel._q_for_pri("pin", 4) == "pin\x06\x163"
        message = {"properties": {"priority": 7}}
        assert channel._get_message_priority(message, reverse=False) == 7

    def test_an_expiry_is_kept_in_milliseconds(self, channel: Any) -> None:
        """_expires has it for each queue, _maybe_update_queues_expire applies it."""
        channel._new_queue("short", arguments={"x-expires": 60_000})
        assert channel._expires == {"short": 60_000}
        _takes(stock.Channel._maybe_update_queues_expire, "self", "client", "queue")

    def test_queues_are_served_by_a_cycle(self, channel: Any) -> None:
        """_queue_cycle, of one of three classes that a fetch can follow by itself."""
        assert type(channel._queue_cycle) is round_robin_cycle
        assert channel._queue_cycle.consume(1) == ["pin"]
        assert channel._queue_cycle.consume(0) == []
        assert set(fetching._ROTATES) == {round_robin_cycle, priority_cycle, sorted_cycle}
        for name, cycle in (("priority", priority_cycle), ("sorted", sorted_cycle)):
            assert cycle_by_name(name) is cycle

    def test_turning_the_cycle(self) -> None:
        """Round robin puts the queue that was served last; the others keep their order."""
        for cycle, expected in (
            (round_robin_cycle(["b", "a"]), ["a", "b"]),
            (priority_cycle(["b", "a"]), ["b", "a"]),
            (sorted_cycle(["b", "a"]), ["a", "b"]),
        ):
            cycle.rotate("b")
            assert cycle.consume(2) == expected

    def test_a_pool_of_its_own(self, channel: Any) -> None:
        """_get_pool makes a new one, whose connection_kwargs count until it connects."""
        pool = channel._get_pool()
        assert pool is not channel.pool
        assert pool is not channel._get_pool()
        pool.connection_kwargs["client_name"] = "pin"
        client = redis.Redis(connection_pool=pool)
        assert client.client_getname() == "pin"
        client.close()
        pool.disconnect()

    def test_a_sentinels_pool_notes_its_manager(self) -> None:
        """A channel that closes closes what _sentinel_manager names; ours forgets it first."""
        _says(stock.SentinelChannel._sentinel_managed_pool, "self._sentinel_manager = ")
        _says(stock.Channel._disconnect_pools, "manager = self._sentinel_manager")
        _says(stock.SentinelChannel._get_pool, "self._sentinel_managed_pool(asynchronous)")

    def test_messages_go_to_the_consumers_of_a_queue(self, channel: Any) -> None:
        """connection._deliver takes what was decoded, and the consumer holds it."""
        raw = channel.prepare_message('"hi"', 0, "application/json", "utf-8", {}, {})
        raw["properties"]["delivery_tag"] = "our-tag"
        raw["properties"]["delivery_info"] = {"exchange": "", "routing_key": "pin"}
        channel.connection._deliver(raw, "pin")
        assert list(channel.qos._delivered) == ["our-tag"]
        message = channel.qos._delivered["our-tag"]
        assert message._raw is raw
        assert message.channel is channel
        message.ack()
        channel.qos._flush()
        assert not channel.qos._delivered

    def test_room(self, channel: Any) -> None:
        """can_consume_max_estimate is what the prefetch count leaves, None without one."""
        assert channel.qos.can_consume_max_estimate() is None
        channel.basic_qos(prefetch_count=3)
        assert channel.qos.can_consume_max_estimate() == 3

    def test_who_it_talks_to(self, channel: Any, redis_server: Any) -> None:
        """connection.client is kombu's Connection, with the parts of the URL."""
        client = channel.connection.client
        assert (client.hostname, client.port) == ("127.0.0.1", redis_server.port)
        assert (client.virtual_host, client.userid) == ("0", None)
        assert client.transport_options == {}

    def test_conn_or_acquire(self, channel: Any) -> None:
        """It lends a client that takes whole commands."""
        with channel.conn_or_acquire() as client:
            assert isinstance(client, redis.Redis)
        assert issubclass(stock.PrefixedStrictRedis, redis.Redis)

    def test_a_prefix_is_for_some_commands_only(self) -> None:
        """Ours give whole keys, and pass by the client that would put its prefix before them."""
        _says(
            stock.GlobalKeyPrefixMixin.execute_command,
            "super().execute_command(*self._prefix_args(args), **kwargs)",
        )
        commands = stock.GlobalKeyPrefixMixin.PREFIXED_COMPLEX_COMMANDS
        assert commands["EVALSHA"] == {"args_start": 2, "args_end": 3}
        assert "BLPOP" not in commands


class TestPolling:
    """The command under way on the connection that kombu's poller watches."""

    def test_one_command_at_a_time(self, channel: Any) -> None:
        """_brpop_start notes connection and time; _brpop_read clears them."""
        cycle = channel.connection.cycle
        cycle.on_poll_start()
        assert channel._in_poll is channel.client.connection
        assert channel._brpop_sent_at is not None
        assert cycle._chan_to_sock[channel, channel.client, "BRPOP"] is channel._in_poll._sock
        with pytest.raises(stock.Empty):
            channel._brpop_read()
        assert channel._in_poll is None

    def test_who_reads(self, channel: Any) -> None:
        """The handler is the method of our class, for it is looked up when a channel is made."""
        assert channel.handlers["BRPOP"] == channel._brpop_read
        _says(stock.MultiChannelPoller._register_BRPOP, "channel._brpop_start()")
        _says(stock.MultiChannelPoller.on_readable, "chan.handlers[type]()")

    def test_a_command_is_sent_only_where_there_is_room(self) -> None:
        """So a fetch may take as many as there is room for."""
        _says(
            stock.MultiChannelPoller.on_poll_start,
            "if channel.qos.can_consume(): self._register_BRPOP(channel)",
        )

    def test_a_new_token_waits_for_the_answer(self) -> None:
        """_flush_brpop_reauth sends it when no command is under way."""
        _takes(stock.Channel._flush_brpop_reauth, "self")
        _says(stock.Channel._flush_brpop_reauth, "if self._in_poll:")
        _says(stock.Channel._brpop_read, "self._flush_brpop_reauth()")

    def test_a_dead_connection_is_noticed_by_the_time_of_the_command(self) -> None:
        """By _brpop_sent_at and brpop_timeout, both of which ours set."""
        _says(
            stock.MultiChannelPoller.maybe_check_brpop_health,
            "waited = now - channel._brpop_sent_at",
            "if waited < channel.brpop_timeout + channel.health_check_interval:",
        )

    def test_polling_interval_sets_the_wait(self) -> None:
        """It is None unless the user set it."""
        assert stock.Transport.polling_interval is None
        assert stock.Transport.brpop_timeout == 1
        _says(stock.Transport.__init__, "self.brpop_timeout = self.polling_interval")

    def test_closing_reads_the_answer(self) -> None:
        """Ours clears _in_poll first, for the answer may never come."""
        _says(stock.Channel.close, "if self._in_poll: try: self._brpop_read()")

    def test_an_event_loop_takes_empty_for_no_error(self) -> None:
        """A bell and an empty fetch raise it; drain_events goes on waiting."""
        _says(Hub.create_loop, "cb(*cbargs)", "except Empty: pass")
        _says(virtual.Transport.drain_events, "get(self._deliver, timeout=timeout) except Empty:")

    def test_drain_events_is_told_from_an_event_loop(self, channel: Any) -> None:
        """_in_protected_read is true while drain_events reads, where each call brings one."""
        assert channel.connection.cycle._in_protected_read is False
        _says(stock.MultiChannelPoller.get, "self._in_protected_read = True")
        _takes(virtual.Transport.drain_events, "self", "connection", "timeout")

    def test_a_channel_is_among_its_transports(self, connection: Connection, channel: Any) -> None:
        """Both drain_events and a consumer that lost its connection look for it there."""
        assert channel in connection.transport.channels


class TestPublish:
    """What a publish token rests on."""

    def test_all_tries_share_one_mapping_of_properties(self, connection: Connection) -> None:
        """Producer.publish makes it once; kombu's delivery_tag is made anew in each try."""
        seen: list[tuple[int, str]] = []

        def put(_channel: Any, _queue: str, message: dict[str, Any], **_: Any) -> None:
            message["properties"]["note"] = "kept"
            seen.append((id(shared[-1]), message["properties"]["delivery_tag"]))
            if len(seen) < 2:
                raise redis.exceptions.ConnectionError("the reply is lost")

        shared: list[dict[str, Any]] = []
        prepare = stock.Channel.prepare_message

        def note(channel: Any, body: Any, *args: Any) -> Any:
            shared.append(args[4])
            return prepare(channel, body, *args)

        with (
            patch.object(stock.Channel, "_put", put),
            patch.object(stock.Channel, "prepare_message", note),
        ):
            Producer(connection).publish(
                {}, routing_key="pin", retry=True, retry_policy={"interval_start": 0}
            )
        moved = "Producer.publish no longer passes one properties mapping to all its tries"
        assert len({object_id for object_id, _ in seen}) == 1, moved
        assert len(shared) == 2, moved
        assert shared[0]["note"] == "kept", moved
        assert len({tag for _, tag in seen}) == 2

    def test_what_is_declared_is_gone_through_just_before(self, connection: Connection) -> None:
        """In each try, by a connection that is there: ``Producer.has_begun`` is said by that."""
        seen: list[str] = []

        class Declares(list[Any]):
            def __bool__(self) -> bool:
                return True

            def __iter__(self) -> Iterator[Any]:
                assert connection.connected
                seen.append("declares")
                return super().__iter__()

        def put(*_: Any, **__: Any) -> None:
            seen.append("sends")
            if len(seen) < 4:
                raise redis.exceptions.ConnectionError("the reply is lost")

        with patch.object(stock.Channel, "basic_publish", put):
            Producer(connection).publish(
                {},
                routing_key="pin",
                declare=Declares(),
                retry=True,
                retry_policy={"interval_start": 0},
            )
        assert seen == ["declares", "sends"] * 2

    def test_errors_are_those_of_the_library(self, connection: Connection) -> None:
        """What a transport raises is kombu's own error, by the name that ours calls, too."""
        with pytest.raises(OperationalError), connection._reraise_as_library_errors():
            raise redis.exceptions.ConnectionError("no one there")
        _says(Connection.ensure, "with self._reraise_as_library_errors():")

    def test_headers_are_in_the_message(self, channel: Any) -> None:
        """The task's id is read from them."""
        message = channel.prepare_message("", headers={"id": "x"}, properties={"a": 1})
        assert message["headers"] == {"id": "x"}
        assert message["properties"]["a"] == 1

    def test_batches_can_be_declined(self) -> None:
        """By an attribute of the channel, and of a transport that has no channel yet."""
        assert isinstance(stock.Channel.supports_batch_publish, property)
        assert isinstance(stock.Transport.supports_batch_publish, property)
        _says(Producer.supports_batch_publish.fget, "'supports_batch_publish'")


class TestFindingTheTransport:
    """How kombu comes from a URL to a class."""

    def test_aliases(self) -> None:
        """TRANSPORT_ALIASES maps a scheme to module:name, and _transport_cache what was found."""
        ours.install()
        for scheme, found in (
            ("redis", ours.Transport),
            ("rediss", ours.Transport),
            ("sentinel", ours.SentinelTransport),
        ):
            assert transport.get_transport_cls(scheme) is found
            assert transport._transport_cache[scheme] is found

    def test_a_failover_goes_back_to_the_scheme(self) -> None:
        """Connection.switch forgets a transport that was given: the scheme must lead to ours."""
        connection = Connection("redis://localhost", transport="memory")
        assert connection.transport_cls == "memory"
        connection.switch("redis://elsewhere")
        assert connection.transport_cls == "redis"

    def test_the_app_that_does_not_ask_keeps_stocks_channel(self, redis_url: str) -> None:
        """Though the transport's class is ours."""
        ours.install()
        with Connection(redis_url) as connection:
            assert type(connection.transport) is ours.Transport
            assert type(connection.default_channel) is stock.Channel


class TestConsumer:
    """Celery's consumer, from which ours takes what it holds."""

    def test_what_is_overridden(self) -> None:
        """Celery calls these."""
        _takes(CeleryConsumer.on_connection_error_after_connected, "self", "exc")
        _takes(CeleryConsumer.on_close, "self")
        _takes(CeleryConsumer.connect, "self")
        _takes(CeleryConsumer.on_ready, "self")
        _takes(StartStopStep.start, "self", "parent")

    def test_the_steps(self) -> None:
        """A step that needs Tasks starts when consumer and prefetch count are there."""
        assert "celery.worker.consumer.tasks:Tasks" in CeleryConsumer.Blueprint.default_steps
        _says(tasks.Tasks.start, "c.task_consumer = ", "c.qos = QoS(")

    def test_what_is_kept_over_a_reconnection(self) -> None:
        """The prefetch count, which Celery lowers for tasks that it no longer counts."""
        _says(
            CeleryConsumer.on_connection_error_after_connected,
            "self.initial_prefetch_count = ",
            "self._maximum_prefetch_restored = ",
        )
        _says(CeleryConsumer.__init__, "self._maximum_prefetch_restored = True")

    def test_prefetch_count(self) -> None:
        """It is raised at once in value, and told to the broker later."""
        count = PrefetchCount(lambda prefetch_count: None, 4)
        count.increment_eventually(3)
        assert count.value == 7

    def test_what_is_forgotten(self) -> None:
        """A close clears what waits for the semaphore, which is _waiting, and what is reserved."""
        _says(CeleryConsumer.on_close, "self.controller.semaphore.clear()", "clear_pending()")
        _says(LaxBoundedSemaphore.clear, "self._waiting.clear()")
        assert hasattr(state, "requests")
        assert hasattr(state, "reserved_requests")
        since = "celery.worker.state has scheduled_requests since Celery 5.7"
        assert hasattr(state, "scheduled_requests") is not CLEARS_TIMERS, since

    def test_the_timer_of_a_task_that_waits(self) -> None:
        """_eta_timer_entry is on the request; before 5.7 there is none, and loops clear all."""
        assert hasattr(Request, "_eta_timer_entry") is not CLEARS_TIMERS
        assert ("hub.timer.clear()" in inspect.getsource(loops)) is CLEARS_TIMERS
        hub = Hub()
        entry = hub.timer.call_after(60, print)
        assert {scheduled.entry for scheduled in hub.timer.queue} == {entry}
        hub.close()

    def test_one_message_at_a_time(self) -> None:
        """worker_disable_prefetch puts a can_consume into the channel's QoS."""
        _says(tasks.Tasks.start, "channel_qos.can_consume = MethodType(can_consume, channel_qos)")

    def test_messages_can_change_their_channel(self, channel: Any) -> None:
        """Acknowledging asks message.channel, at that moment."""
        raw = channel.prepare_message("", properties={"delivery_tag": "x"})
        raw["properties"]["delivery_info"] = {"exchange": "", "routing_key": "pin"}
        message = channel.Message(raw, channel=None)
        message.channel = channel
        channel.qos.append(message, "x")
        message.ack()
        channel.qos._flush()
        assert not channel.qos._delivered
