"""The workers of one broker: which of them live, which one sweeps, whose leases have ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import redis

from reliable_tasks._store.delivery import Layout
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.scripts import Argument, execute, load
from reliable_tasks._store.values import ms, pairs, text

__all__ = ["Fleet"]

#: How much later than a third of the lease a keeper may come to renew (s).
_RENEWAL_SLACK = 3.0
#: How long a queue is looked after that no worker names any more (s).
_QUEUE_TTL = 60.0


class Fleet:
    """The workers, leases and queues behind one prefix, as keepers and the sweeper see them.

    Every method takes the client to use, raises redis-py's own errors, and can be repeated when
    its reply was lost.
    """

    def __init__(self, layout: Layout, keys: Keys) -> None:
        self._prefix = layout.prefix
        self._keys = keys

    def beat(
        self,
        server: redis.Redis,
        *,
        worker: str,
        connection: str,
        server_id: str,
        lease: float,
        elapsed: float,
        term: float,
        jump: float,
        gap: float,
    ) -> tuple[float, bool, float]:
        """Say that a worker lives; return the server's time, whether it sweeps, and the hold."""
        keys = [self._keys.beats, self._keys.keepers, self._keys.sweeper]
        args: list[Argument] = [
            worker,
            connection,
            server_id,
            ms(lease),
            ms(elapsed),
            ms(term),
            ms(jump),
            ms(gap),
            ms(min(lease, lease / 3 + _RENEWAL_SLACK)),
        ]
        now, sweeps, held = load("worker_beat").on(server, keys, args)
        return int(now) / 1000, bool(sweeps), int(held) / 1000

    def leave(self, server: redis.Redis, worker: str) -> None:
        """Forget a worker."""
        keys = [self._keys.beats, self._keys.keepers, self._keys.sweeper]
        load("worker_leave").on(server, keys, [worker])

    def name_queues(
        self, server: redis.Redis, now: float, queues: Mapping[str, Sequence[str]]
    ) -> None:
        """Have these queues looked after; for each its lists, without kombu's prefix."""
        names = {
            json.dumps([self._keys.bell(queue), *(self._prefix + q for q in lists)]): now * 1000
            for queue, lists in queues.items()
        }
        scores = [x for name, at in names.items() for x in (at, name)]
        execute(server, "ZADD", self._keys.queues, *scores)

    def ring(self, server: redis.Redis) -> int:
        """Wake a worker for each queue with messages; return how many were woken."""
        return int(load("queues_ring").on(server, [self._keys.queues], [ms(_QUEUE_TTL)]))

    def silent(self, server: redis.Redis, before: float) -> dict[str, float]:
        """Return the workers that were last heard of before a server's time, and when."""
        found = execute(
            server, "ZRANGEBYSCORE", self._keys.beats, "-inf", f"({before * 1000:.0f}", "WITHSCORES"
        )
        return {text(name): at / 1000 for name, at in pairs(found)}

    def keepers(self, server: redis.Redis, workers: Sequence[str]) -> dict[str, str]:
        """Return how to tell the connections of workers."""
        if not workers:
            return {}
        found = execute(server, "HMGET", self._keys.keepers, *workers)
        return {
            worker: text(value)
            for worker, value in zip(workers, found, strict=True)
            if value is not None
        }

    def end_leases_of(self, server: redis.Redis, worker: str, silent: float) -> int | None:
        """End all leases of a dead worker; return how many there were.

        Args:
            server: The client.
            worker: Its name.
            silent: For how long it must not have been heard of (s).

        Returns:
            ``None`` if it was heard of meanwhile, or has left.
        """
        keys = [self._keys.leases, self._keys.beats]
        ended = 0
        cursor = "0"
        while True:
            answer = load("worker_end").on(server, keys, [worker, ms(silent), cursor])
            cursor = text(answer[0])
            ended += int(answer[1])
            if not cursor:
                return None
            if cursor == "0":
                return ended

    def lapsed(self, server: redis.Redis, now: float, *, limit: int) -> list[str]:
        """Return tags whose lease has ended at a server's time."""
        ended = f"{now * 1000:.0f}"
        return self._leased(server, "-inf", ended, limit)

    def leased_beyond(self, server: redis.Redis, moment: float, *, limit: int) -> list[str]:
        """Return tags whose lease ends later than any can: the server's clock went back."""
        return self._leased(server, f"({moment * 1000:.0f}", "+inf", limit)

    def _leased(self, server: redis.Redis, first: str, last: str, limit: int) -> list[str]:
        key = self._keys.leases
        found = execute(server, "ZRANGEBYSCORE", key, first, last, "LIMIT", 0, limit)
        return [text(tag) for tag in found]
