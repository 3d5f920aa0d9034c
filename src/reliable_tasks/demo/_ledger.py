"""Where each message is, as the broker was told.

Kombu fetches a message with BRPOP and only then notes in ``unacked`` that somebody has it: a
worker that is killed in between loses it without a trace. To tell that loss from any other, the
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
    rb'\+?[\d.]+ \[\d+ [^"]*\] "(?P<name>[LR]PUSH|ZADD|ZREM)" "(?P<key>[^"]*)" (?P<rest>.*)',
    re.DOTALL,
)
# JSON, as MONITOR quotes it.
_TAG = re.compile(rb'\\"delivery_tag\\": \\"([^"\\]+)\\"')
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
        self._task_ids: dict[bytes, str] = {}
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
            tag, task_id = _TAG.search(rest), _TASK_ID.search(rest)
            if tag is None or task_id is None:
                return False
            self._task_ids[tag[1]] = task_id[1].decode()
            return self._move(tag[1], Place.QUEUED)
        if key != b"unacked_index":
            return False
        tag_text = rest.rpartition(b' "')[2] if name == b"ZADD" else rest.lstrip(b'"')
        return self._move(tag_text.rstrip(b'"'), Place.HELD if name == b"ZADD" else Place.DONE_WITH)

    def _move(self, tag: bytes, place: Place) -> bool:
        task_id = self._task_ids.get(tag)
        if task_id is None:
            return False
        self._places[task_id] = place
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
