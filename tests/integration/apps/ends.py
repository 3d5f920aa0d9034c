"""The shop with a task of each lifetime, which ends in the way that its call says."""

from __future__ import annotations

import json
import os
from typing import Any, get_args

from celery import Celery, Task

from reliable_tasks import ReliableTask, once
from reliable_tasks._once.options import Lifetime
from tests.integration.apps import shop

LIFETIMES: tuple[str, ...] = get_args(Lifetime)
#: Added to the name of the task that is retried when its child is killed.
RETRIED = ", retried when lost"
#: How long a window is (s): longer than any test.
WINDOW = 600


def gate(name: str, run: int) -> str:
    """Return where a run of a task waits until it may go on to its end."""
    return f"{name} {run}"


def parked(name: str) -> str:
    """Return the queue of a retry."""
    return f"parked {name}"


def build(broker: str, backend: str | None = None, **options: Any) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = shop.build(broker, backend, **options)
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        RETRIED: {"retry_on_worker_lost": True, "default_retry_delay": 0},
    }
    for lifetime in LIFETIMES:
        window = {"ttl": WINDOW} if lifetime == "until_expired" else {}
        for kind, more in kinds.items():

            @app.task(
                name=f"ends {lifetime}{kind}", shared=False, base=ReliableTask, bind=True, **more
            )
            @once(key="{name}", lock=lifetime, **window)
            def ends(self: Task, name: str, how: str = "succeed") -> str:
                run = 1 + len(shop.journal.events("start", name=name))
                with shop.told(self, name):
                    shop.journal.wait_at(gate(name, run))
                    if run == 1:
                        _end(self, name, how)
                return name

    return app


def _end(task: Task, name: str, how: str) -> None:
    match how:
        case "retry":
            raise task.retry(queue=parked(name), countdown=0)
        case "retry in vain":
            raise task.retry(exc=ValueError(name), max_retries=0)
        case "retry unsent":
            raise task.retry(args=(name, object()), countdown=0)
        case _:
            shop.ACTIONS[how](task, name)


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", shop.LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
