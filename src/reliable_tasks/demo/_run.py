"""One contender's run: start its workers, feed them, kill them, and see what is left."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis

from reliable_tasks.demo._apps import CONTENDERS, Contender
from reliable_tasks.demo._chaos import Chaos, plan
from reliable_tasks.demo._events import EventLog, Execution
from reliable_tasks.demo._ledger import Ledger, Place
from reliable_tasks.demo._load import Load, expected_seconds, fingerprint
from reliable_tasks.demo._outcome import Outcome, overlaps, restarts
from reliable_tasks.demo._screen import Screen
from reliable_tasks.demo._server import EmbeddedServer
from reliable_tasks.demo._stop import StopSignals
from reliable_tasks.demo._workers import Crew, worker_environment

__all__ = ["CHILDREN", "WORKERS", "CannotRun", "run"]

WORKERS = 2
CHILDREN = 3

_QUEUE = "celery"
#: The queue is kept as short as a busy site's, so that a task put back runs soon.
_MOST_QUEUED = 10
_TICK = 0.02
_START_TIMEOUT = 40.0
#: How long is waited for stragglers after the last call (s), and for a whole run.
_LONGEST_WAIT, _LONGEST_RUN = 40.0, 52.0
#: No message has moved for so long: all that can still come is a visibility timeout (s).
_QUIET = 5.0
#: A worker frees its lock after it has stored the result (s).
_LOCK_GRACE = 3.0


class CannotRun(Exception):
    """The demo can not be shown here; the message says why."""


def run(name: str, load: Load, seed: int, stop: StopSignals, screen: Screen) -> Outcome:
    """Let a contender do the whole load on a server and workers of its own.

    Raises:
        CannotRun: The workers do not start.
        Stopped: The user wants to leave. Nothing is left running.
    """
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reliable-tasks-")))
        events = home / "events"
        events.mkdir()
        server = stack.enter_context(EmbeddedServer())
        broker, backend = (f"redis://127.0.0.1:{server.port}/{number}" for number in (0, 1))
        ledger = stack.enter_context(Ledger(server.port, _QUEUE))
        client = stack.enter_context(redis.Redis.from_url(broker, decode_responses=True))
        contender = stack.enter_context(_contender(name, broker, backend))
        environment = worker_environment(name, broker, backend, events)
        crew = stack.enter_context(Crew(WORKERS, CHILDREN, home, environment))
        scene = _Scene(contender, load, seed, crew, EventLog(events), ledger, client, stop, screen)
        return scene.play()


@contextmanager
def _contender(name: str, broker: str, backend: str) -> Iterator[Contender]:
    contender = CONTENDERS[name](broker, backend)
    try:
        yield contender
    finally:
        contender.app.close()


class _Scene:
    """All that takes part in a run, and one loop that turns it."""

    def __init__(
        self,
        contender: Contender,
        load: Load,
        seed: int,
        crew: Crew,
        events: EventLog,
        ledger: Ledger,
        client: redis.Redis,
        stop: StopSignals,
        screen: Screen,
    ) -> None:
        self._contender = contender
        self._load = load
        self._crew = crew
        self._events = events
        self._ledger = ledger
        self._client = client
        self._stop = stop
        self._screen = screen
        self._chaos = Chaos(plan(seed, expected_seconds(load, WORKERS * CHILDREN), WORKERS), crew)
        self._pauses = {item.path: item.pause for item in load.items}
        self._calls = 0
        #: The tasks that were queued: ids and paths.
        self._accepted: dict[str, str] = {}
        #: The results that are stored.
        self._results: dict[str, Any] = {}
        self._started = self._last_news = self._deadline = time.monotonic()

    def play(self) -> Outcome:
        self._wait_for_workers()
        self._started = self._last_news = time.monotonic()
        self._deadline = self._started + _LONGEST_RUN
        self._feed()
        self._deadline = min(self._deadline, time.monotonic() + _LONGEST_WAIT)
        while self._has_hope():
            self._turn()
        self._chaos.give_up()
        seconds = time.monotonic() - self._started
        locks = self._locks()
        # The last results can be stored after the last look at them.
        self._fetch_results()
        self._screen.clear()
        return self._outcome(seconds, locks)

    def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._crew.is_ready:
            self._stop.check()
            dead = next((w for w in self._crew.workers if w.exit_code is not None), None)
            if dead is not None or time.monotonic() > deadline:
                worker = dead or self._crew.workers[0]
                raise CannotRun(f"{worker.host} did not start:\n{worker.log[-2000:]}")
            self._screen.status(f"{self._contender.name}: {WORKERS} workers are starting")
            time.sleep(_TICK)

    def _feed(self) -> None:
        """Call every file's task twice, as fast as the workers take them."""
        waiting = [item.path for item in reversed(self._load.items)]
        while waiting and time.monotonic() < self._deadline:
            self._turn()
            for _ in range(_MOST_QUEUED - self._queued()):
                if not waiting:
                    break
                path = waiting.pop()
                self._call(path)
                self._call(path)

    def _call(self, path: str) -> None:
        self._calls += 1
        task_id = self._contender.call(path, self._pauses[path])
        if task_id is not None:
            self._accepted[task_id] = path

    def _turn(self) -> None:
        """Do what is due, then rest for a moment."""
        self._stop.check()
        has_news = self._events.catch_up()
        # Both are asked: `or` would leave one of them out.
        if self._ledger.catch_up() or has_news:
            self._last_news = time.monotonic()
        self._crew.supervise()
        elapsed = time.monotonic() - self._started
        if hit := self._chaos.step(elapsed, self._events.running):
            self._tell(hit)
            for execution in hit:
                # The user whose task hangs tries again.
                self._call(execution.path)
        self._fetch_results()
        self._show(elapsed)
        time.sleep(_TICK)

    def _tell(self, hit: list[Execution]) -> None:
        kill = self._chaos.kills[-1]
        what = f"pool child {kill.pid} of {kill.host}" if kill.pid else kill.host
        files = ", ".join(os.path.relpath(execution.path, self._load.root) for execution in hit)
        self._screen.say(f"{kill.at - self._started:6.1f} s  SIGKILL of {what} at work on {files}")

    def _queued(self) -> int:
        return int(self._client.llen(_QUEUE))

    def _fetch_results(self) -> None:
        """Ask the result backend for what is not known yet."""
        backend: Any = self._contender.app.backend
        pending = [*self._pending]
        if not pending:
            return
        found = backend.mget([backend.get_key_for_task(task_id) for task_id in pending])
        for task_id, payload in zip(pending, found, strict=True):
            meta = backend.decode_result(payload) if payload else {}
            if meta.get("status") in ("SUCCESS", "FAILURE"):
                self._results[task_id] = meta["result"]

    @property
    def _pending(self) -> set[str]:
        """The tasks that have no result."""
        return self._accepted.keys() - self._results.keys()

    @property
    def _unsettled(self) -> set[str]:
        """The tasks that have no result, or that the broker keeps although they have one."""
        settled = self._results.keys() & self._ledger.tasks(Place.DONE_WITH)
        return self._accepted.keys() - settled

    def _has_hope(self) -> bool:
        """Say whether waiting on can still change anything before the deadline."""
        now = time.monotonic()
        if now > self._deadline or not self._unsettled:
            return False
        if now < self._last_news + _QUIET or self._queued():
            return True
        oldest: list[Any] = self._client.zrange("unacked_index", 0, 0, withscores=True)
        if not oldest:
            return False
        wait = float(oldest[0][1]) + self._contender.redelivery - time.time()
        return now + wait < self._deadline

    def _locks(self) -> list[str]:
        """Return the files whose lock is left, other than those of tasks lost in the window."""
        deadline = time.monotonic() + _LOCK_GRACE
        while True:
            self._stop.check()
            self._ledger.catch_up()
            excused = {self._accepted[task_id] for task_id in self._in_window()}
            locked = self._contender.locked(self._client, self._accepted)
            left = [path for path in locked if path not in excused]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(_TICK)

    def _in_window(self) -> set[str]:
        """Return the tasks that were queued last, and are in the queue no longer."""
        still_there = "".join(str(message) for message in self._client.lrange(_QUEUE, 0, -1))
        queued = self._ledger.tasks(Place.QUEUED)
        return {task_id for task_id in queued if task_id not in still_there}

    def _outcome(self, seconds: float, locks: list[str]) -> Outcome:
        self._events.catch_up()
        kills, executions = self._chaos.kills, self._events.executions
        pending = self._pending
        in_window = self._in_window() & pending
        queued = self._ledger.tasks(Place.QUEUED) & pending - in_window
        waiting = self._ledger.tasks(Place.HELD) & pending
        return Outcome(
            name=self._contender.name,
            calls=self._calls,
            accepted=len(self._accepted),
            kills=tuple(kills),
            done=len(self._results),
            waiting=len(waiting),
            queued=len(queued),
            gone=len(pending - in_window - queued - waiting),
            in_window=len(in_window),
            twice_at_once=overlaps(executions, kills),
            repeated=len(executions) - len({execution.task_id for execution in executions}),
            locks=tuple(locks),
            wrong=tuple(self._wrong()),
            restarts={
                "child": restarts(executions, kills, "child"),
                "worker": restarts(executions, kills, "worker"),
            },
            seconds=seconds,
            redelivery=self._contender.redelivery,
            deserters=tuple(worker.log[-2000:] for worker in self._crew.deserters),
        )

    def _wrong(self) -> Iterator[str]:
        expected = {item.path: item.expected for item in self._load.items}
        for task_id, result in self._results.items():
            path = self._accepted[task_id]
            if result != expected[path] and not _has_changed(path, expected[path]):
                yield f"{path}: {result}"

    def _show(self, elapsed: float) -> None:
        kills = self._chaos.kills
        children = sum(kill.target == "child" for kill in kills)
        hit = sum(any(kill.hit(execution) for kill in kills) for execution in self._events.running)
        self._screen.status(
            f"{self._contender.name}: {elapsed:3.0f} s  "
            f"{len(self._results)} of {len(self._load.items)} done, "
            f"{len(self._events.running) - hit} running, "
            f"killed {children} children and {len(kills) - children} workers"
        )


def _has_changed(path: str, expected: Any) -> bool:
    """Say whether somebody changed a file while the demo ran."""
    try:
        return bool(fingerprint(path) != expected)
    except OSError:
        return True
