"""Puts our transport in the place of kombu's, for kombu's own tests; see README.md.

Loaded by ``pytest -p tests.kombu.plugin`` ahead of the tests, which then take our classes for
kombu's. The tests listed in ``deselected.txt`` must fail: one that passes has to go from the list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import fakeredis
import pytest
import redis
from kombu import transport as transports
from kombu.transport import redis as stock

from reliable_tasks._broker import channel, fetching, held, transport
from reliable_tasks._broker.held import Held
from reliable_tasks._store.delivery import Layout
from reliable_tasks._store.messages import Messages
from reliable_tasks.demo._server import EmbeddedServer
from tests.kombu.deselected import deselected

_SETTINGS = {"key_prefix": "reliable:", "lease": 15.0}

#: Tests of a message's whole way. Their mock knows no scripts, so they get a real server.
_NEED_A_SERVER = frozenset(
    {
        "test_publish__get_redispyv3",
        "test_publish__get_redispyv2",
        "test_publish__consume",
        "test_purge",
        "test_get__Empty",
    }
)


class Channel(channel.Channel):
    """Ours, also where a test makes one of a mock that has no transport options."""

    reliable = _SETTINGS


class SentinelChannel(channel.SentinelChannel):
    """The same by Sentinel."""

    reliable = _SETTINGS


class Transport(transport.Transport):
    """Ours, turned on unasked, and with the channel that a test put into it."""

    Channel: Any = Channel

    def __init__(self, client: Any, **kwargs: Any) -> None:
        client.transport_options = {transport.OPTION: _SETTINGS, **client.transport_options}
        self._reliable_channel = type(self).Channel
        super().__init__(client, **kwargs)

    def drain_events(self, connection: Any, timeout: float | None = None) -> Any:
        """Wait for messages, and leave no channel between two commands when the time is up.

        Some tests look for a command under way after 0.1 s. Stock sends one; ours sends a fetch,
        and, when the next wait begins, BLPOP.
        """
        try:
            return super().drain_events(connection, timeout=timeout)
        except TimeoutError:
            for one in self.cycle._channels:
                consumer = getattr(vars(one).get("client"), "connection", None)
                is_idle = consumer is not None and consumer._sock and not one._in_poll
                if is_idle and one.active_queues and one.qos.can_consume():
                    one._brpop_start()
            raise

    def on_readable(self, fileno: int) -> None:
        """Read; an answer without a message is no error, and kombu's hub takes it for none."""
        # One of the tests turns the hub by hand.
        with suppress(Empty):
            super().on_readable(fileno)


class SentinelTransport(Transport):
    """The same by Sentinel."""

    default_port = transport.SentinelTransport.default_port
    Channel: Any = SentinelChannel


def pytest_configure(config: pytest.Config) -> None:
    """Start a server, one for each process; register the marks of kombu's test environment."""
    server = EmbeddedServer()
    server.start()
    config.add_cleanup(server.stop)
    os.environ.update(REDIS_HOST="127.0.0.1", REDIS_6379_TCP=str(server.port))
    for mark in ("env", "flaky", "replace_module_value", "ensured_modules", "masked_modules"):
        config.addinivalue_line("markers", f"{mark}: of kombu's test environment")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect the listed tests to fail.

    Raises:
        pytest.UsageError: A listed test does not exist.
    """
    files = {item.nodeid.partition("::")[0] for item in items}
    reasons = {name: why for name, why in deselected().items() if name.partition("::")[0] in files}
    found = set()
    for item in items:
        for name in (item.nodeid, item.nodeid.partition("[")[0]):
            if name in reasons:
                found.add(name)
                item.add_marker(pytest.mark.xfail(reason=reasons[name], strict=True))
    if gone := sorted(set(reasons) - found):
        raise pytest.UsageError(f"deselected.txt lists what kombu has not: {', '.join(gone)}")


@pytest.fixture(autouse=True)
def _server_of_a_unit_test(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Give kombu's unit tests, which mock the client, something that can run a script."""
    if "unit" not in Path(request.node.nodeid).parts:
        yield
    elif request.node.originalname in _NEED_A_SERVER:
        port = int(os.environ["REDIS_6379_TCP"])
        redis.Redis(port=port).flushall()
        for name in ("_get_pool", "_new_queue", "_get_response_error"):
            monkeypatch.delattr(request.module.Channel, name)
        monkeypatch.setattr(request.module.Channel, "_get_client", lambda _: redis.Redis)
        monkeypatch.setattr(request.module.Transport, "default_port", port)
        held._helds.clear()
        yield
        held._helds.clear()
    else:
        monkeypatch.setattr(channel.ReliableChannel, "_make_held", lambda _: _FAKE)
        yield


_FAKE = Held(
    Messages(Layout("", "unacked", "unacked_index", stock.Channel.sep), "reliable:"),
    15.0,
    fakeredis.FakeRedis(),
    fakeredis.FakeRedis(),
)

# Tests that stop kombu's clock mean ours as well.
fetching.monotonic = lambda: stock.monotonic()

for _scheme, _name in (
    ("redis", "Transport"),
    ("rediss", "Transport"),
    ("sentinel", "SentinelTransport"),
):
    transports.TRANSPORT_ALIASES[_scheme] = f"{__name__}:{_name}"
stock.QoS = channel.QoS
stock.Channel = Channel
stock.SentinelChannel = SentinelChannel
stock.Transport = Transport
stock.SentinelTransport = SentinelTransport
