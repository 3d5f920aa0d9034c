"""Who ran what and when, written by the tasks themselves.

Each process appends to a file of its own, a line in one write: a SIGKILL can cut off the last
line at most, and no lock, no server and no other process is involved, so that recording a run
does not change it. Times are of the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DIRECTORY", "EventLog", "Execution", "recorded"]

#: The environment variable that tells a worker where its events go.
DIRECTORY = "RELIABLE_TASKS_DEMO_EVENTS"


@dataclass(slots=True)
class Execution:
    """One start of a task.

    Attributes:
        task_id: The task's id.
        path: Its file.
        host: The worker's node name.
        pid: The pool child.
        start: When it started.
        end: When it ended; ``None`` while it runs, and for ever if it was killed.
    """

    task_id: str
    path: str
    host: str
    pid: int
    start: float
    end: float | None = None


@contextmanager
def recorded(task_id: str, path: str, host: str) -> Iterator[None]:
    """Record the start and the end of what runs inside, in a worker."""
    _write({"id": task_id, "path": path, "host": host, "pid": os.getpid()})
    try:
        yield
    finally:
        _write({})


_file: tuple[int, int] | None = None


def _write(fields: dict[str, str | int]) -> None:
    global _file
    pid = os.getpid()
    if _file is None or _file[0] != pid:
        # Ids of processes come back; a file never does.
        name = Path(os.environ[DIRECTORY], f"{time.monotonic_ns()}-{pid}.jsonl")
        _file = pid, os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    line = json.dumps({"t": time.monotonic(), **fields})
    os.write(_file[1], line.encode() + b"\n")


class EventLog:
    """Reads what the tasks of a run have written so far."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}
        self._open: dict[Path, Execution] = {}
        self.executions: list[Execution] = []

    @property
    def running(self) -> list[Execution]:
        """The executions that have not ended, those that were killed among them."""
        return [*self._open.values()]

    def catch_up(self) -> bool:
        """Read what is new, and say whether something was."""
        is_new = False
        for path in self._directory.iterdir():
            done = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(done)
                new = file.read()
            # A line that a kill cut off is never completed.
            complete = new[: new.rfind(b"\n") + 1]
            self._read[path] = done + len(complete)
            for line in complete.splitlines():
                is_new = True
                self._take(path, json.loads(line))
        return is_new

    def _take(self, file: Path, event: dict[str, str | float]) -> None:
        if "id" not in event:
            self._open.pop(file).end = float(event["t"])
            return
        self._open[file] = execution = Execution(
            task_id=str(event["id"]),
            path=str(event["path"]),
            host=str(event["host"]),
            pid=int(event["pid"]),
            start=float(event["t"]),
        )
        self.executions.append(execution)
