"""How far a busy machine falls behind, for tests of what has to come in time."""

from __future__ import annotations

import threading
import time
from typing import Self

_SLEEP = 0.01


class Lag:
    """Counts, in a thread, what short sleeps take beyond their time.

    Attributes:
        seconds: The sum of it so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def _measure(self) -> None:
        begun = time.monotonic()
        while not self._is_over.is_set():
            time.sleep(_SLEEP)
            now = time.monotonic()
            self.seconds += now - begun - _SLEEP
            begun = now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
