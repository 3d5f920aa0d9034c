"""The demo does what it says: it ends with the table, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from click.testing import CliRunner

from reliable_tasks.demo import __main__ as cli
from reliable_tasks.demo._chaos import Kill, plan
from reliable_tasks.demo._events import EventLog, Execution
from reliable_tasks.demo._ledger import Ledger, Place
from reliable_tasks.demo._outcome import Outcome, Restarts, overlaps, restarts
from reliable_tasks.errors import MissingExtra
from tests.support import is_alive, wait_until

_MARK = "RELIABLE_TASKS_TEST_MARK"
_SOURCES = Path(cli.__file__).resolve().parents[2]


class Demo:
    """The demo in a process of its own, with a directory for temporary files of its own."""

    def __init__(self, scratch: Path, command: Sequence[str]) -> None:
        self.scratch = scratch
        scratch.mkdir()
        self._output = scratch.parent / "output.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "reliable_tasks.demo", *command],
                cwd=scratch.parent,
                env={
                    **os.environ,
                    "PYTHONPATH": str(_SOURCES),
                    "TMPDIR": str(scratch),
                    _MARK: str(scratch),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def wait_output(self, pattern: str, timeout: float) -> None:
        """Wait until it has printed something."""
        wait_until(
            lambda: re.search(pattern, self.output) or self.process.poll() is not None,
            timeout,
            lambda: f"{pattern!r} in {self.output}",
        )
        assert re.search(pattern, self.output), self.output

    def family(self) -> list[int]:
        """Find it and all processes that it started: they have inherited the mark."""
        mark = f"{_MARK}={self.scratch}\0".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:
                continue
        return [pid for pid in found if is_alive(pid)]

    def left_files(self) -> list[str]:
        """List the temporary files that are there."""
        return sorted(path.name for path in self.scratch.iterdir())


StartDemo = Callable[..., Demo]


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[StartDemo]:
    """Start the demo, and end it with its workers if the test does not."""
    started: list[Demo] = []

    def start(*command: str) -> Demo:
        demo = Demo(tmp_path / "scratch", command)
        started.append(demo)
        return demo

    yield start
    for demo in started:
        demo.process.kill()
        demo.process.wait()
        wait_until(lambda demo=demo: not demo.family(), message="the demo's processes gone")


@pytest.fixture
def some_files(tmp_path: Path) -> Path:
    """Files of which not all can be used."""
    directory = tmp_path / "files"
    directory.mkdir()
    for number in range(16):
        (directory / f"text-{number}.txt").write_text(f"{number} words " * number)
    (directory / "binary").write_bytes(bytes(range(256)) * 64)
    (directory / "empty").touch()
    (directory / "with \"quotes' {braces} %s and spaces").write_text("one two")
    (directory / "dangling").symlink_to("nowhere")
    os.mkfifo(directory / "pipe")
    with (directory / "huge").open("wb") as huge:
        huge.truncate(1 << 40)
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff\xfe.txt")).write_text("not UTF-8")
    return directory


def rows(output: str) -> Mapping[str, tuple[str, str]]:
    """Read the table back: each row's label and its two cells."""
    cell = r"\S+(?:, \S+| of \d+)?"
    found = re.findall(rf"^ *(\S.*?) {{2,}}({cell}) {{2,}}({cell})$", output, re.MULTILINE)
    return {label: (usual, ours) for label, usual, ours in found}


@pytest.mark.timeout(150)
def test_the_demo_ends_with_the_table(start_demo: StartDemo, some_files: Path) -> None:
    """Workers are killed, this library keeps its promises, and every number is in the table."""
    demo = start_demo("--input", str(some_files), "--seed", "7")
    assert demo.process.wait(120) == 0, demo.output
    assert "19 files of" in demo.output
    for reason in (
        "1 larger than 4 MiB",
        "1 named in another encoding than UTF-8",
        "1 not a regular file",
        "1 unreadable",
    ):
        assert reason in demo.output
    table = rows(demo.output)
    assert table["wrong results"][1] == "0"
    assert table["run twice at once"][1] == "0"
    assert table["locks left behind"][1] == "0"
    assert table["lost: not done at the end"][1] == "0"
    queued, done = (int(table[label][1]) for label in ("tasks queued", "done"))
    assert queued >= 19
    assert done == queued
    children, workers = map(int, table["SIGKILLs: pool children, whole workers"][1].split(", "))
    assert children
    assert workers
    assert demo.left_files() == []
    assert demo.family() == []


