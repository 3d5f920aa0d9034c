"""Retry policies made of tenacity's own objects, carried out as Celery retries.

tenacity decides (``stop``, ``wait``, ``retry``, evaluated as pure functions of a
`tenacity.RetryCallState`); Celery acts: a retry goes back to the broker with its delay and frees
the slot. What tenacity would remember in the process travels in a message header.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tenacity
from tenacity.retry import retry_base
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from reliable_tasks.config import nearest
from reliable_tasks.errors import ConfigError, RetriesExhausted

__all__ = ["RETRYING", "GiveUp", "Policy", "RetryIn", "Retrying", "Return"]

#: Header: what the next attempt must know of the ones before it.
RETRYING = "reliable_retrying"

#: What ``retrying=`` takes: tenacity's ``Retrying``, one of its strategies, several of them, or
#: a mapping of ``Retrying``'s arguments.
Retrying = (
    tenacity.Retrying
    | stop_base
    | wait_base
    | retry_base
    | Iterable[stop_base | wait_base | retry_base]
    | Mapping[str, Any]
)

_KINDS = {"stop": stop_base, "wait": wait_base, "retry": retry_base}
#: Without a stop by attempts, the longest wait is the one that the policy grows to until here.
_ATTEMPTS_LOOKED_AT = 100
_TAKEN = ("stop", "wait", "retry", "before", "after", "before_sleep", "retry_error_callback")


@dataclass(frozen=True, slots=True)
class RetryIn:
    """Run again after a delay.

    Attributes:
        seconds: The delay.
        header: What the next attempt must know.
    """

    seconds: float
    header: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail with an error."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Return:
    """End with a result."""

    value: Any


class Policy:
    """A retry policy.

    Args:
        retrying: Tenacity's objects, see `Retrying`.
        task: The task's name, for messages.

    Raises:
        ConfigError: It is not made of tenacity's objects, or one of them cannot work where
            attempts run in different processes.
    """

    def __init__(self, retrying: Retrying, task: str) -> None:
        self._where = f"retrying={retrying!r} on {task}"
        self._retrying = self._understand(retrying)
        self._refuse_what_cannot_work()

    @property
    def retrying(self) -> tenacity.Retrying:
        """The policy as tenacity's own object."""
        return self._retrying

    def start(
        self, body: Callable[..., Any], args: Any, kwargs: Any, retries: int, header: Any
    ) -> tenacity.RetryCallState:
        """Return tenacity's state for an attempt that begins now.

        It has one attribute more: ``previous_outcome``, the ``repr`` of the error or result of
        the attempt before, or ``None`` in the first.

        Args:
            body: The task's body.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            retries: How often the task was retried before.
            header: What the attempt before left, or ``None``.
        """
        known = header if isinstance(header, dict) else {}
        state = tenacity.RetryCallState(self._retrying, body, args, kwargs)
        state.attempt_number = retries + 1
        state.idle_for = float(known.get("idle_for", 0.0))
        state.previous_outcome = known.get("outcome")  # type: ignore[attr-defined]
        # Monotonic clocks of two hosts have nothing in common: the age of the task comes from
        # their wall clocks, and counts from here on by this process' monotonic one.
        state.start_time -= max(time.time() - float(known.get("started", time.time())), 0.0)
        if self._retrying.before is not None:
            self._retrying.before(state)
        return state

    def after_error(
        self, state: tenacity.RetryCallState, error: BaseException
    ) -> RetryIn | GiveUp | Return:
        """Decide what follows an error."""
        state.set_exception((type(error), error, error.__traceback__))
        is_explicit = isinstance(error, tenacity.TryAgain)
        if not is_explicit and not self._retrying.retry(state):
            return GiveUp(error)
        return self._retry_or_stop(state)

    def after_result(
        self, state: tenacity.RetryCallState, result: Any
    ) -> RetryIn | GiveUp | Return:
        """Decide what follows a result: tenacity can retry on results too."""
        state.set_result(result)
        if not self._retrying.retry(state):
            return Return(result)
        return self._retry_or_stop(state)

    def longest_wait(self) -> float | None:
        """Return the longest delay that the policy can ask for, ``None`` if it cannot be known."""
        last = next((n for n in range(1, _ATTEMPTS_LOOKED_AT) if self._stops_after(n)), None)
        # Nothing waits after the last attempt.
        return _longest(self._retrying.wait, max((last or _ATTEMPTS_LOOKED_AT) - 1, 1))

    def _stops_after(self, attempt: int) -> bool:
        state = tenacity.RetryCallState(self._retrying, None, (), {})
        state.attempt_number = attempt
        state.set_result(None)
        try:
            return bool(self._retrying.stop(state))
        except Exception:  # noqa: BLE001 - a stop of the user's may need what a real attempt has
            return False

    def _retry_or_stop(self, state: tenacity.RetryCallState) -> RetryIn | GiveUp | Return:
        # The order is tenacity's own (BaseRetrying._post_retry_check_actions).
        policy = self._retrying
        if policy.after is not None:
            policy.after(state)
        state.upcoming_sleep = float(policy.wait(state))
        if policy.stop(state):
            return self._stop(state)
        state.next_action = tenacity.RetryAction(state.upcoming_sleep)
        state.idle_for += state.upcoming_sleep
        if policy.before_sleep is not None:
            policy.before_sleep(state)
        header = {
            "started": time.time() - (time.monotonic() - state.start_time),
            "idle_for": state.idle_for,
            "outcome": _shown(state),
        }
        return RetryIn(state.upcoming_sleep, header)

    def _stop(self, state: tenacity.RetryCallState) -> GiveUp | Return:
        if self._retrying.retry_error_callback is not None:
            return Return(self._retrying.retry_error_callback(state))
        outcome = state.outcome
        assert outcome is not None
        error = outcome.exception()
        if error is None:
            return GiveUp(RetriesExhausted(state.attempt_number, repr(outcome.result())[:200]))
        if isinstance(error, tenacity.TryAgain):
            # As tenacity's reraise: what made the task say TryAgain is what it failed of.
            error = error.__cause__ or error.__context__ or error
        return GiveUp(error)

    def _understand(self, retrying: Any) -> tenacity.Retrying:
        if isinstance(retrying, tenacity.Retrying):
            return retrying
        if isinstance(retrying, tenacity.BaseRetrying):
            raise ConfigError(f"{self._where}: only tenacity.Retrying works in a Celery task")
        if isinstance(retrying, Mapping):
            for name in retrying:
                if name not in (*_TAKEN, "reraise", "name", "enabled"):
                    raise ConfigError(f"{self._where}: {name!r}" + nearest(name, list(_TAKEN)))
            return tenacity.Retrying(**retrying)
        strategies = [retrying] if isinstance(retrying, tuple(_KINDS.values())) else retrying
        if isinstance(strategies, (str, bytes)) or not isinstance(strategies, Iterable):
            raise ConfigError(
                f"{self._where}: give tenacity.Retrying(...), or its stop_*, wait_* and "
                "retry_if_* objects"
            )
        arguments: dict[str, Any] = {}
        for strategy in strategies:
            kind = next((k for k, cls in _KINDS.items() if isinstance(strategy, cls)), None)
            if kind is None:
                raise ConfigError(
                    f"{self._where}: {strategy!r} is none of tenacity's stop_*, wait_* and "
                    "retry_if_* objects"
                )
            if kind in arguments:
                raise ConfigError(
                    f"{self._where}: two {kind} strategies; combine them with "
                    f"{'+' if kind == 'wait' else '| or &'}"
                )
            arguments[kind] = strategy
        return tenacity.Retrying(**arguments)

    def _refuse_what_cannot_work(self) -> None:
        policy = self._retrying
        for name, strategy in (
            ("stop", policy.stop),
            ("wait", policy.wait),
            ("retry", policy.retry),
        ):
            if _is_asynchronous(strategy):
                raise ConfigError(
                    f"{self._where}: {name}={strategy!r} is asynchronous, and a Celery task is "
                    "not; use tenacity's own stop_*, wait_* and retry_if_* objects"
                )
        if policy.sleep is not tenacity.nap.sleep:
            raise ConfigError(
                f"{self._where}: 'sleep' is never called, for the wait is spent in the broker; "
                "leave it out"
            )
        if policy.retry_error_cls is not tenacity.RetryError:
            raise ConfigError(
                f"{self._where}: 'retry_error_cls' is never raised: a task that gives up fails "
                "with its own last error; leave it out"
            )
        if _contains(policy.stop, tenacity.stop_when_event_set):
            raise ConfigError(
                f"{self._where}: stop_when_event_set cannot work, for attempts run in different "
                "processes, which share no event"
            )


