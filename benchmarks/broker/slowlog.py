"""Which command blocked the server for longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.machine import longest_stall

__all__ = ["Longest", "Slowlog", "too_long"]

#: Shorter commands are not looked at (µs).
_SHORT = 500
#: How long the machine is watched where a command took longer than it may (s).
_WATCHED = 60


@dataclass(frozen=True)
class Longest:
    """The longest command.

    Attributes:
        ms: How long it took.
        command: Its name and keys, cut short.
        tenth: How long the tenth longest took (ms). If it was much shorter, it was not the command
            that took so long: the server waited for a processor.
    """

    ms: float
    command: str
    tenth: float

    def __str__(self) -> str:
        return f"{self.ms:.2f} ms (the tenth {self.tenth:.2f} ms)"


class Slowlog:
    """Watches a server from now on."""

    def __init__(self, client: Any) -> None:
        self._client = client
        client.config_set("slowlog-log-slower-than", _SHORT)
        # A longest one that is followed by many must not drop out.
        client.config_set("slowlog-max-len", 100_000)
        client.slowlog_reset()

    def longest(self) -> Longest:
        """Return the longest command so far; one shorter than what is looked at counts as that."""
        found = self._client.slowlog_get(100_000)
        found.sort(key=lambda one: one["duration"], reverse=True)
        ms = [one["duration"] / 1000 for one in found]
        ms += [_SHORT / 1000] * 10
        command = found[0]["command"].decode(errors="replace") if found else ""
        return Longest(ms[0], command[:120], ms[9])


def too_long(name: str, longest: Longest, goal: float) -> list[str]:
    """Return the goal (ms) that was missed, unless the machine itself may have taken the time."""
    if longest.ms < goal:
        return []
    what = f"{name}: a command took {longest}, not under {goal:g} ms: {longest.command}"
    if longest.tenth >= goal:
        return [what]
    stall = longest_stall(_WATCHED)
    if longest.ms <= stall:
        print(f"not judged, for this machine stalls for {stall:.2f} ms by itself: {what}")
        return []
    return [what]
