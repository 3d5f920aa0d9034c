"""How long a keeper's beat takes that renews thousands of messages, or puts them back."""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from benchmarks.broker.holder import QUEUE, connect, fill, take
from benchmarks.broker.processes import start
from benchmarks.broker.result import Result
from benchmarks.broker.slowlog import Slowlog, too_long
from benchmarks.spread import percentile
from reliable_tasks._broker.keeper import Keeper
from reliable_tasks._broker.sweep import BEAT
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import wait_until

#: What must not be reached: by the 99th percentile of the beats that renew, and by a command of
#: the server (ms).
_BEAT_MS, _COMMAND_MS = 50.0, 5.0
_LEASE = 15.0
#: A dead worker's messages must all be put back by then (s), or something is wrong.
_BOUND = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--held", type=int, default=10_000, help="messages (default: 10000)")
    parser.add_argument("--beats", type=int, default=200, help="that renew (default: 200)")
    parser.add_argument("--deaths", type=int, default=3, help="of who held them (default: 3)")


def measure(given: argparse.Namespace, draw: random.Random) -> Iterator[Result]:
    """Measure the keeper that renews, then the one that sweeps; nothing is drawn."""
    with _log_to_nowhere():
        yield _renewal(given.held, given.beats)
        yield _sweep(given.held, given.deaths)


def _renewal(count: int, beats: int) -> Result:
    """Hold messages, and renew all of them in each beat."""
    with _channel(count) as (server, channel):
        held = channel.held
        keeper = Keeper.of(held)
        take(channel, count)
        keeper.stop()
        # Its thread may be in its last beat.
        time.sleep(2 * BEAT)
        slowlog = Slowlog(server)
        times = []
        for _ in range(beats):
            # Long ago, so that this beat renews.
            held.renewed_at = 0.0
            begun = time.perf_counter()
            keeper.beat()
            times.append((time.perf_counter() - begun) * 1000)
        longest = slowlog.longest()
        left = int(server.zcard(held.messages.keys.leases))
        assert left == len(held) == count, f"{count - left} leases were lost"
    p99 = percentile(times, 99)
    name = f"keeper, {count} held"
    missed = [f"{name}: p99 of a beat is {p99:.1f} ms, not under {_BEAT_MS:g}"]
    return Result(
        name,
        f"a beat that renews all p50 {statistics.median(times):.1f} ms, p99 {p99:.1f} ms, "
        f"longest {max(times):.1f} ms; longest command {longest}",
        {"beats_ms": times, "longest_command": vars(longest)},
        [*(missed if p99 >= _BEAT_MS else []), *too_long(name, longest, _COMMAND_MS)],
    )


def _sweep(count: int, deaths: int) -> Result:
    """Have the worker killed that holds the messages, some times."""
    found = [_after_a_death(count) for _ in range(deaths)]
    longest = max((one["longest_command"] for one in found), key=lambda one: one.ms)
    beat = max(max(one["beats_ms"]) for one in found)
    seconds = statistics.median(one["seconds"] for one in found)
    name = f"sweep, {count} of a dead worker"
    return Result(
        name,
        f"all put back {seconds:.1f} s after its death; longest beat {beat:.0f} ms; "
        f"longest command {longest}",
        [{**one, "longest_command": vars(one["longest_command"])} for one in found],
        too_long(name, longest, _COMMAND_MS),
    )


def _after_a_death(count: int) -> dict[str, Any]:
    with _channel(count) as (server, channel):
        keeper = Keeper.of(channel.held)
        # Elected before the other one is there. Its own thread is not started.
        assert keeper.beat(), "another worker sweeps"
        url = f"redis://127.0.0.1:{server.connection_pool.connection_kwargs['port']}/0"
        with _holder(url, count) as holder:
            wait_until(
                lambda: keeper.beat() and server.hlen("unacked") == count,
                _BOUND,
                lambda: f"{count} held; {server.hlen('unacked')} are",
                interval=BEAT,
            )
            slowlog = Slowlog(server)
            holder.kill()
            died = time.perf_counter()
            beats = []
            while server.llen(QUEUE) < count:
                begun = time.perf_counter()
                keeper.beat()
                ended = time.perf_counter()
                beats.append((ended - begun) * 1000)
                assert ended - died < _BOUND, f"only {server.llen(QUEUE)} were put back"
                time.sleep(max(0.0, begun + BEAT - ended))
        assert not server.hlen("unacked"), "some are put back and held as well"
        longest = slowlog.longest()
    return {"seconds": ended - died, "beats_ms": beats, "longest_command": longest}


@contextmanager
def _channel(count: int) -> Iterator[tuple[Any, Any]]:
    """Return a client and a channel of a server with so many messages."""
    with EmbeddedServer() as server, connect(server.url, _LEASE) as connection:
        fill(connection, count)
        yield redis.Redis.from_url(server.url), connection.channel()


@contextmanager
def _holder(url: str, count: int) -> Iterator[subprocess.Popen[bytes]]:
    process = start("benchmarks.broker.holder", url, _LEASE, count, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _log_to_nowhere() -> Iterator[None]:
    """Have each line of a sweep formatted and written, as in a worker, but not read."""
    logger = logging.getLogger("reliable_tasks")
    handler = logging.FileHandler(os.devnull)
    handler.setFormatter(logging.Formatter("[%(asctime)s: %(levelname)s] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
        handler.close()
