"""Short tasks, while whole workers are killed under load: how many are lost?"""

from __future__ import annotations

import argparse
import math
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

_WORKERS = 3
#: The load ends behind the last kill.
_KILLS_UNTIL = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--tasks", type=int, help="how many (default: 60000; quick: 3000)")
    parser.add_argument("--kills", type=int, help="how many (default: 90; quick: 6)")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    tasks = given.tasks or (3_000 if given.quick else 60_000)
    kills = given.kills or (6 if given.quick else 90)
    draw = random.Random(f"kills {given.seed}")
    due = [round(tasks * _KILLS_UNTIL * (n + draw.random()) / kills) for n in range(kills)]
    choices = [draw.randrange(60) for _ in due]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, EmbeddedServer() as server:
        journal = Journal(Path(directory, "journal"))
        client = redis.Redis(port=server.port)
        producers = Producers(make_app(system, server.url), total=tasks)
        fleet = Fleet(system, [server.url] * _WORKERS, journal.path, logs=given.logs)
        plan = list(zip(due, choices, strict=True))
        with fleet, producers:

            def step() -> None:
                fleet.supervise()
                if plan and journal.done >= plan[0][0]:
                    # Under load: the worker has run tasks since it was started.
                    busy = [
                        slot
                        for slot, worker in enumerate(fleet.workers)
                        if worker.hostname in journal.hosts
                    ]
                    if busy:
                        fleet.kill(busy[plan.pop(0)[1] % len(busy)])
                producers.allowed = plan[0][0] + 2 * tasks / kills if plan else math.inf

            while plan and not (producers.is_done and journal.done >= len(producers.sent)):
                journal.read()
                step()
                time.sleep(0.01)
            quiet = 30.0 if system == OURS else STOCK_TIMEOUT + 20.0
            settle(lambda: producers.sent, journal, client, quiet=quiet, step=step)
            account = Account.of(producers.sent, journal, fleet.deaths, client)
    row = Row(
        system,
        {
            "kills": len(fleet.deaths) - len(fleet.deserters),
            **account.numbers(),
            "workers dead": len(fleet.deserters),
            "seconds": round(time.monotonic() - began),
        },
        account.broken(),
        {**account.details(), "tracebacks": fleet.tracebacks, "refused": producers.refused},
    )
    if fleet.deserters:
        row.broken.append(f"workers died by themselves: {fleet.deserters}")
    if row.numbers["kills"] < kills:
        row.broken.append(f"only {row.numbers['kills']} of {kills} kills hit a busy worker")
    return [row]
