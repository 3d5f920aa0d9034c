"""The scenarios: what is done, what is to be seen after it, and whether that is as it should be."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from celery import Celery, chain, chord, group

from benchmarks.peers.app import OURS, call, forget, keep, make_app
from reliable_tasks.demo._server import EmbeddedServer, free_port
from tests.support import WorkerProcess, wait_until

__all__ = ["SCENARIOS", "Seen"]

#: A message with late acks comes back to a stock worker after so long (s).
_VISIBILITY = 5
#: So long is waited for a lock that should be free (s).
_FREE_WITHIN = 20.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a scenario."""

    text: str
    is_right: bool


class Scene:
    """A server, workers and a client of one system."""

    def __init__(self, system: str, server: EmbeddedServer, directory: Path, **settings: Any):
        self.system = system
        self.server = server
        self.broker = server.url
        self.backend = f"redis://127.0.0.1:{server.port}/1"
        self._journal = directory / "journal"
        self._settings = settings
        self.app: Celery = make_app(system, self.broker, self.backend, settings)
        self.workers: list[WorkerProcess] = []
        self._killed: set[int] = set()

    def task(self, name: str) -> Any:
        """Return a task."""
        return self.app.tasks[name]

    def worker(self, count: int = 1, **options: Any) -> None:
        """Start workers."""
        env = {
            "RT_SYSTEM": self.system,
            "RT_JOURNAL": str(self._journal),
            "RT_SETTINGS": json.dumps(self._settings),
        }
        urls = {"broker_url": self.broker, "result_url": self.backend}
        new = [
            WorkerProcess("benchmarks.peers.app", env=env, **urls, **options) for _ in range(count)
        ]
        self.workers += new
        for worker in new:
            worker.start()

    def kill(self, pid: int) -> None:
        """Kill the worker that a child belongs to, with all its children."""
        next(worker for worker in self.workers if pid in worker.child_pids()).kill_group()
        self._killed.add(pid)

    def events(self, what: str, key: Any) -> list[Any]:
        """Return the starts or the ends of the runs with a key."""
        return [event for event in self._events() if event[:2] == [what, str(key)]]

    def wait(self, what: str, key: Any, count: int = 1, timeout: float = 30) -> Any:
        """Wait for a start or an end, and return it."""
        return wait_until(
            lambda: len(found := self.events(what, key)) >= count and found[-1],
            timeout,
            f"{what} {count} of {key}",
        )

    def most_at_once(self, key: Any) -> int:
        """Say how many tasks with a key ran at the same time."""
        running = most = 0
        for what, of, _, pid in self._events():
            # A killed one does not say that it runs no more.
            if of == str(key) and pid not in self._killed:
                running += 1 if what == "start" else -1
                most = max(most, running)
        return most

    def is_taken(self, name: str, key: Any) -> bool:
        """Say whether a call with the key is refused."""
        return call(self.task(name), key, countdown=3600) is None

    def _events(self) -> list[list[Any]]:
        if not self._journal.exists():
            return []
        return [json.loads(line) for line in self._journal.read_text().splitlines()]


