"""Every lifetime of a key, every way of ending, every pool: who has the key before, during, after.

Cells of a row, which are of one way of ending and one pool, share a worker. CI runs the prefork
column and a sample of the others; ``make bench-table`` runs all and keeps what was seen.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import gevent
import pytest
import redis
from celery import Task, states
from kombu import Producer
from kombu.exceptions import EncodeError, OperationalError
from kombu.transport import virtual

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import ends
from tests.integration.conftest import StartScene, lose_connections, other_database
from tests.integration.scene import Scene
from tests.support import WorkerProcess, wait_until

POOLS = ("prefork", "threads", "solo", "gevent", "eventlet")
#: How many rows of the other pools than prefork are run, where not all are.
SAMPLE = 8
#: Slots of a worker: enough for a task of each lifetime.
SLOTS = 6
#: How long a task that is stopped by its limit may run (s): until its claim was looked at.
LIMIT = 12

FREE, OWNED, HELD, TURN, UNCONFIRMED = "free", "owned", "held", "turn", "unconfirmed"
_OF_CALLS = dict.fromkeys(ends.LIFETIMES, OWNED)
#: Who has the key of a task that is queued, ...
QUEUED = {**_OF_CALLS, "while_executing": FREE}
#: ... of one that runs, ...
RUNNING = {
    "until_executed": HELD,
    "until_executing": FREE,
    "until_expired": f"{OWNED} and {TURN}",
    "while_executing": TURN,
    "until_and_while_executing": TURN,
}
#: ... of one that has started, and is back in the queue, ...
BACK = dict.fromkeys(ends.LIFETIMES, FREE) | {
    "until_executed": OWNED,
    "until_expired": OWNED,
}
#: ... and of one that has ended.
OVER = dict.fromkeys(ends.LIFETIMES, FREE) | {"until_expired": OWNED}


def who_has(scene: Scene, task: str, name: str, task_id: str | None = None) -> str:
    """Say in a word what there is of a call's claim, and of its turn to run."""
    claim_name = scene.claim_name(name, task=task)
    key, turn = (scene.claims.read(known) for known in (claim_name, f"{claim_name}:turn"))
    assert {claim["owner"] for claim in (key, turn) if claim} <= {task_id}
    found = [HELD if "holder" in key else OWNED] if key else []
    if key and key.get("unconfirmed") == key["owner"]:
        found = [UNCONFIRMED]
    found += [TURN] if turn else []
    return " and ".join(found) or FREE


#: What there was of each lifetime's claim, by the moment.
Seen = dict[str, list[tuple[str, str]]]


