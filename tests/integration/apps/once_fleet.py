"""Tasks as celery-once's README has them, with its own base class or with ours.

``RT_ONCE_FROM`` is where `QueueOnce` comes from; else it reads what the shop reads.
"""

from __future__ import annotations

import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from celery import Celery, Task

from reliable_tasks import apply_reliable_config
from tests.integration.apps.journal import Journal

THEIRS, OURS = "celery_once", "reliable_tasks.contrib.celery_once"

journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))


def build(
    broker: str,
    backend: str | None = None,
    *,
    limit: int = 30,
    once_from: str = OURS,
    once_url: str = "",
    **settings: Any,
) -> Celery:
    """Make the app, the same for a worker and for its client."""
    base: Any = import_module(once_from).QueueOnce
    app = Celery("fleet", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    app.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": once_url or backend, "default_timeout": 60 * 60},
    }
    if once_from == OURS:
        apply_reliable_config(app)
    common: dict[str, Any] = {"base": base, "bind": True, "shared": False, "time_limit": limit}

    def told(task: Task, key: str, seconds: float) -> None:
        journal.write("start", key=key, id=task.request.id)
        time.sleep(seconds)
        journal.write("end", key=key, id=task.request.id)

    @app.task(name="slow_task", **common)
    def slow_task(self: Task) -> str:
        told(self, "slow_task", 1)
        return "Done!"

    @app.task(name="example", once={"keys": ["key"]}, **common)
    def example(self: Task, key: str, seconds: float = 0) -> str:
        told(self, key, seconds)
        return key

    @app.task(name="slow_add", once={"keys": ["a"]}, **common)
    def slow_add(self: Task, a: int, b: int) -> int:
        told(self, f"{a}", 1)
        return a + b

    @app.task(name="graceful", once={"graceful": True}, **common)
    def graceful(self: Task) -> str:
        told(self, "graceful", 1)
        return "Done!"

    @app.task(name="unlocked", once={"unlock_before_run": True}, **common)
    def unlocked(self: Task) -> str:
        told(self, "unlocked", 1)
        return "Done!"

    return app


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", "30")),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
