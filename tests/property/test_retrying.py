"""Celery waits and stops exactly as tenacity computes.

The reference is tenacity's own loop with a sleep that only counts. It runs side by side with the
same policy carried out as Celery retries, both on one clock that stands still but for the waits
and the time that an attempt takes, and on one seed, so that random strategies draw the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self
from unittest import mock

import pytest
import tenacity
import time_machine
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reliable_tasks import ReliableTask, RetriesExhausted
from reliable_tasks._retrying import RETRYING, Policy
from tests.unit.harness import run, take

BEGIN = 1_800_000_000
#: tenacity loops for ever without a stop; here the outcomes end.
MOST_ATTEMPTS = 7

numbers = itertools.count()


class Trouble(Exception):
    """What a failed attempt raises."""


class Worse(Exception):
    """What another failed attempt raises."""


@dataclass
class Attempt:
    """What one attempt does.

    Attributes:
        kind: ``"ok"``, ``"bad"`` (a result that is not wanted), or the error to raise.
        takes: Seconds.
    """

    kind: str
    takes: float


@dataclass
class Trace:
    """What happened.

    Attributes:
        waits: The delays, in order.
        began: When each attempt began, in seconds since the first.
        end: The outcome.
    """

    waits: list[float] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    end: Any = None


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Celery logs each failed attempt with its traceback."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


# -- strategies ------------------------------------------------------------------------------

# Quarters add up without an error, and a delay that is no quarter is never met exactly: which
# side of it a rounding error falls on is no question of policy.
seconds = st.integers(0, 120).map(lambda quarters: quarters / 4)
delays = st.integers(0, 120).map(lambda quarters: quarters / 4 + 0.1)


@st.composite
def random_waits(draw: Any) -> Any:
    """A wait between two bounds."""
    low, high = sorted((draw(seconds), draw(seconds)))
    return tenacity.wait_random(low, high)


def exponential(cls: Any) -> st.SearchStrategy[Any]:
    """A wait that doubles, or nearly."""
    return st.builds(
        cls,
        multiplier=st.sampled_from([0.5, 1, 3]),
        max=st.sampled_from([1, 10, 1e6]),
        exp_base=st.sampled_from([1, 1.5, 2, 3]),
        min=st.sampled_from([0, 0.5]),
    )


WAITS: dict[str, st.SearchStrategy[Any]] = {
    "wait_none": st.builds(tenacity.wait_none),
    "wait_fixed": st.builds(tenacity.wait_fixed, seconds),
    "wait_random": random_waits(),
    "wait_incrementing": st.builds(
        tenacity.wait_incrementing,
        start=seconds,
        increment=st.sampled_from([-1, 0, 0.5, 3]),
        max=st.sampled_from([5, 100]),
    ),
    "wait_exponential": exponential(tenacity.wait_exponential),
    "wait_random_exponential": exponential(tenacity.wait_random_exponential),
    "wait_exponential_jitter": st.builds(
        tenacity.wait_exponential_jitter,
        max=st.sampled_from([1, 10, 1e6]),
        exp_base=st.sampled_from([1, 2, 3]),
        jitter=st.sampled_from([0, 1, 5]),
    ),
    "wait_exception": st.builds(
        lambda a, b: tenacity.wait_exception(lambda e: a if isinstance(e, Trouble) else b),
        seconds,
        seconds,
    ),
}
simple_waits = st.one_of(*[w for name, w in WAITS.items() if name != "wait_exception"])
WAITS["wait_chain"] = st.lists(simple_waits, min_size=1, max_size=4).map(
    lambda waits: tenacity.wait_chain(*waits)
)
WAITS["wait_combine"] = st.tuples(simple_waits, simple_waits).map(lambda two: two[0] + two[1])

STOPS: dict[str, st.SearchStrategy[Any]] = {
    "stop_never": st.just(tenacity.stop_never),
    "stop_after_attempt": st.builds(tenacity.stop_after_attempt, st.integers(1, 6)),
    "stop_after_delay": st.builds(tenacity.stop_after_delay, delays),
    "stop_before_delay": st.builds(tenacity.stop_before_delay, delays),
}
simple_stops = st.one_of(*STOPS.values())
STOPS["stop_any"] = st.tuples(simple_stops, simple_stops).map(lambda two: two[0] | two[1])
STOPS["stop_all"] = st.tuples(simple_stops, simple_stops).map(lambda two: two[0] & two[1])

RETRIES = st.sampled_from(
    [
        tenacity.retry_if_exception_type(Exception),
        tenacity.retry_if_exception_type(Trouble),
        tenacity.retry_if_not_exception_type(Worse),
        tenacity.retry_if_exception_message(match="tr"),
        tenacity.retry_unless_exception_type(Worse),
        tenacity.retry_if_result(lambda result: result == "bad"),
        tenacity.retry_if_exception_type(Exception)
        | tenacity.retry_if_result(lambda result: result == "bad"),
        tenacity.retry_never,
        tenacity.retry_always,
    ]
)
attempts = st.lists(
    st.builds(
        Attempt,
        kind=st.sampled_from(["bad", "trouble", "trouble", "worse", "again", "ok"]),
        takes=st.sampled_from([0, 0.25, 1, 4]),
    ),
    min_size=1,
    max_size=MOST_ATTEMPTS - 1,
)


def body_of(plan: list[Attempt], clock: Any, trace: Trace) -> Callable[[], str]:
    """A task's body that does what is planned, attempt by attempt."""
    errors = {"trouble": Trouble("trouble"), "worse": Worse("worse"), "again": tenacity.TryAgain()}

    def body() -> str:
        number = len(trace.began)
        trace.began.append(round(clock.seconds(), 6))
        # A policy that never stops ends where the plan does.
        attempt = plan[number] if number < len(plan) else Attempt("ok", 0)
        clock.shift(attempt.takes)
        if attempt.kind in errors:
            raise errors[attempt.kind]
        return attempt.kind

    return body


