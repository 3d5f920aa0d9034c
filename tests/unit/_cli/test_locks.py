"""``celery -A proj reliable locks``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery
from click.testing import CliRunner, Result

from reliable_tasks import ReliableTask, StoreUnavailable, once
from reliable_tasks._cli import reliable
from reliable_tasks._cli.output import duration
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store import records
from reliable_tasks._store.claims import Claims
from tests.unit.harness import claims, run, take

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(app: Celery) -> Invoke:
    """Run the command as Celery does, which puts the app into click's context."""

    def invoke(*args: str, answer: str | None = None) -> Result:
        context = SimpleNamespace(app=app)
        return CliRunner().invoke(reliable, ["locks", *args], obj=context, input=answer)

    return invoke


@pytest.fixture
def task(app: Celery) -> Any:
    """A once-task that runs what is put into ``doing``."""

    @app.task(base=ReliableTask, name="shop.send")
    @once(key="invoice:{n}")
    def send(n: int) -> Any:
        return doing.pop()() if doing else None

    doing: list[Callable[[], Any]] = []
    found: Any = app.tasks["shop.send"]
    found.doing = doing
    return found


def key_of(task: Any, n: int) -> str:
    """Return the name of a claim."""
    name: str = task.reliable_once.claim_name(task, (n,), {})
    return name


@pytest.mark.parametrize("command", [(), ("list",)])
def test_the_list(invoke: Invoke, task: Any, command: tuple[str, ...]) -> None:
    """A line for each key, and nothing that is not wanted."""
    first, second = task.delay(7), task.delay(8)
    result = invoke(*command)
    assert result.exit_code == 0
    heading, *rows = result.output.splitlines()
    assert heading.split() == ["key", "task", "owner", "state", "age", "left"]
    assert {tuple(row.split()[:4]) for row in rows} == {
        (key_of(task, 7), "shop.send", first.id, "queued"),
        (key_of(task, 8), "shop.send", second.id, "queued"),
    }
    assert all(re.search(r" [0-9]s +(1h 0m|59m \d+s)$", row) for row in rows), rows
    assert len({row.index("shop.send ") for row in rows}) == 1, "the columns stand in line"


def test_an_empty_list(invoke: Invoke) -> None:
    """It says so, and is no lines of JSON."""
    assert invoke().output == "no key is taken\n"
    assert invoke("list", "--json").output == ""


def test_a_list_for_programs(invoke: Invoke, task: Any) -> None:
    """One object a line, with numbers in seconds."""
    result = task.delay(7)
    (line,) = invoke("list", "--json").output.splitlines()
    found = json.loads(line)
    assert found.pop("age") == pytest.approx(0, abs=2)
    assert found.pop("expires_in") == pytest.approx(3600, abs=2)
    assert int(found.pop("fence")) > 0
    assert found == {
        "name": key_of(task, 7),
        "task": "shop.send",
        "owner": result.id,
        "state": "queued",
        "attempt": 0,
    }


def test_the_keys_of_one_task(app: Celery, invoke: Invoke, task: Any) -> None:
    """Those of others are left out."""

    @app.task(base=ReliableTask, name="shop.other")
    @once(key="invoice:{n}")
    def other(n: int) -> None:
        pass

    task.delay(7)
    app.tasks["shop.other"].delay(7)
    assert "shop.send" not in invoke("list", "--task", "shop.other").output
    assert len(invoke("list", "--task", "shop.other").output.splitlines()) == 2


def test_a_list_of_many(invoke: Invoke, task: Any) -> None:
    """All are there, however many steps it takes to read them."""
    for n in range(1203):
        task.delay(n)
    assert len(invoke().output.splitlines()) == 1204
    assert len(invoke("list", "--json").output.splitlines()) == 1203


def test_the_states(app: Celery, invoke: Invoke, task: Any) -> None:
    """Queued, running, interrupted, and taken for a window."""

    def state() -> str:
        (line,) = invoke("list", "--json").output.splitlines()
        found: str = json.loads(line)["state"]
        return found

    task.doing.append(state)
    task.delay(7)
    assert state() == "queued"
    message = take(app)
    assert run(app, message).value == "running"
    store = locks_of(app).claims
    claim: dict[str, Any] = {"owner": "o", "attempt": 0, "task": "t"}
    store.enter("n", **claim, holder="h", lease=0.001, ttl=60)
    time.sleep(0.01)
    assert state() == "interrupted"
    store.release("n", owner="o", attempt=0, holder="h")
    store.client.redis.zadd(store.leases, {"tag": 2e12})
    store.enter("n", **claim, holder="h", lease=0.001, ttl=60, delivery="tag")
    time.sleep(0.01)
    assert state() == "running", "its delivery is on lease"
    store.client.redis.zrem(store.leases, "tag")
    assert state() == "interrupted"
    store.release("n", owner="o", attempt=0, holder="h")
    store.acquire("n", **claim, token="x", ttl=60, how="window")
    assert state() == "window"


