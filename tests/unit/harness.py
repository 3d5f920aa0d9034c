"""A worker without its processes: takes messages from kombu's memory transport and runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer
from kombu import Queue

from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.locks import locks_of

#: Of each signal that was received: its name, the sender, and the rest.
Heard = list[tuple[str, Any, dict[str, Any]]]


@dataclass(frozen=True)
class Ended:
    """How a copy of a task ended.

    Attributes:
        state: Celery's name for it.
        value: The result or the error.
    """

    state: str
    value: Any


def take(app: Celery) -> Any:
    """Take the next message, ``None`` where there is none."""
    with app.connection_for_read() as connection:
        queue: Any = Queue("celery")(connection.default_channel)
        queue.declare()
        return queue.get(no_ack=True)


def run(
    app: Celery,
    message: Any,
    *,
    redeliver_to: list[Any] | None = None,
    redelivered: bool = False,
) -> Ended:
    """Run a message as a pool child does, with the main process' part before it.

    Args:
        app: The app.
        message: What `take` returned. It is not changed, so it can be run again.
        redeliver_to: Where a message goes that the copy gave back.
        redelivered: Whether it was in a worker's hands before.
    """
    headers = dict(message.headers)
    args, kwargs, embed = message.decode()
    task: Any = app.tasks[headers["task"]]
    if hasattr(task, "_reliable_reserved"):
        task._reliable_reserved(headers)
    request = {
        **headers,
        **(embed or {}),
        "args": args,
        "kwargs": kwargs,
        "hostname": "bench@test",
        "delivery_info": {"routing_key": "celery", "exchange": "", "redelivered": redelivered},
        "is_eager": False,
    }
    trace = build_tracer(task.name, task, app=app, eager=False, propagate=False)
    retval, info, _, _ = trace(headers["id"], args, kwargs, request)
    if info is None:
        return Ended("SUCCESS", retval)
    if isinstance(info.retval, SetAside) and redeliver_to is not None:
        redeliver_to.append(message)
    return Ended(info.state, info.retval)


def run_all(app: Celery, limit: int = 50) -> list[Ended]:
    """Run messages until there are none."""
    ended = []
    while (message := take(app)) is not None:
        ended.append(run(app, message))
        assert len(ended) < limit, "the queue does not become empty"
    return ended


def claims(app: Celery) -> list[dict[str, str]]:
    """The records of all claims of an app."""
    store = locks_of(app).claims
    prefix = "reliable:claim:{"
    return [store.read(key.partition(prefix)[2][:-1]) for key in store.names()]
