"""Runs of tasks: who has one, whether it has ended or continued, and how its starts have crashed.

A run lies in one hash a task, which the scripts of the messages keep, too. Beside another broker
there is nothing else: a copy is let in and leaves, and its message is that broker's.
"""

from __future__ import annotations

import redis

from reliable_tasks._store.crashes import Crash
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.delivery import Copy, Delivery
from reliable_tasks._store.keys import Keys
from reliable_tasks._store.letters import Buried
from reliable_tasks._store.scripts import Argument, execute, load
from reliable_tasks._store.values import ms, text

__all__ = ["OVER_TTL", "RUN_TTL", "Runs"]

#: How long a run is known if nobody ends it (s): a task may wait for its ETA for days.
RUN_TTL = 7 * 86400.0
#: How long a task that had other copies is known to be over (s).
OVER_TTL = 3600.0


class Runs:
    """The runs of one Redis database behind one prefix.

    Every method takes the client to use, raises redis-py's own errors, and can be repeated when
    its reply was lost.

    Args:
        keys: The keys.
        dead: The dead letters.
    """

    def __init__(self, keys: Keys, dead: DeadStore) -> None:
        self.keys = keys
        self._dead = dead

    def crashes(self, server: redis.Redis, delivery: Delivery) -> list[Crash]:
        """Return what is known of the latest crashes of a task; the last of them is the latest."""
        return Crash.read_all(
            *execute(server, "HMGET", self.keys.run(delivery.task_id), "history", "start")
        )

    def is_held(self, server: redis.Redis, task_id: str, tag: str) -> bool:
        """Say whether a delivery may publish the continuation of its task.

        A run that is unknown was forgotten by the server, not taken over.
        """
        holder = execute(server, "HGET", self.keys.run(task_id), "tag")
        return holder is None or text(holder) == tag

    def note_continued(self, server: redis.Redis, task_id: str, tag: str) -> bool:
        """Note that a delivery has published its task's whole continuation."""
        return bool(load("message_continue").on(server, [self.keys.run(task_id)], [tag]))

    def count_start(self, delivery: Delivery, by: int) -> tuple[Argument, ...]:
        """Return the command that counts a start as a crash, takes that back, or says more."""
        script = load("run_start")
        starter = str(delivery.starter or "")
        # Nobody waits for an answer that says NOSCRIPT.
        return ("EVAL", script.code, 1, self.keys.run(delivery.task_id), delivery.tag, by, starter)

    # -- beside another broker ------------------------------------------------------------------

    def enter(
        self, server: redis.Redis, delivery: Delivery, *, order: int, is_copy: bool, lease: float
    ) -> Copy:
        """Let in a copy of another broker's task, with a lease, and count its start as a crash.

        Args:
            server: The client.
            delivery: The copy.
            order: A number that is greater for each continuation of the task.
            is_copy: Whether its message was delivered before.
            lease: In seconds.
        """
        keys = [self.keys.leases, self.keys.run(delivery.task_id)]
        args: list[Argument] = [
            *(delivery.tag, order, int(is_copy), ms(RUN_TTL), ms(lease)),
            str(delivery.starter or ""),
        ]
        return Copy.of(load("run_enter").on(server, keys, args))

    def leave(
        self,
        server: redis.Redis,
        delivery: Delivery,
        *,
        order: int,
        goes_back: bool,
        remembers: float,
    ) -> bool:
        """End a copy that was let in so; return False if its lease had ended."""
        keys = [self.keys.leases, self.keys.run(delivery.task_id)]
        args: list[Argument] = [
            delivery.tag,
            order,
            "back" if goes_back else "over",
            int(not delivery.has_crashed),
            ms(remembers),
            delivery.crash,
        ]
        return bool(load("run_leave").on(server, keys, args))

    def bury(
        self, server: redis.Redis, delivery: Delivery, *, order: int, remembers: float
    ) -> Buried:
        """End a copy that was let in so, and keep its message as a dead letter."""
        assert delivery.letter is not None
        keys = [self.keys.leases, self.keys.run(delivery.task_id), self._dead.keys.dead]
        args = [delivery.tag, order, ms(remembers), *delivery.letter.arguments(delivery.tag)]
        return Buried.of(load("run_bury").on(server, keys, args))

    def note_done(self, server: redis.Redis, task_id: str, order: int) -> None:
        """Note that the copy of this order has published its task's continuation."""
        load("run_done").on(server, [self.keys.run(task_id)], [order, ms(OVER_TTL)])
