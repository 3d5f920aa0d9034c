"""Retry policies: what is taken, what is refused, and what follows an attempt."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import tenacity
import tenacity.asyncio
import time_machine

from reliable_tasks import ConfigError, RetriesExhausted
from reliable_tasks._retrying import GiveUp, Policy, RetryIn, Return

STOP = tenacity.stop_after_attempt(3)
WAIT = tenacity.wait_fixed(2)
RETRY = tenacity.retry_if_exception_type(OSError)


def start(policy: Policy, retries: int = 0, header: Any = None) -> tenacity.RetryCallState:
    """An attempt that begins."""
    return policy.start(print, (1,), {"a": 2}, retries, header)


@pytest.mark.parametrize(
    "retry",
    [
        tenacity.asyncio.retry_if_exception(lambda error: None),  # type: ignore[arg-type]
        tenacity.asyncio.retry_if_exception(lambda error: None) | RETRY,  # type: ignore[arg-type]
    ],
)
def test_an_asynchronous_strategy_is_refused(retry: Any) -> None:
    """The coroutine that it returns would be true whatever it says."""
    with pytest.raises(ConfigError, match="is asynchronous, and a Celery task is not"):
        Policy({"retry": retry}, "t")


# -- what is taken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        tenacity.Retrying(stop=STOP, wait=WAIT, retry=RETRY),
        {"stop": STOP, "wait": WAIT, "retry": RETRY},
        [STOP, WAIT, RETRY],
        (RETRY, STOP, WAIT),
        {STOP, WAIT, RETRY},
    ],
)
def test_every_form_means_the_same(given: Any) -> None:
    """A Retrying, its arguments, or its strategies in any order."""
    retrying = Policy(given, "t").retrying
    assert (retrying.stop, retrying.wait, retrying.retry) == (STOP, WAIT, RETRY)


@pytest.mark.parametrize(("given", "kind"), [(STOP, "stop"), (WAIT, "wait"), (RETRY, "retry")])
def test_one_strategy_is_enough(given: Any, kind: str) -> None:
    """The rest is as in tenacity."""
    retrying = Policy(given, "t").retrying
    default = tenacity.Retrying()
    for name in ("stop", "wait", "retry"):
        expected = given if name == kind else getattr(default, name)
        assert getattr(retrying, name) is expected


def test_strategies_can_be_combined() -> None:
    """As tenacity combines them."""
    given = [
        STOP | tenacity.stop_after_delay(5),
        WAIT + tenacity.wait_random(0, 1),
        RETRY & tenacity.retry_if_exception_message("no"),
    ]
    assert isinstance(Policy(given, "t").retrying.wait, tenacity.wait_combine)


def test_all_that_tenacity_takes_beside_them_is_taken() -> None:
    """Callbacks, ``reraise``, ``name`` and ``enabled`` as keywords of a mapping."""
    given = {"reraise": True, "enabled": False, "name": "n", "before": print}
    assert not Policy(given, "t").retrying.enabled


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, "give tenacity.Retrying(...), or its stop_*, wait_* and retry_if_* objects"),
        ("stop", "give tenacity.Retrying"),
        (b"stop", "give tenacity.Retrying"),
        (tenacity.wait_none, "give tenacity.Retrying"),
        ([STOP, 7], "7 is none of tenacity's stop_*, wait_* and retry_if_* objects"),
        ([STOP, STOP], "two stop strategies; combine them with | or &"),
        ([RETRY, RETRY], "two retry strategies; combine them with | or &"),
        ([WAIT, WAIT], "two wait strategies; combine them with +"),
        ({"stpo": STOP}, "'stpo'; did you mean 'stop'?"),
        ({"sleep": time.sleep}, "'sleep'"),
        (tenacity.AsyncRetrying(), "only tenacity.Retrying works in a Celery task"),
        (tenacity.Retrying(sleep=lambda s: None), "'sleep' is never called"),
        (tenacity.Retrying(retry_error_cls=KeyError), "'retry_error_cls' is never raised"),  # type: ignore[arg-type]
        (tenacity.stop_when_event_set(threading.Event()), "stop_when_event_set cannot work"),
        (
            STOP | (STOP & tenacity.stop_when_event_set(threading.Event())),
            "stop_when_event_set cannot work",
        ),
    ],
)
def test_what_cannot_work_is_refused(given: Any, words: str) -> None:
    """The message names the task and says why."""
    with pytest.raises(ConfigError) as caught:
        Policy(given, "shop.send")
    assert words in str(caught.value)
    assert "on shop.send" in str(caught.value)


# -- what follows an attempt -----------------------------------------------------------------


def test_an_error_that_is_retried() -> None:
    """The delay is the wait's, and the header is what JSON can carry."""
    policy = Policy([STOP, WAIT, RETRY], "t")
    decision = policy.after_error(start(policy), OSError("no"))
    assert isinstance(decision, RetryIn)
    assert decision.seconds == 2.0
    assert json.loads(json.dumps(decision.header)) == decision.header
    assert decision.header["outcome"] == "OSError('no')"
    assert decision.header["idle_for"] == 2.0
    assert decision.header["started"] == pytest.approx(time.time(), abs=5)


