"""The app of the broker benchmark: one task that does nothing, or says when it began.

Its settings are in the environment: ``RB_BROKER``, ``RB_KIND`` (``stock`` or ``ours``) and
``RB_STARTS``, a file for the moments of the starts.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from reliable_tasks import ReliableTask, apply_reliable_config

KINDS = ("stock", "ours")


def build(broker: str, kind: str) -> Celery:
    """Make the app of one contender: late acks and the same prefetch for both."""
    app = Celery("broker-benchmark", broker=broker, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        worker_prefetch_multiplier=4,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
    )
    if kind == "ours":
        apply_reliable_config(app)

    @app.task(name="noop", base=ReliableTask if kind == "ours" else None, shared=False)
    def noop() -> None:
        """Do nothing."""

    @app.task(name="stamp", base=ReliableTask if kind == "ours" else None, shared=False)
    def stamp(number: int) -> None:
        with Path(os.environ["RB_STARTS"]).open("a", encoding="ascii") as starts:
            starts.write(f"{number} {time.time()}\n")

    return app


app = build(os.environ.get("RB_BROKER", "memory://"), os.environ.get("RB_KIND", "stock"))
