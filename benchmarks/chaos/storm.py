"""Long tasks, while whole workers are killed: is each done, and none run without need?"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import redis

from benchmarks.chaos.account import Account, Row, settle
from benchmarks.chaos.app import OURS, STOCK_TIMEOUT, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from benchmarks.chaos.producer import Producers
from reliable_tasks.demo._server import EmbeddedServer

_WORKERS, _CONCURRENCY = 4, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--tasks", type=int, help="how many (default: 60; quick: 20)")
    parser.add_argument("--kills", type=int, help="how many (default: 6; quick: 2)")
    parser.add_argument("--task-seconds", type=float, help="each (default: 13; quick: 7)")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    tasks = given.tasks or (20 if given.quick else 60)
    kills = given.kills or (2 if given.quick else 6)
    seconds = given.task_seconds or (7.0 if given.quick else 13.0)
    draw = random.Random(f"storm {given.seed}")
    span = seconds * tasks / (_WORKERS * _CONCURRENCY)
    plan = [
        (span * (number + draw.random()) / kills, draw.randrange(_WORKERS))
        for number in range(kills)
    ]
    with tempfile.TemporaryDirectory() as directory, EmbeddedServer() as server:
        journal = Journal(Path(directory, "journal"))
        client = redis.Redis(port=server.port)
        producers = Producers(make_app(system, server.url), total=tasks, seconds=seconds)
        fleet = Fleet(
            system,
            [server.url] * _WORKERS,
            journal.path,
            concurrency=_CONCURRENCY,
            loglevel="INFO",
            logs=given.logs,
        )
        with fleet:
            fleet.wait_ready()
            began = time.monotonic()
            with producers:

                def step() -> None:
                    fleet.supervise()
                    if not plan or time.monotonic() - began < plan[0][0]:
                        return
                    if fleet.workers[plan[0][1]].hostname in journal.hosts:
                        fleet.kill(plan.pop(0)[1])

                quiet = seconds + (30.0 if system == OURS else STOCK_TIMEOUT + 20.0)
                settle(
                    lambda: producers.sent if producers.is_done and not plan else [""],
                    journal,
                    client,
                    quiet=quiet,
                    step=step,
                )
            account = Account.of(producers.sent, journal, fleet.deaths, client)
            took = time.monotonic() - began
    # A run whose worker was killed between its last line and its acknowledgement.
    as_killed = sum(
        1
        for task_id, ends in journal.ends.items()
        for end in ends
        if end.host in fleet.deaths
        and any(start.at > fleet.deaths[end.host] for start in journal.starts[task_id])
    )
    row = Row(
        system,
        {
            "kills": len(fleet.deaths) - len(fleet.deserters),
            **account.numbers(),
            "ended as killed": as_killed,
            "workers dead": len(fleet.deserters),
            "seconds": round(took),
        },
        account.broken(),
        {**account.details(), "tracebacks": fleet.tracebacks},
    )
    if account.completions != tasks + as_killed:
        row.broken.append(f"{account.completions} completions, not {tasks} + {as_killed}")
    if fleet.deserters:
        row.broken.append(f"workers died by themselves: {fleet.deserters}")
    if row.numbers["kills"] < kills:
        row.broken.append(f"only {row.numbers['kills']} of {kills} kills hit a busy worker")
    return [row]
