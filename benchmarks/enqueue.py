"""How fast calls are published: plain Celery, this library and celery-once, in one run.

Rounds are interleaved, so that whatever else the machine does meets all of them alike; the
ratios are paired by round, and their interval is a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery
from celery_once import QueueOnce

from benchmarks import machine
from benchmarks.spread import interval
from reliable_tasks import ReliableTask, apply_reliable_config, once
from reliable_tasks.demo._server import EmbeddedServer

Publish = Callable[[int], Any]


def contenders(url: str) -> dict[str, Publish]:
    """Return what publishes one call of each contender."""
    plain = Celery("plain", broker=url, set_as_current=False)
    reliable = Celery("reliable", broker=url, set_as_current=False)
    apply_reliable_config(reliable)
    peers = Celery("peers", broker=url, set_as_current=False)
    peers.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": url, "default_timeout": 3600},
    }

    def body(number: int) -> None:
        """Do nothing."""

    tasks = {
        "plain Celery": plain.task(name="plain")(body),
        "ReliableTask": reliable.task(name="reliable", base=ReliableTask)(body),
        "@once": once(key="{number}")(reliable.task(name="once", base=ReliableTask)(body)),
        "celery-once": peers.task(name="peer", base=QueueOnce)(body),
    }
    return {name: task.delay for name, task in tasks.items()}


def measure(
    publishers: dict[str, Publish], rounds: int, calls: int, draw: random.Random
) -> dict[str, list[float]]:
    """Return calls a second, by contender and round."""
    rates: dict[str, list[float]] = {name: [] for name in publishers}
    numbers = itertools.count()
    for publish in publishers.values():
        publish(next(numbers))
    for _ in range(rounds):
        for name in draw.sample(list(publishers), len(publishers)):
            publish = publishers[name]
            begun = time.perf_counter()
            for _ in range(calls):
                publish(next(numbers))
            rates[name].append(calls / (time.perf_counter() - begun))
    return rates


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table, and keep JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--calls", type=int, default=500, help="in each round (default: 500)")
    parser.add_argument("--seed", type=int, default=1, help="what is drawn (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers here")
    given = parser.parse_args(arguments)
    made_with = machine.describe(seed=given.seed)
    machine.introduce(made_with)
    draw = random.Random(f"enqueue {given.seed}")
    with EmbeddedServer() as server:
        rates = measure(contenders(server.url), given.rounds, given.calls, draw)
    plain = rates["plain Celery"]
    rows = []
    for name, measured in rates.items():
        ratios = [own / other for own, other in zip(measured, plain, strict=True)]
        rows.append(
            {
                "contender": name,
                "calls_per_second": round(statistics.median(measured)),
                "ratio": round(statistics.median(ratios), 3),
                "interval": [round(edge, 3) for edge in interval(ratios, draw)],
            }
        )
    print(f"{'publishing':<14} {'calls/s':>8} {'of plain':>9}   95 % interval")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['contender']:<14} {row['calls_per_second']:>8} {row['ratio']:>9.2f}"
            f"   {low:.2f} to {high:.2f}"
        )
    if given.json:
        kept = {**made_with, "rounds": given.rounds, "calls": given.calls, "rows": rows}
        given.json.write_text(json.dumps(kept, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
