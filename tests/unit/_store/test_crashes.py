"""What is noted of who starts a task, and read again when that was its crash."""

from __future__ import annotations

import pytest

from reliable_tasks._store.crashes import Crash, Starter


@pytest.mark.parametrize(
    ("starter", "line"),
    [
        (Starter(17, "w1@shop"), "17 - w1@shop"),
        (Starter(17, "w1@shop", is_ending=True), "17 e w1@shop"),
        (Starter(17, "w1@shop", how="signal 9 (SIGKILL)"), "17 - w1@shop signal 9 (SIGKILL)"),
        (Starter(17, "my w1@shop", is_ending=True, how="exitcode 3"), "17 e my_w1@shop exitcode 3"),
        (Starter(17, ""), "17 -"),
    ],
)
def test_who_starts_a_task_is_one_line(starter: Starter, line: str) -> None:
    """A worker's name is one word in it, so that what follows is how the process ended."""
    assert str(starter) == line


@pytest.mark.parametrize("how", ["", "exitcode 3", "signal 11 (SIGSEGV)"])
@pytest.mark.parametrize("is_ending", [False, True])
def test_a_line_is_read_as_it_was_written(how: str, is_ending: bool) -> None:
    """The scripts put the time in front of it."""
    line = f"1500 {Starter(17, 'w1@shop', is_ending, how)}"
    assert Crash.read(line) == Crash(1.5, 17, "w1@shop", is_ending, how)


def test_the_start_that_stands_is_the_latest_crash() -> None:
    """It is not in the history yet."""
    found = Crash.read_all(b"1000 1 - w1@shop exitcode 3\n2000 2 e w2@shop", b"3000 3 - w3@shop")
    assert [(one.at, one.pid, one.is_ending, one.how) for one in found] == [
        (1.0, 1, False, "exitcode 3"),
        (2.0, 2, True, ""),
        (3.0, 3, False, ""),
    ]


@pytest.mark.parametrize("history", [None, b"", ""])
def test_a_task_that_has_not_crashed_has_no_history(history: bytes | str | None) -> None:
    """A client may leave answers as they are, or make text of them."""
    assert Crash.read_all(history, None) == []
    (only,) = Crash.read_all(history, "3000 3 - w3@shop")
    assert only.pid == 3


def test_what_was_cut_off_is_left_out() -> None:
    """Of a long history only the end is kept, which can begin in the midst of a line."""
    history = b"ashop exitcode 3 again\n7 - w\n2000 2 - w2@shop"
    assert [one.pid for one in Crash.read_all(history, None)] == [2]


def test_a_crash_is_told_as_a_poison_pill_has_it() -> None:
    """Whether only the handlers ran is no matter of those who read it."""
    crash = Crash(1.5, 17, "w1@shop", True, "exitcode 3")
    assert crash.as_dict() == {"host": "w1@shop", "pid": 17, "how": "exitcode 3", "at": 1.5}
