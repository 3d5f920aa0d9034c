"""The app of tasks that crash, go back to their queue without end, or fail for good."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis
from billiard import current_process
from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from kombu.serialization import register

from reliable_tasks import ReliableTask, apply_reliable_config, once
from reliable_tasks.dead_letters import DeadLetter
from tests.integration.apps.journal import Journal

#: Hard time limit of the tasks (s).
LIMIT = 30

journal = Journal(Path(os.environ.get("RT_JOURNAL", "/nonexistent")))


def _seal(body: object) -> str:
    if "RT_JOURNAL" in os.environ:
        raise ValueError("no worker writes this")
    return repr(body)


# As pickle they know more than JSON does, and workers of root may accept them.
register("literals", repr, ast.literal_eval, "application/x-literals", "utf-8")
register("sealed", _seal, ast.literal_eval, "application/x-sealed", "utf-8")


def _sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(3)


def _segfault() -> None:
    # Python writes a traceback to stderr otherwise.
    ctypes.string_at(0)


def _out_of_memory() -> None:
    """Be killed by the kernel for what it allocates, as far as a test may provoke that.

    A limit of the address space turns it into an error of malloc, which C code answers by abort.
    """
    resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    if libc.malloc(ctypes.c_size_t(2**34)) is None:
        os.abort()


def _kill_worker() -> None:
    # Not whoever is its parent now, should that be dead already.
    os.kill(current_process()._parent_pid, signal.SIGKILL)
    time.sleep(30)


def _kill_worker_at_rest() -> None:
    """Wait until the worker takes no message.

    Stock kombu takes one first and notes it afterwards: killed in between, it takes that with it,
    and nothing beside it can know.
    """
    with redis.Redis.from_url(app.conf.broker_url) as broker:
        while broker.llen("celery"):
            time.sleep(0.02)
    time.sleep(0.3)
    _kill_worker()


#: How a task can crash, by its name.
CRASHES = {
    "sigkill": _sigkill,
    "exit": _exit,
    "segfault": _segfault,
    "out_of_memory": _out_of_memory,
    "kill_worker": _kill_worker,
    "kill_worker_at_rest": _kill_worker_at_rest,
}


def redact(letter: DeadLetter) -> DeadLetter:
    """Leave out the numbers of cards; of some letters it can make nothing."""
    if "unreadable" in letter.argsrepr:
        raise LookupError(letter.argsrepr)
    return replace(letter, argsrepr=letter.argsrepr.replace("4111", "****"))


class Handled(ReliableTask):
    """A task that says when its handlers run, and whose handlers can crash, too."""

    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Write down the failure."""
        journal.write("on_failure", id=task_id, error=type(exc).__name__)
        self._break("on_failure", args)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Leave it to the body to say so."""
        # It has crashed, or come back.
        if journal.events("start", id=task_id):
            self._break("before_start", args)

    def _break(self, where: str, args: Any) -> None:
        """Do what the task's third argument says, ``"raise in on_failure"`` for one."""
        what = args[2] if len(args) > 2 and args[2].endswith(f" in {where}") else ""
        if what.startswith("crash"):
            _sigkill()
        elif what.startswith("raise"):
            raise RuntimeError(what)
        elif what.startswith("ignore"):
            raise Ignore
        elif what.startswith("reject"):
            raise Reject(what, requeue=True)
        elif what.startswith("retry"):
            raise self.retry(countdown=0, max_retries=None)
        elif what.startswith("hang"):
            time.sleep(30)


class OutOfStock(LookupError):
    """An error that no child can hand on as it is, as many of users' own."""

    def __init__(self, item: str, left: int) -> None:
        super().__init__(f"{left} of {item}")