class Clock:
    """A clock that both sides wait on: the wall's, and a process' monotonic one."""

    def __init__(self) -> None:
        self._passed = 0.0
        self._booted = 1000.0
        self._patches = contextlib.ExitStack()

    def seconds(self) -> float:
        """Seconds since the first attempt."""
        return self._passed

    def shift(self, seconds: float) -> None:
        """Let time pass."""
        self._passed += seconds
        self._traveller.shift(seconds)

    def change_process(self) -> None:
        """Go on where the monotonic clock began at another time."""
        self._booted = 5000.0 - self._booted

    def monotonic(self) -> float:
        """Seconds since some beginning."""
        return self._booted + self._passed

    def __enter__(self) -> Self:
        self._traveller = self._patches.enter_context(time_machine.travel(BEGIN, tick=False))
        self._patches.enter_context(mock.patch.object(time, "monotonic", self.monotonic))
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.close()


def policy_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that both sides take; always bounded, whatever the plan."""
    stop = arguments["stop"]
    return {**arguments, "stop": stop | tenacity.stop_after_attempt(MOST_ATTEMPTS)}


def by_tenacity(arguments: dict[str, Any], plan: list[Attempt], seed: int) -> Trace:
    """What tenacity's own loop does."""
    trace = Trace()
    random.seed(seed)
    with Clock() as clock:

        def sleep(delay: float) -> None:
            trace.waits.append(float(delay))
            clock.shift(delay)

        retrying = tenacity.Retrying(**policy_of(arguments), sleep=sleep)
        try:
            trace.end = retrying(body_of(plan, clock, trace))
        except tenacity.RetryError as error:
            last = error.last_attempt
            trace.end = type(last.exception()) if last.failed else RetriesExhausted
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
            trace.end = type(error)
    return trace


def by_celery(app: Celery, arguments: dict[str, Any], plan: list[Attempt], seed: int) -> Trace:
    """What the policy does as Celery retries, through real messages."""
    trace = Trace()
    with Clock() as clock:
        body = body_of(plan, clock, trace)

        @app.task(
            base=ReliableTask,
            shared=False,
            name=f"t{next(numbers)}",
            retrying=policy_of(arguments),
        )
        def task() -> str:
            return body()

        app.finalize()
        random.seed(seed)
        waits = spy_on_countdowns(task)
        task.delay()
        while (message := take(app)) is not None:
            clock.change_process()
            # Each attempt begins in a process that knows the message and nothing else.
            message.headers = json.loads(json.dumps(message.headers))
            if waits:
                assert message.headers[RETRYING]["idle_for"] == pytest.approx(sum(waits))
            ended = run(app, message)
            assert len(trace.began) <= MOST_ATTEMPTS
            if ended.state == "RETRY":
                clock.shift(waits[-1])
        trace.waits = waits
        trace.end = ended.value if ended.state == "SUCCESS" else type(ended.value)
    return trace