class Row:
    """A task of each lifetime, all in one worker, which all end in the same way.

    Args:
        scene: The app.
        pool: Its worker's pool.
        ending: How they end.
        lifetimes: Which of them there are.
        start: Starts a worker for them; or has one that is shared take them.
        queue: Where they are queued.
    """

    def __init__(
        self,
        scene: Scene,
        pool: str,
        ending: Ending,
        lifetimes: Sequence[str],
        start: Callable[[Row], WorkerProcess],
        queue: str = "celery",
    ) -> None:
        self.worker: WorkerProcess
        self.scene, self.pool = scene, pool
        self.queue = queue
        self.names = {lifetime: uuid4().hex[:8] for lifetime in lifetimes}
        self.seen: Seen = {lifetime: [] for lifetime in lifetimes}
        self._ending, self._start = ending, start
        self.options = {"queue": queue, **ending.options}
        self.results = {
            lifetime: scene.call(self._task(lifetime), name, ending.how, **self.options)
            for lifetime, name in self.names.items()
        }
        self.note("queued", QUEUED)

    def go(self) -> None:
        """See them from their start to their end."""
        ending = self._ending
        ending.before(self)
        self.worker = self._start(self)
        if ending.runs:
            self.note_start("running", 1)
            ending.meanwhile(self)
        if ending.runs == 2:
            self.note_start("running again", 2)
            self.open(2)
        if ending.runs == 0:
            for result in self.results.values():
                self.worker.wait_log(f"Discarding revoked task: .*{result.id}", timeout=30)
        for lifetime, result in self.results.items():
            wait_until(
                lambda result=result: result.state == ending.state,
                30,
                lambda lifetime=lifetime, result=result: (
                    f"{ending.state} of {lifetime}, not {result.state}\n{self.scene.logs}"
                ),
            )
        self.note("over", OVER)

    def check_starts(self) -> None:
        """Check that none was started once more, now that nobody will any more."""
        for lifetime, name in self.names.items():
            about = f"{self._ending} of {lifetime}\n{self.scene.logs}"
            assert self.scene.starts(name) == self._ending.runs, about

    def start_another(self) -> None:
        """Start a worker in place of the one that is gone."""
        self.worker = self._start(self)

    def open(self, run: int) -> None:
        """Let them go on to the end of a run."""
        for name in self.names.values():
            self.scene.journal.open(ends.gate(name, run))

    def note_start(self, moment: str, run: int) -> None:
        """Note who has the keys of those that run, each as soon as it does."""
        for lifetime, name in self.names.items():
            self.scene.wait_starts(name, run, timeout=30)
            self._note(moment, lifetime, RUNNING[lifetime])

    def note(self, moment: str, expected: Mapping[str, str]) -> None:
        """Note who has the keys."""
        for lifetime in self.names:
            self._note(moment, lifetime, expected[lifetime])

    def _note(self, moment: str, lifetime: str, expected: str) -> None:
        wait_until(
            lambda: self._state(lifetime) == expected,
            15,
            lambda: (
                f"{moment}, {lifetime}: {expected}, not {self._state(lifetime)}; "
                f"seen until now: {self.seen[lifetime]}\n{self.scene.logs}"
            ),
        )
        self.seen[lifetime].append((moment, expected))

    def _state(self, lifetime: str) -> str:
        task_id = self.results[lifetime].id
        return who_has(self.scene, self._task(lifetime), self.names[lifetime], task_id)

    def _task(self, lifetime: str) -> str:
        return f"ends {lifetime}{self._ending.kind}"


def _nothing(row: Row) -> None:
    pass


def _go_on(row: Row) -> None:
    row.open(1)


