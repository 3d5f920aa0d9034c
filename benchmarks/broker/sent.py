"""Counts the commands that clients send; what their scripts call is not among them."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

__all__ = ["Sent"]


class Sent:
    """Counts what a server is sent between entry and exit.

    Read as it comes: for hundreds of clients the server would have to keep megabytes of it.

    Args:
        url: The server's URL.

    Attributes:
        count: How many commands so far.
    """

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self.count = 0
        self._stream = socket.create_connection((where.hostname, where.port))
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        # As an end: whether it was ours, `__exit__` knows.
        with suppress(ConnectionResetError), self._stream.makefile("rb") as lines:
            for line in lines:
                # A line is: moment [db address] "command" "argument" and so on, escaped.
                head = line.partition(b"]")[0]
                self.count += b" [" in head and not head.endswith(b" lua")

    def __enter__(self) -> Self:
        self._stream.sendall(b"MONITOR\r\n")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        is_whole = self._thread.is_alive()
        # Wakes the thread, which a close alone does not.
        self._stream.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stream.close()
        assert is_whole, "the server ended the connection that was told of all commands"
