"""An app whose tasks, handlers and arguments are what a worker can only just bear.

It reads what the shop reads from the environment; none of its tasks has ``@once``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

from reliable_tasks import ReliableTask, apply_reliable_config
from tests.integration.apps.journal import Journal

#: Hard time limit of the tasks (s).
LIMIT = 60

journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))


def _raise(what: str) -> None:
    if what == "GreenletExit":
        # Only what is installed with gevent and eventlet has it.
        from greenlet import GreenletExit

        raise GreenletExit
    raise {"MemoryError": MemoryError, "SystemExit": SystemExit}[what](what)


class Handled(ReliableTask):
    """A task whose handlers raise what the call says."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Raise before the body runs."""
        self._raise_in("before_start", *args)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Raise when the result is stored."""
        self._raise_in("on_success", *args)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Raise when the failure is stored."""
        self._raise_in("on_failure", *args)

    def _raise_in(self, handler: str, name: str, where: str, what: str) -> None:
        if where == handler:
            _raise(what)


def build(
    broker: str, backend: str | None = None, *, limit: int = LIMIT, **settings: Any
) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = Celery("adverse", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    apply_reliable_config(app)
    common = {"shared": False, "base": ReliableTask, "bind": True, "time_limit": limit}

    @app.task(name="sleep", **common)
    def sleep(self: Task, name: str, seconds: float = 0) -> str:
        journal.write("start", name=name, id=self.request.id, pid=os.getpid())
        time.sleep(seconds)
        journal.write("end", name=name, id=self.request.id)
        return name

    @app.task(name="wait", **common)
    def wait(self: Task, name: str) -> str:
        journal.write("start", name=name, id=self.request.id)
        journal.wait_at(name)
        journal.write("end", name=name, id=self.request.id)
        return name

    # Celery 5.6 stores that such a task has started.
    @app.task(name="silent", ignore_result=True, track_started=False, **common)
    def silent(self: Task, name: str) -> None:
        journal.write("start", name=name, id=self.request.id)

    @app.task(name="limited", rate_limit="1/m", **common)
    def limited(self: Task, name: str) -> str:
        journal.write("start", name=name, id=self.request.id)
        return name

    @app.task(name="measure", **common)
    def measure(self: Task, name: str, text: str) -> int:
        journal.write("start", name=name, id=self.request.id)
        return len(text)

    @app.task(name="fail_at_length", **common)
    def fail_at_length(self: Task, name: str, length: int) -> None:
        journal.write("start", name=name, id=self.request.id)
        journal.wait_at(name)
        raise ValueError("x" * length)

    @app.task(name="leave", **common)
    def leave(self: Task, name: str, what: str) -> None:
        journal.write("start", name=name, id=self.request.id)
        _raise(what)

    @app.task(name="handled", **{**common, "base": Handled})
    def handled(self: Task, name: str, where: str, what: str) -> str:
        journal.write("start", name=name, id=self.request.id)
        if where == "on_failure":
            raise ValueError(name)
        return name

    @app.task(name="plain", shared=False)
    def plain(name: str) -> str:
        journal.write("start", name=name)
        return name

    return app


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
