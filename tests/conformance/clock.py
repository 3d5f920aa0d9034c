"""The clock of a server, which a test can move on."""

from __future__ import annotations

from typing import Any

import time_machine

from tests.support import wait_until


class OnAClock:
    """What has a server, by whose time the scripts go.

    Args:
        traveller: The clock of a fake server; a real one has its own.
    """

    server: Any

    def __init__(self, traveller: time_machine.Traveller | None) -> None:
        self._traveller = traveller

    def now(self) -> float:
        """The server's clock."""
        seconds, micros = self.server.time()
        return float(seconds) + float(micros) / 1e6

    def let_pass(self, seconds: float) -> None:
        """Return when the server's clock has moved on."""
        if self._traveller is not None:
            self._traveller.shift(seconds)
            return
        end = self.now() + seconds
        wait_until(lambda: self.now() > end, seconds + 5)
