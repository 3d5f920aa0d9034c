"""A worker stopped past its lease, then woken: what does its late word change?"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import redis

from benchmarks.chaos.account import Row
from benchmarks.chaos.app import OURS, STEP, make_app
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Journal
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import wait_until

_LEASE = 6.0
_SETTINGS = {"reliable_lease": _LEASE}
_LEASES = "reliable:leases"
#: The stopped copy still has to run so long when it is woken (s).
_LEFT = 4.0
#: The other copy runs for so long (s): through all that the woken one says.
_OTHER = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--trials", type=int, help="how many (default: 5; quick: 1)")


def run(given: argparse.Namespace, system: str) -> list[Row]:
    """Run the scenario for one system."""
    trials = given.trials or (1 if given.quick else 5)
    draw = random.Random(f"zombie {given.seed}")
    found = [_trial(given, system, draw.uniform(1.0, 3.0)) for _ in range(trials)]
    numbers = {name: sum(bool(one[name]) for one in found) for name in found[0]}
    row = Row(system, {"trials": trials, **numbers}, details={"trials": found})
    row.broken = [f"{count} times: {name}" for name, count in numbers.items() if count]
    return [row]


def _trial(given: argparse.Namespace, system: str, pause: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, EmbeddedServer() as server:
        journal = Journal(Path(directory, "journal"))
        client = redis.Redis(port=server.port, decode_responses=True)
        app = make_app(system, server.url, _SETTINGS)
        fleet = Fleet(
            system,
            [server.url] * 2,
            journal.path,
            settings=_SETTINGS,
            concurrency=1,
            loglevel="INFO",
            logs=given.logs,
        )
        with fleet:
            fleet.wait_ready()
            # time.sleep goes by a clock that runs on while the process is stopped, so the first
            # copy ends as soon as it is woken, unless it has more to sleep.
            task_id = app.tasks[STEP].apply_async((pause + 2 * _LEASE + 5 + _LEFT, _OTHER)).id
            first = journal.wait_start(task_id)
            (old,) = client.hkeys("unacked")
            time.sleep(pause)
            slot = fleet.slot_of(first.host)
            fleet.stop(slot)
            second = journal.wait_start(task_id, 2, 60)
            (new,) = client.hkeys("unacked")
            fleet.go_on(slot)
            woken = time.monotonic()
            renewed = zombie_held = False
            ends = _ends_of_both(journal, task_id)
            lost_entry = lost_lease = False
            while not ends(second.host):
                # The other copy still runs: its message must be its own.
                entries, leases = set(client.hkeys("unacked")), client.zrange(_LEASES, 0, -1)
                if ends(second.host):
                    break
                lost_entry = lost_entry or new not in entries
                lost_lease = lost_lease or (system == OURS and new not in leases)
                zombie_held = zombie_held or (system == OURS and old in entries)
                renewed = renewed or (system == OURS and old in leases)
                if time.monotonic() - woken > 90:
                    break
                time.sleep(0.05)
            wait_until(lambda: ends(first.host), 60, "the end of the first copy")
            has_starts = len(journal.starts[task_id])
            wait_until(lambda: not client.hlen("unacked"), 20, "all acknowledged")
            left = client.hlen("unacked") + client.llen("celery") + client.zcard(_LEASES)
            zombie_log = fleet.workers[slot].log
        return {
            "other's message gone": lost_entry,
            "other's lease gone": lost_lease,
            "same tag": old == new,
            "old tag back": zombie_held,
            "old lease back": renewed,
            "third start": has_starts > 2,
            "left over": left > 0,
            "nothing said": "lost its lease" not in zombie_log,
            "not ended twice": len(journal.ends[task_id]) != 2,
        }


def _ends_of_both(journal: Journal, task_id: str) -> Any:
    return lambda host: journal.ended(task_id, host) is not None
