"""What idle consumers cost the server, and what a message costs while they wait."""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kombu
import redis

from benchmarks.broker.app import KINDS
from benchmarks.broker.consumers import QUEUES, options_of
from benchmarks.broker.processes import start
from benchmarks.broker.result import Result
from benchmarks.broker.sent import Sent
from reliable_tasks._broker.transport import install
from reliable_tasks._store.keys import Keys
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import wait_until

#: How many consumers share a process.
_TOGETHER = 50
#: As long as keepers take to name their queues once more (s).
_QUIET = 20.0
_MESSAGES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--consumers", type=int, default=500, help="default: 500")
    parser.add_argument("--idle-rounds", type=int, default=3, help="default: 3")


def measure(given: argparse.Namespace, draw: random.Random) -> Iterator[Result]:
    """Measure both contenders in turn; medians over rounds."""
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(given.idle_rounds):
        for kind in draw.sample(KINDS, len(KINDS)):
            rounds[kind].append(_round(kind, given.consumers))
    for kind, found in rounds.items():
        medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
        yield Result(
            f"{given.consumers} idle consumers, {kind}",
            "{sent:.0f} commands/s ({executed:.0f} with those in scripts), {cpu:.1f} % of a core; "
            "each message {sent_each:.1f} commands ({executed_each:.1f}), "
            "{cpu_each:.3f} ms of the server".format_map(medians),
            {"rounds": found, "medians": medians},
        )


def _round(kind: str, count: int) -> dict[str, float]:
    with EmbeddedServer() as server, _consumers(server.url, kind, count):
        client: Any = redis.Redis.from_url(server.url)
        wait_until(
            lambda: client.info("clients")["blocked_clients"] >= count * 0.98,
            120,
            lambda: f"consumers: {client.info('clients')}",
        )
        keepers = count if kind == "ours" else 0
        wait_until(
            lambda: _keepers(client) == keepers,
            30,
            lambda: f"{keepers} keepers; there are {_keepers(client)}",
        )
        time.sleep(3)
        quiet = _work(server.url, lambda: time.sleep(_QUIET))
        with _producer(server.url, kind) as publish:
            busy = _work(server.url, publish)
        assert _keepers(client) == keepers, "keepers came or went while they were measured"
    a_second = [value / took for value, took in quiet]
    # What the server does anyway meanwhile is not the messages'.
    each = [
        (value - rate * took) / _MESSAGES
        for (value, took), rate in zip(busy, a_second, strict=True)
    ]
    return {
        "keepers": float(keepers),
        "sent": a_second[0],
        "executed": a_second[1],
        "cpu": a_second[2] * 100,
        "sent_each": each[0],
        "executed_each": each[1],
        "cpu_each": each[2] * 1000,
    }


def _work(url: str, during: Callable[[], None]) -> list[tuple[float, float]]:
    """Return what a server did, and in how many seconds.

    Returns:
        Commands that clients sent, commands with those that scripts called, and seconds of the
        processor.
    """
    with redis.Redis.from_url(url) as client:
        before, begun = client.info(), time.perf_counter()
        during()
        after, took = client.info(), time.perf_counter() - begun
    # Once more: to be watched costs the server more than to do it.
    begun = time.perf_counter()
    with Sent(url) as sent:
        during()
    watched = time.perf_counter() - begun
    names = ("total_commands_processed", "used_cpu_user", "used_cpu_sys")
    executed, *cpu = (float(after[name]) - float(before[name]) for name in names)
    return [(float(sent.count), watched), (executed, took), (sum(cpu), took)]


@contextmanager
def _producer(url: str, kind: str) -> Iterator[Callable[[], None]]:
    """Return what publishes messages and waits until they are taken."""
    install()
    with kombu.Connection(url, transport_options=options_of(kind)) as connection:
        producer = connection.Producer()

        def publish(count: int = _MESSAGES) -> None:
            for _ in range(count):
                producer.publish({}, routing_key=QUEUES[1], exchange=QUEUES[1], retry=False)
                time.sleep(0.02)
            time.sleep(1)

        # To connect costs commands too.
        publish(1)
        yield publish


@contextmanager
def _consumers(url: str, kind: str, count: int) -> Iterator[None]:
    crew = [
        start(
            "benchmarks.broker.consumers",
            *(url, kind, first, min(_TOGETHER, count - first)),
            stdin=subprocess.PIPE,
        )
        for first in range(0, count, _TOGETHER)
    ]
    try:
        yield
    finally:
        for process in crew:
            process.kill()
            process.communicate()


def _keepers(client: Any) -> int:
    return int(client.zcard(Keys("reliable:").beats))
