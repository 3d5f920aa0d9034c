"""Which command blocked the server for longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Longest", "Slowlog"]

#: Shorter commands are not looked at (µs).
_SHORT = 500


@dataclass(frozen=True)
class Longest:
    """The longest command.

    Attributes:
        ms: How long it took.
        command: Its name and keys, cut short.
    """

    ms: float
    command: str

    def __str__(self) -> str:
        return f"{self.ms:.2f} ms" if self.command else f"under {self.ms:g} ms"


class Slowlog:
    """Watches a server from now on."""

    def __init__(self, client: Any) -> None:
        self._client = client
        client.config_set("slowlog-log-slower-than", _SHORT)
        # A longest one that is followed by many must not drop out.
        client.config_set("slowlog-max-len", 100_000)
        client.slowlog_reset()

    def longest(self) -> Longest:
        """Return the longest command so far."""
        found = self._client.slowlog_get(100_000)
        if not found:
            return Longest(_SHORT / 1000, "")
        entry = max(found, key=lambda one: one["duration"])
        command = entry["command"].decode(errors="replace")
        return Longest(entry["duration"] / 1000, command[:120])
