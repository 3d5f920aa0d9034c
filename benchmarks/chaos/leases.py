"""Tasks many times longer than their lease, in each pool: how often does each start?

One worker has long tasks, one with a countdown, and one that lets nothing else of its process
run: it does not release the GIL, or it is a green thread that needs the whole processor. Then a
second worker comes, and puts back what seems to be nobody's.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from benchmarks.chaos.account import Row
from benchmarks.chaos.app import GIL, OURS, SPIN, STEP, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from reliable_tasks.demo._server import EmbeddedServer

_POOLS: dict[str, tuple[str, ...]] = {
    "prefork": (GIL,),
    "threads": (GIL,),
    "solo": (GIL,),
    "gevent": (GIL, SPIN),
    "eventlet": (GIL, SPIN),
}
#: What a worker of ours says that could not keep its leases.
_CONFESSIONS = ("lost its lease", "after its lease", "no longer renews", "No lease")
#: What the starts of workers and a busy machine may add (s).
_GRACE = 20.0


@dataclass(frozen=True)
class Lengths:
    """Seconds.

    Attributes:
        lease: Of a lease; for stock Celery its visibility_timeout.
        long: That a task lasts, and that another one waits for.
        gil: In which the GIL is not released.
        spin: In which a green thread lets no other run.
    """

    lease: float
    long: float
    gil: float
    spin: float


_FULL = Lengths(lease=10, long=60, gil=5, spin=20)
_QUICK = Lengths(lease=3, long=9, gil=1.5, spin=5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--pools", default=",".join(_POOLS), help="default: all")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    return [
        _pool(given, system, pool, blocking)
        for pool in given.pools.split(",")
        for blocking in _POOLS[pool]
    ]


def _pool(given: argparse.Namespace, system: str, pool: str, blocking: str) -> Row:
    lengths = _QUICK if given.quick else _FULL
    draw = random.Random(f"leases {pool} {blocking} {given.seed}")
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedServer() as server,
        ExitStack() as stack,
    ):
        client = redis.Redis(port=server.port)
        journal = Journal(Path(directory, "journal"))
        settings: dict[str, Any] = (
            {"reliable_lease": lengths.lease}
            if system == OURS
            else {"broker_transport_options": {"visibility_timeout": lengths.lease}}
        )
        first, second = (
            Fleet(
                system,
                [server.url],
                journal.path,
                pool=pool,
                concurrency=1 if pool == "solo" else 4,
                settings=settings,
                loglevel="INFO",
                logs=given.logs,
            )
            for _ in range(2)
        )
        stack.enter_context(first).wait_ready()
        called = time.time()
        tasks = _call(make_app(system, server.url, settings), journal, first, blocking, lengths)
        # The second one may look for the dead at any moment of the first one's beats.
        time.sleep(draw.uniform(0.0, lengths.gil / 5))
        stack.enter_context(second)

        def goes_on() -> bool:
            first.supervise()
            second.supervise()
            journal.read()
            return not all(one in journal.ends for one in tasks.values())

        until = time.monotonic() + 2 * lengths.long + lengths.spin + _GRACE
        while goes_on():
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        # What is put back late starts late.
        time.sleep(lengths.lease + 3.0)
        goes_on()
        held = int(client.hlen("unacked"))
        logs = first.workers[0].log + second.workers[0].log
    starts = {name: len(journal.starts[task_id]) for name, task_id in tasks.items()}
    waited = min((one.at for one in journal.starts[tasks["countdown"]]), default=called) - called
    numbers = {
        "leases lost": sum(logs.count(one) for one in _CONFESSIONS),
        "never ended": sum(one not in journal.ends for one in tasks.values()),
        "left held": held,
        "workers dead": len(first.deserters) + len(second.deserters),
    }
    found = [f"{name} started {count} times" for name, count in starts.items() if count != 1]
    found += [f"{count} {name}" for name, count in numbers.items() if count]
    if waited < lengths.long:
        found.append(f"the countdown of {lengths.long:g} s ended after {waited:.1f} s")
    return Row(
        system,
        {
            "pool": pool,
            "blocked by": blocking,
            **{f"starts: {name}": count for name, count in starts.items()},
            **numbers,
            "seconds": round(time.monotonic() - began),
        },
        [f"{pool}, {blocking}: {what}" for what in found],
        {
            "starts": {name: [str(one) for one in journal.starts[tasks[name]]] for name in tasks},
            "tracebacks": {**first.tracebacks, **second.tracebacks},
        },
    )


def _call(
    app: Celery, journal: Journal, first: Fleet, blocking: str, lengths: Lengths
) -> dict[str, str]:
    """Have the only worker take tasks; return their ids."""
    step: Any = app.tasks[STEP]
    tasks = {"countdown": step.apply_async(countdown=lengths.long).id}
    first.workers[0].wait_log(f"{tasks['countdown']}.* received")
    seconds = lengths.gil if blocking == GIL else lengths.spin
    calls = {
        "long": (lengths.long,),
        "long, too": (lengths.long,),
        "blocking": (seconds, None, blocking),
    }
    # Solo runs one at a time: first the one that blocks, then a long one on each worker.
    is_solo = first.pool == "solo"
    for name in reversed(calls) if is_solo else calls:
        tasks[name] = step.apply_async(calls[name]).id
        if not is_solo or name == "blocking":
            journal.wait_start(tasks[name])
    return {name: tasks[name] for name in ("countdown", *calls)}
