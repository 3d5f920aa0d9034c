"""One app on its servers: its client in this process, its workers, and what they wrote down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from celery import Celery

from reliable_tasks import ReliableResult
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.claims import Claims
from tests.integration.apps import shop
from tests.integration.apps.journal import Journal
from tests.support import WorkerProcess, wait_until

#: Arguments of workers that do not wait for each other: they start in half the time.
ALONE = ["--without-mingle", "--without-gossip"]


def reading(queues: str) -> list[str]:
    """Return the arguments of a worker of some queues, e.g. ``"a,b"``."""
    return [*ALONE, "-Q", queues]


class Scene:
    """The shop app, its workers and its journal.

    Args:
        directory: Where the journal is kept.
        broker: The broker's URL.
        backend: The result backend's URL.
        settings: Settings of client and workers, on top of what the library sets.
        limit: Hard time limit of the tasks (s).
        env: More environment variables of the workers.
        module: The app's module, whose ``build`` makes it.

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
        limit: int = shop.LIMIT,
        env: dict[str, str] | None = None,
        module: ModuleType = shop,
    ) -> None:
        self._module = module.__name__
        self.app: Celery = module.build(broker, backend, limit=limit, **(settings or {}))
        self.journal = Journal(directory)
        self.workers: list[WorkerProcess] = []
        self._env = {
            "RT_JOURNAL": str(directory),
            "RT_LIMIT": str(limit),
            **(env or {}),
        }
        self._settings = settings or {}
        self._broker, self._backend = broker, backend

    def worker(self, **options: Any) -> WorkerProcess:
        """Start a worker; takes what `WorkerProcess` takes, and ``settings`` of its own."""
        (worker,) = self.crew(1, **options)
        return worker

    def crew(self, count: int, **options: Any) -> list[WorkerProcess]:
        """Start some workers at once; takes what `worker` takes, and ``waits=False``."""
        settings = {**self._settings, **options.pop("settings", {})}
        given = {
            "broker_url": self._broker,
            "result_url": self._backend,
            "args": ALONE,
            "env": {**self._env, "RT_SETTINGS": json.dumps(settings)},
            "warm": True,
            **options,
        }
        waits = given.pop("waits", True)
        crew = [WorkerProcess(self._module, **given) for _ in range(count)]
        self.workers += crew
        for worker in crew:
            worker.start(wait=False)
        for worker in crew if waits else ():
            worker.wait_ready()
        return crew

    def control(self, command: str, queue: str, worker: WorkerProcess) -> None:
        """Have a worker add or cancel a consumer, and ask again until it says that it has.

        A green one can be ready a moment before it listens. And it says that it has cancelled one
        when its loop is yet to do so.
        """
        ask = getattr(self.app.control, command)
        cancelled = worker.log.count(f"Canceling queue {queue}")
        wait_until(
            lambda: ask(queue, destination=[worker.hostname], reply=True, timeout=2),
            20,
            lambda: f"an answer to {command}\n{self.logs}",
        )
        if command == "cancel_consumer":
            wait_until(
                lambda: worker.log.count(f"Canceling queue {queue}") > cancelled,
                20,
                lambda: f"{queue} cancelled\n{self.logs}",
            )

    def wait_listening(self, workers: Sequence[WorkerProcess]) -> None:
        """Wait until workers answer, as those do that have a connection and consume by it."""
        names = {worker.hostname for worker in workers}

        def all_answer() -> bool:
            # One of its own: those of the pool may have been killed with the workers'.
            with self.app.connection_for_write() as connection:
                answers = self.app.control.ping(
                    destination=sorted(names), limit=len(names), timeout=2, connection=connection
                )
            return names == {name for answer in answers for name in answer}

        wait_until(all_answer, 20, lambda: f"answers of {sorted(names)}\n{self.logs}")

    def release(self, queue: str) -> None:
        """Have the first worker read a queue too: what was called there has waited until now."""
        self.control("add_consumer", queue, self.workers[0])

    def call(self, task: str, *args: Any, **options: Any) -> ReliableResult:
        """Queue a task; options are those of ``apply_async``."""
        result: ReliableResult = self.app.tasks[task].apply_async(args, **options)
        return result

    def send(self, task: str, *args: Any) -> Any:
        """Queue a task by its name."""
        return self.app.send_task(task, args)

    def send_garbage(self, task: str, task_id: str) -> None:
        """Queue a message that says that it is JSON, and is not."""
        with self.app.connection_for_write() as connection:
            queue = self.app.amqp.queues["celery"]
            connection.Producer().publish(
                b"no JSON",
                exchange=queue.exchange,
                routing_key=queue.routing_key,
                content_type="application/json",
                content_encoding="utf-8",
                headers={"id": task_id, "task": task},
            )

    def revoked(self) -> set[str]:
        """Ask a worker which tasks it knows to be revoked."""
        known = self.app.control.inspect(timeout=2, limit=1).revoked() or {}
        return {task_id for ids in known.values() for task_id in ids}

    @property
    def claims(self) -> Claims:
        """The app's claims."""
        return locks_of(self.app).claims

    def claim_name(self, *args: Any, task: str = "act") -> str:
        """Return the name of a call's claim."""
        called = self.app.tasks[task]
        name: str = called.reliable_once.claim_name(called, args, None)
        return name

    def claim(self, *args: Any, task: str = "act") -> dict[str, str]:
        """Return the claim of a call, empty where the key is free."""
        return self.claims.read(self.claim_name(*args, task=task))

    def run_elsewhere(self, name: str, owner: str, *, lease: float = 60.0) -> None:
        """Let another copy of a call hold its claim, as if it ran on another host.

        Do this while its message waits in a queue that no worker reads.
        """
        self.claims.enter(
            self.claim_name(name),
            owner=owner,
            attempt=0,
            holder="elsewhere",
            lease=lease,
            ttl=60.0,
            task="act",
        )

    def let_go_elsewhere(self, name: str, owner: str) -> None:
        """Let that other copy be gone."""
        self.run_elsewhere(name, owner, lease=0.01)

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

    def wait_followed(self, task_id: str, timeout: float = 15) -> None:
        """Wait until a duplicate has come to a worker that follows a task."""
        wait_until(
            lambda: any(f"it follows task {task_id}" in worker.log for worker in self.workers),
            timeout,
            lambda: f"somebody who follows {task_id}\n{self.logs}",
        )

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

    def stop_workers(self) -> None:
        """Stop the workers, while the servers that they say goodbye to are still there."""
        WorkerProcess.stop_all(self.workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop_workers()
        finally:
            self.app.close()
