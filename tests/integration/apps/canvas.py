"""The shop with what a canvas needs around its tasks."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery, Task, chain, chord, group
from celery.signals import task_prerun

from reliable_tasks import ReliableTask, once
from tests.integration.apps import shop


def build(broker: str, backend: str | None = None, **options: Any) -> Celery:
    """Make the app, the same for a worker and for its client."""
    app = shop.build(broker, backend, **options)
    common: dict[str, Any] = {"shared": False, "base": ReliableTask, "bind": True}

    @app.task(name="plus", **common)
    def plus(self: Task, value: str, name: str) -> str:
        with shop.told(self, name):
            return f"{value} > {name}"

    @app.task(name="collect", **common)
    def collect(self: Task, values: list[str], name: str) -> str:
        with shop.told(self, name):
            return f"{' + '.join(map(str, values))} > {name}"

    # Celery gives a bound one the id of the task alone.
    @app.task(name="note_failure", **{**common, "bind": False})
    def note_failure(request: Any, exc: Any, traceback: Any, name: str) -> None:
        shop.journal.write("failure", name=name, error=type(exc).__name__)

    @app.task(name="calls", **common)
    def calls(self: Task, name: str, task: str) -> str:
        """Call a task with the key of one that has called this, where somebody waits for it."""
        with shop.told(self, f"{name}, calls"):
            same = app.tasks[task].si(name)
            return str(chain(plus.si("", "a"), same, plus.s("b")).apply_async().id)

    @app.task(name="caller", **common)
    @once(key="{name}")
    def caller(self: Task, name: str, task: str = "") -> str:
        return _call_others(self, name, task)

    @app.task(name="strict caller", **common)
    @once(key="{name}", on_conflict="raise")
    def strict_caller(self: Task, name: str, task: str = "") -> str:
        return _call_others(self, name, task)

    def _call_others(task: Task, name: str, called: str) -> str:
        with shop.told(task, name):
            if called:
                calls.delay(name, called)
                shop.journal.wait_at(name)
        return name

    @app.task(name="becomes", **common)
    @once(key="{name}")
    def becomes(self: Task, name: str, what: str = "succeed") -> str:
        with shop.told(self, name):
            if what == "wait":
                shop.journal.wait_at(name)
            if what.startswith("later, "):
                first = app.tasks["act"].si(f"{name}, first", "wait")
                after = chain(first, self.si(name)) if "chain" in what else None
                raise self.replace(after or chord([first], self.si(name)))
            if what in ("chain", "group", "chord"):
                raise self.replace(_replacement(app, self, name, what))
        return name

    return app


def _replacement(app: Celery, task: Task, name: str, what: str) -> Any:
    plus, collect = app.tasks["plus"], app.tasks["collect"]
    same = task.si(name, "succeed")
    if what == "chain":
        return chain(same, plus.s("chain"))
    if what == "group":
        return group(same, plus.si("a", "group"))
    return chord([same, plus.si("a", "chord")], collect.s("body"))


@task_prerun.connect(weak=False)
def _note_slot(task: Any = None, task_id: str = "", args: Any = (), **_: Any) -> None:
    """Write down that a once-task of the tests takes a slot, also if it does not run."""
    if task.name == "act":
        shop.journal.write("slot", name=args[0], id=task_id)


app = build(
    os.environ.get("RT_BROKER_URL", "memory://"),
    os.environ.get("RT_RESULT_URL"),
    limit=int(os.environ.get("RT_LIMIT", shop.LIMIT)),
    **json.loads(os.environ.get("RT_SETTINGS", "{}")),
)
