"""What became of a run: every number of the table, from what was recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from reliable_tasks.demo._chaos import Kill, Target
from reliable_tasks.demo._events import Execution

__all__ = ["Outcome", "Restarts", "overlaps", "restarts"]


@dataclass(frozen=True, slots=True)
class Restarts:
    """How long tasks that a kill interrupted waited for their next start.

    Attributes:
        seconds: For each that started again.
        interrupted: How many there were.
    """

    seconds: tuple[float, ...]
    interrupted: int

    @property
    def median(self) -> float:
        """The median of those that started again."""
        return median(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One contender's run.

    Attributes:
        name: The contender.
        calls: How often a task was called.
        accepted: How many calls queued a task; the others were duplicates.
        kills: What was killed.
        done: How many tasks have ended in a result.
        waiting: How many are with the broker still, for the visibility timeout of a dead worker.
        queued: How many are in the queue still.
        gone: How many the broker has forgotten although they have no result.
        in_window: How many the broker has forgotten in kombu's fetch window.
        twice_at_once: How often a file's task started while another one of it ran.
        repeated: How many executions followed one of the same task.
        locks: Files whose lock is left, but for those in the window.
        wrong: Files with another result than was expected, and that result.
        restarts: For pool children and for whole workers.
        seconds: How long it took.
        redelivery: For how many seconds at most a message stays with a dead worker.
        deserters: Logs of workers that ended although nobody killed them.
    """

    name: str
    calls: int
    accepted: int
    kills: tuple[Kill, ...]
    done: int
    waiting: int
    queued: int
    gone: int
    in_window: int
    twice_at_once: int
    repeated: int
    locks: tuple[str, ...]
    wrong: tuple[str, ...]
    restarts: Mapping[Target, Restarts]
    seconds: float
    redelivery: float
    deserters: tuple[str, ...] = field(default=())

    @property
    def lost(self) -> int:
        """Tasks without a result in the end."""
        return self.waiting + self.queued + self.gone + self.in_window

    @property
    def broken(self) -> list[str]:
        """What this library promises and did not hold."""
        promises = {
            "lost tasks": self.lost,
            "tasks that ran twice at once": self.twice_at_once,
            "locks left behind": len(self.locks),
            "wrong results": len(self.wrong),
        }
        return [f"{count} {what}" for what, count in promises.items() if count]


def overlaps(executions: Iterable[Execution], kills: Sequence[Kill]) -> int:
    """Count the executions that started while another one of the same file ran.

    One that was killed ran until the signal was sent, and maybe a little longer; counting it as
    shorter never makes up an overlap.
    """
    by_file = defaultdict(list)
    for execution in executions:
        by_file[execution.path].append(execution)
    count = 0
    for same_file in by_file.values():
        latest_end = float("-inf")
        for execution in sorted(same_file, key=lambda execution: execution.start):
            count += execution.start < latest_end
            latest_end = max(latest_end, _end(execution, kills))
    return count


def restarts(executions: Sequence[Execution], kills: Sequence[Kill], target: Target) -> Restarts:
    """Measure from each kill to the next start of each task that it interrupted."""
    seconds = []
    interrupted = 0
    for execution in executions:
        kill = _kill_of(execution, kills)
        if kill is None or kill.target != target:
            continue
        interrupted += 1
        later = [
            other.start - kill.at
            for other in executions
            if other.task_id == execution.task_id and other.start > execution.start
        ]
        if later:
            seconds.append(min(later))
    return Restarts(tuple(seconds), interrupted)


def _kill_of(execution: Execution, kills: Sequence[Kill]) -> Kill | None:
    # The first: a worker may be killed after one of its children was.
    return next((kill for kill in kills if kill.hit(execution)), None)


def _end(execution: Execution, kills: Sequence[Kill]) -> float:
    if execution.end is not None:
        return execution.end
    kill = _kill_of(execution, kills)
    return execution.start if kill is None else kill.at