def test_what_is_no_claim_hides_no_other(app: Celery, invoke: Invoke, task: Any) -> None:
    """Somebody wrote to such keys; they are listed too, and left alone."""
    first = task.delay(7)
    server = locks_of(app).claims.client.redis
    server.set("reliable:claim:{a string}", "x")
    server.hset("reliable:claim:{a half}", "owner", "o")
    server.hset(f"reliable:claim:{{{key_of(task, 8)}}}", mapping={"owner": "o", "fence": "x"})
    listed = [json.loads(line) for line in invoke("list", "--json").output.splitlines()]
    states = {record["name"]: record["state"] for record in listed}
    assert states == {
        key_of(task, 7): "queued",
        key_of(task, 8): "unreadable",
        "a string": "unreadable",
        "a half": "unreadable",
    }
    assert first.id in invoke().output
    for name in ("a string", "a half"):
        result = invoke("free", "--yes", name)
        assert result.exit_code == 1
        assert f"{name} is no claim of this library" in result.output
        assert server.exists(f"reliable:claim:{{{name}}}")


def test_one_key(invoke: Invoke, task: Any) -> None:
    """All that is known, one fact a line."""
    result = task.delay(7)
    shown = dict(
        line.split(None, 1) for line in invoke("show", key_of(task, 7)).output.splitlines()
    )
    assert (shown["key"], shown["owner"], shown["attempt"]) == (key_of(task, 7), result.id, "0")
    assert list(shown) == ["key", "task", "owner", "state", "attempt", "age", "left", "fence"]
    assert json.loads(invoke("show", "--json", key_of(task, 7)).output)["owner"] == result.id


@pytest.mark.parametrize("command", ["show", "free"])
def test_a_key_that_nobody_has(invoke: Invoke, task: Any, command: str) -> None:
    """The error names it, and keys that are like it."""
    task.delay(7)
    result = invoke(command, "invoice:7")
    assert result.exit_code == 1
    assert "nobody has the key invoice:7; perhaps you mean" in result.output
    assert key_of(task, 7) in result.output
    assert "perhaps" not in invoke(command, "nothing like it").output


def test_a_key_is_freed(app: Celery, invoke: Invoke, task: Any) -> None:
    """When somebody says yes; and the next call is no duplicate."""
    first = task.delay(7)
    result = invoke("free", key_of(task, 7), answer="n\n")
    assert result.exit_code == 1
    assert f"Task shop.send[{first.id}] waits in its queue, and will run all the same" in (
        result.output
    )
    assert task.delay(7).duplicate
    result = invoke("free", key_of(task, 7), answer="y\n")
    assert result.exit_code == 0
    assert result.output.endswith(f"{key_of(task, 7)} is free\n")
    assert claims(app) == []
    assert not task.delay(7).duplicate


def test_a_key_is_freed_without_a_question(invoke: Invoke, task: Any) -> None:
    """For scripts."""
    task.delay(7)
    assert invoke("free", "--yes", key_of(task, 7)).output == f"{key_of(task, 7)} is free\n"


def test_a_key_that_changed_hands_is_not_freed(
    app: Celery, invoke: Invoke, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed is what was shown."""
    task.delay(7)
    store = locks_of(app).claims
    free = Claims.free

    def late(self: Claims, name: str, **of: str) -> bool:
        store.client.redis.delete(*store.names())
        task.delay(7)
        return free(self, name, **of)

    monkeypatch.setattr(Claims, "free", late)
    result = invoke("free", "--yes", key_of(task, 7))
    assert result.exit_code == 1
    assert "it has changed hands since" in result.output
    assert len(claims(app)) == 1


def test_a_refused_command_is_an_error(
    invoke: Invoke, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without the right to read sees no keys that are unreadable."""

    def refuse(server: Any, commands: Any) -> list[Any]:
        return [redis.exceptions.NoPermissionError("NOPERM no rights") for _ in commands]

    task.delay(7)
    monkeypatch.setattr(records, "pipelined", refuse)
    result = invoke("list")
    assert result.exit_code == 1
    assert "the lock Redis refused to list claims: NOPERM no rights" in result.output


@pytest.mark.parametrize("command", [("list",), ("show", "k"), ("free", "k")])
def test_without_the_lock_redis(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """An error, and no traceback."""

    def away(self: Claims, what: str) -> Any:
        raise StoreUnavailable("redis://h", "away")

    monkeypatch.setattr(Claims, "reading", away)
    result = invoke(*command)
    assert result.exit_code == 1
    assert "the Redis at redis://h is not available: away" in result.output
    assert result.exc_info is not None
    assert result.exc_info[0] is SystemExit


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m 0s"), (3599, "59m 59s"), (3600, "1h 0m"), (90061, "1d 1h")],
)
def test_a_duration(seconds: float, text: str) -> None:
    """The two largest units say enough."""
    assert duration(seconds) == text
