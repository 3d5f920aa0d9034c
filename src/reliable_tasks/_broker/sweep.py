"""What the elected worker does for all: find the dead, put back what they held, ring bells."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import partial

import redis

from reliable_tasks._broker import listeners
from reliable_tasks._broker.held import Held
from reliable_tasks._broker.saying import do, say, tell
from reliable_tasks._store.delivery import Delivery
from reliable_tasks._store.scripts import execute
from reliable_tasks.instrumentation.dropping import tell_pruned

__all__ = ["BEAT", "ring", "sweep"]

#: How often a keeper says that its worker lives (s).
BEAT = 1.0
#: A worker has missed two beats when it was silent for so long (s).
_SILENT = 2 * BEAT + 0.3
#: What is seldom the case is looked for each so many seconds.
_SELDOM = 10
#: So many messages are put back in one go, ...
_AT_ONCE = 100
#: ... and for so long at each beat (s).
_LONGEST = 0.5
#: No lease lasts longer (s). One that seems to was given before the server's clock went back.
_LONGEST_LEASE = 600.0


def sweep(held: Held, server: redis.Redis, now: float, server_id: str) -> int:
    """Put back what nobody holds any more; return how many messages that were.

    Args:
        held: What this worker holds, and the scripts.
        server: The keeper's client.
        now: The server's time.
        server_id: Id of the server process.
    """
    if held.detects_deaths and server_id:
        _end_leases_of_the_dead(held, server, now, server_id)
    is_seldom = int(now) % _SELDOM == 0
    count = 0
    # The rest comes with the next beat: the keeper has leases to renew.
    ends_at = time.monotonic() + _LONGEST
    while time.monotonic() < ends_at:
        tags = held.fleet.lapsed(server, now, limit=_AT_ONCE)
        if not tags and is_seldom:
            tags = held.fleet.leased_beyond(server, now + _LONGEST_LEASE, limit=_AT_ONCE)
        put_back = _put_back(held, server, tags)
        count += put_back
        if len(tags) < _AT_ONCE or not put_back:
            break
    if is_seldom:
        _forget_the_silent(held, server, now)
        tell(partial(tell_pruned, held.messages.dead.prune(server)))
    return count


def ring(held: Held, server: redis.Redis) -> None:
    """Wake workers for messages that came without a bell."""
    held.fleet.ring(server)


def _put_back(held: Held, server: redis.Redis, tags: list[str]) -> int:
    lapsed: list[Delivery] = []
    for found in held.messages.find(server, tags):
        if isinstance(found, str):
            held.messages.drop(server, found)
        else:
            lapsed.append(found)
    put_back = held.messages.requeue_lapsed(
        server, lapsed, _LONGEST_LEASE, lambda thrown: do(partial(listeners.thrown.tell, thrown))
    )
    for delivery in put_back:
        if delivery.was_aside:
            continue
        say(
            logging.WARNING,
            "Task %s is put back into %s: the worker that had it no longer renews its lease",
            delivery.task_id or delivery.tag,
            delivery.queue,
        )
    return len(put_back)


def _end_leases_of_the_dead(held: Held, server: redis.Redis, now: float, server_id: str) -> None:
    fleet = held.fleet
    silent = [name for name in fleet.silent(server, now - _SILENT) if name != held.worker]
    connections: dict[str, str] = {}
    for worker, known in fleet.keepers(server, silent).items():
        process, _, connection = known.partition(" ")
        # Seen by another process of the server, its connection says nothing here.
        if connection and process == server_id:
            connections[worker] = connection
    if not connections:
        return
    alive = _connected(server, connections.values())
    if alive is None:
        held.detects_deaths = False
        return
    for worker, connection in connections.items():
        if connection not in alive:
            count = fleet.end_leases_of(server, worker, _SILENT)
            if count is None:
                continue
            fleet.leave(server, worker)
            say(logging.WARNING, "Worker %s is dead; it held %d messages", worker, count)


def _connected(server: redis.Redis, ids: Iterable[str]) -> set[str] | None:
    try:
        answer = execute(server, "CLIENT LIST", "ID", *ids)
    except redis.exceptions.ResponseError as error:
        say(
            logging.INFO, "Dead workers are found by their leases alone: CLIENT LIST says %s", error
        )
        return None
    return {str(client["id"]) for client in answer}


def _forget_the_silent(held: Held, server: redis.Redis, now: float) -> None:
    for worker in held.fleet.silent(server, now - 2 * _LONGEST_LEASE):
        held.fleet.leave(server, worker)
