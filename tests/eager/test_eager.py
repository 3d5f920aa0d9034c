"""``task_always_eager`` and ``apply()``: nothing is queued, so nothing is claimed."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity
from celery import Celery, chain, chord, group
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask, apply_reliable_config, once, presets

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def app() -> Any:
    """An eager app whose broker, results and claims cannot be reached."""
    with Celery("shop", broker=NOBODY, backend="cache+memory://") as app:
        app.conf.update(task_always_eager=True, reliable_redis_url=NOBODY)
        apply_reliable_config(app)
        yield app


@pytest.fixture
def send(app: Celery) -> Any:
    """The task of the issue."""

    @app.task(base=ReliableTask, **presets.STANDARD)
    @once(key="invoice:{invoice_id}")
    def send(invoice_id: int, *, copy_to: str | None = None) -> str:
        return f"{invoice_id} to {copy_to}"

    return send


def test_a_call_runs_at_once(send: Any) -> None:
    """Two calls are two runs: when the second is made the first has ended."""
    for result in (send.delay(7), send.delay(7), send.apply_async((7,), {"copy_to": None})):
        assert result.get() == "7 to None"
        assert not result.duplicate
        assert result.replaced_id is None
        assert result.ignored_id is None


def test_a_caller_may_give_an_id(send: Any) -> None:
    """It is the result's."""
    assert send.apply_async((7,), task_id="mine").id == "mine"


def test_a_task_inside_a_task_with_its_key_runs(app: Celery) -> None:
    """Nothing is claimed, so nothing is refused."""

    @app.task(base=ReliableTask, name="t")
    @once
    def t(depth: int = 0) -> int:
        return depth or 1 + int(t.delay(1).get(disable_sync_subtasks=False))

    assert t.delay().get() == 2


def test_retries_run_at_once(app: Celery) -> None:
    """A policy is followed; its waits are not waited for."""
    attempts = []

    @app.task(
        base=ReliableTask,
        bind=True,
        retrying=[tenacity.stop_after_attempt(3), tenacity.wait_fixed(1000)],
    )
    @once
    def t(self: Any) -> str:
        attempts.append((self.request.retries, self.request.is_eager))
        if len(attempts) < 3:
            raise OSError("no")
        return "done"

    assert t.delay().get() == "done"
    assert attempts == [(0, True), (1, True), (2, True)]


def test_a_policy_that_gives_up_fails_with_the_error(app: Celery) -> None:
    """As it would in a worker."""

    @app.task(base=ReliableTask, retrying=tenacity.stop_after_attempt(2))
    def t() -> None:
        raise OSError("no")

    result = t.delay()
    assert result.failed()
    with pytest.raises(OSError, match="no"):
        result.get()


def test_self_retry_runs_at_once(app: Celery) -> None:
    """Celery's own retry does too."""

    @app.task(base=ReliableTask, bind=True)
    @once
    def t(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=1000)
        retries: int = self.request.retries
        return retries

    assert t.delay().get() == 2


def test_a_replacement_runs_at_once(app: Celery) -> None:
    """``self.replace`` returns what the replacement returns."""

    @app.task(base=ReliableTask, bind=True)
    @once
    def t(self: Any, again: bool = True) -> Any:
        return self.replace(t.s(False)) if again else "replaced"

    assert t.apply().get() == "replaced"


def test_canvas_runs_at_once(app: Celery) -> None:
    """Chains, groups and chords of once-tasks."""

    @app.task(base=ReliableTask)
    @once
    def double(n: int) -> int:
        return 2 * n

    @app.task(base=ReliableTask)
    @once
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    assert chain(double.s(1), double.s(), double.s())().get() == 8
    assert group(double.s(1), double.s(1))().get() == [2, 2]
    assert chord([double.s(1), double.s(2)])(total.s()).get() == 6


def test_calling_and_applying_need_no_server(app: Celery, send: Any) -> None:
    """A task is a function, and ``apply()`` runs it here, eager app or not."""
    app.conf.task_always_eager = False
    assert send(7) == "7 to None"
    assert send.run(7) == "7 to None"
    assert send.apply((7,)).get() == "7 to None"
    with pytest.raises(OperationalError, match="refused"):
        send.delay(7)
