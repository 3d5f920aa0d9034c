"""The app of tasks that fail for good, with workers that die at one step of what they do then.

A step is a line of this library's or of Celery's request that is executed for the first time, or
one side of a command to a server: about to be sent, or sent and not answered. They are counted in
the worker's main process, from when it hears of a failure until it has acknowledged the message.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from celery import Celery, Task
from kombu.message import Message

from reliable_tasks import once
from reliable_tasks._celery.request import ReliableRequest
from tests.integration.apps import poison

#: Where a worker writes its steps, and at which of them it dies; none if it lives.
STEPS_FILE, DIES_AT = "RT_STEPS_FILE", "RT_DIES_AT"

_FOLLOWED = ("/reliable_tasks/", "/celery/worker/request.py")
#: Whose beginning and whose end are steps, by file.
_COMMANDS = {
    "/redis/connection.py": {"send_packed_command", "read_response"},
    "/amqp/transport.py": {"write"},
    "/kombu/message.py": {"ack"},
}


def build(broker: str, backend: str | None = None, **options: Any) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = poison.build(broker, backend, **options)
    common = {"shared": False, "base": poison.Handled, "bind": True}

    @app.task(name="fail_once", **common)
    @once(key="{name}")
    def fail_once(self: Task, name: str) -> None:
        poison.journal.write("start", name=name, id=self.request.id)
        raise ValueError(f"{name} is broken")

    @app.task(name="slow_once", **{**common, "time_limit": 1})
    @once(key="{name}")
    def slow_once(self: Task, name: str) -> None:
        poison.journal.write("start", name=name, id=self.request.id)
        time.sleep(30)

    return app


class Stepper:
    """What counts the steps of one thread, and kills its process at one of them.

    Args:
        steps: The file for them, when they are done, or the process dies.
        dies_at: The number of that step, from 1 on, or the last there is; 0 to live.
    """

    def __init__(self, steps: Path, dies_at: int) -> None:
        self._file, self._dies_at = steps, dies_at
        self._steps: list[str] = []
        self._lines: set[tuple[str, int]] = set()
        self._message: Any = None

    def begin(self, message: Any) -> None:
        """Count from here on, once in the life of this process."""
        if self._message is None and threading.current_thread() is threading.main_thread():
            self._message = message
            sys.settrace(self._enter)

    def end(self, message: Any) -> None:
        """Count no more, if it was for this message."""
        if message is self._message:
            sys.settrace(None)
            self._write(dies=self._dies_at > 0)

    def _write(self, *, dies: bool) -> None:
        self._file.write_text("\n".join(self._steps))
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if any(part in name for part in _FOLLOWED):
            return self._follow
        for ending, functions in _COMMANDS.items():
            if name.endswith(ending) and frame.f_code.co_name in functions:
                self._step(frame, "begins")
                frame.f_trace_lines = False
                return self._leave
        return None

    def _follow(self, frame: FrameType, event: str, arg: Any) -> Any:
        line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and line not in self._lines:
            self._lines.add(line)
            self._step(frame, str(frame.f_lineno))
        return self._follow

    def _leave(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "return":
            self._step(frame, "ends")
        return self._leave

    def _step(self, frame: FrameType, what: str) -> None:
        path = Path(frame.f_code.co_filename)
        self._steps.append(f"{path.parent.name}/{path.name}:{frame.f_code.co_name}:{what}")
        if len(self._steps) == self._dies_at:
            self._write(dies=True)


def _watch(stepper: Stepper) -> None:
    on_failure, ack = ReliableRequest.on_failure, Message.ack

    @functools.wraps(on_failure)
    def watched_failure(self: ReliableRequest, *args: Any, **options: Any) -> None:
        stepper.begin(self.message)
        on_failure(self, *args, **options)

    @functools.wraps(ack)
    def watched_ack(self: Message, *args: Any, **options: Any) -> None:
        ack(self, *args, **options)
        stepper.end(self)

    ReliableRequest.on_failure = watched_failure  # type: ignore[method-assign]
    Message.ack = watched_ack  # type: ignore[method-assign]


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", poison.LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
if os.environ.get(STEPS_FILE):
    _watch(Stepper(Path(os.environ[STEPS_FILE]), int(os.environ[DIES_AT])))
