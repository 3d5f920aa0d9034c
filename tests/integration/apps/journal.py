"""What tasks did, written down by themselves, for a test to read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A gate that nobody opens ends the task that waits for it.
_GATE_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a journal.

    Attributes:
        name: What happened, e.g. ``"start"``.
        at: When, in seconds since the epoch.
        pid: In which process.
        data: What else was said.
    """

    name: str
    at: float
    pid: int
    data: Mapping[str, Any]


class Journal:
    """A file that many processes append to, and gates that hold tasks until a test opens them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / "journal"

    def write(self, event: str, **data: Any) -> None:
        """Append a line; whole, for it is one small write."""
        line = json.dumps([event, time.time(), os.getpid(), data]) + "\n"
        handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def events(self, event: str | None = None, **data: Any) -> list[Event]:
        """Return the lines in order: all, or those of one event that say the given things."""
        if not self._file.exists():
            return []
        text = self._file.read_text()
        # What is being written this moment can be seen in part.
        whole = text[: text.rfind("\n") + 1]
        lines = [Event(*json.loads(line)) for line in whole.splitlines()]
        return [
            line
            for line in lines
            if event in (None, line.name) and data.items() <= line.data.items()
        ]

    def wait_at(self, gate: str) -> None:
        """Hold a task here until the gate is opened."""
        deadline = time.monotonic() + _GATE_TIMEOUT
        while time.monotonic() < deadline and not self._gate(gate).exists():
            time.sleep(0.01)

    def open(self, gate: str) -> None:
        """Let through whoever waits at the gate, and who comes later."""
        self._gate(gate).touch()

    def _gate(self, gate: str) -> Path:
        return self.directory / f"gate-{gate}"
