"""Waiting for something to become true, with a deadline instead of a guess."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 10.0,
    message: str | Callable[[], str] = "",
    *,
    interval: float = 0.02,
) -> T:
    """Poll until a predicate is truthy and return what it returned.

    Args:
        predicate: Called again and again; an exception it raises is not caught.
        timeout: Seconds until it counts as a failure.
        message: What was waited for, or a function that says so once the time is up, to
            show e.g. a log as it stands by then.
        interval: Seconds between two calls.

    Returns:
        The first truthy value.

    Raises:
        AssertionError: If the time is up; it ends with the message.
    """
    deadline = time.monotonic() + timeout
    while True:
        if value := predicate():
            return value
        if time.monotonic() >= deadline:
            what = message() if callable(message) else message
            raise AssertionError(f"not within {timeout:g} s: {what or predicate}")
        time.sleep(interval)
