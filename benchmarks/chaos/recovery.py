"""Seconds from a worker's end to the start of its task on another one that was there before."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from celery import Celery

from benchmarks.chaos.account import Row
from benchmarks.chaos.app import OURS, STEP, STOCK_DEFAULTS, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import Proxy

#: reliable_lease, by default and for a quick run (s).
_LEASE, _QUICK_LEASE = 15.0, 6.0
_WORKERS = 2
#: After a SIGKILL; and after anything else, longer than the lease (s).
_MEDIAN, _MOST, _BEYOND_LEASE = 3.0, 6.0, 3.0
#: How often stock looks for a dead worker's messages at its own pace (s).
_STOCK_PACE = 100.0
#: Nobody waits longer than this (s); the second is for stock at its own pace.
_BOUND, _LONG_BOUND = 60.0, 150.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--trials", type=int, help="SIGKILLs (default: 20; quick: 3)")
    parser.add_argument("--stops", type=int, help="SIGSTOPs, and cuts (default: 5; quick: 1)")
    parser.add_argument(
        "--default-trials",
        type=int,
        help="SIGKILLs with stock's own pace of looking for the dead (default: 3; quick: 0)",
    )


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
        slow = given.default_trials
        slow = (0 if given.quick else 3) if slow is None else slow
        return rows + ([_series(given, STOCK_DEFAULTS, "SIGKILL", slow, {})] if slow else [])
    for row, most in zip(rows, (_MOST, lease + _BEYOND_LEASE, lease + _BEYOND_LEASE), strict=True):
        limits = {"max": most, **({"median": _MEDIAN} if row is rows[0] else {})}
        row.broken = [
            f"{row.numbers['end']}: {name} {row.numbers[name]} s, more than {limit:g} s"
            for name, limit in limits.items()
            if row.numbers[name] is None or row.numbers[name] > limit
        ]
    return rows


def _series(
    given: argparse.Namespace, system: str, how: str, trials: int, settings: dict[str, Any]
) -> Row:
    draw = random.Random(f"recovery {how} {given.seed}")
    bound, pace = (_LONG_BOUND, _STOCK_PACE) if system == STOCK_DEFAULTS else (_BOUND, 0.0)
    seconds = []
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedServer() as server,
        ExitStack() as stack,
    ):
        journal = Journal(Path(directory, "journal"))
        app = make_app(system, server.url, settings)
        # Each one's network can be cut; else none is in the way of telling connections apart.
        cables = [stack.enter_context(Proxy(server.port)) for _ in range(_WORKERS)]
        fleet = Fleet(
            system,
            [cable.url() if how == "network cut" else server.url for cable in cables],
            journal.path,
            settings=settings,
            loglevel="INFO",
            logs=given.logs,
            concurrency=1,
        )
        with fleet:
            fleet.wait_ready()
            for _ in range(trials):
                # The end comes anywhere between two sweeps, and within a beat and a renewal.
                time.sleep(draw.uniform(0.0, pace))
                pause = draw.uniform(0.2, 2.2)
                seconds.append(_trial(app, fleet, journal, how, pause, cables, bound))
    found = [one for one in seconds if one is not None]
    return Row(
        system,
        {
            "end": how,
            "trials": trials,
            "min": round(min(found), 2) if found else None,
            "median": round(statistics.median(found), 2) if found else None,
            # One that did not come back has no longest time.
            "max": round(max(found), 2) if len(found) == trials else None,
            "bound": bound,
            "over it": trials - len(found),
        },
        details={"seconds": seconds, "tracebacks": fleet.tracebacks},
    )


def _trial(
    app: Celery,
    fleet: Fleet,
    journal: Journal,
    how: str,
    pause: float,
    cables: list[Proxy],
    bound: float,
) -> float | None:
    task_id = app.tasks[STEP].apply_async((2 * _BOUND, 0.0)).id
    slot = fleet.slot_of(journal.wait_start(task_id).host)
    time.sleep(pause)
    if how == "SIGKILL":
        # Not replaced yet: a new worker looks for the dead when it starts, but has to start.
        at = fleet.kill(slot, is_replaced=False)
    elif how == "SIGSTOP":
        at = fleet.stop(slot)
    else:
        at = time.time()
        cables[slot].black_hole()
    try:
        seconds = journal.wait_start(task_id, 2, bound).at - at
    except AssertionError:
        seconds = None
    if how == "SIGKILL":
        fleet.replace(slot)
    else:
        fleet.kill(slot)
        cables[slot].heal()
    for worker in fleet.workers:
        worker.wait_ready()
    return seconds
