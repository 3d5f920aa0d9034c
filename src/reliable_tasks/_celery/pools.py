"""The end of eventlet's pool."""

from __future__ import annotations

import sys
from typing import Any

from celery.signals import eventlet_pool_preshutdown

__all__ = ["wait_for_all_of_eventlets_pool"]

#: How often a pool that is to end is looked at (s).
_LOOK = 0.05


def wait_for_all_of_eventlets_pool() -> None:
    """Have a worker that shuts down see the end of its last task, from now on.

    Celery asks eventlet to do so. But that never returns where a task waited for a slot when it
    was asked: the task that gets the slot replaces the event that is waited for.

    Where a slot was freed and the task that waits for it has not got it yet, nothing runs and
    nobody waits by eventlet's count; the balance of its semaphore counts both.
    """
    eventlet_pool_preshutdown.connect(_wait_for_all, weak=False)


def _wait_for_all(sender: Any = None, **_: Any) -> None:
    pool = sender._pool
    while pool is not None and pool.sem.balance < pool.size:
        sys.modules["eventlet"].sleep(_LOOK)
