"""The end of a prefork pool's child, and of eventlet's pool."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from reliable_tasks._celery.pools import notice_dead_children

# Patched as in a worker, which a test process must not be.
_SCRIPT = """\
import eventlet
eventlet.monkey_patch()

from celery.concurrency.eventlet import TaskPool
from reliable_tasks._celery.pools import wait_for_all_of_eventlets_pool

wait_for_all_of_eventlets_pool()

def run(name, seconds):
    eventlet.sleep(seconds)
    # The next look at the pool comes before the slot's next task.
    eventlet.patcher.original("time").sleep(0.2)
    return name

pool = TaskPool(1)
pool.start()
pool.apply_async(run, ("first", 0.3), callback=print)
eventlet.spawn(pool.apply_async, run, ("second", 0.1), callback=print)
eventlet.sleep(0.1)
pool.stop()
print("ended")
"""


def test_a_pool_in_which_a_task_waits_for_a_slot_comes_to_its_end() -> None:
    """And so does its worker, when it has run both."""
    ended = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout.split() == ["first", "second", "ended"], ended.stderr


class Prefork:
    """Celery's pool of children, of whom one closes its pipe a moment before it is dead."""

    def __init__(self, looks: int) -> None:
        self._pool = ["child", "other"]
        self._looks = looks

    def maintain_pool(self) -> None:
        """Look for dead children."""
        self._looks -= 1
        if self._looks == 0:
            self._pool.remove("child")

    def _event_process_exit(self, hub: Any, child: Any) -> None:
        self.maintain_pool()


class Hub:
    """An event loop that is told when to call what."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, function: Any, *args: Any) -> None:
        """Note it."""
        self.calls.append((seconds, lambda: function(*args)))


class Pool:
    """What a worker has, around that of billiard."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool


def test_a_child_is_looked_for_until_it_is_seen() -> None:
    """Within a second and not once more; and a connection later it is not done twice over."""
    prefork, hub = Prefork(looks=3), Hub()
    for _ in range(2):
        notice_dead_children(Pool(prefork))
    prefork._event_process_exit(hub, "child")
    assert prefork._pool == ["child", "other"]
    assert len(hub.calls) == 4
    assert max(seconds for seconds, _ in hub.calls) <= 1
    for _, call in hub.calls:
        call()
    assert (prefork._pool, prefork._looks) == (["other"], 0)


def test_other_pools_have_no_children() -> None:
    """They are left as they are."""
    for pool in (Pool(None), Pool(object()), object()):
        notice_dead_children(pool)
