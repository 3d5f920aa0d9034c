"""Connections that are kept for scripts which are run again and again.

redis-py makes each command a matter of its pool, its hooks and its retries, which costs more than
the command. A script that can be repeated needs none of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis

__all__ = ["Lines", "Sent"]

#: What has not been used for so long (s) may have been closed by the other side.
_IDLE = 1.0

Command = Sequence[str | bytes | int]


class Lines:
    """Connections of a pool, each used by one caller at a time.

    Errors are redis-py's own. After a connection error all others are given up too: what broke one
    has broken them.

    Args:
        pool: Where they come from, and what they are made by.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pid = os.getpid()
        self._free: list[tuple[Any, float]] = []

    def run(self, command: Command) -> Any:
        """Run one command."""
        return self.send(command).answer()

    def run_each(self, commands: Sequence[Command]) -> list[Any]:
        """Run some commands in one go; each answer can be an error."""
        connection = self._take()
        answers: list[Any] = []
        try:
            connection.send_packed_command([b"".join(map(_packed, commands))])
            for _ in commands:
                try:
                    answers.append(connection.read_response())
                except redis.ResponseError as error:
                    answers.append(error)
        except BaseException:
            self.give_up(connection)
            raise
        self.give_back(connection, *answers)
        return answers

    def send(self, command: Command) -> Sent:
        """Send a command whose answer is read later."""
        connection = self._take()
        try:
            connection.send_packed_command([_packed(command)])
        except BaseException:
            self.give_up(connection)
            raise
        return Sent(self, connection)

    def close(self) -> None:
        """Give up all that nobody uses."""
        free, self._free = self._free, []
        for connection, _ in free:
            self._part_with(connection)

    def give_back(self, connection: Any, *answers: Any) -> None:
        """Let others use a connection again that has answered so."""
        if any(isinstance(answer, redis.exceptions.ReadOnlyError) for answer in answers):
            # What was the master is none any more.
            self.give_up(connection)
        else:
            self._free.append((connection, time.monotonic()))

    def give_up(self, connection: Any) -> None:
        """Close a connection, and all that nobody uses."""
        self._part_with(connection)
        self.close()

    def _take(self) -> Any:
        if self._pid != os.getpid():
            # The parent's, which go on.
            self._pid, self._free = os.getpid(), []
        with suppress(IndexError):
            connection, since = self._free.pop()
            if time.monotonic() - since < _IDLE or not _is_stale(connection):
                return connection
            self.give_up(connection)
        return self._pool.get_connection()

    def _part_with(self, connection: Any) -> None:
        with suppress(Exception):
            connection.disconnect()
        with suppress(Exception):
            self._pool.release(connection)


@dataclass(slots=True)
class Sent:
    """A command that was sent, and whose answer has to be read."""

    lines: Lines
    connection: Any

    def answer(self) -> Any:
        """Wait for the answer."""
        try:
            answer = self.connection.read_response()
        except redis.ResponseError as error:
            self.lines.give_back(self.connection, error)
            raise
        except BaseException:
            self.lines.give_up(self.connection)
            raise
        self.lines.give_back(self.connection)
        return answer

    def forget(self) -> None:
        """Do without the answer."""
        self.lines.give_up(self.connection)


def _is_stale(connection: Any) -> bool:
    try:
        # Nothing is due: what can be read is the end.
        return bool(connection.can_read())
    except (redis.RedisError, OSError):
        return True


def _packed(command: Command) -> bytes:
    """Return a command as the server reads it: an array of texts."""
    if any(isinstance(one, bytes) for one in command):
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
