"""What Celery's pools miss: the end of a child, and of eventlet's last task."""

from __future__ import annotations

import sys
from typing import Any

from celery.signals import eventlet_pool_preshutdown

__all__ = ["notice_dead_children", "wait_for_all_of_eventlets_pool"]

#: After so many seconds it is looked again for a child that has closed its pipe. What still runs
#: then has not died, and Celery's own round comes each 5 s.
_LOOK_AGAIN = (0.01, 0.04, 0.2, 1.0)
#: How often a pool that is to end is looked at (s).
_LOOK = 0.05


def notice_dead_children(pool: Any) -> None:
    """Have a prefork worker notice at once that a child has died, from now on.

    Celery looks when the child's pipe is closed. The kernel does that a moment before the child
    can be waited for, and a worker that looks in that moment finds it alive.
    """
    prefork: Any = getattr(pool, "_pool", None)
    # Of the instance, where this was done before.
    if not hasattr(prefork, "_event_process_exit") or "_event_process_exit" in vars(prefork):
        return
    look = prefork._event_process_exit

    def look_until_it_is_seen(hub: Any, child: Any) -> None:
        look(hub, child)
        for seconds in _LOOK_AGAIN:
            hub.call_later(seconds, _look_for, prefork, child)

    prefork._event_process_exit = look_until_it_is_seen


def _look_for(prefork: Any, child: Any) -> None:
    if child in prefork._pool:
        prefork.maintain_pool()


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