def test_an_error_that_is_not_retried() -> None:
    """The task fails with it."""
    policy = Policy([STOP, WAIT, RETRY], "t")
    error = ValueError("no")
    assert policy.after_error(start(policy), error) == GiveUp(error)


def test_the_last_attempt_fails_with_its_error() -> None:
    """Not with tenacity's RetryError around it."""
    policy = Policy([STOP, WAIT, RETRY], "t")
    error = OSError("no")
    assert isinstance(policy.after_error(start(policy, 1), error), RetryIn)
    assert policy.after_error(start(policy, 2), error) == GiveUp(error)


def test_a_result_that_is_accepted() -> None:
    """It is the task's result."""
    policy = Policy([STOP, WAIT], "t")
    assert policy.after_result(start(policy), 7) == Return(7)


def test_a_result_that_is_not_accepted() -> None:
    """It is retried, and in the end the task fails and says with what."""
    policy = Policy([STOP, tenacity.retry_if_result(lambda result: result is None)], "t")
    decision = policy.after_result(start(policy), None)
    assert isinstance(decision, RetryIn)
    assert decision.header["outcome"] == "None"
    assert decision.seconds == 0.0
    last = policy.after_result(start(policy, 2), None)
    assert isinstance(last, GiveUp)
    assert isinstance(last.error, RetriesExhausted)
    assert (last.error.attempts, last.error.result) == (3, "None")


def test_a_long_outcome_is_cut() -> None:
    """Headers travel with every message."""
    policy = Policy([STOP, WAIT], "t")
    decision = policy.after_error(start(policy), OSError("x" * 10_000))
    assert isinstance(decision, RetryIn)
    assert len(decision.header["outcome"]) == 200


def test_try_again_is_always_retried() -> None:
    """Whatever ``retry`` says; until ``stop`` ends it with the error behind it."""
    policy = Policy([STOP, WAIT, tenacity.retry_never], "t")
    cause = OSError("no")
    bare = tenacity.TryAgain()
    chained = tenacity.TryAgain()
    chained.__cause__ = cause
    within = tenacity.TryAgain()
    within.__context__ = cause
    assert isinstance(policy.after_error(start(policy), bare), RetryIn)
    assert policy.after_error(start(policy, 2), bare) == GiveUp(bare)
    assert policy.after_error(start(policy, 2), chained) == GiveUp(cause)
    assert policy.after_error(start(policy, 2), within) == GiveUp(cause)


def test_a_fallback_is_the_result_in_the_end() -> None:
    """``retry_error_callback`` sees the last attempt."""
    seen = []

    def fallback(state: tenacity.RetryCallState) -> str:
        assert state.outcome is not None
        seen.append((state.attempt_number, state.outcome.exception()))
        return "fallback"

    policy = Policy({"stop": STOP, "retry_error_callback": fallback}, "t")
    error = OSError("no")
    assert policy.after_error(start(policy, 2), error) == Return("fallback")
    assert seen == [(3, error)]


