"""What a call costs: plain Celery, this library and the peers, in one run.

Rounds are interleaved, so that whatever else the machine does meets all of them alike; ratios are
paired by round, and their interval is a bootstrap over rounds. The peers are celery-once and, where
it is installed, celery-singleton.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import redis
from celery import Celery
from celery_once import AlreadyQueued, QueueOnce

from benchmarks import machine
from benchmarks.spread import interval
from reliable_tasks import ReliableTask, apply_reliable_config, once
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.client import ServerAddress
from reliable_tasks.demo._server import EmbeddedServer

Publish = Callable[[int], Any]
PublishMany = Callable[[list[tuple[tuple[int], None]]], Any]
Row = dict[str, Any]

PLAIN, ONCE, ONCE_ELSEWHERE = "plain Celery", "@once", "@once, other Redis"
PEERS = ("celery-once", "celery-singleton")
#: Calls of a batch.
BATCH = 1_000
#: A claim is taken and released so many times in a round, beside so many others.
_TAKEN = 300
_FEW, _MANY = 1_000, 1_000_000


def contenders(broker: str, other: str) -> tuple[dict[str, Publish], dict[str, PublishMany]]:
    """Return what publishes one call of each contender, and many calls of those that can.

    Args:
        broker: The broker, and the Redis of most locks.
        other: Another Redis, for locks that are not the broker's.
    """

    def body(number: int) -> None:
        """Do nothing."""

    def app(name: str, **settings: Any) -> Celery:
        made = Celery(name, broker=broker, set_as_current=False)
        made.conf.update(settings)
        return made

    reliable, elsewhere = app("reliable"), app("elsewhere", reliable_redis_url=other)
    for one in (reliable, elsewhere):
        apply_reliable_config(one)
    peers = app("peers", singleton_backend_url=broker)
    peers.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": broker, "default_timeout": 3600},
    }
    by_number = once(key="{number}")
    tasks = {
        PLAIN: app("plain").task(name="plain")(body),
        "ReliableTask": reliable.task(name="reliable", base=ReliableTask)(body),
        ONCE: by_number(reliable.task(name="once", base=ReliableTask)(body)),
        ONCE_ELSEWHERE: by_number(elsewhere.task(name="elsewhere", base=ReliableTask)(body)),
        "celery-once": peers.task(name="peer", base=QueueOnce)(body),
    }
    with contextlib.suppress(ImportError):
        from celery_singleton import Singleton

        tasks["celery-singleton"] = peers.task(name="single", base=Singleton, lock_expiry=3600)(
            body
        )
    many = {name: task.apply_many for name, task in tasks.items() if name in (ONCE, ONCE_ELSEWHERE)}
    return {name: task.delay for name, task in tasks.items()}, many


def measure(
    publishers: dict[str, Publish],
    numbers: Iterator[int],
    rounds: int,
    calls: int,
    draw: random.Random,
) -> dict[str, list[float]]:
    """Return calls a second, by contender and round."""
    rates: dict[str, list[float]] = {name: [] for name in publishers}
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


def measure_many(
    publishers: dict[str, Publish],
    many: dict[str, PublishMany],
    numbers: Iterator[int],
    rounds: int,
    draw: random.Random,
) -> dict[str, list[float]]:
    """Return calls a second in batches, and of the peers one by one, by contender and round."""
    rates: dict[str, list[float]] = {name: [] for name in (*PEERS, *many) if name in publishers}
    for _ in range(rounds):
        for name in draw.sample(list(rates), len(rates)):
            taken = list(itertools.islice(numbers, BATCH))
            begun = time.perf_counter()
            if name in many:
                many[name]([((number,), None) for number in taken])
            else:
                for number in taken:
                    publishers[name](number)
            rates[name].append(BATCH / (time.perf_counter() - begun))
    return rates


def compared(
    rates: dict[str, list[float]], with_: str, draw: random.Random, title: str
) -> list[Row]:
    """Print the rates beside those of one contender, and return the rows."""
    print(f"\n{title:<20} {'calls/s':>8} {'ratio':>7}   95 % interval")
    rows = []
    for name, measured in rates.items():
        ratios = [own / other for own, other in zip(measured, rates[with_], strict=True)]
        low, high = interval(ratios, draw)
        row = {
            "contender": name,
            "calls_per_second": round(statistics.median(measured)),
            "ratio": round(statistics.median(ratios), 3),
            "interval": [round(low, 3), round(high, 3)],
        }
        rows.append(row)
        print(
            f"{name:<20} {row['calls_per_second']:>8} {row['ratio']:>7.2f}"
            f"   {low:.2f} to {high:.2f}"
        )
    return rows


def duplicates(publishers: dict[str, Publish]) -> dict[str, Publish]:
    """Return what makes one call that is a duplicate, by contender."""

    def refused(publish: Publish) -> Publish:
        def call(_: int) -> None:
            with contextlib.suppress(AlreadyQueued):
                publish(-1)

        return call

    return {name: refused(publish) for name, publish in publishers.items() if name in _LOCKING}


_LOCKING = (ONCE, ONCE_ELSEWHERE, *PEERS)


def memory(publishers: dict[str, Publish], servers: list[str], calls: int = 200) -> list[Row]:
    """Print what a lock takes of a server's memory (bytes), and return the rows."""
    print(f"\n{'memory of a lock':<20} {'bytes':>8}")
    rows = []
    for name in _LOCKING:
        if name not in publishers:
            continue
        before = {url: _keys(url) for url in servers}
        for number in range(calls):
            publishers[name](10_000_000 + number)
        taken = []
        for url in servers:
            with redis.Redis.from_url(url, decode_responses=True) as server:
                new = _keys(url) - before[url]
                # What remembers a publish for some minutes, and the queue, are no locks.
                locks = [key for key in new if "sent:" not in key and server.ttl(key) > 600]
                taken += [int(server.memory_usage(key) or 0) for key in locks]
        assert len(taken) == calls, f"{name}: {len(taken)} locks"
        rows.append({"contender": name, "bytes": statistics.median(taken)})
        print(f"{name:<20} {statistics.median(taken):>8.0f}")
    return rows


