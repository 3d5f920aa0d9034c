"""Connections killed, replies lost, Redis killed, restarted and stopped, all under load."""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.chaos.account import Account, Row, settle
from benchmarks.chaos.app import OURS, STEP, STOCK_TIMEOUT, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from benchmarks.chaos.producer import Producers
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import Proxy, wait_until

_WORKERS = 3
#: Each task runs for so long (s): at any moment some are under way.
_SECONDS = 0.3
#: Of the long tasks of a quick run (s): they must be renewed after the restart.
_SHORT_LEASE = 5.0
_DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
_PARTS = ("connections", "restarts", "pause", "long tasks")


@dataclass
class Scene:
    """One system under load.

    Attributes:
        server: The broker.
        proxy: Between the producers and the broker.
        fleet: The workers.
        journal: What their tasks wrote.
        draw: What happens when.
    """

    server: EmbeddedServer
    proxy: Proxy
    fleet: Fleet
    journal: Journal
    draw: random.Random
    faults: int = 0

    def client(self) -> redis.Redis:
        """Return a client that is not behind the proxy."""
        return redis.Redis(port=self.server.port)

    def wait(self, seconds: float) -> None:
        """Let time go by, and supervise the workers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.fleet.supervise()
            time.sleep(0.05)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--seconds", type=float, help="of killing (default: 60; quick: 6)")
    parser.add_argument("--restarts", type=int, help="how many (default: 10; quick: 2)")
    parser.add_argument("--pause", type=float, help="SIGSTOP, s (default: 10; quick: 5)")
    parser.add_argument("--parts", default=",".join(_PARTS), help="default: all")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    seconds = given.seconds or (6.0 if given.quick else 60.0)
    restarts = given.restarts or (2 if given.quick else 10)
    pause = given.pause or (5.0 if given.quick else 10.0)
    parts: dict[str, Callable[[], Row]] = {
        "connections": lambda: _under_load(
            given, system, "connections", lambda scene: _kill_connections(scene, seconds)
        ),
        "restarts": lambda: _under_load(
            given, system, "restarts", lambda scene: _kill_server(scene, restarts)
        ),
        "pause": lambda: _under_load(
            given, system, "pause", lambda scene: _stop_server(scene, pause)
        ),
        "long tasks": lambda: _long_tasks(given, system),
    }
    return [parts[name]() for name in given.parts.split(",")]


def _kill_connections(scene: Scene, seconds: float) -> None:
    """Kill all connections each second, and lose replies to publishes in between."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        scene.wait(scene.draw.uniform(0.2, 0.8))
        scene.proxy.lose_replies(STEP.encode(), times=2)
        scene.faults += 2
        scene.wait(0.3)
        with scene.client() as client:
            for kind in ("normal", "pubsub"):
                scene.faults += int(client.client_kill_filter(_type=kind))


def _kill_server(scene: Scene, restarts: int) -> None:
    for _ in range(restarts):
        scene.wait(scene.draw.uniform(2.0, 5.0))
        scene.server.kill()
        scene.wait(scene.draw.choice((0.0, 0.3, 2.0)))
        scene.server.start()
        scene.faults += 1
    scene.wait(3.0)


def _stop_server(scene: Scene, pause: float) -> None:
    scene.wait(2.0)
    os.kill(scene.server.pid, signal.SIGSTOP)
    scene.wait(pause)
    os.kill(scene.server.pid, signal.SIGCONT)
    scene.faults += 1
    scene.wait(3.0)


@contextmanager
def _scene(
    given: argparse.Namespace,
    system: str,
    part: str,
    workers: int,
    concurrency: int,
    settings: dict[str, Any] | None = None,
) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory() as directory, EmbeddedServer(args=_DURABLE) as server:
        journal = Journal(Path(directory, "journal"))
        fleet = Fleet(
            system,
            [server.url] * workers,
            journal.path,
            concurrency=concurrency,
            settings=settings,
            loglevel="INFO",
            # It waits a second for neighbours at each reconnection, in which nothing is fetched.
            args=["--without-mingle"],
            logs=given.logs,
        )
        with Proxy(server.port) as proxy, fleet:
            fleet.wait_ready()
            draw = random.Random(f"outages {part} {given.seed}")
            yield Scene(server, proxy, fleet, journal, draw)


def _under_load(
    given: argparse.Namespace, system: str, part: str, harm: Callable[[Scene], None]
) -> Row:
    with _scene(given, system, part, _WORKERS, 4) as scene:
        app = make_app(system, scene.proxy.url())
        began = time.monotonic()
        with Producers(app, pause=0.08, seconds=_SECONDS) as producers:
            harm(scene)
        scene.proxy.heal()
        quiet = 30.0 if system == OURS else STOCK_TIMEOUT + 20.0
        with scene.client() as client:
            settle(
                lambda: producers.sent,
                scene.journal,
                client,
                quiet=quiet,
                step=scene.fleet.supervise,
            )
            account = Account.of(producers.sent, scene.journal, scene.fleet.deaths, client)
        took = time.monotonic() - began
    return _row(system, part, scene, account, producers, took)


def _long_tasks(given: argparse.Namespace, system: str) -> Row:
    """Restart the server while four workers run long tasks."""
    seconds, settings = (10.0, {"reliable_lease": _SHORT_LEASE}) if given.quick else (30.0, {})
    with _scene(given, system, "long tasks", 4, 2, settings) as scene:
        began = time.monotonic()
        app = make_app(system, scene.proxy.url(), settings)
        producers = Producers(app, total=8, seconds=seconds)
        with producers:
            wait_until(lambda: scene.journal.read() >= 8, 30, "all running")
        scene.wait(scene.draw.uniform(0.5, 2.0))
        scene.server.kill()
        scene.wait(0.5)
        scene.server.start()
        scene.faults += 1
        with scene.client() as client:
            settle(
                lambda: producers.sent,
                scene.journal,
                client,
                quiet=seconds + 20.0,
                step=scene.fleet.supervise,
            )
            account = Account.of(producers.sent, scene.journal, scene.fleet.deaths, client)
        took = time.monotonic() - began
    return _row(system, "long tasks", scene, account, producers, took)


def _row(
    system: str,
    part: str,
    scene: Scene,
    account: Account,
    producers: Producers,
    took: float,
) -> Row:
    fleet = scene.fleet
    row = Row(
        system,
        {
            "part": part,
            "faults": scene.faults,
            **account.numbers(),
            "refused": len(producers.refused),
            "odd errors": producers.odd,
            "workers dead": len(fleet.deserters),
            "tracebacks": len(fleet.tracebacks),
            "slowest publish": round(producers.slowest, 1),
            "seconds": round(took),
        },
        [f"{part}: {what}" for what in account.broken()],
        {
            **account.details(),
            "tracebacks": fleet.tracebacks,
            "refused": producers.refused,
            "deserters": fleet.deserters,
        },
    )
    if fleet.deserters:
        row.broken.append(f"{part}: workers died by themselves: {fleet.deserters}")
    return row
