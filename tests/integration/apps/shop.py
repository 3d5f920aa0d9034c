"""The app of the integration tests: tasks that do what they are told, and say when.

A worker finds its settings in the environment: ``RT_BROKER_URL``, ``RT_RESULT_URL``,
``RT_SETTINGS`` (JSON, on top of what the library sets), ``RT_LIMIT`` (seconds) and
``RT_JOURNAL`` (a directory).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tenacity
from celery import Celery, Task
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.utils.scheduling import priority_cycle

from reliable_tasks import ReliableTask, apply_reliable_config, once, presets
from tests.integration.apps.journal import Journal
from tests.integration.apps.showing import run_show

#: Hard time limit of the tasks (s): short, for the time to recovery follows from it.
LIMIT = 4
#: What ``flaky`` waits before each of its retries (s).
WAITS = (0.3, 1.7, 0.6)

#: A task for each of these, by its name.
LIFETIMES: dict[str, Any] = {
    "until_executing": {"lock": "until_executing"},
    "until_expired": {"lock": "until_expired", "ttl": 6},
    "while_executing": {"lock": "while_executing"},
    "while_executing, drop": {"lock": "while_executing", "on_conflict": "drop"},
    "while_executing, early ack": {"lock": "while_executing"},
    "until_and_while_executing": {"lock": "until_and_while_executing"},
    "replace": {"on_conflict": "replace"},
}

journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))


@contextlib.contextmanager
def told(task: Task, name: str) -> Iterator[None]:
    """Write down that a task starts, and that it ends, also by an exception."""
    request = task.request
    about = {"name": name, "id": request.id, "attempt": request.retries}
    journal.write("start", **about, crashes=request.get("crashes"))
    try:
        yield
    finally:
        journal.write("end", **about)


def _note_attempt(state: tenacity.RetryCallState) -> None:
    """Write down what tenacity knows when an attempt begins."""
    journal.write(
        "attempt",
        name=state.args[0],
        number=state.attempt_number,
        age=time.monotonic() - state.start_time,
        idle_for=state.idle_for,
    )


def _is_first(name: str) -> bool:
    return len(journal.events("start", name=name)) == 1


def _kill_own_child() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _succeed(task: Task, name: str) -> None:
    pass


def _wait(task: Task, name: str) -> None:
    journal.wait_at(name)


def _fail(task: Task, name: str) -> None:
    raise ValueError(name)


def _ignore(task: Task, name: str) -> None:
    raise Ignore


def _reject(task: Task, name: str) -> None:
    raise Reject("told to", requeue=False)


def _requeue(task: Task, name: str) -> None:
    if _is_first(name):
        raise Reject("told to", requeue=True)


def _wait_and_fail(task: Task, name: str) -> None:
    journal.wait_at(name)
    raise ValueError(name)


def _retry(task: Task, name: str) -> None:
    if task.request.retries == 0:
        raise task.retry(countdown=0)


def _wait_and_retry(task: Task, name: str) -> None:
    journal.wait_at(name)
    _retry(task, name)


def _retry_later(task: Task, name: str) -> None:
    if task.request.retries == 0:
        raise task.retry(countdown=1.2)


def _retry_and_die(task: Task, name: str) -> None:
    if task.request.retries == 0:
        try:
            task.retry(countdown=0)
        except Retry:
            # Once: the attempt may run again before its retry, and must get past this.
            if _is_first(name):
                _kill_own_child()
            raise


def _retry_and_take_worker_down(task: Task, name: str) -> None:
    if task.request.retries == 0:
        try:
            task.retry(countdown=0)
        except Retry:
            os.kill(os.getppid(), signal.SIGKILL)
            _kill_own_child()
    raise ValueError(name)


def _replace_and_take_worker_down(task: Task, name: str) -> None:
    if _is_first(name):
        try:
            task.replace(task.s(name))
        except Ignore:
            os.kill(os.getppid(), signal.SIGKILL)
            _kill_own_child()


def _replace_other_and_take_worker_down(task: Task, name: str) -> None:
    try:
        task.replace(task.s(f"{name}, again"))
    except Ignore:
        os.kill(os.getppid(), signal.SIGKILL)
        _kill_own_child()


def _replace_same(task: Task, name: str) -> None:
    if _is_first(name):
        raise task.replace(task.s(name))


def _replace_other(task: Task, name: str) -> None:
    raise task.replace(task.s(f"{name}, again"))


def _sleep(task: Task, name: str) -> None:
    time.sleep(30)


def _take_a_while(task: Task, name: str) -> None:
    time.sleep(0.3)


def _sleep_on(task: Task, name: str) -> None:
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        time.sleep(30)


def _exit(task: Task, name: str) -> None:
    if _is_first(name):
        raise SystemExit(3)


def _die(task: Task, name: str) -> None:
    if _is_first(name):
        _kill_own_child()


def _clean_up(task: Task, name: str) -> None:
    if not _is_first(name):
        return

    def clean_up(*_: Any) -> None:
        time.sleep(3)
        journal.write("end", name=name)
        os._exit(1)

    signal.signal(signal.SIGUSR1, clean_up)
    time.sleep(30)


def _call_itself(task: Task, name: str) -> None:
    if _is_first(name):
        # Not as a child, of which its caller's result would make another one, that nobody keeps.
        task.apply_async((name,), add_to_parent=False)
        time.sleep(0.5)


def _call_itself_in_vain(task: Task, name: str) -> None:
    if _is_first(name):
        task.apply_async((name,), expires=0.5, add_to_parent=False)
        time.sleep(2)


def _leave(task: Task, name: str) -> None:
    raise SystemExit(3)


def _interrupt(task: Task, name: str) -> None:
    raise KeyboardInterrupt


def _cancel(task: Task, name: str) -> None:
    raise asyncio.CancelledError


def _run_out_of_memory(task: Task, name: str) -> None:
    raise MemoryError(name)


def _hold_gil(task: Task, name: str) -> None:
    # Through PyDLL the call keeps what CDLL would release.
    ctypes.PyDLL(None).usleep(int(float(name.rpartition(" ")[2]) * 1_000_000))


def _spin(task: Task, name: str) -> None:
    until = time.monotonic() + float(name.rpartition(" ")[2])
    while time.monotonic() < until:
        pass


#: What a task can be told to do, by its name.
ACTIONS = {
    action.__name__.removeprefix("_"): action
    for action in (
        *(
            _succeed,
            _wait,
            _fail,
            _ignore,
            _reject,
            _requeue,
            _retry,
            _retry_later,
            _wait_and_fail,
            _wait_and_retry,
        ),
        *(_retry_and_die, _retry_and_take_worker_down, _replace_same, _replace_other),
        *(
            _sleep,
            _sleep_on,
            _exit,
            _die,
            _call_itself,
            _call_itself_in_vain,
            _take_a_while,
            _clean_up,
        ),
        *(_replace_and_take_worker_down, _replace_other_and_take_worker_down),
        *(_leave, _interrupt, _cancel, _run_out_of_memory, _hold_gil, _spin),
    )
}


class BackwardCycle(priority_cycle):
    """A queue_order_strategy of a user's own: the last name first."""

    def consume(self, n: int) -> Any:
        """Return the queues in the order in which they are to be looked at."""
        return sorted(self.items or (), reverse=True)[:n]


