"""A network that can be broken on purpose, and an ear on what crosses it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any, Self

import redis

_POLL = 0.05


class Proxy:
    """A TCP proxy on loopback that delays, swallows, refuses and cuts.

    A fault holds for connections that are open and for new ones, until `heal`. As a context
    manager it fails a test that wanted a reply lost which nobody ever asked for.

    Args:
        target_port: The port on loopback that it stands before.

    Attributes:
        latency: Seconds that each piece of data waits, either way.
        port: The port that it listens on.
    """

    def __init__(self, target_port: int) -> None:
        self.latency = 0.0
        self._target = ("127.0.0.1", target_port)
        self._black_hole = False
        self._lost_reply: bytes | None = None
        self._lost_left = 0
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._closed = threading.Event()
        self._listener: socket.socket | None = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    def url(self, db: int = 0) -> str:
        """The URL of a Redis database behind the proxy."""
        return f"redis://127.0.0.1:{self.port}/{db}"

    def refuse(self) -> None:
        """Refuse new connections and cut those that are open: the server is down."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone would leave it listening while the other thread is in accept.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every open connection; new ones are served."""
        for link in self._open_links():
            link.reset()

    def black_hole(self) -> None:
        """Take connections and data and pass nothing on: the network is gone."""
        self._black_hole = True

    def lose_replies(self, command: bytes = b"", times: int = 1) -> None:
        """Let commands through to the server and cut the connection instead of answering.

        Args:
            command: Only connections that send these bytes from now on are hit; by default
                the next that sends anything.
            times: How many connections are hit.
        """
        with self._lock:
            self._lost_reply, self._lost_left = command, times

    @property
    def replies_to_lose(self) -> int:
        """How many connections have yet to be hit, for they did not send what `lose_replies` says.

        A connection is counted as hit when the server is sent the command.
        """
        return self._lost_left

    def heal(self) -> None:
        """End every fault. A connection that lost data in a black hole is cut."""
        with self._lock:
            self._lost_reply, self._lost_left = None, 0
            self.latency = 0.0
            self._black_hole = False
            if self._listener is None:
                self._listener = self._listen(self.port)
        for link in self._open_links():
            if link.lost_data:
                link.reset()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._open_links())

    def close(self) -> None:
        """Refuse, cut and end."""
        self._closed.set()
        self.refuse()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        if exc[0] is None:
            assert not self.replies_to_lose, f"nobody sent {self._lost_reply!r}: no reply was lost"

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                _reset(client)
                continue
            link = _Link(self, client, server)
            with self._lock:
                self._links.add(link)
            link.start()

    def _open_links(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _takes_reply_of(self, data: bytes) -> bool:
        with self._lock:
            hit = self._lost_left > 0 and self._lost_reply is not None and self._lost_reply in data
            self._lost_left -= hit
            return hit


class _Link:
    """One client's connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._cut_at_reply = False
        self.lost_data = False
        # Before anybody else can close them.
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(None)

    def start(self) -> None:
        for way in ((self._client, self._server), (self._server, self._client)):
            threading.Thread(target=self._pump, args=way, daemon=True).start()

    def reset(self) -> None:
        _reset(self._client)
        _reset(self._server)
        self._proxy._forget(self)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self._proxy.latency:
                    time.sleep(self._proxy.latency)
                if self._proxy._black_hole:
                    self.lost_data = True
                    continue
                if source is self._client:
                    if self._proxy._takes_reply_of(data):
                        self._cut_at_reply = True
                elif self._cut_at_reply:
                    break
                sink.sendall(data)
        except OSError:
            pass
        self.reset()


def _reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset, as after a crash."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Wakes a thread that waits for data on it, which a close alone does not.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)
    sock.close()


@dataclass(frozen=True, slots=True)
class MonitoredCommand:
    """A command that reached the server.

    Attributes:
        name: The command in capitals, e.g. ``EVALSHA``.
        text: The command with its arguments, as MONITOR shows it.
        client: The address that it came from, ``host:port``.
        db: The number of the database.
    """

    name: str
    text: str
    client: str
    db: int


class Monitor:
    """Every command that a server is sent between entry and exit.

    What a script calls on the server is left out: MONITOR marks it ``lua``, and it costs no
    round trip.

    Args:
        url: The server's URL.

    Attributes:
        commands: The commands, in order; complete once the block has been left.
    """

    def __init__(self, url: str) -> None:
        self.commands: list[MonitoredCommand] = []
        self._marker = f"monitor-{uuid.uuid4().hex}"
        self._client = redis.Redis.from_url(url)
        self._stream: Any = None

    def names(self, *, client: str | None = None) -> list[str]:
        """The commands' names, in order, of one client's address or of all."""
        return [c.name for c in self.commands if client is None or c.client == client]

    def __enter__(self) -> Self:
        self._stream = self._client.monitor().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            # What was sent before the marker is listed before it: no need to wait and hope.
            self._client.echo(self._marker)
            self._read_to_marker()
        finally:
            self._stream.__exit__(None, None, None)
            self._client.close()

    def _read_to_marker(self) -> None:
        for seen in self._stream.listen():
            text = seen["command"]
            if self._marker in text:
                break
            if seen["client_type"] == "lua":
                continue
            name = text.partition(" ")[0].upper()
            address = f"{seen['client_address']}:{seen['client_port']}"
            self.commands.append(MonitoredCommand(name, text, address, int(seen["db"])))
        # The handshake of the connection that sent the marker is ours, not the test's.
        own = self._own_address()
        self.commands = [command for command in self.commands if command.client != own]

    def _own_address(self) -> str:
        return str(self._client.client_info()["addr"])
