"""Workers that are killed, stopped and replaced, as by a supervisor."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.chaos.app import JOURNAL, SETTINGS, SYSTEM
from tests.support import WorkerProcess

__all__ = ["Fleet"]

#: A host name is never used again, also by the next fleet.
_numbers = itertools.count(1)


class Fleet:
    """A fixed number of workers; one that ends is replaced at once, unless told otherwise.

    Args:
        system: Which app they run.
        urls: The broker's URL for each of them.
        journal: Where their tasks write.
        concurrency: How many tasks each runs at once.
        pool: Their kind of pool.
        settings: Theirs, as `make_app` takes them.
        loglevel: Theirs.
        args: More arguments of ``celery worker``.
        logs: A directory that keeps their logs.

    Attributes:
        pool: Their kind of pool.
        deaths: When each worker died, by host name.
        deserters: Workers that ended although nobody killed them, and how.
    """

    def __init__(
        self,
        system: str,
        urls: list[str],
        journal: Path,
        *,
        concurrency: int = 2,
        pool: str = "prefork",
        settings: Mapping[str, Any] | None = None,
        loglevel: str = "WARNING",
        args: Sequence[str] = (),
        logs: Path | None = None,
    ) -> None:
        self._system = system
        self._urls = urls
        self._env: Mapping[str, str] = {
            SYSTEM: system,
            JOURNAL: str(journal),
            SETTINGS: json.dumps(settings or {}),
            # Killed workers do not tidy up after themselves.
            "TMPDIR": str(journal.parent),
        }
        self._concurrency = concurrency
        self.pool = pool
        self._loglevel = loglevel
        self._args = args
        self._keep = logs
        self.workers: list[WorkerProcess] = []
        self.deaths: dict[str, float] = {}
        self.deserters: dict[str, int | None] = {}
        self.tracebacks: dict[str, str] = {}

    def kill(self, slot: int, *, is_replaced: bool = True) -> float:
        """SIGKILL a worker and its children; return when.

        Args:
            slot: Its place.
            is_replaced: Whether another one is started; else by `replace`.
        """
        worker = self.workers[slot]
        at = time.time()
        worker.kill_group()
        self.deaths[worker.hostname] = at
        self._bury(worker)
        if is_replaced:
            self.replace(slot)
        return at

    def replace(self, slot: int) -> None:
        """Start a worker in place of a dead one."""
        self.workers[slot] = self._start(slot)

    def stop(self, slot: int) -> float:
        """SIGSTOP a worker and its children; return when."""
        at = time.time()
        os.killpg(self.workers[slot].pid, signal.SIGSTOP)
        return at

    def go_on(self, slot: int) -> None:
        """SIGCONT a worker and its children."""
        os.killpg(self.workers[slot].pid, signal.SIGCONT)

    def supervise(self) -> None:
        """Replace workers that have ended by themselves."""
        for slot, worker in enumerate(self.workers):
            if not worker.running and worker.hostname not in self.deaths:
                self.deaths[worker.hostname] = time.time()
                self.deserters[worker.hostname] = worker.returncode
                self._bury(worker)
                self.replace(slot)

    def wait_ready(self) -> None:
        """Wait until all take tasks; needs the log level INFO."""
        for worker in self.workers:
            worker.wait_ready()

    def slot_of(self, host: str) -> int:
        """Return the place of a worker."""
        return next(slot for slot, one in enumerate(self.workers) if one.hostname == host)

    def _start(self, slot: int) -> WorkerProcess:
        worker = WorkerProcess(
            "benchmarks.chaos.worker_app",
            broker_url=self._urls[slot],
            concurrency=self._concurrency,
            pool=self.pool,
            hostname=f"chaos{slot + 1}-{next(_numbers)}@host",
            env=self._env,
            loglevel=self._loglevel,
            args=self._args,
        )
        worker.start(wait=False)
        return worker

    def _bury(self, worker: WorkerProcess) -> None:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.stop()
        log = worker.log
        if "Traceback" in log:
            self.tracebacks[worker.hostname] = log
        if self._keep is not None:
            name = f"{self._system.replace(' ', '-')}-{worker.hostname}.log"
            (self._keep / name).write_text(log)

    def __enter__(self) -> Self:
        try:
            for slot in range(len(self._urls)):
                self.workers.append(self._start(slot))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            if worker.hostname not in self.deaths:
                self._bury(worker)
