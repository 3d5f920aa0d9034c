"""Real prefork workers, and the supervisor that replaces a dead one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import reliable_tasks
from reliable_tasks.demo import _events
from reliable_tasks.demo._server import tied_to_parent

__all__ = ["BACKEND", "BROKER", "CONTENDER", "Crew", "Worker", "forget_celery_environment"]

#: The environment variables that tell a worker which app it runs, and where.
CONTENDER = "RELIABLE_TASKS_DEMO_CONTENDER"
BROKER = "RELIABLE_TASKS_DEMO_BROKER"
BACKEND = "RELIABLE_TASKS_DEMO_BACKEND"

_READY = re.compile(r" ready\.\s*$", re.MULTILINE)


def forget_celery_environment() -> None:
    """Drop what would send the demo's tasks to the user's own broker.

    ``CELERY_BROKER_URL`` and its like win over what an app is told.
    """
    for name in [name for name in os.environ if name.startswith("CELERY_")]:
        del os.environ[name]


class Worker:
    """``celery worker`` in a process group of its own, tied to this process.

    Args:
        host: Its node name, never used before.
        concurrency: How many children it has.
        home: Where it runs and writes its log.
        environment: Its environment variables.
    """

    def __init__(
        self, host: str, concurrency: int, home: Path, environment: Mapping[str, str]
    ) -> None:
        self.host = host
        self._log = home / f"{host}.log"
        command = [
            *(sys.executable, "-m", "celery", "-A", "reliable_tasks.demo._worker_app", "worker"),
            *("--concurrency", str(concurrency), "--hostname", host, "--loglevel", "INFO"),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                tied_to_parent(command),
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """How the main process ended; ``None`` while it lives."""
        return self._process.poll()

    @property
    def is_ready(self) -> bool:
        """Whether it takes tasks."""
        return bool(_READY.search(self.log))

    @property
    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """End it and its children with SIGKILL, as the loss of its host would."""
        # Its children make the group last until it is reaped here, and that comes after.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Crew:
    """A fixed number of workers; one that ends is replaced at once, as by a supervisor.

    Args:
        size: How many workers.
        concurrency: How many children each has.
        home: Where they run and write their logs.
        environment: Environment variables of theirs, on top of this process' own.
    """

    def __init__(
        self, size: int, concurrency: int, home: Path, environment: Mapping[str, str]
    ) -> None:
        self._concurrency = concurrency
        self._home = home
        self._environment = {
            **os.environ,
            "PYTHONPATH": _python_path(),
            # Killed workers do not tidy up after themselves.
            "TMPDIR": str(home),
            **environment,
        }
        self._size = size
        self._started: Counter[int] = Counter()
        self.workers: list[Worker] = []
        #: Workers that ended although nobody killed them.
        self.deserters: list[Worker] = []

    @property
    def is_ready(self) -> bool:
        """Whether all of them take tasks."""
        return all(worker.is_ready for worker in self.workers)

    def kill(self, slot: int) -> None:
        """Kill the worker in a place, and start another one there."""
        self.workers[slot].kill()
        self.workers[slot] = self._start(slot)

    def supervise(self) -> None:
        """Replace workers that have ended by themselves."""
        for slot, worker in enumerate(self.workers):
            if worker.exit_code is not None:
                worker.kill()
                self.deserters.append(worker)
                self.workers[slot] = self._start(slot)

    def _start(self, slot: int) -> Worker:
        self._started[slot] += 1
        host = f"worker{slot + 1}-{self._started[slot]}@demo"
        return Worker(host, self._concurrency, self._home, self._environment)

    def __enter__(self) -> Self:
        try:
            for slot in range(self._size):
                self.workers.append(self._start(slot))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            worker.kill()


def worker_environment(contender: str, broker: str, backend: str, events: Path) -> dict[str, str]:
    """Return what a worker has to know."""
    return {
        CONTENDER: contender,
        BROKER: broker,
        BACKEND: backend,
        _events.DIRECTORY: str(events),
    }


def _python_path() -> str:
    """Return the import path for workers, which run in another directory than this process."""
    here = str(Path(reliable_tasks.__file__).resolve().parents[1])
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([here, *(str(Path(entry).resolve()) for entry in rest if entry)])