def _see_the_end(row: Row) -> None:
    row.open(1)
    for name in row.names.values():
        wait_until(lambda name=name: row.scene.journal.events("end", name=name), 30)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A way in which a task can end.

    Attributes:
        name: What it is called in the table.
        how: What the task does at the end of its first run.
        state: Its state when all is over.
        runs: How often it is started.
        options: What it is called with.
        before: What happens before a worker has it.
        meanwhile: What happens while it runs.
        not_in: Pools that cannot do it, each with the reason.
        settings: Settings of its worker.
        kind: Which task it is.
    """

    name: str
    how: str = "succeed"
    state: str = states.SUCCESS
    runs: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Row], None] = _nothing
    meanwhile: Callable[[Row], None] = _go_on
    not_in: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""

    def __str__(self) -> str:
        return self.name


def _revoke(row: Row) -> None:
    ids = {result.id for result in row.results.values()}

    def are_revoked() -> bool:
        # A green worker can be ready a moment before it listens.
        row.scene.app.control.revoke(list(ids))
        return ids <= row.scene.revoked()

    wait_until(are_revoked, 30)


def _terminate(row: Row) -> None:
    for result in row.results.values():
        result.revoke(terminate=True)


def _let_expire(row: Row) -> None:
    time.sleep(row.options["expires"] + 0.1)


def _take_retry(row: Row) -> None:
    row.open(1)
    row.note("waits for its retry", QUEUED)
    for name in row.names.values():
        row.scene.release(ends.parked(name))


def _kill(row: Row) -> None:
    row.worker.kill_group()
    row.note("killed", RUNNING)
    row.start_another()


def _lose_connections(row: Row) -> None:
    with redis.Redis.from_url(str(row.scene.app.conf.broker_url)) as broker:
        # A busy solo worker looks at its connection when it has time.
        lose_connections(row.worker, broker, waits=row.pool != "solo")
    row.note("connections lost", RUNNING)
    row.open(1)


def _stop_warm(row: Row) -> None:
    row.worker.terminate()
    row.worker.wait_log("Warm shutdown", timeout=30)
    row.open(1)


def _stop_soft(row: Row) -> None:
    row.worker.send_signal(signal.SIGQUIT)
    row.worker.wait_log("Initiating Soft Shutdown", timeout=30)
    row.open(1)


def _stop_cold(row: Row) -> None:
    row.worker.send_signal(signal.SIGQUIT)
    row.worker.wait()
    row.note("back in the queue", BACK)
    row.start_another()


def _stop_cold_in_the_end(row: Row) -> None:
    row.worker.send_signal(signal.SIGQUIT)
    row.worker.wait_log(r"Hitting Ctrl\+C", timeout=30)
    row.open(1)


_CHILDREN = "it has no child processes"
_SOFT_LIMITS = "Celery has soft time limits in prefork alone"
_HARD_LIMITS = "Celery has hard time limits in prefork and gevent alone"
_STOPPED = "Celery cannot stop its tasks"

#: Those that a worker outlives.
OF_TASKS = (
    Ending(name="success"),
    Ending(name="failure", how="fail", state=states.FAILURE),
    # Its state is that of a task that runs.
    Ending(name="Ignore", how="ignore", state=states.STARTED, meanwhile=_see_the_end),
    Ending(name="Reject", how="reject", state=states.FAILURE),
    Ending(name="Reject, requeue", how="requeue", runs=2),
    Ending(name="replace", how="replace_same", runs=2),
    Ending(name="SystemExit", how="exit", state=states.FAILURE),
    Ending(name="retry", how="retry", runs=2, meanwhile=_take_retry),
    Ending(name="no retry left", how="retry in vain", state=states.FAILURE),
    Ending(name="retry not published", how="retry unsent", state=states.FAILURE),
    Ending(
        name="soft time limit",
        state=states.FAILURE,
        options={"soft_time_limit": LIMIT},
        meanwhile=_nothing,
        not_in=dict.fromkeys(POOLS[1:], _SOFT_LIMITS),
    ),
    Ending(
        name="hard time limit",
        state=states.FAILURE,
        options={"time_limit": LIMIT},
        meanwhile=_nothing,
        not_in=dict.fromkeys(("threads", "solo", "eventlet"), _HARD_LIMITS),
    ),
    Ending(name="revoked before its start", state=states.REVOKED, runs=0, before=_revoke),
    Ending(
        name="terminated",
        state=states.REVOKED,
        meanwhile=_terminate,
        not_in=dict.fromkeys(("threads", "solo"), _STOPPED),
    ),
    Ending(
        name="expired", state=states.REVOKED, runs=0, options={"expires": 0.5}, before=_let_expire
    ),
    Ending(
        name="child killed",
        how="die",
        runs=2,
        not_in=dict.fromkeys(POOLS[1:], _CHILDREN),
    ),
)
if hasattr(Task, "retry_on_worker_lost"):
    OF_TASKS += (
        Ending(
            name="child killed, retry_on_worker_lost",
            how="die",
            runs=2,
            kind=ends.RETRIED,
            not_in=dict.fromkeys(POOLS[1:], _CHILDREN),
        ),
    )
#: Those that are of a worker, or of what it is connected to.
OF_WORKERS = (
    Ending(name="worker killed", runs=2, meanwhile=_kill),
    Ending(name="connection lost", meanwhile=_lose_connections),
    Ending(name="warm shutdown", meanwhile=_stop_warm),
    Ending(
        name="soft shutdown",
        meanwhile=_stop_soft,
        settings={"worker_soft_shutdown_timeout": 12.0},
    ),
    Ending(
        name="cold shutdown",
        runs=2,
        meanwhile=_stop_cold,
        settings={"worker_soft_shutdown_timeout": 0.0},
        not_in=dict.fromkeys(("threads", "solo"), _STOPPED),
    ),
    Ending(
        name="cold shutdown, which waits",
        meanwhile=_stop_cold_in_the_end,
        settings={"worker_soft_shutdown_timeout": 0.0},
        not_in=dict.fromkeys(("prefork", "gevent", "eventlet"), "it stops its tasks"),
    ),
)


def _rows() -> list[tuple[str, Ending, Sequence[str]]]:
    """Return the rows that are run: all, or prefork's and a sample.

    A solo worker has one slot: each of its rows is of one lifetime.
    """
    rows = [
        (pool, ending, lifetimes)
        for pool in POOLS
        for ending in (*OF_TASKS, *OF_WORKERS)
        if pool not in ending.not_in
        for lifetimes in ([[one] for one in ends.LIFETIMES] if pool == "solo" else [ends.LIFETIMES])
    ]
    if os.environ.get("RT_TABLE") == "all":
        return rows
    others = [row for row in rows if row[0] != "prefork"]
    return [row for row in rows if row[0] == "prefork"] + random.Random(1).sample(others, SAMPLE)


def _those_of(endings: Sequence[Ending]) -> pytest.MarkDecorator:
    rows = [row for row in _rows() if row[1] in endings]
    ids = [
        "-".join([pool, str(ending), *(lifetimes if len(lifetimes) == 1 else ())])
        for pool, ending, lifetimes in rows
    ]
    return pytest.mark.parametrize(("pool", "ending", "lifetimes"), rows, ids=ids)


class Shops:
    """A worker of each pool that is asked for, and what was run there."""

    def __init__(self, server: EmbeddedServer, start: StartScene) -> None:
        self.rows: list[Row] = []
        self._server, self._start = server, start
        self._scenes: dict[str, Scene] = {}

    def __getitem__(self, pool: str) -> Scene:
        if pool not in self._scenes:
            urls = (other_database(self._server, 2 * len(self._scenes) + n) for n in (0, 1))
            self._scenes[pool] = self._start(*urls, module=ends)
            self._scenes[pool].worker(pool=pool, concurrency=SLOTS)
        return self._scenes[pool]


@pytest.fixture(scope="module")
def shops(module_redis: EmbeddedServer, module_scenes: StartScene) -> Iterator[Shops]:
    """Start the workers that the module's tests share."""
    shops = Shops(module_redis, module_scenes)
    yield shops
    for row in shops.rows:
        row.check_starts()


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Keep what was seen of a row for the table."""

    def keep(where: str, ending: Ending | str, seen: Seen) -> None:
        record_property("row", [where, str(ending), seen])

    return keep


@_those_of(OF_TASKS)
def test_a_task_ends(
    shops: Shops, note: Callable[..., None], pool: str, ending: Ending, lifetimes: Sequence[str]
) -> None:
    """Its worker goes on."""
    scene = shops[pool]
    (worker,) = scene.workers

    def take(row: Row) -> WorkerProcess:
        scene.release(row.queue)
        return worker

    row = Row(scene, pool, ending, lifetimes, take, queue=uuid4().hex[:8])
    shops.rows.append(row)
    row.go()
    note(pool, ending, row.seen)
    assert worker.running


@_those_of(OF_WORKERS)
def test_a_task_ends_as_its_worker_does(
    redis_server: EmbeddedServer,
    scenes: StartScene,
    note: Callable[..., None],
    pool: str,
    ending: Ending,
    lifetimes: Sequence[str],
) -> None:
    """Or goes on in another one."""
    urls = (redis_server.url, other_database(redis_server))
    scene = scenes(*urls, module=ends, settings=dict(ending.settings))
    row = Row(scene, pool, ending, lifetimes, lambda _: scene.worker(pool=pool, concurrency=SLOTS))
    row.go()
    scene.stop_workers()
    row.check_starts()
    note(pool, ending, row.seen)


class _Interrupted:
    """A publish that is interrupted, before or after the broker has the message.

    Args:
        error: What interrupts it.
        whose: Whose publish: one that has to connect first, or one that sends.
        is_late: Whether the broker has the message.
    """

    def __init__(self, error: BaseException, whose: type, *, is_late: bool = False) -> None:
        self._error, self._whose, self._is_late = error, whose, is_late

    @contextmanager
    def __call__(self, scene: Scene) -> Iterator[None]:
        name = "publish" if self._whose is Producer else "basic_publish"
        publish = getattr(self._whose, name)

        def interrupted(*args: Any, **kwargs: Any) -> None:
            if self._is_late:
                publish(*args, **kwargs)
            raise self._error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._whose, name, interrupted)
            with pytest.raises(type(self._error)):
                yield


@contextmanager
def _refused(scene: Scene) -> Iterator[None]:
    """Have the broker take nothing any more."""
    with redis.Redis.from_url(str(scene.app.conf.broker_url)) as broker:
        broker.config_set("maxmemory", 1)
        try:
            with pytest.raises(OperationalError):
                yield
        finally:
            broker.config_set("maxmemory", 0)


@contextmanager
def _unserialisable(scene: Scene) -> Iterator[None]:
    with pytest.raises(EncodeError):
        yield


@contextmanager
def _purged(scene: Scene) -> Iterator[None]:
    yield
    assert scene.app.control.purge() == 1


_NOBODYS = dict.fromkeys(ends.LIFETIMES, FREE)
#: Of a call that may have been queued: the next one takes its place.
_IN_DOUBT = {**dict.fromkeys(ends.LIFETIMES, UNCONFIRMED), "while_executing": FREE}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A way in which a call can come to nothing.

    Attributes:
        happens: Lets it happen to the call that is made inside.
        argument: What the call has as an argument.
        with_one_redis: Who has the key then, with claims on the broker's Redis, ...
        with_two: ... and with claims on another one.
    """

    happens: Callable[[Scene], AbstractContextManager[None]]
    argument: Any = ""
    with_one_redis: Mapping[str, str] = field(default_factory=_NOBODYS.copy)
    with_two: Mapping[str, str] = field(default_factory=_NOBODYS.copy)