def _keys(url: str) -> set[str]:
    with redis.Redis.from_url(url, decode_responses=True) as server:
        return set(server.scan_iter(count=10_000))


def many(rounds: int, draw: random.Random) -> list[Row]:
    """Measure taking and releasing a claim beside few and beside a million others, in turn."""
    few, lots = f"{_FEW:,} live claims", f"{_MANY:,} live claims"
    rates: dict[str, list[float]] = {few: [], lots: []}
    with EmbeddedServer() as one, EmbeddedServer() as other:
        stores = {few: _filled(one.url, _FEW), lots: _filled(other.url, _MANY)}
        for _ in range(rounds):
            for name in draw.sample(list(stores), len(stores)):
                begun = time.perf_counter()
                for _ in range(_TAKEN):
                    _take_and_release(stores[name])
                rates[name].append(_TAKEN / (time.perf_counter() - begun))
    return compared(rates, few, draw, "taken and released")


def _take_and_release(claims: Claims) -> None:
    owner = uuid4().hex
    common = {"owner": owner, "attempt": 0}
    claims.acquire(owner, **common, token=owner, ttl=60, task="t")
    claims.enter(owner, **common, holder="h", lease=60, ttl=60, task="t")
    claims.release(owner, **common, holder="h")


def _filled(url: str, live: int) -> Claims:
    """Return the claims of a server that has so many, as calls make them."""
    claims = Claims(ServerAddress(url, 5.0), "reliable:")
    sample = "sample"
    claims.acquire(sample, owner=uuid4().hex, attempt=0, token=uuid4().hex, ttl=36_000, task="t")
    with redis.Redis.from_url(url) as server:
        fields: Any = server.hgetall(claims.keys.claim(sample))
        for begin in range(1, live, 10_000):
            with server.pipeline(transaction=False) as pipeline:
                for number in range(begin, min(begin + 10_000, live)):
                    key = claims.keys.claim(f"filler:{number}")
                    pipeline.hset(key, mapping=fields)
                    pipeline.pexpire(key, 36_000_000)
                pipeline.execute()
        assert server.dbsize() == live
    return claims


def judged(
    publishing: list[Row], duplicate: list[Row], batches: list[Row], claims: list[Row]
) -> list[str]:
    """Return the goals that were missed."""
    ratio = {row["contender"]: row["ratio"] for row in publishing}
    refused = {row["contender"]: row["calls_per_second"] for row in duplicate}
    best_peer = max(ratio[name] for name in PEERS if name in ratio)
    quickest_peer = max(refused[name] for name in PEERS if name in refused)
    at_once = {row["contender"]: row["calls_per_second"] for row in batches}
    quickest = max(at_once[name] for name in PEERS if name in at_once)
    goals = {
        f"@once at least 0.9 of plain: {ratio[ONCE]:.2f}": ratio[ONCE] >= 0.9,
        f"@once with another Redis at least the best peer: {ratio[ONCE_ELSEWHERE]:.2f} to "
        f"{best_peer:.2f}": ratio[ONCE_ELSEWHERE] >= best_peer,
        f"duplicates at least 1.3 of the best peer: {refused[ONCE] / quickest_peer:.2f}": (
            refused[ONCE] >= 1.3 * quickest_peer
        ),
        f"a batch of {BATCH:,} at least 3 times the best peer: {at_once[ONCE] / quickest:.2f}": (
            at_once[ONCE] >= 3 * quickest
        ),
    }
    if claims:
        goals[f"a million claims cost what a thousand do: {claims[-1]['ratio']:.2f}"] = (
            claims[-1]["ratio"] >= 0.9
        )
    print()
    for goal, is_met in goals.items():
        print(f"{'met' if is_met else 'MISSED'}: {goal}")
    return [goal for goal, is_met in goals.items() if not is_met]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print tables, and keep JSON where asked to; missed goals are the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--calls", type=int, default=500, help="in each round (default: 500)")
    parser.add_argument("--many", action="store_true", help="beside a million claims, too (1 GB)")
    parser.add_argument("--seed", type=int, default=1, help="what is drawn (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers here")
    given = parser.parse_args(arguments)
    made_with = machine.describe(seed=given.seed)
    machine.introduce(made_with)
    draw, numbers = random.Random(f"enqueue {given.seed}"), itertools.count()
    with EmbeddedServer() as server, EmbeddedServer() as other:
        publishers, in_batches = contenders(server.url, other.url)
        rates = measure(publishers, numbers, given.rounds, given.calls, draw)
        publishing = compared(rates, PLAIN, draw, "publishing")
        again = measure(duplicates(publishers), numbers, given.rounds, given.calls, draw)
        duplicate = compared(again, "celery-once", draw, "duplicates")
        in_one_go = measure_many(publishers, in_batches, numbers, given.rounds, draw)
        batches = compared(in_one_go, "celery-once", draw, f"batches of {BATCH:,}")
        locks = memory(publishers, [server.url, other.url])
        claims = many(given.rounds, draw) if given.many else []
    missed = judged(publishing, duplicate, batches, claims)
    if given.json:
        kept = {
            **made_with,
            "rounds": given.rounds,
            "calls": given.calls,
            "publishing": publishing,
            "duplicates": duplicate,
            "batches": batches,
            "memory": locks,
            "claims": claims,
            "missed": missed,
        }
        given.json.write_text(json.dumps(kept, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
