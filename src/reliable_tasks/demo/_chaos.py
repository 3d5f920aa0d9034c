"""What is killed, and when: drawn from the seed, so that both contenders suffer the same."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from reliable_tasks.demo._events import Execution
from reliable_tasks.demo._workers import Crew

__all__ = ["Chaos", "Kill", "Plan", "Target", "plan"]

Target = Literal["child", "worker"]

#: How far the kills lie apart on average (s).
_APART = 1.75
#: So long are workers killed at the most (s).
_LONGEST = 21.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One kill to come.

    Attributes:
        at: Seconds from the start of the load. It waits until its worker runs a task.
        target: A pool child, or a whole worker.
        slot: Which of the workers.
        choice: Picks one of the children that run a task then.
    """

    at: float
    target: Target
    slot: int
    choice: int


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill that was carried out.

    Attributes:
        target: A pool child, or a whole worker.
        host: The worker's node name.
        pid: The child's process id; ``None`` for a whole worker.
        at: When the signal was sent.
    """

    target: Target
    host: str
    pid: int | None
    at: float

    def hit(self, execution: Execution) -> bool:
        """Say whether this ended an execution."""
        return (
            execution.end is None
            and execution.host == self.host
            and self.pid in (None, execution.pid)
        )


def plan(seed: int, seconds: float, workers: int) -> list[Plan]:
    """Draw the kills for a load that takes so many seconds at the least."""
    draw = random.Random(f"kills {seed}")
    span = min(seconds, _LONGEST)
    count = max(2, round(span / _APART))
    whole = max(1, count // 3)
    # Whole workers early: what they held comes back after a visibility timeout.
    early = set(draw.sample(range(max(whole, count * 2 // 3)), whole))
    return [
        Plan(
            at=span / count * (number + draw.uniform(0.2, 0.8)),
            target="worker" if number in early else "child",
            slot=draw.randrange(workers),
            choice=draw.randrange(1000),
        )
        for number in range(count)
    ]


class Chaos:
    """Carries the plan out.

    Args:
        plans: The kills to come, in order.
        crew: Who they are aimed at.
    """

    def __init__(self, plans: Sequence[Plan], crew: Crew) -> None:
        self._plans = [*plans]
        self._crew = crew
        self.kills: list[Kill] = []

    @property
    def is_over(self) -> bool:
        """Whether no kill is left."""
        return not self._plans

    def give_up(self) -> None:
        """Drop what is left: there is nothing to be hit any more."""
        self._plans.clear()

    def step(self, elapsed: float, running: Sequence[Execution]) -> list[Execution]:
        """Carry out the next kill if it is due and there is a task to hit.

        Args:
            elapsed: Seconds since the load began.
            running: The executions that have not ended.

        Returns:
            The executions that were hit, as far as is known.
        """
        if not self._plans or elapsed < self._plans[0].at:
            return []
        next_one = self._plans[0]
        worker = self._crew.workers[next_one.slot]
        busy = sorted(
            (
                execution
                for execution in running
                if execution.host == worker.host
                and not any(kill.hit(execution) for kill in self.kills)
            ),
            key=lambda execution: execution.pid,
        )
        if not busy:
            return []
        del self._plans[0]
        if next_one.target == "worker":
            self.kills.append(Kill("worker", worker.host, None, time.monotonic()))
            self._crew.kill(next_one.slot)
            return busy
        victim = busy[next_one.choice % len(busy)]
        self.kills.append(Kill("child", worker.host, victim.pid, time.monotonic()))
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        return [victim]
