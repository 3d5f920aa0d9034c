"""What is known of a start that its task ended by no word of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reliable_tasks._store.values import text

__all__ = ["Crash", "Starter"]

_ENDING, _RUNNING = "e", "-"


@dataclass(frozen=True, slots=True)
class Starter:
    """Who starts a task, as the scripts note it.

    Attributes:
        pid: Of the pool child where it is known, else of the worker.
        host: The worker's name.
        is_ending: Whether only the task's end is run: its handlers.
        how: How the process ended, or ``""``.
    """

    pid: int
    host: str
    is_ending: bool = False
    how: str = ""

    def __str__(self) -> str:
        # A name with a space in it would be read as two.
        host = self.host.replace(" ", "_")
        mark = _ENDING if self.is_ending else _RUNNING
        return f"{self.pid} {mark} {host} {self.how}".rstrip()


@dataclass(frozen=True, slots=True)
class Crash:
    """A start that stands as a crash.

    Attributes:
        at: When it was started (s by the server's clock).
        pid: Of the pool child that died, or of the worker where nobody saw how it ended.
        host: The worker's name.
        is_ending: Whether only the task's end was run: its handlers.
        how: How the process ended, or ``""``.
    """

    at: float
    pid: int
    host: str
    is_ending: bool
    how: str

    @classmethod
    def read(cls, line: str) -> Crash:
        """Read what ``count_crash.lua`` and ``explain_crash.lua`` wrote."""
        at, pid, mark, rest = line.split(" ", 3)
        host, _, how = rest.partition(" ")
        return cls(int(at) / 1000, int(pid), host, mark == _ENDING, how)

    @classmethod
    def read_all(cls, history: Any, start: Any) -> list[Crash]:
        """Read a run's fields of these names; the latest is the last."""
        lines = text(history or b"").splitlines()
        if start is not None:
            lines.append(text(start))
        # The first one can have been cut off.
        return [cls.read(line) for line in lines if line.count(" ") >= 3 and line[0].isdigit()]

    def as_dict(self) -> dict[str, Any]:
        """Return it as `PoisonPill.history` has it."""
        return {"host": self.host, "pid": self.pid, "how": self.how, "at": self.at}
