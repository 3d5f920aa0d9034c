"""What a pool reports of a child, put in the words that Celery's request acts upon."""

from __future__ import annotations

import os
import re
from signal import SIGTERM
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError

__all__ = [
    "TaskOutOfMemory",
    "has_exited",
    "how_lost",
    "info_of",
    "lost_worker",
    "was_told_to_end",
    "without_memory_error",
]


_HOW = re.compile(r"prematurely: (.+?)(?: Job: \d+)?\.?$")


def how_lost(error: Any) -> str:
    """Return how a pool child ended, in billiard's words, e.g. ``"signal 9 (SIGKILL)"``."""
    found = _HOW.search(str(error))
    return found[1] if found else ""


def info_of(error: Exception) -> ExceptionInfo:
    """Return an error as a pool reports one."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()


def has_exited(pid: Any) -> bool:
    """Say whether a pool child is dead; leaves it for billiard to reap."""
    if not pid or pid == os.getpid():
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def was_told_to_end(error: Any) -> bool:
    """Say whether a pool child ended by SIGTERM: a process manager sends it to all of a group."""
    return isinstance(error, WorkerLostError) and f"signal {int(SIGTERM)} " in str(error)


def without_memory_error(exc_info: Any) -> Any:
    """Return the same failure under another type."""
    replaced = info_of(TaskOutOfMemory(str(exc_info.exception)))
    replaced.traceback = exc_info.traceback
    return replaced


class TaskOutOfMemory(Exception):
    """A task's MemoryError, as the worker's main process handles it."""


def lost_worker(reason: str) -> ExceptionInfo:
    """Return the failure of a task whose child is gone."""
    return info_of(WorkerLostError(f"Worker exited prematurely: {reason}."))
