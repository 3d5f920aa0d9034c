"""The fence: an exclusive task dies before its lease ends for the others.

The worker's main process can be stopped, or cut off from the broker, while its children run on.
So the child watches the last renewal by itself, in memory that it shares with its parent, and
a watchdog that needs neither the parent nor Python's interpreter lock ends it in time.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Fenced", "exclusively", "note_renewal", "take_page"]

#: When the last confirmed renewal was sent (monotonic s, the same in all processes of a host),
#: and for how long it lasts (s).
_layout = struct.Struct("dd")
#: Where that is written. Anonymous and shared: children are forked with it.
_page = mmap.mmap(-1, _layout.size)
_page_of = os.getpid()

#: So long before the lease ends the task is dead (s), or a tenth of the lease if that is less.
_MARGIN = 1.0
#: How often the watchdog is told of new renewals (s).
_LOOK = 0.25


class Fenced(Exception):
    """The lease may have ended already: an exclusive task must not start."""


def take_page() -> None:
    """Have a page that this worker shares with its children alone, before they are forked.

    One that was itself forked, from a process that had imported this, has the page of its
    siblings: their renewals would keep its own children alive.
    """
    global _page, _page_of
    if _page_of != os.getpid():
        _page, _page_of = mmap.mmap(-1, _layout.size), os.getpid()


def note_renewal(sent_at: float, lease: float) -> None:
    """Note in the main process that a renewal was confirmed.

    Args:
        sent_at: When it was sent (monotonic s): before it counted for the server.
        lease: In seconds.
    """
    _layout.pack_into(_page, 0, sent_at, lease)


def time_left() -> float:
    """Return the seconds until an exclusive task must be dead."""
    sent_at, lease = _layout.unpack_from(_page, 0)
    return float(sent_at + lease - min(_MARGIN, lease / 10) - time.monotonic())


@contextmanager
def exclusively() -> Iterator[None]:
    """Run a body that ends, with its process, before the lease does.

    Raises:
        Fenced: The lease may have ended.
    """
    left = time_left()
    if left <= 0:
        raise Fenced
    _arm(left)
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), name="reliable-tasks-fence", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(done: threading.Event) -> None:
    while not done.wait(_LOOK):
        left = time_left()
        if left <= 0:
            os._exit(1)
        _arm(left)


def _arm(left: float) -> None:
    # Its thread is written in C: it ends the process also while a task holds the lock.
    faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
