"""What the kernel knows of processes."""

from __future__ import annotations

import os
import select
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A live process: its id, its parent's and its group's."""

    pid: int
    parent: int
    group: int


def live_processes() -> list[ProcessInfo]:
    """List every process that still runs.

    One that has ended and waits for its parent to notice is left out; sending it signal 0
    would not tell it from a live one.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is the name in parentheses, which may hold spaces itself.
            state, parent, group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if state != "Z":
            found.append(ProcessInfo(int(entry.parent.name), int(parent), int(group)))
    return found


def is_alive(pid: int) -> bool:
    """Tell whether a process still runs."""
    return any(process.pid == pid for process in live_processes())


def death_of(pid: int) -> Future[float]:
    """Watch a process that lives, also one that is no child; the result is when it ended.

    The kernel says so at once, and does not wait until its parent has noticed.
    """
    handle = os.pidfd_open(pid)
    found: Future[float] = Future()

    def watch() -> None:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        ended.poll()
        found.set_result(time.time())
        os.close(handle)

    threading.Thread(target=watch, daemon=True).start()
    return found
