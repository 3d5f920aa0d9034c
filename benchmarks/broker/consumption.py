"""How many tasks that do nothing a worker gets through in a second."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import redis

from benchmarks.broker.app import KINDS, build
from benchmarks.broker.processes import worker
from benchmarks.broker.result import Result
from benchmarks.spread import interval
from reliable_tasks.demo._server import EmbeddedServer

_POOLS = ("prefork", "threads")
#: The middle part of a run is measured: start and end are not consumption.
_HEAD, _TAIL = 0.9, 0.1
#: What the median of the ratio, and the lower end of its interval, must reach.
_MEDIAN, _LOW = 1.0, 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--tasks", type=int, default=3000, help="in each round (default: 3000)")


def measure(given: argparse.Namespace, draw: random.Random) -> Iterator[Result]:
    """Measure each pool."""
    for pool in _POOLS:
        rates = _rates(pool, given.rounds, given.tasks, draw)
        medians = {kind: statistics.median(found) for kind, found in rates.items()}
        ratios = [ours / stock for ours, stock in zip(rates["ours"], rates["stock"], strict=True)]
        ratio = statistics.median(ratios)
        low, high = interval(ratios, draw)
        name = f"consumption, {pool}"
        yield Result(
            name,
            f"stock {medians['stock']:.0f}/s, ours {medians['ours']:.0f}/s; "
            f"ratio {ratio:.3f} ({low:.3f} to {high:.3f})",
            {"rates": rates, "ratio": ratio, "interval": [low, high]},
            [
                f"{name}: {what} of the ratio is {value:.3f}, less than {goal:g}"
                for what, value, goal in (
                    ("the median", ratio, _MEDIAN),
                    ("the interval's lower end", low, _LOW),
                )
                if value < goal
            ],
        )


def _rates(pool: str, rounds: int, tasks: int, draw: random.Random) -> dict[str, list[float]]:
    """Return tasks a second, by contender and round."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with EmbeddedServer() as server:
        client = redis.Redis.from_url(server.url)
        for _ in range(rounds):
            for kind in draw.sample(KINDS, len(KINDS)):
                client.flushall()
                app = build(server.url, kind)
                for _ in range(tasks):
                    app.tasks["noop"].delay()
                with worker(server.url, kind, pool=pool, concurrency=2):
                    first = _left_at(client, tasks * _HEAD)
                    last = _left_at(client, tasks * _TAIL)
                app.close()
                rates[kind].append((first[1] - last[1]) / (last[0] - first[0]))
    return rates


def _left_at(client: Any, count: float) -> tuple[float, int]:
    while (left := client.llen("celery")) > count:
        time.sleep(0.002)
    return time.perf_counter(), left
