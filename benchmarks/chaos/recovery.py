"""Seconds from a worker's end to the start of its task on another one."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from celery import Celery

from benchmarks.chaos.account import Row
from benchmarks.chaos.app import OURS, STEP, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import Proxy

#: reliable_lease, by default and for a quick run (s).
_LEASE, _QUICK_LEASE = 15.0, 6.0
_MEDIAN, _MOST, _BEYOND_LEASE = 3.0, 6.0, 3.0
_BOUND = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--trials", type=int, help="SIGKILLs (default: 20; quick: 3)")
    parser.add_argument("--stops", type=int, help="SIGSTOPs, and cuts (default: 5; quick: 1)")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    trials = given.trials or (3 if given.quick else 20)
    stops = given.stops or (1 if given.quick else 5)
    lease = _QUICK_LEASE if given.quick else _LEASE
    rows = [_series(given, system, "SIGKILL", trials, {})]
    rows += [
        _series(given, system, how, stops, {"reliable_lease": lease})
        for how in ("SIGSTOP", "network cut")
    ]
    if system != OURS:
        return rows
    for row, bound in zip(rows, (_MOST, lease + _BEYOND_LEASE, lease + _BEYOND_LEASE), strict=True):
        if row.numbers["max"] is None or row.numbers["max"] > bound:
            row.broken.append(f"max {row.numbers['max']} s, more than {bound:g} s")
    if rows[0].numbers["median"] is None or rows[0].numbers["median"] > _MEDIAN:
        rows[0].broken.append(f"median {rows[0].numbers['median']} s, more than {_MEDIAN:g} s")
    return rows


def _series(
    given: argparse.Namespace, system: str, how: str, trials: int, settings: dict[str, Any]
) -> Row:
    draw = random.Random(f"recovery {how} {given.seed}")
    with tempfile.TemporaryDirectory() as directory, EmbeddedServer() as server:
        journal = Journal(Path(directory, "journal"))
        app = make_app(system, server.url, settings)
        with Proxy(server.port) as proxy:
            # Only the first one's network is cut, so its task must be the first one's.
            is_cut = how == "network cut"
            urls = [proxy.url() if is_cut else server.url, server.url]
            fleet = Fleet(
                system,
                urls,
                journal.path,
                settings=settings,
                loglevel="INFO",
                logs=given.logs,
                concurrency=1,
            )
            with fleet:
                fleet.wait_ready()
                pauses = (draw.uniform(0.2, 2.2) for _ in range(trials))
                seconds = [_trial(app, fleet, journal, how, one, proxy) for one in pauses]
    found = [one for one in seconds if one is not None]
    return Row(
        system,
        {
            "end": how,
            "trials": trials,
            "min": round(min(found), 2) if found else None,
            "median": round(statistics.median(found), 2) if found else None,
            "max": round(max(found), 2) if len(found) == trials else None,
            f"over {_BOUND:g} s": trials - len(found),
        },
        details={"seconds": seconds, "tracebacks": fleet.tracebacks},
    )


def _trial(
    app: Celery, fleet: Fleet, journal: Journal, how: str, pause: float, proxy: Proxy
) -> float | None:
    task_id, slot = _start(app, fleet, journal)
    while how == "network cut" and slot != 0:
        # It went to the worker whose network stays: not what this is about.
        fleet.kill(slot)
        fleet.workers[slot].wait_ready()
        journal.wait_start(task_id, 2, _BOUND)
        task_id, slot = _start(app, fleet, journal)
    # The end comes anywhere within a beat and a renewal.
    time.sleep(pause)
    if how == "SIGKILL":
        at = fleet.kill(slot)
    elif how == "SIGSTOP":
        at = fleet.stop(slot)
    else:
        at = time.time()
        proxy.black_hole()
    try:
        seconds = journal.wait_start(task_id, 2, _BOUND).at - at
    except AssertionError:
        seconds = None
    if how != "SIGKILL":
        fleet.kill(slot)
        proxy.heal()
    for worker in fleet.workers:
        worker.wait_ready()
    return seconds


def _start(app: Celery, fleet: Fleet, journal: Journal) -> tuple[str, int]:
    """Have a task started; return its id and where it runs."""
    task_id = app.tasks[STEP].apply_async((2 * _BOUND, 0.0)).id
    return task_id, fleet.slot_of(journal.wait_start(task_id).host)
