"""What it costs to have many dead letters: to look at them, to keep one more, and in memory."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import redis
from celery import Celery

from benchmarks.broker.result import Result
from benchmarks.broker.slowlog import Slowlog, too_long
from benchmarks.spread import percentile
from reliable_tasks import apply_reliable_config, dead_letters
from reliable_tasks._places import dead_place
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter, Letter
from reliable_tasks.demo._server import EmbeddedServer

#: What must not be reached: by the 99th percentile of a page, and by a command of the server (ms).
_PAGE_MS, _COMMAND_MS = 50.0, 10.0
_PAGE = 50
_BOUNDS = Bounds(max_age=90 * 86400.0, max_count=1_000_000, max_body=1_000_000)
_TASKS = [f"shop.task_{number}" for number in range(20)]
#: As long as a traceback of a few frames (characters).
_TRACEBACK = "".join(f'  File "/srv/shop/module_{n}.py", line {n}, in step\n' for n in range(20))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--letters", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--pages", type=int, default=200, help="of each kind (default: 200)")


def measure(given: argparse.Namespace, draw: random.Random) -> Iterator[Result]:
    """Measure pages, writes, a walk over all, dropping and memory."""
    with EmbeddedServer() as server:
        app = Celery("dead-benchmark", broker=server.url, set_as_current=False)
        apply_reliable_config(app)
        client = redis.Redis.from_url(server.url)
        slowlog = Slowlog(client)
        before = client.info("memory")["used_memory"]
        writes = _fill(app, given.letters, draw)
        taken = (client.info("memory")["used_memory"] - before) / given.letters
        size = next(dead_letters.list(app=app)).size
        pages = {
            name: [_timed(lambda which=which: _page(app, which)) for _ in range(given.pages)]
            for name, which in _KINDS.items()
        }
        walk = _timed(lambda: sum(1 for _ in dead_letters.list(app=app)))
        counted = _timed(lambda: dead_letters.count(app=app))
        purged = _timed(lambda: dead_letters.purge(task=_TASKS[0], app=app))
        longest = slowlog.longest()
        app.close()
    worst = {name: percentile(times, 99) for name, times in pages.items()}
    name = f"dead letters, {given.letters}"
    yield Result(
        name,
        f"a page of {_PAGE} p50/p99 "
        + ", ".join(
            f"{kind} {statistics.median(times):.1f}/{worst[kind]:.1f} ms"
            for kind, times in pages.items()
        )
        + f"; one more {statistics.median(writes):.2f} ms; count {counted:.1f} ms; "
        f"a walk over all {walk / 1000:.1f} s; a purge of one task {purged / 1000:.1f} s; "
        f"{taken:.0f} bytes each, with a message of {size} and a traceback of {len(_TRACEBACK)}; "
        f"longest command {longest}",
        {"pages_ms": pages, "bytes_each": taken, "longest_command": vars(longest)},
        [
            *(
                f"{name}: p99 of a page {kind} is {p99:.1f} ms, not under {_PAGE_MS:g}"
                for kind, p99 in worst.items()
                if p99 >= _PAGE_MS
            ),
            *too_long(name, longest, _COMMAND_MS),
        ],
    )


_KINDS: dict[str, dict[str, Any]] = {
    "of all": {},
    "of a task": {"task": _TASKS[3]},
    "of a cause": {"cause": "failed"},
    "of both": {"task": _TASKS[3], "cause": "poison"},
    "of the last minute": {"since": timedelta(minutes=1)},
    "oldest first": {"oldest_first": True},
}


def _page(app: Celery, which: dict[str, Any]) -> None:
    found = list(dead_letters.list(app=app, limit=_PAGE, **which))
    assert len(found) == _PAGE


def _timed(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return (time.perf_counter() - begun) * 1000


def _fill(app: Celery, count: int, draw: random.Random) -> list[float]:
    """Keep so many letters, and return how long each took (ms)."""
    place = dead_place(app)
    assert place is not None
    times = []
    for number in range(count):
        letter = _letter(number, draw)
        begun = time.perf_counter()
        place.store.bury(place.server, letter, str(number))
        times.append((time.perf_counter() - begun) * 1000)
    return times


def _letter(number: int, draw: random.Random) -> Letter:
    task_id = f"{draw.getrandbits(128):032x}-{number:04d}"
    about = DeadLetter(
        id=task_id,
        task=draw.choice(_TASKS),
        task_id=task_id,
        cause=draw.choice([Cause.FAILED, Cause.RETRIES, Cause.POISON, Cause.TIME_LIMIT]),
        error="ConnectionError: the bank did not answer within 30 seconds",
        traceback=_TRACEBACK,
        worker="worker-3@shop-7f9c",
        queue="celery",
        retries=3,
        first_at=time.time(),
        argsrepr=f"('invoice-{number}', 12.5)",
        kwargsrepr="{'currency': 'EUR'}",
        root_id=task_id,
    )
    message = {"body": "x" * 400, "headers": {"id": task_id, "task": about.task, "lang": "py"}}
    return Letter(about, json.dumps(message).encode(), _BOUNDS)
