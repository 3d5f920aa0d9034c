"""An app without this library, as small as Celery allows: for the harness and comparisons."""

from __future__ import annotations

import os
import time

from celery import Celery
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)

app = Celery(
    "plain",
    broker=os.environ.get("RT_BROKER_URL"),
    backend=os.environ.get("RT_RESULT_URL"),
)


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
