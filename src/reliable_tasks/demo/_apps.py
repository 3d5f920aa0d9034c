"""The two contenders: Celery set up the usual way, and with this library."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import redis
from celery import Celery, current_task
from celery.result import EagerResult

from reliable_tasks import (
    ReliableTask,
    apply_reliable_config,
    once,
    presets,
)
from reliable_tasks.demo._events import recorded
from reliable_tasks.demo._load import fingerprint
from reliable_tasks.errors import MissingExtra

__all__ = ["CONTENDERS", "Contender"]

_TASK = "demo.fingerprint"
#: The same for both. Celery notices a killed child within 5 s at the latest; a hard limit that
#: struck before would fail the task, not put it back.
_LIMITS = presets.time_limit(hard=8, soft=7)


class Contender(ABC):
    """An app with one task, which hashes a file and counts its words.

    Args:
        broker: The broker's URL.
        backend: The result backend's URL.
    """

    name: ClassVar[str]

    def __init__(self, broker: str, backend: str) -> None:
        self.app = Celery("demo", broker=broker, backend=backend)
        self.task: Any = None
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Configure the app and make the task."""

    @abstractmethod
    def call(self, path: str, pause: float) -> str | None:
        """Queue a file's task; return its id, or ``None`` for a duplicate, which is not queued."""

    @abstractmethod
    def locked(self, client: redis.Redis, accepted: Mapping[str, str]) -> list[str]:
        """Return the path of each file whose lock exists.

        Args:
            client: A client of the broker's database.
            accepted: The ids of the tasks that were queued, and their paths.
        """

    @property
    @abstractmethod
    def redelivery(self) -> float:
        """For how many seconds at most a dead worker's message stays with it."""


class Usual(Contender):
    """What is recommended against lost tasks and duplicates; all else as Celery has it."""

    name = "usual"

    def _set_up(self) -> None:
        queue_once = _queue_once()
        self.app.conf.task_acks_late = True
        self.app.conf.task_reject_on_worker_lost = True
        self.app.conf.ONCE = {
            "backend": "celery_once.backends.Redis",
            "settings": {"url": self.app.conf.broker_url},
        }

        @self.app.task(
            name=_TASK,
            shared=False,
            base=queue_once,
            once={"graceful": True, "keys": ["path"]},
            **_LIMITS,
        )
        def task(path: str, pause: float) -> dict[str, Any]:
            return _work(path, pause)

        self.task = task

    @property
    def redelivery(self) -> float:
        return 3600.0

    def call(self, path: str, pause: float) -> str | None:
        result = self.task.delay(path, pause)
        return None if isinstance(result, EagerResult) else str(result.id)

    def locked(self, client: redis.Redis, accepted: Mapping[str, str]) -> list[str]:
        return [
            str(key).partition("_path-")[2] for key in client.scan_iter(f"qo_{_TASK}_*", count=1000)
        ]


class Reliable(Contender):
    """The same app and the same task with this library, and nothing else set."""

    name = "reliable_tasks"

    def _set_up(self) -> None:
        apply_reliable_config(self.app)

        @self.app.task(name=_TASK, shared=False, base=ReliableTask, **_LIMITS)
        @once(key="{path}")
        def task(path: str, pause: float) -> dict[str, Any]:
            return _work(path, pause)

        self.task = task

    @property
    def redelivery(self) -> float:
        return float(self.app.conf.broker_transport_options["reliable"]["lease"])

    def call(self, path: str, pause: float) -> str | None:
        result = self.task.delay(path, pause)
        return None if result.duplicate else str(result.id)

    def locked(self, client: redis.Redis, accepted: Mapping[str, str]) -> list[str]:
        owners = [
            str(client.hget(key, "owner"))
            for key in client.scan_iter("reliable:claim:*", count=1000)
        ]
        return [accepted.get(owner, f"a file of unknown task {owner}") for owner in owners]


CONTENDERS: Mapping[str, type[Contender]] = {kind.name: kind for kind in (Usual, Reliable)}


def _work(path: str, pause: float) -> dict[str, Any]:
    request = current_task.request
    with recorded(str(request.id), path, str(request.hostname)):
        time.sleep(pause)
        return fingerprint(path)


def _queue_once() -> Any:
    try:
        with warnings.catch_warnings():
            # It dates from 2019.
            warnings.simplefilter("ignore")
            from celery_once import QueueOnce
    except ImportError as error:
        # It imports more than it declares.
        is_itself = error.name is None or error.name.startswith("celery_once")
        raise MissingExtra("celery-once" if is_itself else str(error.name), "demo") from error
    return QueueOnce
