"""The same tasks, locked by one library or another.

A worker reads ``RT_BROKER_URL``, ``RT_RESULT_URL``, ``RT_SYSTEM``, ``RT_JOURNAL`` and
``RT_SETTINGS`` (JSON).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery, Task
from celery.result import AsyncResult
from celery_once import AlreadyQueued, QueueOnce
from celery_once.backends import redis as their_redis
from celery_singleton import Singleton
from celery_singleton import backends as their_backends

from reliable_tasks import ReliableTask, apply_reliable_config, once, presets

__all__ = ["OURS", "SYSTEMS", "call", "forget", "keep", "make_app"]

OURS = "reliable_tasks"
SYSTEMS = (OURS, "celery-once", "celery-singleton")
#: How long a lock lives whose lifetime matters (s); else it is an hour.
SHORT = 2

_results: WeakKeyDictionary[Celery, list[Any]] = WeakKeyDictionary()


def make_app(system: str, broker: str, backend: str, settings: dict[str, Any]) -> Celery:
    """Make the app, the same for a worker and for its client."""
    # Their clients are the process', whatever app comes next.
    their_redis.redis = their_backends._backend = None  # noqa: SLF001
    app = Celery(f"peers-{system}", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    app.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": backend, "default_timeout": 3600},
    }
    app.conf.singleton_backend_url = backend
    if system == OURS:
        apply_reliable_config(app)
    for name, body in (("hold", _hold), ("retry_once", _retry_once), ("echo", _echo)):
        app.task(name=name, bind=True, shared=False, **_options(system, None))(
            _locked(system, body, None)
        )
        app.task(name=f"short_{name}", bind=True, shared=False, **_options(system, SHORT))(
            _locked(system, body, SHORT)
        )
    # Beside them what has no lock.
    app.task(name="plus", shared=False)(_plus)
    app.task(name="join", shared=False)(_join)
    return app


def call(task: Any, *args: Any, **options: Any) -> Any:
    """Call a task; return its result, or ``None`` if it is a duplicate."""
    known = _results.setdefault(task.app, [])
    try:
        result = task.apply_async(args, **options)
    except AlreadyQueued:
        return None
    # celery-singleton returns the result of the task that has the key, and does not say so.
    is_duplicate = any(result.id == other.id for other in known)
    keep(task.app, result)
    return None if is_duplicate else result


def keep(app: Celery, result: Any) -> Any:
    """Keep a result, and those that it is made of, until `forget`."""
    for other in (getattr(result, "parent", None), *getattr(result, "results", ())):
        if other is not None:
            keep(app, other)
    if isinstance(result, AsyncResult):
        _results.setdefault(app, []).append(result)
    return result


def forget(app: Celery) -> None:
    """Let go of an app's results: Celery tells their server when one is collected."""
    for result in _results.pop(app, []):
        result.backend = None


def _options(system: str, ttl: int | None) -> dict[str, Any]:
    if system == OURS:
        return {"base": ReliableTask, **presets.time_limit(hard=60)}
    # As their READMEs have it.
    common = {"time_limit": 60}
    if system == "celery-once":
        return {**common, "base": QueueOnce, "once": {"keys": ["key"], "timeout": ttl or 3600}}
    return {**common, "base": Singleton, "unique_on": ["key"], "lock_expiry": ttl or 3600}


def _locked(system: str, body: Any, ttl: int | None) -> Any:
    def run(self: Task, key: Any, seconds: float = 0) -> Any:
        return body(self, key, seconds)

    return once(key="{key}", ttl=ttl or 3600)(run) if system == OURS else run


def _hold(task: Task, key: Any, seconds: float) -> Any:
    _note("start", task, key)
    time.sleep(seconds)
    _note("end", task, key)
    return key


def _note(what: str, task: Task, key: Any) -> None:
    line = json.dumps([what, str(key), task.request.id, os.getpid()])
    with Path(os.environ["RT_JOURNAL"]).open("a") as lines:
        lines.write(f"{line}\n")


def _retry_once(task: Task, key: Any, seconds: float) -> Any:
    if task.request.retries:
        return _hold(task, key, 1)
    raise task.retry(countdown=seconds)


def _echo(task: Task, key: Any, seconds: float) -> Any:
    return key


def _plus(value: Any, name: str) -> str:
    return f"{value}{name}"


def _join(values: list[Any]) -> str:
    return "".join(map(str, values))


if "RT_SYSTEM" in os.environ:
    app = make_app(
        os.environ["RT_SYSTEM"],
        os.environ["RT_BROKER_URL"],
        os.environ["RT_RESULT_URL"],
        json.loads(os.environ.get("RT_SETTINGS", "{}")),
    )
