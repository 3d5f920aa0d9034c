"""The shop with workers that die when they have published a continuation, and not acknowledged."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from celery import Celery, Task, chain, group
from celery.exceptions import Ignore, Retry
from celery.signals import after_task_publish

from reliable_tasks import ReliableTask
from reliable_tasks._celery.headers import TIMES_SET_ASIDE
from tests.integration.apps import shop


def build(broker: str, backend: str | None = None, **options: Any) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = shop.build(broker, backend, **options)

    @app.task(shared=False, name="step", base=ReliableTask, bind=True)
    def step(self: Task, name: str) -> str:
        with shop.told(self, name):
            return name

    @app.task(shared=False, name="go_on", base=ReliableTask, bind=True)
    def go_on(self: Task, name: str, how: str) -> str:
        with shop.told(self, name):
            if how == "retry" and self.request.retries:
                return name
            try:
                if how == "retry":
                    self.retry(countdown=0)
                self.replace(_replacement(app, name, how))
            except (Ignore, Retry):
                # The continuation is published, and nobody has heard that this attempt is over.
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(how)

    return app


@after_task_publish.connect(weak=False)
def _die_rescheduling(headers: Any = None, **_: Any) -> None:
    """Die when a copy that was set aside is in its queue again, at the first time."""
    found = headers or {}
    if found.get(TIMES_SET_ASIDE) and not shop.journal.events("rescheduled", id=found["id"]):
        shop.journal.write("rescheduled", id=found["id"])
        os.killpg(0, signal.SIGKILL)


def _replacement(app: Celery, name: str, how: str) -> Any:
    step = app.tasks["step"]
    if how == "replace":
        return step.si(f"{name}, next")
    if how == "chain":
        return chain(step.si(f"{name}, next"), step.si(f"{name}, last"))
    return group(step.si(f"{name}, next"), step.si(f"{name}, last"))


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", shop.LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