def build(
    broker: str, backend: str | None = None, *, limit: int = LIMIT, **settings: Any
) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = Celery("shop", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    apply_reliable_config(app)
    limits = presets.time_limit(hard=limit)

    @app.task(shared=False, name="act", base=ReliableTask, bind=True, **limits)
    @once(key="{name}")
    def act(self: Task, name: str, what: str = "succeed") -> str:
        with told(self, name):
            ACTIONS[what](self, name)
        return name

    @app.task(shared=False, name="bare", base=ReliableTask, bind=True, **limits)
    def bare(self: Task, name: str, what: str = "succeed") -> str:
        with told(self, name):
            ACTIONS[what](self, name)
        return name

    @app.task(shared=False, name="strict", base=ReliableTask, bind=True, **limits)
    @once(key="{name}", on_conflict="raise")
    def strict(self: Task, name: str) -> str:
        with told(self, name):
            journal.wait_at(name)
        return name

    for kind, options in LIFETIMES.items():

        @app.task(
            shared=False,
            name=kind,
            base=ReliableTask,
            bind=True,
            acks_late="early ack" not in kind,
            **limits,
        )
        @once(key="{name}", **options)
        def lives(self: Task, name: str, what: str = "succeed", text: str = "") -> str:
            with told(self, name):
                ACTIONS[what](self, name)
            return text or name

    @app.task(shared=False, name="brief", base=ReliableTask, bind=True, **limits)
    @once(key="{name}", ttl=0.4)
    def brief(self: Task, name: str) -> str:
        with told(self, name):
            journal.wait_at(name)
        return name

    @app.task(shared=False, name="sleep", base=ReliableTask, bind=True, **limits)
    def sleep(self: Task, name: str, seconds: float = 0) -> str:
        with told(self, name):
            time.sleep(seconds)
        return name

    @app.task(
        shared=False, name="limited", base=ReliableTask, bind=True, rate_limit="1/s", **limits
    )
    def limited(self: Task, name: str, seconds: float = 0) -> str:
        with told(self, name):
            time.sleep(seconds)
        return name

    @app.task(
        shared=False,
        name="flaky",
        base=ReliableTask,
        bind=True,
        retrying=tenacity.Retrying(
            stop=tenacity.stop_after_attempt(4),
            wait=tenacity.wait_chain(*map(tenacity.wait_fixed, WAITS)),
            before=_note_attempt,
        ),
        **limits,
    )
    @once(key="{name}")
    def flaky(self: Task, name: str, failures: int) -> int:
        with told(self, name):
            if self.request.retries < failures:
                raise ConnectionError(name)
        return self.request.retries

    @app.task(shared=False, name="show", base=ReliableTask, bind=True, **limits)
    def show(self: Task, name: str, seconds: float = 0, text: str = "") -> str:
        return run_show(journal, self, name, seconds, text)

    # What Celery does by itself, for comparison.
    @app.task(shared=False, name="plain", bind=True, time_limit=limit)
    def plain(self: Task, name: str, seconds: float = 0) -> str:
        with told(self, name):
            time.sleep(seconds)
        return name

    return app


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
