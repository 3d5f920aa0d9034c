"""A task that shows its message: the same in an app with this library and in one without."""

from __future__ import annotations

import time

from celery import Task

from tests.integration.apps.journal import Journal


def run_show(journal: Journal, task: Task, name: str, seconds: float, text: str) -> str:
    """Write down what came with a message, and who ran it."""
    request = task.request
    delivery = request.delivery_info or {}
    about = {
        "name": name,
        "id": request.id,
        "worker": request.hostname,
        "custom": request.get("x-custom"),
        "priority": delivery.get("priority"),
        "queue": delivery.get("routing_key"),
        "length": len(text),
        "crashes": request.get("crashes"),
    }
    journal.write("start", **about)
    time.sleep(seconds)
    journal.write("end", **about)
    return name
