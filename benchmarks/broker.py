"""What the transport costs beside stock kombu: consumption, latency, idle workers, the keeper.

Rounds are interleaved and ratios are paired by round; the interval is a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import kombu
import redis
from kombu.transport.virtual import Channel

from benchmarks.broker_app import KINDS, build
from benchmarks.enqueue import interval
from reliable_tasks._broker.held import all_held
from reliable_tasks._broker.keeper import Keeper
from reliable_tasks._broker.transport import install
from reliable_tasks.demo._server import EmbeddedServer, tied_to_parent
from tests.support import wait_until

_ROOT = Path(__file__).resolve().parents[1]
#: The middle part of a run is measured: start and end are not consumption.
_HEAD, _TAIL = 0.9, 0.1


@contextmanager
def worker(
    url: str, kind: str, *, pool: str, concurrency: int, starts: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker that says nothing."""
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.broker_app", "worker"]
    command += ["--pool", pool, "--concurrency", str(concurrency), "--loglevel", "ERROR"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)]),
        "RB_BROKER": url,
        "RB_KIND": kind,
        "RB_STARTS": str(starts or os.devnull),
    }
    process = subprocess.Popen(
        tied_to_parent(command),
        env=environment,
        cwd=_ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def consumption(pool: str, rounds: int, tasks: int) -> dict[str, list[float]]:
    """Return no-op tasks a second, by contender and round."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with EmbeddedServer() as server:
        client = redis.Redis.from_url(server.url)
        for _ in range(rounds):
            for kind in random.sample(KINDS, len(KINDS)):
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


def latency(rounds: int) -> dict[str, list[float]]:
    """Return seconds from the call to the start in an idle worker."""
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
            _latency_of(*apps[kind], -1)
        for number in range(rounds):
            for kind in random.sample(KINDS, len(KINDS)):
                found[kind].append(_latency_of(*apps[kind], number))
                time.sleep(random.uniform(0.02, 0.1))
        for app, _ in apps.values():
            app.close()
    return found


def _latency_of(app: Any, starts: Path, number: int) -> float:
    begun = time.time()
    app.tasks["stamp"].delay(number)

    def started() -> float | None:
        lines = starts.read_text().splitlines() if starts.exists() else []
        return next((float(at) for n, at in map(str.split, lines) if int(n) == number), None)

    at = wait_until(started, 60, lambda: f"the start of {number}")
    return float(at) - begun


#: Idle consumers, in processes of their own that hold many connections each.
_IDLE = """
import sys, threading, socket, kombu
from reliable_tasks._broker.transport import install
install()
url, options, count = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3])
def consume():
    connection = kombu.Connection(url, transport_options=options)
    queues = [kombu.Queue(n, kombu.Exchange(n), routing_key=n) for n in ("q1", "q2", "q3")]
    consumer = connection.Consumer(queues, callbacks=[lambda body, message: message.ack()])
    consumer.qos(prefetch_count=1)
    consumer.consume()
    while True:
        try:
            connection.drain_events(timeout=5)
        except socket.timeout:
            pass
for _ in range(count):
    threading.Thread(target=consume, daemon=True).start()
