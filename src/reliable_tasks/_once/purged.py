"""The claims of messages that were thrown away, where they are kept in another Redis."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any
from weakref import WeakSet

from celery import Celery

from reliable_tasks._once.once import Once
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.delivery import Thrown
from reliable_tasks.errors import ConfigError

__all__ = ["free_thrown", "remember"]

logger = logging.getLogger("reliable_tasks")

_apps: WeakSet[Celery] = WeakSet()
#: Those whose tasks are all known.
_read: WeakSet[Celery] = WeakSet()


def remember(app: Celery) -> None:
    """Note an app whose tasks may have claims."""
    _apps.add(app)


def free_thrown(thrown: list[Thrown]) -> None:
    """Free the claims of purged messages that the broker does not keep.

    The messages are gone, whatever comes of it.
    """
    for app in list(_apps):
        try:
            _free(app, thrown)
        except ConfigError:
            # An app that has no Redis for claims has none.
            continue
        except Exception:
            logger.exception("The claims of purged messages may stay until they lapse")


def _free(app: Celery, thrown: list[Thrown]) -> None:
    if app not in _read:
        # `celery purge` needs no task, and has not read those that the app includes.
        app.loader.import_default_modules()
        _read.add(app)
    kept: dict[Claims, list[Thrown]] = defaultdict(list)
    for one in thrown:
        task: Any = app.tasks.get(one.task)
        once: Once | None = getattr(task, "reliable_once", None)
        if once is None or once.options.is_for_a_window:
            continue
        locks = once.locks(task)
        if not locks.are_made_by_broker:
            kept[locks.claims].append(one)
    for claims, some in kept.items():
        claims.discard_each(some)
