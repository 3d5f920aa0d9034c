"""Real Celery workers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from reliable_tasks.demo._server import tied_to_parent
from tests.support.forkserver import Forked, fork_server
from tests.support.processes import live_processes
from tests.support.wait import wait_until

_ROOT = Path(__file__).resolve().parents[2]
_READY = re.compile(r" ready\.\s*$", re.MULTILINE)
#: Those that patch no modules, which would have to come before all imports.
_WARM_POOLS = frozenset({"prefork", "solo", "threads"})


class WorkerProcess:
    """``celery -A <app> worker`` as a user would start it, with its output in a file.

    The app finds its servers in the environment variables ``RT_BROKER_URL`` and
    ``RT_RESULT_URL``. The worker leads a process group of its own, so that nothing of it is
    left after `stop`, and dies with the test process.

    Args:
        app: The module of the app, e.g. ``tests.integration.apps.shop``.
        broker_url: The broker's URL.
        result_url: The result backend's URL, if there is one.
        pool: The kind of pool.
        concurrency: How many tasks it runs at once.
        hostname: The worker's node name; by default a unique one.
        args: More arguments of ``celery worker``, e.g. ``["-Q", "slow"]``.
        env: More environment variables.
        loglevel: The worker's log level.
        ready_timeout: Seconds that it may take to start.
        warm: Fork it from a process that has imported Celery: ready in a sixth of the time.
            A green one, and one whose ``env`` Python itself reads, are started plainly.
    """

    def __init__(
        self,
        app: str,
        *,
        broker_url: str,
        result_url: str | None = None,
        pool: str = "prefork",
        concurrency: int = 1,
        hostname: str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        loglevel: str = "INFO",
        ready_timeout: float = 30.0,
        warm: bool = False,
    ) -> None:
        self.hostname = hostname or f"w{uuid.uuid4().hex[:8]}@test"
        self._ready_timeout = ready_timeout
        self._process: subprocess.Popen[bytes] | Forked | None = None
        is_plain = any(variable.startswith("PYTHON") for variable in env or ())
        self._is_warm = warm and pool in _WARM_POOLS and sys.platform == "linux" and not is_plain
        self._is_gone = False
        self._command = [
            *("-A", app, "worker"),
            *("--pool", pool),
            *("--concurrency", str(concurrency)),
            *("--hostname", self.hostname),
            *("--loglevel", loglevel),
            *args,
        ]
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(_ROOT), str(_ROOT / "src"), os.environ.get("PYTHONPATH")])
            ),
            "RT_BROKER_URL": broker_url,
            **({"RT_RESULT_URL": result_url} if result_url else {}),
            **(env or {}),
        }
        handle, name = tempfile.mkstemp(prefix="reliable-tasks-worker-", suffix=".log")
        os.close(handle)
        self._log = Path(name)
        self._last_log = ""

    @property
    def pid(self) -> int:
        """The process id of the worker's main process."""
        if self._process is None:
            raise RuntimeError("the worker has not been started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the main process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """How the main process ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        """Everything that the worker has written so far."""
        if self._log.exists():
            return self._log.read_text(errors="replace")
        return self._last_log

    def start(self, *, wait: bool = True) -> None:
        """Start the worker and, unless told otherwise, wait until it takes tasks."""
        self._is_gone = False
        self._process = self._fork() if self._is_warm else self._spawn()
        if wait:
            self.wait_ready()

    def _fork(self) -> Forked:
        server = fork_server(self._env["PYTHONPATH"])
        return server.start(self._command, self._env, _ROOT, self._log)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                tied_to_parent([sys.executable, "-m", "celery", *self._command]),
                cwd=_ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until the worker takes tasks, and fail with its log if it never does."""
        try:
            wait_until(
                lambda: not self.running or _READY.search(self.log),
                self._ready_timeout,
                lambda: f"worker ready; its log:\n{self.log[-4000:]}",
            )
            assert self.running, f"the worker ended with {self.returncode}:\n{self.log[-4000:]}"
        except BaseException:
            self.stop()
            raise

    def wait_log(self, pattern: str, timeout: float = 10.0) -> re.Match[str]:
        """Wait until the log matches a regular expression and return the match."""
        match = wait_until(
            lambda: re.search(pattern, self.log),
            timeout,
            lambda: f"{pattern!r} in the worker's log:\n{self.log[-4000:]}",
        )
        assert match
        return match

    def child_pids(self) -> list[int]:
        """The process ids of the pool's children, oldest first."""
        return sorted(child.pid for child in live_processes() if child.parent == self.pid)

    def terminate(self) -> None:
        """Ask for a warm shutdown, and do not wait for it."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the main process with SIGKILL.

        On Linux prefork children ask the kernel to die with it, and follow at once.
        """
        self.send_signal(signal.SIGKILL)
        self.wait()

    def kill_group(self) -> None:
        """End the worker and all its children with SIGKILL, as the loss of its host would."""
        self._signal_group()
        self.wait()

    def send_signal(self, signum: int) -> None:
        """Send a signal to the main process, e.g. SIGSTOP or SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signum)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the main process to end and return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout)

    def stop(self, timeout: float = 15.0) -> None:
        """Shut the worker down, by force after the timeout; nothing of it is left."""
        self._ask_to_end()
        self._see_it_end(timeout)

    def _ask_to_end(self) -> None:
        if self.running:
            # A stopped process does not see SIGTERM until it runs again.
            self.send_signal(signal.SIGCONT)
            self.terminate()

    def _see_it_end(self, timeout: float) -> None:
        # Once, for the process group's id may be another one's later.
        if self._process is None or self._is_gone:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self._signal_group()
        self._process.wait()
        wait_until(
            lambda: not any(process.group == self.pid for process in live_processes()),
            message=f"process group {self.pid} gone",
        )
        self._is_gone = True
        if self._log.exists():
            self._last_log = self.log
            self._log.unlink()

    def _signal_group(self) -> None:
        # The group keeps its id as long as one of it lives, so this cannot hit strangers
        # before `stop` has seen it empty.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @staticmethod
    def stop_all(workers: Sequence[WorkerProcess], timeout: float = 15.0) -> None:
        """Shut workers down, all at the same time."""
        for worker in workers:
            worker._ask_to_end()
        for worker in workers:
            worker._see_it_end(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
