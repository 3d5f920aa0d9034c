"""How long stock kombu must wait before it takes a message for abandoned.

On Redis kombu hands a message to another worker a ``visibility_timeout`` after it was fetched,
whether or not its worker lives. Too short, and long tasks run twice at once; too long, and the
tasks of a dead worker wait. The right number follows from the app's own limits.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.utils.time import rate

from reliable_tasks._celery.registry import hard_limit, known_tasks
from reliable_tasks._places import read_config
from reliable_tasks._retrying import Policy
from reliable_tasks.config import UNLIMITED

__all__ = ["VisibilityTimeout", "recommend", "recommended_visibility_timeout"]


@dataclass(frozen=True, slots=True)
class VisibilityTimeout:
    """A recommended ``visibility_timeout``.

    Attributes:
        seconds: The number.
        reasons: What it is made of, one line each.
        unlimited: Names of the tasks that have no hard time limit, so that no number is safe
            for them; give them ``time_limit=`` or say ``longest_task=``.
    """

    seconds: int
    reasons: tuple[str, ...]
    unlimited: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"visibility_timeout = {self.seconds} s: " + "; ".join(self.reasons)


def recommended_visibility_timeout(
    app: Celery,
    *,
    longest_task: float | None = None,
    longest_countdown: float | None = None,
) -> VisibilityTimeout:
    """Say which ``visibility_timeout`` an app needs, and why.

    It is the time that a message can wait in a worker's prefetch, behind tasks that take as long
    as they may and for its rate limit, plus the longest task, plus the longest countdown, ETA or
    retry delay (a worker holds a message while it waits for its time), plus a margin.

    Args:
        app: The app, with its tasks imported.
        longest_task: Seconds that the longest task without a hard limit runs. Default:
            ``reliable_longest_task``.
        longest_countdown: The longest countdown or ETA that callers use, in seconds. Default:
            ``reliable_longest_countdown``.
    """
    app.finalize(auto=True)
    return recommend(
        app, known_tasks(app), longest_task=longest_task, longest_countdown=longest_countdown
    )


def recommend(
    app: Celery,
    tasks: Sequence[Any],
    *,
    longest_task: float | None = None,
    longest_countdown: float | None = None,
    concurrency: int | None = None,
) -> VisibilityTimeout:
    """Do what `recommended_visibility_timeout` does, for the tasks that are known so far."""
    config = read_config(app)
    stated = config.longest_task if longest_task is None else longest_task
    run, run_reason, unlimited = _longest_run(tasks, stated)
    delays = [*_retry_delays(tasks)]
    countdown = config.longest_countdown if longest_countdown is None else longest_countdown
    if countdown is not None:
        delays.append((float(countdown), "the longest countdown, as stated"))
    delay, delay_reason = max(delays, default=(0.0, ""))
    multiplier = int(app.conf.worker_prefetch_multiplier or 0)
    reasons = [run_reason]
    total = run
    if multiplier > 1:
        total += (multiplier - 1) * run
        reasons.append(f"{multiplier - 1} x as much waiting in the prefetch")
    if delay:
        total += delay
        reasons.append(f"{delay:g} s {delay_reason}")
    held = multiplier * (concurrency or app.conf.worker_concurrency or os.cpu_count() or 1)
    spread, rate_reason = max(_rate_waits(tasks, held), default=(0.0, ""))
    if spread:
        total += spread
        reasons.append(f"{spread:g} s {rate_reason}")
    reasons.append(f"{config.visibility_margin:g} s margin")
    seconds = math.ceil(total + config.visibility_margin)
    return VisibilityTimeout(seconds, tuple(reasons), unlimited)


def count(names: Sequence[str]) -> str:
    """Return how many tasks have something, as the beginning of a sentence."""
    return f"{len(names)} task{'s have' if len(names) > 1 else ' has'}"


def _longest_run(tasks: Sequence[Any], stated: float | None) -> tuple[float, str, tuple[str, ...]]:
    limits = [(hard_limit(task), task.name) for task in tasks if hard_limit(task)]
    unlimited = tuple(task.name for task in tasks if not hard_limit(task))
    longest, name = max(limits, default=(0.0, ""))
    if stated is not None:
        if stated >= longest:
            return float(stated), f"{stated:g} s the longest task, as stated", ()
        return longest, f"{longest:g} s hard limit of {name}", ()
    if unlimited or not limits:
        why = f"{count(unlimited)} no hard limit" if unlimited else "no tasks are known"
        if longest > UNLIMITED:
            return longest, f"{longest:g} s hard limit of {name} ({why})", unlimited
        return UNLIMITED, f"{UNLIMITED:g} s because {why}", unlimited
    return longest, f"{longest:g} s hard limit of {name}", ()


def _retry_delays(tasks: Iterable[Any]) -> Iterable[tuple[float, str]]:
    for task in tasks:
        policy: Policy | None = getattr(task, "_policy", None)
        wait = policy.longest_wait() if policy is not None else None
        if wait:
            yield wait, f"longest retry wait of {task.name}"
        if getattr(task, "autoretry_for", ()):
            backoff = float(getattr(task, "retry_backoff", 0) or 0)
            longest = float(getattr(task, "retry_backoff_max", 600))
            yield (
                longest if backoff else float(task.default_retry_delay),
                f"longest autoretry delay of {task.name}",
            )
        elif _calls_retry(task):
            yield float(task.default_retry_delay), f"default_retry_delay of {task.name}"


def _rate_waits(tasks: Iterable[Any], held: int) -> Iterable[tuple[float, str]]:
    for task in tasks:
        per_second = rate(task.rate_limit) if task.rate_limit else 0
        if per_second:
            yield held / per_second, f"for {held} held messages at {task.rate_limit} ({task.name})"


def _calls_retry(task: Any) -> bool:
    code = getattr(inspect.unwrap(getattr(task, "run", None) or (lambda: None)), "__code__", None)
    return code is not None and "retry" in code.co_names
