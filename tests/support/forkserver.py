"""Workers of one test process, forked from one that has imported Celery already.

What a worker does until it is ready is nearly all Celery's imports: 0.6 of 0.7 s of a core, for
each of some five hundred. A fork of a process that did nothing but import has them for nothing;
this library's too, for Celery imports what adds commands to it. From there on it is a worker like
any other: ``celery.__main__.main()`` in a process of its own, which imports its app, and lives
and dies as it would.

Green pools patch modules before they are imported, so their workers have to be started plainly.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from reliable_tasks.demo._server import tied_to_parent

_CHILD = Path(__file__).with_name("_forked.py")


class Forked:
    """One process that a `ForkServer` started: as much of `subprocess.Popen` as a worker needs.

    Attributes:
        pid: Its process id.
        returncode: How it ended, as Popen says it; None while it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._has_ended = threading.Event()

    def ended(self, returncode: int) -> None:
        """Note how it ended."""
        self.returncode = returncode
        self._has_ended.set()

    def poll(self) -> int | None:
        """Return how it ended, or None."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It runs still.
        """
        if not self._has_ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            # It may have ended, and nobody has said so yet.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


class ForkServer:
    """A process that has imported Celery, and forks a worker whenever it is asked to.

    It and what it forked end with the process that made it, and with the thread of that: make it
    in the main one.

    Args:
        python_path: Its ``PYTHONPATH``, and that of its workers.
    """

    def __init__(self, python_path: str) -> None:
        self._process = subprocess.Popen(
            # -P: the folder of the script is no place to import from.
            tied_to_parent([sys.executable, "-P", str(_CHILD)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path},
            start_new_session=True,
            text=True,
        )
        self._lock = threading.Lock()
        self._started: queue.SimpleQueue[Forked | None] = queue.SimpleQueue()
        self._alive: dict[int, Forked] = {}
        threading.Thread(target=self._listen, name="fork server", daemon=True).start()

    def start(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Forked:
        """Start a worker in a session of its own, with its output at the end of a file.

        Args:
            command: What follows ``celery`` on the command line.
            env: All of its environment.
            cwd: Where it runs.
            log: The file.
        """
        assert self._process.poll() is None, "the fork server has ended"
        request = {"command": [*command], "env": {**env}, "cwd": str(cwd), "log": str(log)}
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            try:
                forked = self._started.get(timeout=30)
            except queue.Empty:
                # What it says later would be taken for the answer to another question.
                self.kill()
                raise
        assert forked, "the fork server has ended"
        return forked

    def kill(self) -> None:
        """End it with SIGKILL, and with it all that it forked."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # Of what it has not read.
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                said: dict[str, int] = json.loads(line)
                pid = said["pid"]
                if "returncode" in said:
                    self._alive.pop(pid).ended(said["returncode"])
                else:
                    self._alive[pid] = Forked(pid)
                    self._started.put(self._alive[pid])
        # It was killed, and the kernel has killed its workers with it.
        for forked in self._alive.values():
            forked.ended(-signal.SIGKILL)
        self._started.put(None)


@functools.cache
def fork_server(python_path: str) -> ForkServer:
    """Return the one of this process; it is started when it is first asked for."""
    server = ForkServer(python_path)
    atexit.register(server.kill)
    return server
