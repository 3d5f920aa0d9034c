"""An app whose tasks need no Redis: none of them has ``@once``. Else as the shop."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

from reliable_tasks import ReliableTask, apply_reliable_config
from tests.integration.apps.journal import Journal

journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))


def build(broker: str, backend: str | None = None, *, limit: int = 4, **settings: Any) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = Celery("bare", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    apply_reliable_config(app)

    @app.task(shared=False, name="sleep", base=ReliableTask, bind=True, time_limit=limit)
    def sleep(self: Task, name: str, seconds: float = 0) -> str:
        journal.write("start", name=name, id=self.request.id)
        time.sleep(seconds)
        journal.write("end", name=name, id=self.request.id)
        return name

    return app


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", "4")),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