class Called(Handled):
    """A task of which whatever it raises is something else for those who call it."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what its third argument says instead of failing."""
        try:
            return super().__call__(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever it is
            return self._break("__call__", args)


def build(
    broker: str, backend: str | None = None, *, limit: int = LIMIT, **settings: Any
) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = Celery("poison", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    apply_reliable_config(app)
    common = {"shared": False, "base": Handled, "bind": True, "time_limit": limit}

    def start(task: Task, name: str) -> None:
        request = task.request
        journal.write(
            "start", name=name, id=request.id, retries=request.retries, args=list(request.args)
        )

    @app.task(name="crash", **common)
    def crash(self: Task, name: str, how: str, then: str = "") -> None:
        start(self, name)
        CRASHES[how]()

    @app.task(name="crash_called", **{**common, "base": Called})
    def crash_called(self: Task, name: str, how: str, then: str) -> None:
        start(self, name)
        CRASHES[how]()

    # Without a Redis there are no claims.
    if "redis" in broker or "redis" in (backend or ""):

        @app.task(name="crash_once", **common)
        @once(key="{name}")
        def crash_once(self: Task, name: str, how: str) -> None:
            start(self, name)
            CRASHES[how]()

        @app.task(name="fail_keyed", **common)
        @once(key="{name}")
        def fail_keyed(self: Task, name: str) -> None:
            start(self, name)
            if not journal.events("mended", name=name):
                raise ValueError(f"{name} is broken")

    @app.task(name="innocent", **common)
    def innocent(self: Task, name: str, seconds: float = 0) -> str:
        start(self, name)
        time.sleep(seconds)
        journal.write("end", name=name, id=self.request.id)
        return name

    @app.task(name="requeue", max_requeues=3, **common)
    def requeue(self: Task, name: str) -> None:
        start(self, name)
        raise Reject("not here", requeue=True)

    @app.task(name="hand_back", max_requeues=1, **common)
    def hand_back(self: Task, name: str, thing: object) -> None:
        """Put itself back; what it is given need be no JSON."""
        journal.write("start", name=name, id=self.request.id, thing=repr(thing))
        raise Reject("not here", requeue=True)

    @app.task(name="overtime", max_requeues=2, acks_on_timeout=False, **{**common, "time_limit": 1})
    def overtime(self: Task, name: str) -> None:
        start(self, name)
        time.sleep(30)

    @app.task(name="waver", max_requeues=None, acks_on_timeout=False, **{**common, "time_limit": 2})
    def waver(self: Task, name: str, *ways: str) -> str:
        """End its first run in the first way, its second one in the second way, and so on."""
        start(self, name)
        way = dict(enumerate(ways, 1)).get(len(journal.events("start", name=name)))
        if way == "overtime":
            time.sleep(30)
        elif way == "requeue":
            raise Reject("not here", requeue=True)
        elif way == "retry":
            raise self.retry(countdown=0)
        elif way == "replace":
            raise self.replace(self.si(name, *ways))
        elif way == "fail":
            raise ValueError(f"{name} is broken")
        elif way is not None:
            CRASHES[way]()
        return name

    @app.task(name="slow_end", acks_on_timeout=False, **{**common, "time_limit": 2})
    def slow_end(self: Task, name: str, how: str, then: str) -> None:
        start(self, name)
        CRASHES[how]()

    @app.task(name="fail", **common)
    def fail(self: Task, name: str, how: str = "", then: str = "") -> None:
        start(self, name)
        if not journal.events("mended", name=name):
            raise ValueError(f"{name} is broken")

    @app.task(name="fail_again", max_retries=2, **common)
    def fail_again(self: Task, name: str) -> str:
        start(self, name)
        if not journal.events("mended", name=name):
            raise self.retry(exc=KeyError(name), countdown=0)
        return name

    @app.task(name="slow", **{**common, "time_limit": 1})
    def slow(self: Task, name: str) -> str:
        start(self, name)
        if not journal.events("mended", name=name):
            time.sleep(30)
        return name

    @app.task(name="dropped", **common)
    def dropped(self: Task, name: str) -> None:
        start(self, name)
        raise Reject("not here", requeue=False)

    @app.task(name="dropped_oddly", **common)
    def dropped_oddly(self: Task, name: str) -> None:
        start(self, name)
        raise Reject(OutOfStock("tea", 0), requeue=False)

    @app.task(name="perishable", dead_letter={"expired": True}, **common)
    def perishable(self: Task, name: str) -> str:
        start(self, name)
        return name

    @app.task(name="hasty_perishable", dead_letter={"expired": True}, acks_late=False, **common)
    def hasty_perishable(self: Task, name: str) -> str:
        start(self, name)
        return name

    @app.task(name="careless", dead_letter=False, **common)
    def careless(self: Task) -> None:
        raise ValueError("expected")

    @app.task(name="expecting", throws=(ValueError,), **common)
    def expecting(self: Task) -> None:
        raise ValueError("expected")

    @app.task(name="expecting_odd", throws=(OutOfStock,), **common)
    def expecting_odd(self: Task) -> None:
        raise OutOfStock("tea", 0)

    @app.task(name="hasty", acks_late=False, **common)
    def hasty(self: Task, name: str) -> str:
        start(self, name)
        if not journal.events("mended", name=name):
            raise ValueError(f"{name} is broken")
        return name

    @app.task(name="fail_at", **common)
    def fail_at(self: Task, name: str, gate: str) -> None:
        start(self, name)
        journal.wait_at(gate)
        raise ValueError(f"{name} is broken")

    @app.task(name="add", **common)
    def add(self: Task, name: str, number: int, other: int = 1) -> int:
        start(self, name)
        if not journal.events("mended", name=name):
            raise ValueError(f"{name} is broken")
        return number + other

    # Deployed late: workers that started before do not know it.
    if journal.events("mended", name="deployed"):

        @app.task(name="deployed", **common)
        def deployed(self: Task, number: int) -> int:
            return number

    @app.task(name="note", **common)
    def note(self: Task, *values: Any) -> None:
        journal.write("note", values=[repr(value) for value in values])

    @app.task(name="total", **common)
    def total(self: Task, numbers: list[int]) -> int:
        journal.write("total", numbers=numbers)
        return sum(numbers)

    return app


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