sys.stdin.read()
"""


def idle(consumers: int, seconds: float, messages: int) -> list[dict[str, Any]]:
    """Count what the server does for idle consumers on 3 queues x 4 priorities, and a message."""
    rows = []
    for kind in KINDS:
        options = {"reliable": {"lease": 15.0}} if kind == "ours" else {}
        with EmbeddedServer() as server:
            client: Any = redis.Redis.from_url(server.url)
            crew = [
                subprocess.Popen(
                    tied_to_parent([sys.executable, "-c", _IDLE, server.url, repr(options), "50"]),
                    env={**os.environ, "PYTHONPATH": str(_ROOT / "src")},
                    stdin=subprocess.PIPE,
                )
                for _ in range(consumers // 50)
            ]
            wait_until(
                lambda client=client: client.info("clients")["blocked_clients"] >= consumers * 0.98,
                120,
                lambda client=client: f"consumers: {client.info('clients')}",
            )
            time.sleep(3)
            before = _work(client)
            time.sleep(seconds)
            quiet = [(b - a) / seconds for a, b in zip(before, _work(client), strict=True)]
            install()
            connection = kombu.Connection(server.url, transport_options=options)
            producer = connection.Producer()
            before, begun = _work(client), time.perf_counter()
            for _ in range(messages):
                producer.publish({}, routing_key="q2", exchange="q2", retry=False)
                time.sleep(0.02)
            time.sleep(1)
            took = time.perf_counter() - begun
            after = _work(client)
            busy = [
                (b - a - rate * took) / messages
                for a, b, rate in zip(before, after, quiet, strict=True)
            ]
            connection.release()
            rows.append(
                {
                    "contender": kind,
                    "commands_per_second": round(quiet[0]),
                    "server_cpu_percent": round(quiet[1] * 100, 2),
                    "commands_per_message": round(busy[0], 1),
                    "server_ms_per_message": round(busy[1] * 1000, 3),
                }
            )
            for process in crew:
                process.kill()
                process.wait()
    return rows


def _work(client: Any) -> tuple[float, float]:
    found = client.info()
    return (
        float(found["total_commands_processed"]),
        float(found["used_cpu_user"]) + float(found["used_cpu_sys"]),
    )


def keeper(held_messages: int, beats: int) -> dict[str, Any]:
    """Time the beats of a keeper that holds many messages, each with all of them renewed."""
    install()
    with EmbeddedServer() as server:
        client: Any = redis.Redis.from_url(server.url)
        client.config_set("slowlog-log-slower-than", 1000)
        options = {"reliable": {"lease": 1.5}}
        connection = kombu.Connection(server.url, transport_options=options)
        queue = kombu.Queue("q", kombu.Exchange("q"), routing_key="q")
        producer = connection.Producer()
        for number in range(held_messages):
            headers = {"id": f"task-{number}"}
            producer.publish({}, headers=headers, exchange="q", routing_key="q", declare=[queue])
        channel: Channel = connection.channel()
        taken = 0
        while taken < held_messages and channel.basic_get("q") is not None:
            taken += 1
        (held,) = all_held()
        beating = Keeper.of(held)
        beating.stop()
        time.sleep(2)
        client.slowlog_reset()
        times = []
        for _ in range(beats):
            held.renewed_at = 0.0
            begun = time.perf_counter()
            beating.beat()
            times.append(time.perf_counter() - begun)
        slow = [entry["duration"] / 1000 for entry in client.slowlog_get(128)]
        assert len(held) == held_messages, f"{held_messages - len(held)} leases were lost"
        channel.close()
        connection.release()
        times.sort()
        return {
            "held": held_messages,
            "p50_ms": round(statistics.median(times) * 1000, 1),
            "p99_ms": round(times[int(len(times) * 0.99) - 1] * 1000, 1),
            "longest_command_ms": round(max(slow, default=0.0), 2),
        }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or keep JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--calls", type=int, default=200, help="for the latency")
    parser.add_argument("--consumers", type=int, default=500)
    parser.add_argument("--only", choices=("consumption", "latency", "idle", "keeper"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers here")
    given = parser.parse_args(arguments)
    kept: dict[str, Any] = {}
    if given.only in (None, "consumption"):
        for pool in ("prefork", "threads"):
            rates = consumption(pool, given.rounds, given.tasks)
            ratios = [a / b for a, b in zip(rates["ours"], rates["stock"], strict=True)]
            low, high = interval(ratios)
            kept[f"consumption, {pool}"] = rates
            medians = {kind: statistics.median(found) for kind, found in rates.items()}
            print(
                f"consumption, {pool}: stock {medians['stock']:.0f}/s, "
                f"ours {medians['ours']:.0f}/s; "
                f"ratio {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )
    if given.only in (None, "latency"):
        kept["latency"] = latency(given.calls)
        for kind, found in kept["latency"].items():
            ordered = sorted(found)
            p99 = ordered[int(len(ordered) * 0.99) - 1]
            print(
                f"idle to start, {kind}: p50 {statistics.median(found) * 1000:.1f} ms, "
                f"p99 {p99 * 1000:.1f} ms",
                flush=True,
            )
    if given.only in (None, "idle"):
        kept["idle"] = idle(given.consumers, 20.0, 200)
        for row in kept["idle"]:
            print(f"{given.consumers} idle consumers: {row}", flush=True)
    if given.only in (None, "keeper"):
        kept["keeper"] = keeper(10_000, 200)
        print(f"keeper: {kept['keeper']}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
