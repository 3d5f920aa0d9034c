"""How long it takes from a call to the start of its task in a worker that is idle."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.broker.app import KINDS, build
from benchmarks.broker.processes import worker
from benchmarks.broker.result import Result
from benchmarks.spread import interval, percentile
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import wait_until


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--calls", type=int, default=300, help="of each (default: 300)")


def measure(given: argparse.Namespace, draw: random.Random) -> Iterator[Result]:
    """Measure both contenders, call by call."""
    seconds = _seconds(given.calls, draw)
    found = {kind: [one * 1000 for one in measured] for kind, measured in seconds.items()}
    later = [ours - stock for ours, stock in zip(found["ours"], found["stock"], strict=True)]
    low, high = interval(later, draw)
    each = (
        f"{kind} p50 {statistics.median(found[kind]):.2f} ms, "
        f"p99 {percentile(found[kind], 99):.2f} ms"
        for kind in KINDS
    )
    yield Result(
        "idle to start",
        f"{'; '.join(each)}; ours later by {statistics.median(later):.2f} ms "
        f"({low:.2f} to {high:.2f}; the median of the pairs)",
        {"ms": found, "later": statistics.median(later), "interval": [low, high]},
    )


def _seconds(calls: int, draw: random.Random) -> dict[str, list[float]]:
    """Return the seconds of each call, by contender."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        apps = {}
        for kind in KINDS:
            server = stack.enter_context(EmbeddedServer())
            starts = directory / kind
            stack.enter_context(
                worker(server.url, kind, pool="prefork", concurrency=1, starts=starts)
            )
            apps[kind] = (build(server.url, kind), starts)
            _one(*apps[kind], -1)
        for number in range(calls):
            for kind in draw.sample(KINDS, len(KINDS)):
                found[kind].append(_one(*apps[kind], number))
                # Until the worker waits again, and not in step with anything that it does.
                time.sleep(draw.uniform(0.02, 0.1))
        for app, _ in apps.values():
            app.close()
    return found


def _one(app: Any, starts: Path, number: int) -> float:
    begun = time.time()
    app.tasks["stamp"].delay(number)

    def started() -> float | None:
        lines = starts.read_text().splitlines() if starts.exists() else []
        return next((float(at) for n, at in map(str.split, lines) if int(n) == number), None)

    at = wait_until(started, 60, lambda: f"the start of {number}")
    assert at is not None
    return at - begun
