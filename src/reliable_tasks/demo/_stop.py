"""Ctrl-C and SIGTERM as something that is asked for, not something that strikes anywhere."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

__all__ = ["StopSignals", "Stopped"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The user wants the demo to end.

    Attributes:
        exit_code: What a shell expects of a process that such a signal ended.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


class StopSignals:
    """Notes the signals that end the demo while it is entered.

    An exception raised by a handler could fall between the start of a process and the line that
    remembers it, or into the middle of tidying up. So the handler only takes a note, and the
    demo looks at it often, where it can be left.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> None:
        """Go on, or leave.

        Raises:
            Stopped: A signal has come.
        """
        if self._signum is not None:
            raise Stopped(self._signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = self._signum or signum

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
