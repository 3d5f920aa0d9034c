"""Where each message is, as the broker was told.

Stock kombu fetches a message with BRPOP and only then notes in ``unacked`` that somebody has it:
a worker that is killed in between loses it without a trace. To tell that loss from any other, the
demo reads along all that the server is told (MONITOR) and keeps books: a message that was
queued last, yet is in the queue no longer, fell into that window; one that was taken off
``unacked`` without being queued again was acknowledged.
"""

from __future__ import annotations

import re
import socket
from enum import Enum
from typing import Self

__all__ = ["Ledger", "Place"]

_COMMAND = re.compile(
    rb'\+?[\d.]+ \[\d+ [^"]*\] "(?P<name>[LR]PUSH|HSET|HDEL)" "(?P<key>[^"]*)" (?P<rest>.*)',
    re.DOTALL,
)
# JSON, as MONITOR quotes it.
_TASK_ID = re.compile(rb'\\"correlation_id\\": \\"([^"\\]+)\\"')


class Place(Enum):
    """Where a message was put last."""

    QUEUED = "queued"
    HELD = "held"
    DONE_WITH = "done with"


class Ledger:
    """Keeps books about the messages of one queue.

    Args:
        port: The broker's port on loopback.
        queue: The queue's name.
    """

    def __init__(self, port: int, queue: str = "celery") -> None:
        self._queue = queue.encode()
        self._buffer = b""
        self._held: dict[bytes, re.Match[bytes] | None] = {}
        self._places: dict[str, Place] = {}
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=5.0)
        self._socket.sendall(b"MONITOR\r\n")
        self._buffer = self._socket.recv(64)
        self._socket.setblocking(False)

    def place(self, task_id: str) -> Place | None:
        """Return where a task's message was put last; ``None`` if it was never seen."""
        return self._places.get(task_id)

    def tasks(self, place: Place) -> set[str]:
        """Return the ids of the tasks whose message was put there last."""
        return {task_id for task_id, found in self._places.items() if found is place}

    def catch_up(self) -> bool:
        """Read what is new, and say whether a message has moved."""
        parts = [self._buffer]
        try:
            while part := self._socket.recv(1 << 20):
                parts.append(part)
        except BlockingIOError:
            pass
        *lines, self._buffer = b"".join(parts).split(b"\r\n")
        moved = [self._take(line) for line in lines]
        return any(moved)

    def _take(self, line: bytes) -> bool:
        command = _COMMAND.match(line)
        if command is None:
            return False
        name, key, rest = command["name"], command["key"], command["rest"]
        if name.endswith(b"PUSH") and key == self._queue:
            return self._move(_TASK_ID.search(rest), Place.QUEUED)
        if key != b"unacked":
            return False
        tag, _, message = rest.lstrip(b'"').partition(b'"')
        if name == b"HDEL":
            task_id = self._held.pop(tag, None)
            return self._move(task_id, Place.DONE_WITH)
        self._held[tag] = _TASK_ID.search(message)
        return self._move(self._held[tag], Place.HELD)

    def _move(self, task_id: re.Match[bytes] | None, place: Place) -> bool:
        if task_id is None:
            return False
        self._places[task_id[1].decode()] = place
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
