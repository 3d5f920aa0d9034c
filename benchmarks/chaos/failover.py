"""The master of a Sentinel group dies or is replaced: what did its replica not know?"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.chaos.account import Account, Row, settle
from benchmarks.chaos.app import OURS, STOCK_TIMEOUT, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from benchmarks.chaos.producer import Producers
from reliable_tasks.demo._server import free_port
from tests.support import wait_until
from tests.support.redis_variants import SentinelGroup

#: Each short task runs for so long (s), and each producer pauses for so long: what is called
#: while the replica is alone is still in its queue when the master dies.
_SECONDS, _PAUSE = 0.05, 0.005
#: The replica has lost its master for so long (s) when that one dies.
_BEHIND = (0.2, 0.6)
_PARTS = ("losses", "long tasks")


@dataclass
class Scene:
    """One system on one Sentinel group."""

    group: SentinelGroup
    fleet: Fleet
    journal: Journal
    settings: dict[str, Any]

    def client(self) -> redis.Redis:
        """Return a client of the server that is the master now."""
        return redis.Redis(port=self.group.master.port)

    def wait(self, seconds: float) -> None:
        """Let time go by, and supervise the workers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.fleet.supervise()
            time.sleep(0.05)

    def account(self, producers: Producers, quiet: float) -> Account:
        """Wait until nothing moves, and count."""
        with self.client() as client:
            settle(
                lambda: producers.sent, self.journal, client, quiet=quiet, step=self.fleet.supervise
            )
            return Account.of(producers.sent, self.journal, self.fleet.deaths, client)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--trials", type=int, help="masters killed (default: 5; quick: 1)")
    parser.add_argument("--parts", default=",".join(_PARTS), help="default: all")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    parts = given.parts.split(",")
    rows = []
    if "losses" in parts:
        # WAIT is this library's.
        rows += [_losses(given, system, wait) for wait in ((0, 1) if system == OURS else (0,))]
    if "long tasks" in parts:
        for how in ("replaced", "killed"):
            rows.append(_long_tasks(given, system, how))
    return rows


def _losses(given: argparse.Namespace, system: str, wait: int) -> Row:
    """Kill masters whose replica lost them a moment before, under load."""
    trials = given.trials or (1 if given.quick else 5)
    draw = random.Random(f"failover {given.seed}")
    total: dict[str, int] = {}
    details = []
    for _ in range(trials):
        behind = draw.uniform(*_BEHIND)
        with _scene(given, system, workers=2, concurrency=4, wait=wait) as scene:
            app = make_app(system, scene.group.url(), scene.settings)
            with Producers(app, pause=_PAUSE, seconds=_SECONDS) as producers:
                scene.wait(2.0)
                with redis.Redis(port=scene.group.replica.port) as replica:
                    replica.replicaof("127.0.0.1", free_port())
                scene.wait(behind)
                dead = scene.group.kill_master()
                dead.start()
                with redis.Redis(port=dead.port) as client:
                    client.replicaof("127.0.0.1", scene.group.master.port)
                scene.group.wait_replica()
                scene.wait(3.0)
            account = scene.account(producers, _quiet(system))
            numbers = {
                **account.numbers(),
                "refused": len(producers.refused),
                "workers dead": len(scene.fleet.deserters),
            }
            total = {name: total.get(name, 0) + count for name, count in numbers.items()}
            details.append({"behind": behind, **account.details()})
    row = Row(
        system,
        {"part": "losses", "WAIT": wait, "masters": trials, **total},
        details={"trials": details},
    )
    if total["stuck"] or total["workers dead"]:
        row.broken.append(f"losses: {total['stuck']} stuck, {total['workers dead']} workers dead")
    if wait and total["lost"]:
        row.broken.append(f"losses: {total['lost']} lost although a replica had them")
    return row


def _long_tasks(given: argparse.Namespace, system: str, how: str) -> Row:
    """Replace the master while four workers run long tasks."""
    seconds = 12.0 if given.quick else 30.0
    with _scene(given, system, workers=4, concurrency=2, wait=0) as scene:
        app = make_app(system, scene.group.url(), scene.settings)
        producers = Producers(app, total=8, seconds=seconds)
        with producers:
            wait_until(lambda: scene.journal.read() >= 8, 30, "all running")
        with scene.client() as client:
            # What is not copied yet would be lost with the master; that is the other part's.
            client.execute_command("WAIT", 1, 5000)
        change: Callable[[], object] = (
            scene.group.failover if how == "replaced" else scene.group.kill_master
        )
        change()
        account = scene.account(producers, seconds + _quiet(system))
        deserters = scene.fleet.deserters
    row = Row(
        system,
        {
            "part": f"long tasks, {how}",
            "WAIT": 0,
            "masters": 1,
            **account.numbers(),
            "refused": len(producers.refused),
            "workers dead": len(deserters),
        },
        [f"long tasks, {how}: {what}" for what in account.broken()],
        account.details(),
    )
    if deserters:
        row.broken.append(f"long tasks, {how}: workers died by themselves: {deserters}")
    return row


def _quiet(system: str) -> float:
    return 40.0 if system == OURS else STOCK_TIMEOUT + 20.0


@contextmanager
def _scene(
    given: argparse.Namespace, system: str, *, workers: int, concurrency: int, wait: int
) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory() as directory, SentinelGroup(Path(directory)) as group:
        journal = Journal(Path(directory, "journal"))
        settings: dict[str, Any] = {"broker_transport_options": {"master_name": group.name}}
        if system == OURS:
            settings["reliable_wait_replicas"] = wait
        fleet = Fleet(
            system,
            [group.url()] * workers,
            journal.path,
            concurrency=concurrency,
            settings=settings,
            loglevel="INFO",
            args=["--without-mingle"],
            logs=given.logs,
        )
        with fleet:
            fleet.wait_ready()
            yield Scene(group, fleet, journal, settings)