def _contains(stop: Any, kind: type) -> bool:
    return isinstance(stop, kind) or any(_contains(s, kind) for s in getattr(stop, "stops", ()))


def _is_asynchronous(strategy: Any) -> bool:
    parts = getattr(strategy, "retries", ())
    return (
        inspect.iscoroutinefunction(strategy)
        or inspect.iscoroutinefunction(type(strategy).__call__)
        or any(_is_asynchronous(part) for part in parts)
    )


def _shown(state: tenacity.RetryCallState) -> str:
    """Return the outcome of an attempt as text, for the attempt that follows."""
    outcome = state.outcome
    assert outcome is not None
    error = outcome.exception()
    return (repr(error) if error is not None else repr(outcome.result()))[:200]


def _longest(wait: Any, attempts: int) -> float | None:
    """Return the upper bound of a wait strategy over its first attempts."""
    if isinstance(wait, tenacity.wait_combine):
        parts = [_longest(one, attempts) for one in wait.wait_funcs]
        return None if None in parts else sum(part for part in parts if part is not None)
    if isinstance(wait, tenacity.wait_chain):
        parts = [_longest(one, attempts) for one in wait.strategies[:attempts]]
        return None if None in parts else max(part for part in parts if part is not None)
    if isinstance(wait, tenacity.wait_random):
        return float(wait.wait_random_max)
    if isinstance(wait, tenacity.wait_fixed):
        return float(wait.wait_fixed)
    if isinstance(wait, tenacity.wait_exponential):
        # The random kind draws below what its base class returns.
        bound = functools.partial(tenacity.wait_exponential.__call__, wait)
        return max(float(bound(_at(1))), float(bound(_at(attempts))))
    if isinstance(wait, tenacity.wait_incrementing):
        return max(float(wait(_at(1))), float(wait(_at(attempts))))
    if isinstance(wait, tenacity.wait_exponential_jitter):
        # Before 9.2 the multiplier was called initial, and there was no min.
        grows = tenacity.wait_exponential(
            multiplier=getattr(wait, "multiplier", getattr(wait, "initial", 1)),
            exp_base=wait.exp_base,
        )
        longest = max(float(grows(_at(1))), float(grows(_at(attempts)))) + wait.jitter
        return max(float(getattr(wait, "min", 0)), min(longest, float(wait.max)))
    return None


def _at(attempt: int) -> tenacity.RetryCallState:
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = attempt
    return state
