"""Connections that are kept for scripts which are run again and again.

redis-py makes each command a matter of its pool, its hooks and its retries, which costs more than
the command. A script that can be repeated needs none of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis

__all__ = ["Lines"]

#: What has not been used for so long (s) may have been closed by the other side.
_IDLE = 1.0

#: So many commands are packed and sent at once: the server works while more are packed.
_AT_ONCE = 50

Command = Sequence[str | bytes | int]


class Lines:
    """Connections of a pool, each used by one caller at a time.

    Errors are redis-py's own. After a connection error all others are given up too: what broke one
    has broken them.

    Args:
        pool: Where they come from, and what they are made by. One is left to it.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pid = os.getpid()
        self._free: list[tuple[Any, float]] = []
        self._most = getattr(pool, "max_connections", None) or 2**31

    def run(self, command: Command) -> Any:
        """Run one command."""
        (answer,) = self.run_each([command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run_each(self, commands: Sequence[Command]) -> list[Any]:
        """Run some commands in one go; each answer can be an error."""
        connection = self._take()
        answers: list[Any] = []
        try:
            for begin in range(0, len(commands), _AT_ONCE):
                some = commands[begin : begin + _AT_ONCE]
                connection.send_packed_command([b"".join(map(_packed, some))])
            for _ in commands:
                try:
                    answers.append(connection.read_response())
                except redis.ResponseError as error:
                    answers.append(error)
        except BaseException:
            # Whatever is still to be read is nobody's.
            self._part_with(connection)
            self.close()
            raise
        if any(isinstance(answer, redis.exceptions.ReadOnlyError) for answer in answers):
            # What was the master is none any more.
            self._part_with(connection)
            self.close()
        elif len(self._free) < self._most - 1:
            self._free.append((connection, time.monotonic()))
        else:
            self._pool.release(connection)
        return answers

    def close(self) -> None:
        """Give up all that nobody uses."""
        free, self._free = self._free, []
        for connection, _ in free:
            self._part_with(connection)

    def _take(self) -> Any:
        if self._pid != os.getpid():
            # The parent's, which go on.
            self._pid, self._free = os.getpid(), []
        with suppress(IndexError):
            connection, since = self._free.pop()
            if time.monotonic() - since < _IDLE or not _is_stale(connection):
                return connection
            self._part_with(connection)
            self.close()
        try:
            return self._pool.get_connection()
        except (redis.RedisError, OSError):
            raise
        except BaseException:
            # Interrupted: redis-py may have put one back in the midst of its handshake.
            self._pool.disconnect(inuse_connections=False)
            raise

    def _part_with(self, connection: Any) -> None:
        with suppress(Exception):
            connection.disconnect()
        with suppress(Exception):
            self._pool.release(connection)


def _is_stale(connection: Any) -> bool:
    try:
        # Nothing is due: what can be read is the end.
        return bool(connection.can_read())
    except (redis.RedisError, OSError):
        return True


def _packed(command: Command) -> bytes:
    """Return a command as the server reads it: an array of texts."""
    if bytes in map(type, command):
        return b"*%d\r\n%b" % (len(command), b"".join(map(_packed_bytes, command)))
    parts = [f"*{len(command)}\r\n"]
    for one in command:
        text = str(one)
        size = len(text) if text.isascii() else len(text.encode())
        parts.append(f"${size}\r\n{text}\r\n")
    return "".join(parts).encode()


def _packed_bytes(one: str | bytes | int) -> bytes:
    data = one if isinstance(one, bytes) else str(one).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
