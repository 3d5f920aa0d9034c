"""One app on its servers: its client in this process, its workers, and what they wrote down."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from celery import Celery

from reliable_tasks import ReliableResult
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.claims import Claims
from tests.integration.apps import shop
from tests.integration.apps.journal import Journal
from tests.support import WorkerProcess, wait_until


class Scene:
    """The shop app, its workers and its journal.

    Args:
        directory: Where the journal is kept.
        broker: The broker's URL.
        backend: The result backend's URL.
        settings: Settings of client and workers, on top of what the library sets.
        env: More environment variables of the workers.

    Attributes:
        app: The client's app.
        journal: What the tasks wrote down.
        workers: The workers that were started.
    """

    def __init__(
        self,
        directory: Path,
        broker: str,
        backend: str | None,
        *,
        settings: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.app: Celery = shop.build(broker, backend, **(settings or {}))
        self.journal = Journal(directory)
        self.workers: list[WorkerProcess] = []
        self._env = {
            "RT_JOURNAL": str(directory),
            "RT_SETTINGS": json.dumps(settings or {}),
            **(env or {}),
        }
        self._broker, self._backend = broker, backend

    def worker(self, **options: Any) -> WorkerProcess:
        """Start a worker; takes what `WorkerProcess` takes."""
        env = {**self._env, **options.pop("env", {})}
        given = {"broker_url": self._broker, "result_url": self._backend, **options}
        worker = WorkerProcess("tests.integration.apps.shop", env=env, **given)
        self.workers.append(worker)
        worker.start()
        return worker

    def call(self, task: str, *args: Any, **options: Any) -> ReliableResult:
        """Queue a task; options are those of ``apply_async``."""
        return self.app.tasks[task].apply_async(args, **options)

    @property
    def claims(self) -> Claims:
        """The app's claims."""
        return locks_of(self.app).claims

    def claim(self, *args: Any, task: str = "act") -> dict[str, str]:
        """Return the claim of a call, empty where the key is free."""
        called = self.app.tasks[task]
        return self.claims.read(called.reliable_once.claim_name(called, args, None))

    def starts(self, name: str) -> int:
        """Say how often a call was started."""
        return len(self.journal.events("start", name=name))

    def wait_starts(self, name: str, count: int = 1, timeout: float = 15) -> float:
        """Wait until a call was started so often, and return when the last of them was."""
        events = wait_until(
            lambda: len(found := self.journal.events("start", name=name)) >= count and found,
            timeout,
            lambda: f"start {count} of {name}; the workers' logs:\n{self.logs}",
        )
        return float(events[-1].at)

    def wait_free(self, *args: Any, task: str = "act", timeout: float = 10) -> None:
        """Wait until nobody holds the key of a call: a result is stored before its claim goes."""
        wait_until(
            lambda: not self.claim(*args, task=task),
            timeout,
            lambda: f"{args} free; its claim is {self.claim(*args, task=task)}\n{self.logs}",
        )

    @property
    def logs(self) -> str:
        """What the workers have written."""
        return "\n\n".join(f"{worker.hostname}:\n{worker.log[-3000:]}" for worker in self.workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        stop: list[Callable[[], None]] = [worker.stop for worker in self.workers]
        with contextlib.ExitStack() as stack:
            stack.callback(self.app.close)
            for one in stop:
                stack.callback(one)