def test_callbacks_see_what_tenacity_would_show() -> None:
    """Attempt, arguments, outcome, wait and the time spent waiting."""
    seen: list[Any] = []

    def before(state: tenacity.RetryCallState) -> None:
        seen.append(("before", state.attempt_number, state.args, state.kwargs, state.outcome))

    def after(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        seen.append(("after", state.attempt_number, state.outcome.exception()))

    def before_sleep(state: tenacity.RetryCallState) -> None:
        assert state.next_action is not None
        assert state.fn is print
        seen.append(("before_sleep", state.next_action.sleep, state.idle_for))

    error = OSError("no")
    policy = Policy(
        {
            "stop": STOP,
            "wait": WAIT,
            "before": before,
            "after": after,
            "before_sleep": before_sleep,
        },
        "t",
    )
    first = policy.after_error(start(policy), error)
    assert isinstance(first, RetryIn)
    policy.after_error(start(policy, 1, first.header), error)
    policy.after_error(start(policy, 2, first.header), error)
    assert seen == [
        ("before", 1, (1,), {"a": 2}, None),
        ("after", 1, error),
        ("before_sleep", 2.0, 2.0),
        ("before", 2, (1,), {"a": 2}, None),
        ("after", 2, error),
        ("before_sleep", 2.0, 4.0),
        ("before", 3, (1,), {"a": 2}, None),
        ("after", 3, error),
    ]


def test_callbacks_can_be_left_out() -> None:
    """None is none."""
    policy = Policy({"stop": STOP, "before": None, "after": None, "before_sleep": None}, "t")
    assert isinstance(policy.after_error(start(policy), OSError()), RetryIn)


def test_an_attempt_knows_the_outcome_before_it() -> None:
    """As text, for an error of another process cannot always be made again."""
    policy = Policy([STOP, WAIT], "t")
    first = start(policy)
    decision = policy.after_error(first, OSError("no"))
    assert isinstance(decision, RetryIn)
    second = start(policy, 1, decision.header)
    outcomes = [getattr(state, "previous_outcome", "") for state in (first, second)]
    assert outcomes == [None, "OSError('no')"]


@pytest.mark.parametrize("header", [None, "text", {}, {"started": 0.0, "idle_for": 1}])
def test_a_header_may_be_missing(header: Any) -> None:
    """Then the attempt counts from now."""
    state = start(Policy(STOP, "t"), 4, header)
    assert state.attempt_number == 5


def test_the_time_since_the_first_attempt_is_true_in_another_process() -> None:
    """It is taken from the wall clock, for monotonic ones have nothing in common."""
    policy = Policy([tenacity.stop_after_delay(10), WAIT], "t")
    with time_machine.travel(1_800_000_000, tick=False) as traveller:
        decision = policy.after_error(start(policy), OSError())
        assert isinstance(decision, RetryIn)
        traveller.shift(9)
        state = start(policy, 1, decision.header)
        assert isinstance(policy.after_error(state, OSError()), RetryIn)
        traveller.shift(1)
        state = start(policy, 2, decision.header)
        assert isinstance(policy.after_error(state, OSError()), GiveUp)


def test_a_clock_that_was_set_back_does_not_count_below_zero() -> None:
    """Another host's clock may be ahead."""
    state = start(Policy(STOP, "t"), 1, {"started": time.time() + 100})
    state.set_result(None)
    assert state.seconds_since_start == pytest.approx(0, abs=5)


# -- the longest wait ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "longest"),
    [
        (tenacity.wait_none(), 0.0),
        (tenacity.wait_fixed(3), 3.0),
        (tenacity.wait_random(1, 4), 4.0),
        (tenacity.wait_incrementing(start=1, increment=2, max=100), 7.0),
        (tenacity.wait_incrementing(start=10, increment=-2), 10.0),
        (tenacity.wait_incrementing(start=1, increment=2, max=4), 4.0),
        (tenacity.wait_exponential(multiplier=1, max=100), 8.0),
        (tenacity.wait_exponential(multiplier=1, max=7), 7.0),
        (tenacity.wait_exponential(multiplier=100, exp_base=0.5), 100.0),
        (tenacity.wait_random_exponential(multiplier=1, max=100), 8.0),
        (tenacity.wait_full_jitter(multiplier=1, max=7), 7.0),
        (tenacity.wait_exponential_jitter(max=100, jitter=2), 10.0),
        (tenacity.wait_exponential_jitter(max=5, jitter=2), 5.0),
        (tenacity.wait_fixed(3) + tenacity.wait_random(0, 2), 5.0),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(9)), 9.0),
        (tenacity.wait_exception(lambda error: 3), None),
        (tenacity.wait_fixed(3) + tenacity.wait_exception(lambda error: 3), None),
        (tenacity.wait_chain(tenacity.wait_exception(lambda error: 3)), None),
    ],
)
def test_the_longest_wait_of_five_attempts(wait: Any, longest: float | None) -> None:
    """The bound is never less than what the policy can ask for."""
    assert Policy([tenacity.stop_after_attempt(5), wait], "t").longest_wait() == longest


def test_without_a_stop_the_wait_grows_to_its_own_maximum() -> None:
    """A policy that never stops reaches the bound that it has."""
    wait = tenacity.wait_exponential(max=600)
    assert Policy(wait, "t").longest_wait() == 600.0


def test_a_stop_that_needs_a_real_attempt_is_not_asked() -> None:
    """A stop of one's own may look at what does not exist yet."""

    def stop(state: tenacity.RetryCallState) -> bool:
        return bool(state.args[0])

    policy = Policy(tenacity.Retrying(stop=stop, wait=tenacity.wait_exponential(max=600)), "t")
    assert policy.longest_wait() == 600.0
