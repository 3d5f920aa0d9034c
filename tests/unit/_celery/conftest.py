"""A worker's main process, and a task for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.worker import state as worker_state

from reliable_tasks import ReliableTask, once
from reliable_tasks._celery import delivery
from tests.unit._celery.bench import Bench


@pytest.fixture
def bench(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A worker's main process."""
    bench = Bench(app, monkeypatch)
    bench.start_consumer()
    yield bench
    worker_state.reserved_requests.clear()
    worker_state.revoked.clear()
    worker_state.successful_requests.clear()
    delivery._consumers.clear()


@pytest.fixture
def send(app: Celery) -> Any:
    """A once-task."""

    @app.task(base=ReliableTask, name="send", time_limit=60)
    @once(key="{n}")
    def send(n: int) -> None:
        pass

    return app.tasks["send"]
