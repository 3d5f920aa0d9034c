"""Connections that are kept for scripts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from reliable_tasks._store.lines import Lines
from reliable_tasks.demo._server import EmbeddedServer


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """A real server: a fake one has no connections."""
    with EmbeddedServer() as server:
        yield server


def pool(server: EmbeddedServer, **options: Any) -> redis.ConnectionPool:
    """Return a pool of connections to it."""
    return redis.ConnectionPool.from_url(server.url, decode_responses=True, **options)


@pytest.mark.parametrize("value", ["x", "ü €", b"\xff\x00", 7, -3, "", "a\r\nb"])
def test_a_command_comes_as_it_was_meant(server: EmbeddedServer, value: Any) -> None:
    """Texts, bytes and numbers."""
    lines = Lines(redis.ConnectionPool.from_url(server.url))
    lines.run(("SET", "key", value))
    assert lines.run(("GET", "key")) == (value if isinstance(value, bytes) else str(value).encode())


def test_one_connection_does_for_one_caller(server: EmbeddedServer) -> None:
    """It is used again."""
    lines = Lines(pool(server))
    first = lines.run(("CLIENT", "ID"))
    assert {lines.run(("CLIENT", "ID")) for _ in range(5)} == {first}


def test_an_error_is_raised_and_ends_nothing(server: EmbeddedServer) -> None:
    """The connection is as good as before; in one go each command has its own answer."""
    lines = Lines(pool(server))
    first = lines.run(("CLIENT", "ID"))
    with pytest.raises(redis.ResponseError, match="unknown command"):
        lines.run(("NONSENSE",))
    refused, after = lines.run_each([("NONSENSE",), ("CLIENT", "ID")])
    assert isinstance(refused, redis.ResponseError)
    assert after == first


def test_an_interrupt_leaves_no_answer_to_others(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had been sent is answered to nobody."""
    lines = Lines(pool(server))
    lines.run(("PING",))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(redis.Connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lines.run(("ECHO", "mine"))
    assert lines.run(("ECHO", "yours")) == "yours"


def test_an_interrupt_in_a_handshake(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half-made connection is not used."""
    lines = Lines(pool(server))
    connect = redis.Connection.connect

    def interrupted(self: Any) -> None:
        connect(self)
        self.send_command("ECHO", "of the handshake")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(redis.Connection, "connect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lines.run(("ECHO", "mine"))
    assert lines.run(("ECHO", "yours")) == "yours"


def test_a_pool_of_one_connection_can_be_shared(server: EmbeddedServer) -> None:
    """Others find it there."""
    shared = pool(server, max_connections=1)
    lines = Lines(shared)
    assert lines.run(("PING",))
    with redis.Redis(connection_pool=shared) as client:
        assert client.ping()
    assert lines.run(("PING",))


def test_one_that_was_closed_while_nobody_used_it(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is not used after a while; a moment later it is an error, and the next one is new."""
    lines = Lines(pool(server))
    with redis.Redis.from_url(server.url) as other:
        other.client_kill_filter(_id=lines.run(("CLIENT", "ID")))
        with pytest.raises(redis.ConnectionError):
            lines.run(("PING",))
        other.client_kill_filter(_id=lines.run(("CLIENT", "ID")))
    monkeypatch.setattr("reliable_tasks._store.lines._IDLE", 0.0)
    assert lines.run(("PING",))


def test_a_child_has_connections_of_its_own(server: EmbeddedServer) -> None:
    """And its parent's go on."""
    lines = Lines(pool(server))
    before = lines.run(("CLIENT", "ID"))
    child = os.fork()
    if not child:
        is_other = False
        with contextlib.suppress(Exception):
            is_other = lines.run(("CLIENT", "ID")) != before
        os._exit(0 if is_other else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert lines.run(("CLIENT", "ID")) == before
