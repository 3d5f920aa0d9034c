"""Holds messages until it is killed: ``python -m benchmarks.broker.holder URL LEASE COUNT``."""

from __future__ import annotations

import sys
from typing import Any

import kombu

from reliable_tasks._broker.transport import install

__all__ = ["QUEUE", "connect", "fill", "take"]

QUEUE = "q"


def connect(url: str, lease: float) -> kombu.Connection:
    """Return a connection of this library's transport."""
    install()
    return kombu.Connection(url, transport_options={"reliable": {"lease": lease}})


def fill(connection: kombu.Connection, count: int) -> None:
    """Publish messages that look like tasks."""
    queue = kombu.Queue(QUEUE, kombu.Exchange(QUEUE), routing_key=QUEUE)
    producer = connection.Producer()
    for number in range(count):
        headers = {"id": f"task-{number}", "task": "noop"}
        producer.publish({}, headers=headers, exchange=QUEUE, routing_key=QUEUE, declare=[queue])


def take(channel: Any, count: int) -> None:
    """Take them; this starts the keeper."""
    for _ in range(count):
        assert channel.basic_get(QUEUE) is not None, "there are fewer messages"


def main() -> None:
    """Take messages and hold them until standard input ends."""
    url, lease, count = sys.argv[1:]
    take(connect(url, float(lease)).channel(), int(count))
    sys.stdin.read()


if __name__ == "__main__":
    main()
