"""Seconds from SIGKILL to the restart of the task: this library beside plain Celery.

``python -m benchmarks.recovery [--trials N] [--json FILE]``, from the root of the repository.
Both are set up as their users are told to; ``benchmarks.chaos recovery`` has more ways to die,
more trials, and a stock Celery that is set up to find the dead as soon as it can.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from celery import Celery

from benchmarks import machine
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import WorkerProcess

LIBRARIES = ("reliable_tasks", "plain Celery")
KILLS = ("pool child", "whole worker")
#: Plain Celery has a dead worker's message back after its visibility_timeout, an hour; nobody waits
#: for that here (s).
BOUND = 60.0


@dataclass
class Series:
    """The trials of one library and one kind of kill; None stands for "not within the bound"."""

    library: str
    kill: str
    seconds: list[float | None]

    @property
    def summary(self) -> str:
        """The trials in a few words."""
        found = [one for one in self.seconds if one is not None]
        if not found:
            return f"not within {BOUND:g} s"
        missed = len(self.seconds) - len(found)
        return f"{min(found):.1f} - {max(found):.1f} s, median {statistics.median(found):.1f} s" + (
            f", {missed} not within {BOUND:g} s" if missed else ""
        )


def measure(library: str, kill: str, trials: int) -> Series:
    """Kill a task so many times, and see when it starts again."""
    with tempfile.TemporaryDirectory() as directory:
        return Series(
            library,
            kill,
            [_trial(library, kill, Path(directory, f"journal-{n}")) for n in range(trials)],
        )


def _trial(library: str, kill: str, journal: Path) -> float | None:
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        urls = {
            "broker_url": server.url,
            "result_url": f"redis://127.0.0.1:{server.port}/1",
        }
        workers = [
            stack.enter_context(
                WorkerProcess("benchmarks.recovery_app", env={"RT_LIBRARY": library}, **urls)
            )
            for _ in range(2)
        ]
        client = stack.enter_context(Celery(broker=server.url, set_as_current=False))
        client.send_task("hold", (str(journal),))
        _, pid = _start(journal, 1, 30) or _fail("the task did not start")
        if kill == "pool child":
            os.kill(int(pid), signal.SIGKILL)
        else:
            next(worker for worker in workers if int(pid) in worker.child_pids()).kill_group()
        killed = time.time()
        restarted = _start(journal, 2, BOUND)
        return None if restarted is None else restarted[0] - killed


def _start(journal: Path, number: int, timeout: float) -> tuple[float, float] | None:
    """Return when and where the task was started for the given time, None if it was not."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        lines = journal.read_text().splitlines() if journal.exists() else []
        if len(lines) >= number:
            at, pid = map(float, lines[number - 1].split())
            return at, pid
        time.sleep(0.02)
    return None


def _fail(message: str) -> tuple[float, float]:
    raise RuntimeError(message)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=3, help="for each row (default: 3)")
    parser.add_argument("--json", type=Path, help="a file for the single numbers")
    given = parser.parse_args(arguments)
    made_with = machine.describe()
    machine.introduce(made_with)
    results = []
    print(f"{'SIGKILL of a':<14} {'':<16} seconds to restart ({given.trials} trials)")
    for kill in KILLS:
        for library in LIBRARIES:
            series = measure(library, kill, given.trials)
            results.append(series)
            print(f"{kill:<14} {library:<16} {series.summary}", flush=True)
    if given.json:
        rows = [vars(series) for series in results]
        given.json.write_text(json.dumps({**made_with, "bound": BOUND, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
