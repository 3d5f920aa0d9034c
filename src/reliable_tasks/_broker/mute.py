"""A connection for commands whose answer nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import redis

from reliable_tasks._store.scripts import execute

__all__ = ["UNREACHABLE", "MuteConnection"]

#: What may go wrong on the way to a server that is there again later.
UNREACHABLE = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    OSError,
)


class MuteConnection:
    """Sends commands whose answer nobody waits for.

    What was sent lies in the kernel's buffer, and reaches the server also when this process is
    killed in the next moment.
    """

    def __init__(self, server: redis.Redis) -> None:
        self._server = server
        self._connection: Any = None
        self._is_refused = False
        # In the threads pool tasks start and are set aside in threads of their own.
        # A signal handler that sets one aside may interrupt a start.
        self._sending = threading.RLock()

    def send(self, command: Sequence[Any]) -> None:
        """Send a command.

        Raises:
            redis.ConnectionError: The server cannot be reached, tried twice.
        """
        with self._sending:
            try:
                self._send(command)
            except UNREACHABLE:
                self._disconnect()
                self._send(command)

    def _send(self, command: Sequence[Any]) -> None:
        if self._connection is None and not self._is_refused:
            self._connect()
        if self._is_refused:
            execute(self._server, *command)
            return
        if self._is_cut():
            self._disconnect()
            self._connect()
        packed = self._connection.pack_command(*command)
        # A health check would wait for an answer.
        self._connection.send_packed_command(packed, check_health=False)

    def _connect(self) -> None:
        connection: Any = self._server.connection_pool.get_connection()
        try:
            # Asked for first, for what follows is not answered, not even by a refusal.
            self._ask(connection, "ON")
            connection.read_response()
            self._ask(connection, "OFF")
        except redis.exceptions.ResponseError:
            self._is_refused = True
            self._server.connection_pool.release(connection)
        except BaseException:
            connection.disconnect()
            self._server.connection_pool.release(connection)
            raise
        else:
            self._connection = connection

    def _ask(self, connection: Any, replies: str) -> None:
        connection.send_command("CLIENT", "REPLY", replies, check_health=False)

    def _is_cut(self) -> bool:
        """Say whether the server has closed the connection, which a write alone would not see."""
        try:
            # Nothing is ever answered: what can be read is the end.
            return bool(self._connection.can_read(0))
        except UNREACHABLE:
            return True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
            self._server.connection_pool.release(connection)