@contextmanager
def scene(system: str, **settings: Any) -> Iterator[Scene]:
    """Start a server; stop it, and the workers, at the end."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = Scene(system, stack.enter_context(EmbeddedServer()), directory, **settings)
        stack.callback(lambda: forget(made.app))
        stack.callback(lambda: WorkerProcess.stop_all(made.workers))
        yield made


def _killed(system: str) -> Seen:
    """1. The worker is killed in the midst of a task: how long is its key taken?"""
    with scene(system) as it:
        it.worker(2)
        call(it.task("hold"), "a", 4)
        _, _, _, pid = it.wait("start", "a")
        it.kill(pid)
        killed = time.monotonic()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: call(it.task("hold"), "a", 0) is not None, _FREE_WITHIN, "")
            seconds = time.monotonic() - killed
            most = it.most_at_once("a")
            text = f"free again after {seconds:.1f} s; at most {most} at once"
            return Seen(text, most == 1)
        return Seen(f"still taken after {_FREE_WITHIN:.0f} s", False)


def _unpublished(system: str) -> Seen:
    """2. The broker is down when a task is called: is its key taken?"""
    with scene(system) as it:
        away = make_app(
            system,
            f"redis://127.0.0.1:{free_port()}/0",
            it.backend,
            {"reliable_redis_url": it.backend} if system == OURS else {},
        )
        away.conf.task_publish_retry = False
        with contextlib.suppress(Exception):
            call(away.tasks["hold"], "a", 0)
            return Seen("the call did not fail", False)
        with redis.Redis.from_url(it.backend, decode_responses=True) as server:
            left = [key for key in server.keys("*") if "a" in key]
        return Seen(f"{len(left)} keys left", not left)


def _outlived(system: str) -> Seen:
    """3. A task of 6 s, a lock of 2 s, a call every half second."""
    with scene(system) as it:
        it.worker(concurrency=4)
        until = time.monotonic() + 9
        while time.monotonic() < until:
            call(it.task("short_hold"), "a", 6)
            time.sleep(0.5)
        most, starts = it.most_at_once("a"), len(it.events("start", "a"))
        return Seen(f"{starts} starts, at most {most} at once", most == 1)


def _never_run(system: str) -> Seen:
    """4. Revoked, terminated, expired, purged: which keys stay taken?"""
    with scene(system) as it:
        purged = call(it.task("hold"), "purged", 0)
        assert purged is not None
        it.app.control.purge()
        it.worker(concurrency=4)
        revoked = call(it.task("hold"), "revoked", 0, countdown=1)
        revoked.revoke()
        call(it.task("hold"), "expired", 0, countdown=2, expires=1)
        terminated = call(it.task("hold"), "terminated", 30)
        it.wait("start", "terminated")
        terminated.revoke(terminate=True, signal="SIGKILL")
        time.sleep(8)
        keys = ("revoked", "terminated", "expired", "purged")
        left = [key for key in keys if it.is_taken("hold", key)]
        return Seen(f"taken: {', '.join(left) or 'none'}", not left)


def _retried(system: str) -> Seen:
    """5. A retry in 4 s, a lock of 2 s: does it run, and alone?"""
    with scene(system) as it:
        it.worker(concurrency=4)
        call(it.task("short_retry_once"), "a", 4)
        until = time.monotonic() + 3.5
        accepted = 0
        while time.monotonic() < until:
            accepted += call(it.task("short_retry_once"), "a", 4) is not None
            time.sleep(0.5)
        time.sleep(6)
        ends, most = len(it.events("end", "a")), it.most_at_once("a")
        is_right = (ends, accepted) == (1, 0)
        return Seen(f"{ends} ran, {accepted} more accepted, at most {most} at once", is_right)


def _arguments(system: str) -> Seen:
    """6. Arguments that look different in a worker: is the key free again?"""
    with scene(system) as it:
        it.worker()
        keys = {"tuple": (1, 2), "mapping": {1: 2}, "text": "a"}
        for key in keys.values():
            result = call(it.task("echo"), key)
            result.get(timeout=15)
        time.sleep(1)
        left = [name for name, key in keys.items() if it.is_taken("echo", key)]
        return Seen(f"taken: {', '.join(left) or 'none'}", not left)


def _canvas(system: str) -> Seen:
    """7. A duplicate in a canvas: which of five complete?"""
    with scene(system) as it:
        it.worker(concurrency=4)
        hold, plus, join = it.task("hold"), it.task("plus"), it.task("join")
        shapes: dict[str, Callable[[str], Any]] = {
            "head": lambda key: chain(hold.si(key), plus.s("b")),
            "middle": lambda key: chain(plus.si("", ""), hold.si(key), plus.s("b")),
            "twice": lambda key: chain(hold.si(key), hold.si(key), plus.s("b")),
            "group": lambda key: group(hold.si(key), plus.si("", "b")),
            "chord": lambda key: chord([hold.si(key), plus.si("", "b")], join.s()),
        }
        results = {}
        for name, shape in shapes.items():
            call(hold, name, 2)
            it.wait("start", name)
            with contextlib.suppress(Exception):
                results[name] = keep(it.app, shape(name).apply_async())
        done = []
        for name, result in results.items():
            with contextlib.suppress(Exception):
                result.get(timeout=10)
                done.append(name)
        missing = [name for name in shapes if name not in done]
        return Seen(f"not: {', '.join(missing) or 'none'}", not missing)


def _by_name(system: str) -> Seen:
    """8. Two calls by name while a task runs: how many run at once?"""
    with scene(system) as it:
        it.worker(concurrency=4)
        call(it.task("hold"), "a", 4)
        it.wait("start", "a")
        for _ in range(2):
            it.app.send_task("hold", ("a", 4))
        time.sleep(12)
        most = it.most_at_once("a")
        return Seen(f"at most {most} at once", most == 1)


def _redelivered(system: str) -> Seen:
    """10. A task that takes longer than the broker's visibility_timeout."""
    with scene(system, **_short_visibility(system)) as it:
        it.worker(2)
        call(it.task("hold"), "a", 15)
        it.wait("end", "a")
        time.sleep(2)
        starts, most = len(it.events("start", "a")), it.most_at_once("a")
        return Seen(f"{starts} starts, at most {most} at once", most == 1)


def _short_visibility(system: str) -> dict[str, Any]:
    if system == OURS:
        return {}
    # Swept each second, and not at some time of the next hundred.
    sweeps = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    options = {"visibility_timeout": _VISIBILITY, **sweeps}
    late = {"task_acks_late": True, "task_reject_on_worker_lost": True}
    return {"broker_transport_options": options, **late}


#: The ninth is what a call costs: ``benchmarks/enqueue.py``.
SCENARIOS: dict[str, Callable[[str], Seen]] = {
    "killed": _killed,
    "unpublished": _unpublished,
    "outlived": _outlived,
    "never run": _never_run,
    "retried": _retried,
    "arguments": _arguments,
    "canvas": _canvas,
    "by name": _by_name,
    "redelivered": _redelivered,
}
