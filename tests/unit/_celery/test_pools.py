"""The end of eventlet's pool."""

from __future__ import annotations

import subprocess
import sys

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