OF_CALLS = {
    "publish refused": Failure(happens=_refused),
    "publish not serialisable": Failure(happens=_unserialisable, argument=object()),
    "purged": Failure(happens=_purged, with_one_redis=OVER, with_two=OVER),
}
for error in (KeyboardInterrupt(), GeneratorExit(), gevent.Timeout(1)):
    named = f"publish interrupted: {type(error).__name__}"
    OF_CALLS[named] = Failure(happens=_Interrupted(error, Producer))
    # Where its claim is a step of its own, its caller cannot know whether the message is queued.
    OF_CALLS[f"{named}, on the way"] = Failure(
        happens=_Interrupted(error, virtual.Channel), with_two=_IN_DOUBT
    )
    OF_CALLS[f"{named}, too late"] = Failure(
        happens=_Interrupted(error, Producer, is_late=True),
        with_one_redis=QUEUED,
        with_two=_IN_DOUBT,
    )


@pytest.mark.parametrize("ending", OF_CALLS)
@pytest.mark.parametrize("where", ["the broker's Redis", "another Redis"])
def test_a_call_comes_to_nothing(
    redis_server: EmbeddedServer,
    module_redis: EmbeddedServer,
    scenes: StartScene,
    note: Callable[..., None],
    where: str,
    ending: str,
) -> None:
    """Nobody has its key, unless its message is queued all the same, or may be."""
    has_one = where == "the broker's Redis"
    settings = {"reliable_redis_url": (redis_server if has_one else module_redis).url}
    scene = scenes(redis_server.url, None, module=ends, settings=settings)
    failure = OF_CALLS[ending]
    expected = failure.with_one_redis if has_one else failure.with_two
    seen = {}
    for lifetime in ends.LIFETIMES:
        task_id = str(uuid4())
        with failure.happens(scene):
            scene.call(f"ends {lifetime}", task_id, failure.argument, task_id=task_id)
        found = who_has(scene, f"ends {lifetime}", task_id, task_id)
        assert found == expected[lifetime], lifetime
        seen[lifetime] = [("over", found)]
    note(f"client, lock on {where}", ending, seen)
