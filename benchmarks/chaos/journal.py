"""Reads what the tasks wrote down."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.support import wait_until

__all__ = ["Journal", "Note"]


@dataclass(frozen=True, slots=True)
class Note:
    """The start or the end of one run."""

    task_id: str
    host: str
    pid: int
    at: float


class Journal:
    """The starts and ends of all runs, in the order in which they were written.

    Args:
        path: Where the tasks write; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts: defaultdict[str, list[Note]] = defaultdict(list)
        self.ends: defaultdict[str, list[Note]] = defaultdict(list)
        self.hosts: set[str] = set()
        self.lines = 0
        self._offset = 0
        self._rest = b""

    def read(self) -> int:
        """Read what is new; return how many lines there are."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            what, task_id, host, pid, at = line.decode().split()
            note = Note(task_id, host, int(pid), float(at))
            self.hosts.add(host)
            (self.starts if what == "start" else self.ends)[task_id].append(note)
        self.lines += len(lines)
        return self.lines

    @property
    def done(self) -> int:
        """How many tasks have ended at least once."""
        return len(self.ends)

    @property
    def completions(self) -> int:
        """How many runs have ended."""
        return sum(len(notes) for notes in self.ends.values())

    def started(self, task_id: str, times: int = 1) -> Note | None:
        """Return the start of the given number, ``None`` as long as there is none."""
        self.read()
        notes = self.starts.get(task_id, [])
        return notes[times - 1] if len(notes) >= times else None

    def wait_start(self, task_id: str, times: int = 1, timeout: float = 30.0) -> Note:
        """Wait for the start of the given number.

        Raises:
            AssertionError: It did not come.
        """
        note = wait_until(
            lambda: self.started(task_id, times), timeout, f"start {times} of task {task_id}"
        )
        assert note is not None
        return note

    def ended(self, task_id: str, host: str) -> Note | None:
        """Return the end of a run on a worker, ``None`` as long as there is none."""
        self.read()
        return next((note for note in self.ends.get(task_id, []) if note.host == host), None)
