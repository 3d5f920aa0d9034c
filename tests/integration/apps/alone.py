"""The shop with a task that nobody may run twice at once, whatever becomes of its worker."""

from __future__ import annotations

import ctypes
import json
import os
import time
from typing import Any

from celery import Celery, Task

from reliable_tasks import ReliableTask
from tests.integration.apps import shop


def build(broker: str, backend: str | None = None, **options: Any) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = shop.build(broker, backend, **options)

    @app.task(shared=False, name="exclusive", base=ReliableTask, bind=True, exclusive=True)
    def exclusive(self: Task, name: str, seconds: float) -> str:
        with shop.told(self, name):
            time.sleep(seconds)
        return name

    @app.task(shared=False, name="exclusive_hog", base=ReliableTask, bind=True, exclusive=True)
    def exclusive_hog(self: Task, name: str, seconds: float) -> str:
        with shop.told(self, name):
            # Through PyDLL the call keeps Python's lock, which CDLL would release.
            ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
        return name

    return app


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", shop.LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
