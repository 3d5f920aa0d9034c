"""What was called in a canvas is called anew without the ids that it had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from reliable_tasks._dead.canvas import thawed

#: What a user may give a task: it looks like a signature that was called.
JOB = {
    "task": "resize",
    "args": [1],
    "kwargs": {"tasks": [{"task": "crop", "options": {"task_id": "mine"}}]},
    "options": {"task_id": "mine", "parent_id": 7, "chord": "C major", "link": 1, "w": 1},
    "subtask_type": "group",
    "immutable": False,
}


@pytest.fixture
def pay(app: Celery) -> Any:
    """A task."""

    @app.task(name="shop.pay")
    def pay(*args: Any, **kwargs: Any) -> None: ...

    return app.tasks["shop.pay"]


def frozen(called: Any) -> dict[str, Any]:
    """A part of a canvas as a message has it, under ids of its own."""
    called.freeze("old", group_id="old", root_id="old", parent_id="old", group_index=1)
    found: dict[str, Any] = json.loads(json.dumps(called))
    return found


def names_in(value: Any) -> set[str]:
    """The names of all that is said in a signature, and in its parts."""
    if isinstance(value, Mapping):
        return set(value).union(*map(names_in, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(names_in, value))
    return set()


def test_each_canvas_is_the_same_without_its_ids(app: Celery, pay: Any) -> None:
    """In all its parts, and in what is called after them."""
    pair = group(pay.s(1), pay.s(2))
    names = {"task_id", "group_id", "root_id", "parent_id", "reply_to", "group_index", "chord"}
    for canvas in (
        pay.s(1),
        chain(pay.s(1), pay.s(2), pair),
        pair,
        chord([pay.s(1), chain(pay.s(2), pay.s(3))], pay.s(4), app=app),
        chain(pay.s(0), chord(pair, chain(pay.s(3), pay.s(4)), app=app)),
    ):
        before = app.signature(json.loads(json.dumps(canvas)))
        found = thawed(app, frozen(canvas))
        assert (repr(found), found.subtask_type) == (repr(before), before.subtask_type)
        assert not names & names_in(found)


def test_what_is_called_after_it_has_no_id_either(app: Celery, pay: Any) -> None:
    """One callback or several; the rest of how it is called is kept."""
    note = pay.s("note").set(task_id="old", queue="slow")
    called = pay.s(1).set(link=note, link_error=[note], chain=[note], priority=3)
    options = thawed(app, frozen(called)).options
    assert options.pop("priority") == 3
    for found in (options["link"], *options["link_error"], *options["chain"]):
        assert (found["args"], found["options"]) == (["note"], {"queue": "slow"})


def test_what_is_given_to_a_task_stays_as_it_is(app: Celery, pay: Any) -> None:
    """Also where it looks like a signature, or is one."""
    mine = pay.s(1).set(task_id="mine")
    given = json.loads(json.dumps([JOB, {"options": ["fast"], "task": "resize"}, mine]))
    kwargs = {"job": JOB, "tasks": [JOB], "header": JOB}
    step = pay.s(*given, **kwargs)
    steps = thawed(app, frozen(chain(step, step.clone()))).kwargs["tasks"]
    body = thawed(app, frozen(chord([step.clone()], step.clone(), app=app))).kwargs["body"]
    for found in (thawed(app, frozen(step)), *steps, body):
        assert (list(found["args"]), found["kwargs"]) == (given, kwargs)
    assert list(thawed(app, frozen(pay.map([JOB]))).kwargs["it"]) == [JOB]


@pytest.mark.parametrize(
    "changed",
    [
        {"options": ["fast"]},
        {"options": None},
        {"options": {"link": "shop.pay"}},
        {"kwargs": None},
        {"subtask_type": "chain"},
        {"subtask_type": "unknown"},
        {"subtask_type": ["chain"]},
        {"subtask_type": "group", "kwargs": {"tasks": [{"task": "shop.pay"}]}},
    ],
)
def test_what_is_no_canvas_raises(app: Celery, pay: Any, changed: dict[str, Any]) -> None:
    """Whoever wrote it may have put anything there."""
    with pytest.raises((TypeError, ValueError, LookupError, AttributeError)):
        thawed(app, {**pay.s(1), **changed})
