"""One task on an app of Celery's own or of this library's, for ``recovery.py`` to kill."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from reliable_tasks import ReliableTask, apply_reliable_config, presets

app = Celery(
    "recovery",
    broker=os.environ.get("RT_BROKER_URL"),
    backend=os.environ.get("RT_RESULT_URL"),
    set_as_current=False,
)

if os.environ.get("RT_LIBRARY") == "reliable_tasks":
    apply_reliable_config(app)
    options = {"base": ReliableTask, **presets.time_limit(hard=20)}
else:
    # What is recommended for tasks that must not be lost; all else as Celery has it.
    options = {"acks_late": True, "reject_on_worker_lost": True, "time_limit": 20}


@app.task(name="hold", shared=False, **options)
def hold(journal: str) -> None:
    """Write down when it starts; the first time it is still running when it is killed."""
    path = Path(journal)
    with path.open("a") as lines:
        lines.write(f"{time.time()} {os.getpid()}\n")
    if len(path.read_text().splitlines()) == 1:
        time.sleep(15)