def spy_on_countdowns(task: Any) -> list[float]:
    """The delays that the task asks Celery for, as it asks for them."""
    waits: list[float] = []
    retry = task.retry

    def spied(*args: Any, **options: Any) -> Any:
        waits.append(options["countdown"])
        return retry(*args, **options)

    task.retry = spied
    return waits


def compare(app: Celery, arguments: dict[str, Any], plan: list[Attempt], seed: int) -> None:
    """Both sides wait, run and end alike."""
    expected = by_tenacity(arguments, plan, seed)
    found = by_celery(app, arguments, plan, seed)
    assert found.waits == expected.waits
    assert found.began == pytest.approx(expected.began, abs=1e-3)
    assert found.end == expected.end


many = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.mark.parametrize("name", WAITS)
def test_every_wait_is_tenacitys(app: Celery, name: str) -> None:
    """Delay by delay, drawn from the same random numbers."""

    @many
    @given(WAITS[name], RETRIES, attempts, st.integers(0, 9))
    def check(wait: Any, retry: Any, plan: list[Attempt], seed: int) -> None:
        stop = tenacity.stop_after_attempt(5)
        compare(app, {"wait": wait, "stop": stop, "retry": retry}, plan, seed)

    check()


@pytest.mark.parametrize("name", STOPS)
def test_every_stop_is_tenacitys(app: Celery, name: str) -> None:
    """After the same attempt, with the same outcome, on the same clock."""

    @many
    @given(STOPS[name], simple_waits, RETRIES, attempts, st.integers(0, 9))
    def check(stop: Any, wait: Any, retry: Any, plan: list[Attempt], seed: int) -> None:
        compare(app, {"wait": wait, "stop": stop, "retry": retry}, plan, seed)

    check()


def test_every_strategy_of_tenacity_is_among_them() -> None:
    """A strategy that tenacity adds has to be looked at here."""
    ours = set(WAITS) | set(STOPS)
    theirs = {
        name
        for name in dir(tenacity)
        if name.startswith(("wait_", "stop_")) and name not in ("stop_base", "wait_base")
    }
    aliases = {"wait_full_jitter", "wait_unknown"}
    refused = {"stop_when_event_set"}
    assert theirs - aliases - refused == ours & theirs
    assert theirs <= ours | aliases | refused


@many
@given(simple_waits, st.integers(1, 6), st.integers(0, 9))
def test_no_wait_is_longer_than_the_bound(wait: Any, stop: int, seed: int) -> None:
    """What the visibility timeout is computed from holds for every attempt."""
    policy = Policy([wait, tenacity.stop_after_attempt(stop)], "t")
    longest = policy.longest_wait()
    assert longest is not None
    random.seed(seed)
    # Nothing waits after the last attempt.
    for number in range(1, stop):
        state = tenacity.RetryCallState(policy.retrying, None, (), {})
        state.attempt_number = number
        assert wait(state) <= longest + 1e-9


@settings(many, max_examples=20)
@given(st.integers(1, 5), RETRIES, attempts, st.integers(0, 9))
def test_an_eager_task_retries_as_often(
    stop: int, retry: Any, plan: list[Attempt], seed: int
) -> None:
    """``task.apply()`` follows the same policy, and does not wait."""
    plan = [Attempt(attempt.kind, 0) for attempt in plan]
    arguments = {"stop": tenacity.stop_after_attempt(stop), "retry": retry}
    expected = by_tenacity(arguments, plan, seed)
    trace = Trace()
    with (
        Celery("eager", broker="memory://", set_as_current=False) as app,
        Clock() as clock,
    ):
        body = body_of(plan, clock, trace)
        waits = {"wait": tenacity.wait_fixed(100), **policy_of(arguments)}

        @app.task(base=ReliableTask, shared=False, name="t", retrying=waits)
        def task() -> str:
            return body()

        ended = task.apply()
    assert len(trace.began) == len(expected.began)
    assert (ended.result if ended.state == "SUCCESS" else type(ended.result)) == expected.end