@pytest.mark.parametrize(
    ("moment", "signum"),
    [
        ("files of", signal.SIGINT),
        ("workers are starting", signal.SIGTERM),
        ("SIGKILL of", signal.SIGINT),
    ],
)
def test_the_demo_can_be_stopped_at_any_time(
    start_demo: StartDemo, some_files: Path, moment: str, signum: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM end it within seconds; no process and no file is left."""
    demo = start_demo("--input", str(some_files), "--seed", "7")
    demo.wait_output(moment, 60)
    demo.process.send_signal(signum)
    assert demo.process.wait(10) == 128 + signum, demo.output
    assert "Traceback" not in demo.output
    assert demo.left_files() == []
    assert demo.family() == []


def test_workers_die_with_a_demo_that_is_killed(start_demo: StartDemo, some_files: Path) -> None:
    """SIGKILL of the demo itself leaves no worker and no server running."""
    demo = start_demo("--input", str(some_files), "--seed", "7")
    demo.wait_output("SIGKILL of", 60)
    assert len(demo.family()) > 1
    demo.process.kill()
    demo.process.wait()
    wait_until(lambda: not demo.family(), message="the demo's processes gone")


@pytest.mark.parametrize("arguments", [[], ["demo"]])
def test_both_ways_to_call_it_explain_themselves(arguments: list[str]) -> None:
    """The console script has a command, and says what its options are."""
    result = CliRunner().invoke(cli.main, [*arguments, "--help"])
    assert result.exit_code == 0
    assert ("--seed" if arguments else "demo") in result.output


def test_an_input_that_is_missing_is_named(tmp_path: Path) -> None:
    """A directory that does not exist is refused by name."""
    missing = tmp_path / "missing"
    result = CliRunner().invoke(cli.main, ["demo", "--input", str(missing)])
    assert result.exit_code == 2
    assert "--input" in result.output
    assert "missing" in result.output


def test_an_input_without_files_is_named(tmp_path: Path) -> None:
    """A directory without a file that can be used is refused by name, with the reasons."""
    os.mkfifo(tmp_path / "pipe")
    result = CliRunner().invoke(cli.main, ["demo", "--input", str(tmp_path)])
    assert result.exit_code == 2
    assert str(tmp_path) in re.sub(r"\s", "", result.output)
    assert "1 not a regular file" in result.output


def test_a_missing_extra_is_named(some_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the demo's packages it ends with the line that installs them."""
    monkeypatch.setitem(sys.modules, "celery_once", None)
    result = CliRunner().invoke(cli.main, ["demo", "--input", str(some_files)])
    assert result.exit_code == 2
    assert str(MissingExtra("celery-once", "demo")) in result.output


@pytest.mark.parametrize(
    ("what_happened", "exit_code"),
    [
        ({}, 0),
        ({"in_window": 1}, 1),
        ({"waiting": 1}, 1),
        ({"gone": 1}, 1),
        ({"twice_at_once": 1}, 1),
        ({"locks": ("file",)}, 1),
        ({"wrong": ("file: None",)}, 1),
    ],
)
def test_the_exit_code_says_whether_a_promise_was_broken(
    some_files: Path,
    monkeypatch: pytest.MonkeyPatch,
    what_happened: Mapping[str, Any],
    exit_code: int,
) -> None:
    """It is 1 for what this library broke; the usual setup does not set it."""
    usual = outcome("usual", waiting=1, gone=1, twice_at_once=1, locks=("file",))
    ours = outcome("reliable_tasks", **what_happened)
    monkeypatch.setattr(cli, "run", lambda name, *rest: usual if name == "usual" else ours)
    result = CliRunner().invoke(cli.main, ["demo", "--input", str(some_files)])
    assert result.exit_code == exit_code, result.output
    assert ("broke its promise" in result.output) == bool(exit_code)


def outcome(name: str, **numbers: Any) -> Outcome:
    """Make the outcome of a run in which nothing happened but what is said."""
    no_restarts = Restarts((), 0)
    nothing: dict[str, Any] = {
        **dict.fromkeys(("calls", "accepted", "done", "waiting", "queued", "gone"), 0),
        **dict.fromkeys(("in_window", "twice_at_once", "repeated"), 0),
        **dict.fromkeys(("kills", "locks", "wrong"), ()),
        **dict.fromkeys(("seconds", "redelivery"), 1.0),
        "restarts": {"child": no_restarts, "worker": no_restarts},
    }
    return Outcome(name=name, **{**nothing, **numbers})


def execution(task_id: str, start: float, end: float | None, pid: int = 1) -> Execution:
    """Make an execution of the one file."""
    return Execution(task_id, "file", "host", pid, start, end)


def test_two_runs_at_once_are_counted() -> None:
    """Runs of a file that overlap are counted, a killed one up to its kill and no longer."""
    kills = [Kill("child", "host", 1, at=2.0)]
    killed = execution("a", 0.0, None)
    assert overlaps([killed, execution("a", 2.1, 3.0, pid=2)], kills) == 0
    assert overlaps([killed, execution("a", 1.9, 3.0, pid=2)], kills) == 1
    assert overlaps([execution("a", 0.0, 9.0), execution("b", 1.0, 2.0, pid=2)], []) == 1


def test_restarts_are_measured_from_the_kill() -> None:
    """A task that never starts again counts as interrupted, and has no seconds."""
    kills = [Kill("child", "host", 1, at=2.0), Kill("worker", "host", None, at=5.0)]
    executions = [
        execution("a", 0.0, None, pid=1),
        execution("a", 2.5, 3.0, pid=2),
        execution("b", 4.0, None, pid=3),
    ]
    child, worker = (restarts(executions, kills, target) for target in ("child", "worker"))
    assert (child.seconds, child.interrupted) == ((0.5,), 1)
    assert (worker.seconds, worker.interrupted) == ((), 1)


def test_a_line_cut_off_by_a_kill_is_not_read(tmp_path: Path) -> None:
    """The events before it count, and it is no event."""
    start = '{"t": 1.0, "id": "a", "path": "file", "host": "host", "pid": 1}\n'
    (tmp_path / "1.jsonl").write_text(start + '{"t": 2.')
    log = EventLog(tmp_path)
    assert log.catch_up()
    assert log.running == [execution("a", 1.0, None)]
    assert not log.catch_up()


def test_the_same_seed_gives_the_same_kills() -> None:
    """Both contenders suffer the same, children and whole workers; another seed differs."""
    kills = plan(3, 20.0, 2)
    assert kills == plan(3, 20.0, 2) != plan(4, 20.0, 2)
    assert {kill.target for kill in kills} == {"child", "worker"}


def test_the_ledger_knows_a_message_that_was_fetched_but_not_noted(redis_url: str) -> None:
    """A message popped from the queue and never noted down can be told from an acknowledged one."""
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    with Ledger(port) as ledger, Celery(broker=redis_url) as app:
        lost, held, done = (app.send_task("task").id for _ in range(3))
        with redis.Redis.from_url(redis_url) as client:
            client.rpop("celery")
        with app.connection_for_read() as connection, connection.channel() as channel:
            queue = app.amqp.queues["celery"](channel)
            first, second = queue.get(), queue.get()
            second.ack()

            def places() -> list[Place | None]:
                ledger.catch_up()
                return [ledger.place(task_id) for task_id in (lost, held, done)]

            expected = [Place.QUEUED, Place.HELD, Place.DONE_WITH]
            wait_until(lambda: places() == expected, message=f"{expected}")
            first.requeue()
            wait_until(lambda: places()[1] is Place.QUEUED, message="queued again")
