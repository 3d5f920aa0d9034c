"""A worker's main process, and a task for it."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from reliable_tasks import ReliableTask, once


@pytest.fixture
def send(app: Celery) -> Any:
    """A once-task."""

    @app.task(base=ReliableTask, name="send", time_limit=60)
    @once(key="{n}")
    def send(n: int) -> None:
        pass

    return app.tasks["send"]
