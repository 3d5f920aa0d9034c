"""The report reads as text and as data."""

from __future__ import annotations

import pytest

from reliable_tasks import Change, Report
from reliable_tasks._setup.report import Concern

CHANGE = Change("task_acks_late", False, True, "so that nothing is lost")
CONCERN = Concern("task_time_limit", 0, "set one")


@pytest.fixture
def report() -> Report:
    """A report of one change and one concern."""
    return Report(lambda: ([CHANGE], [CONCERN]))


def test_it_reads_as_text(report: Report) -> None:
    """Each setting with its values and its reason."""
    assert str(report) == (
        "reliable_tasks set:\n"
        "  task_acks_late = True (was False)\n"
        "      so that nothing is lost\n"
        "your settings that break the promise:\n"
        "  task_time_limit = 0\n"
        "      set one"
    )
    assert "break the promise" not in str(Report(lambda: ([CHANGE], [])))


def test_it_reads_as_data(report: Report) -> None:
    """Nothing but lists, dicts and values."""
    assert report.as_dict() == {
        "changes": [
            {
                "setting": "task_acks_late",
                "old": False,
                "new": True,
                "reason": "so that nothing is lost",
            }
        ],
        "concerns": [{"setting": "task_time_limit", "value": 0, "reason": "set one"}],
    }


def test_a_change_is_looked_up_by_its_setting(report: Report) -> None:
    """What was not changed is a KeyError."""
    assert report["task_acks_late"] is CHANGE
    with pytest.raises(KeyError, match="task_track_started"):
        _ = report["task_track_started"]


def test_a_concern_is_a_sentence() -> None:
    """It is also what the warning says."""
    assert str(CONCERN) == "task_time_limit = 0: set one"
