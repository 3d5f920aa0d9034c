"""Each thing that happens to a claim is told once, to whoever listens."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from reliable_tasks import DuplicateTaskError, ReliableTask, once
from reliable_tasks._once.locks import locks_of
from reliable_tasks.instrumentation import signals
from tests.unit.harness import Heard, run, take


def make(app: Celery, body: Any = None, **options: Any) -> Any:
    """Return a once-task."""

    @app.task(base=ReliableTask, name="task", bind=True)
    @once(key="{n}", **options)
    def task(self: Any, n: int) -> Any:
        return body(self) if body else None

    return app.tasks["task"]


def test_a_claim_that_is_taken_and_freed(app: Celery, heard: Heard) -> None:
    """The sender is the task, and what is told is what the signal promises."""
    task = make(app)
    result = task.delay(7)
    run(app, take(app))
    key = task.reliable_once.claim_name(task, (7,), {})
    assert heard == [
        ("claim_acquired", task, {"key": key, "task_id": result.id, "replaced_id": None}),
        ("claim_released", task, {"key": key, "task_id": result.id}),
    ]
    for name, _, told in heard:
        assert set(told) == set(getattr(signals, name).providing_args)


@pytest.mark.parametrize("action", ["existing", "raise"])
def test_a_call_whose_key_is_taken(app: Celery, heard: Heard, action: Any) -> None:
    """What is done about it, and the id that the call asked for."""
    task = make(app, on_conflict=action)
    first = task.delay(7)
    heard.clear()
    try:
        task.apply_async((7,), task_id="mine")
    except DuplicateTaskError:
        assert action == "raise"
    ((name, _, told),) = heard
    assert name == "claim_conflict"
    assert set(told) == set(signals.claim_conflict.providing_args)
    assert (told["task_id"], told["owner"], told["action"]) == ("mine", first.id, action)


def test_a_call_that_takes_anothers_place(app: Celery, heard: Heard) -> None:
    """It is no conflict: the call has the key."""
    task = make(app, on_conflict="replace")
    first, second = task.delay(7), task.delay(7)
    assert [told["replaced_id"] for _, _, told in heard] == [None, first.id]
    assert [told["task_id"] for _, _, told in heard] == [first.id, second.id]


def test_a_retry_takes_nothing_new(app: Celery, heard: Heard) -> None:
    """The claim stays the task's."""

    def body(self: Any) -> None:
        if not self.request.retries:
            raise self.retry(countdown=0)

    make(app, body).delay(7)
    run(app, take(app))
    run(app, take(app))
    assert [name for name, _, _ in heard] == ["claim_acquired", "claim_released"]


def test_a_turn(app: Celery, heard: Heard) -> None:
    """It is taken and freed by the one that runs; one that waits says so once."""
    back: list[Any] = []

    def body(self: Any) -> None:
        if not back:
            run(app, take(app), redeliver_to=back)

    task = make(app, body, lock="while_executing")
    first, second = task.delay(7), task.delay(7)
    run(app, take(app))
    assert [(name, told["task_id"]) for name, _, told in heard] == [
        ("claim_acquired", first.id),
        ("claim_conflict", second.id),
        ("claim_released", first.id),
    ]
    assert heard[1][2]["action"] == "reschedule"
    assert heard[1][2]["key"].endswith(":turn")


def test_a_key_that_is_free_at_the_start(app: Celery, heard: Heard) -> None:
    """It is told when the task starts, and not when it ends."""
    make(app, lambda _: len(heard), lock="until_executing").delay(7)
    assert run(app, take(app)).value == 2
    assert [name for name, _, _ in heard] == ["claim_acquired", "claim_released"]


def test_a_claim_that_lapsed(app: Celery, heard: Heard) -> None:
    """Nobody has it at the end of the task, or another task has it when the task starts."""
    store = locks_of(app).claims

    def body(self: Any) -> None:
        store.client.redis.delete(*store.names())

    task = make(app, body)
    first = task.delay(7)
    run(app, take(app))
    assert heard[-1][0] == "claim_lost"
    assert (heard[-1][2]["task_id"], heard[-1][2]["owner"]) == (first.id, None)
    second = task.delay(7)
    late = take(app)
    store.client.redis.delete(*store.names())
    third = task.delay(7)
    run(app, late)
    name, _, told = heard[-1]
    assert (name, told["action"]) == ("claim_conflict", "follow")
    assert (told["task_id"], told["owner"]) == (second.id, third.id)


def test_what_a_receiver_raises_disturbs_nobody(app: Celery) -> None:
    """The task runs and its claim is freed."""

    def fail(**told: Any) -> None:
        raise ValueError

    for signal in (signals.claim_acquired, signals.claim_released):
        signal.connect(fail, weak=False)
    try:
        task = make(app)
        task.delay(7)
        assert run(app, take(app)).state == "SUCCESS"
        assert not task.delay(7).duplicate
    finally:
        for signal in (signals.claim_acquired, signals.claim_released):
            signal.disconnect(fail)
