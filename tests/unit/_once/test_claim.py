"""The claim as it travels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.app.task import Context

from reliable_tasks._once.claim import CLAIM, Claim, Run

HEADER = {"key": "k", "owner": "one", "attempt": 3}


def test_a_claim_survives_its_header() -> None:
    """What was put into a message comes out of it."""
    claim = Claim("k", "one", 3)
    assert claim.as_header() == HEADER
    assert Claim.from_headers({CLAIM: HEADER}, "one") == claim


@pytest.mark.parametrize(
    ("headers", "task_id"),
    [
        (None, "one"),
        ({}, "one"),
        ({CLAIM: "text"}, "one"),
        ({CLAIM: HEADER}, "two"),
        ({CLAIM: HEADER}, None),
        ({CLAIM: {**HEADER, "owner": None}}, None),
        ({CLAIM: {"owner": "one"}}, "one"),
        ({CLAIM: {**HEADER, "key": 7}}, "one"),
        ({CLAIM: {**HEADER, "attempt": "x"}}, "one"),
    ],
)
def test_a_claim_of_another_task_is_none(headers: Any, task_id: str | None) -> None:
    """Only the task whose id is in the header owns the claim."""
    assert Claim.from_headers(headers, task_id) is None


def test_a_task_without_a_run_has_none() -> None:
    """A request may carry anything under that name."""
    for request in ({}, {"reliable_run": "not a run"}):
        task: Any = SimpleNamespace(request=Context(request))
        assert Run.of(task) is None
