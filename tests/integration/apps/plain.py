"""An app without this library, as small as Celery allows: for the harness and comparisons.

It reads ``RT_SETTINGS`` and ``RT_JOURNAL`` as the shop does.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from celery import Celery, Task
from celery.utils.log import get_task_logger

from tests.integration.apps.journal import Journal
from tests.integration.apps.showing import run_show

logger = get_task_logger(__name__)
journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))

app = Celery(
    "plain",
    broker=os.environ.get("RT_BROKER_URL"),
    backend=os.environ.get("RT_RESULT_URL"),
)
app.conf.update(json.loads(os.environ.get("RT_SETTINGS", "{}")))


@app.task
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@app.task
def work(seconds: float) -> int:
    """Keep a child busy and return the process that did it."""
    logger.info("working for %s s", seconds)
    time.sleep(seconds)
    return os.getpid()


@app.task(shared=False, name="show", bind=True, acks_late=True)
def show(self: Task, name: str, seconds: float = 0, text: str = "") -> str:
    """Do and write down what the shop's task of this name does."""
    return run_show(journal, self, name, seconds, text)
