"""Idle consumers in one process: ``python -m benchmarks.broker.consumers URL KIND FIRST COUNT``.

Each has a connection of its own, as if it were alone in its process, and with this library a
keeper of its own.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

import kombu

from reliable_tasks._broker.transport import install

__all__ = ["QUEUES", "options_of"]

QUEUES = ("q1", "q2", "q3")


def options_of(kind: str, consumer: int | None = None) -> dict[str, Any]:
    """Return the transport options of one consumer, or of a producer."""
    if kind != "ours":
        return {}
    # What a process holds, and its keeper, are looked up by all that is in here: with an entry
    # that only one consumer has, no other one shares them.
    return {"reliable": {"lease": 15.0, "consumer": consumer}}


def _consume(url: str, options: dict[str, Any]) -> None:
    connection = kombu.Connection(url, transport_options=options)
    queues = [kombu.Queue(name, kombu.Exchange(name), routing_key=name) for name in QUEUES]
    consumer = connection.Consumer(queues, callbacks=[lambda _, message: message.ack()])
    consumer.qos(prefetch_count=1)
    consumer.consume()
    while True:
        with suppress(TimeoutError):
            connection.drain_events(timeout=5)


def main() -> None:
    """Consume until standard input ends."""
    url, kind, first, count = sys.argv[1:]
    install()
    for number in range(int(first), int(first) + int(count)):
        threading.Thread(target=_consume, args=(url, options_of(kind, number)), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
