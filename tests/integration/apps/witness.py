"""An app without this library that writes down what Celery's signals bring in a real worker."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject
from celery.worker import request as worker_request

from tests.integration.apps.journal import Journal

journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))

app = Celery(
    "witness",
    broker=os.environ.get("RT_BROKER_URL"),
    backend=os.environ.get("RT_RESULT_URL"),
    set_as_current=False,
)


@signals.task_postrun.connect
def _on_postrun(sender: Any, task: Any, task_id: str, state: str, **_: Any) -> None:
    journal.write(
        "postrun",
        what=task.request.args[0],
        state=state,
        stored=app.AsyncResult(task_id).state,
        is_the_task=sender is task,
        token=task.request.get("token_of_the_main_process"),
    )


class Request(worker_request.Request):
    """A request of ours, found by its name, whose headers reach the child."""

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self.request_dict["token_of_the_main_process"] = os.getpid()


NEEDED = (
    "qos.increment_eventually",
    "qos.decrement_eventually",
    "timer.call_after",
    "on_task_request",
    "task_consumer.channel",
)


_consumers: list[Any] = []


class Watched(Task):
    """A task that learns which consumer will hand it its messages."""

    def start_strategy(self, app: Celery, consumer: Any, **options: Any) -> Any:
        """Remember the consumer, which is not complete yet."""
        _consumers.append(consumer)
        return super().start_strategy(app, consumer, **options)


@signals.task_received.connect
def _on_received(sender: Any, **_: Any) -> None:
    """Write down what of the consumer a message needs that is set aside."""
    journal.write(
        "received",
        consumer=f"{type(sender).__module__}.{type(sender).__qualname__}",
        is_known=_consumers[-1] is sender,
        has=[name for name in NEEDED if _has(sender, name)],
    )


def _has(consumer: Any, path: str) -> bool:
    try:
        operator.attrgetter(path)(consumer)
    except AttributeError:
        return False
    return True


@app.task(
    shared=False, name="end", bind=True, base=Watched, acks_late=True, Request=f"{__name__}:Request"
)
def end(self: Task, what: str) -> str:
    """End as told."""
    if what == "FAILURE":
        raise ValueError(what)
    if what == "IGNORED":
        raise Ignore
    if what == "REJECTED":
        raise Reject("told to", requeue=False)
    if what == "RETRY" and self.request.retries == 0:
        raise self.retry(countdown=0)
    return what
