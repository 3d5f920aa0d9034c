"""``@once`` above and below, on functions, methods and classes, and where it would do nothing."""

from __future__ import annotations

import functools
from typing import Any

import pydantic
import pytest
from celery import Celery, Task, shared_task

from reliable_tasks import ConfigError, ReliableTask, once
from reliable_tasks._once.decorator import refuse_plain_base


def names(task: Any, *args: Any, **kwargs: Any) -> str:
    """The name of a call's claim, without the digest."""
    name: str = task.reliable_once.claim_name(task, args, kwargs)
    return name.rpartition(":")[0]


def test_below_the_task_decorator(app: Celery) -> None:
    """The order of the issue."""

    @app.task(base=ReliableTask, name="t")
    @once(key="{a}")
    def t(a: int) -> int:
        """Double it."""
        return 2 * a

    assert names(t, 7) == "t:7"
    assert t(4) == 8
    assert t.__doc__ == "Double it."


def test_above_the_task_decorator(app: Celery) -> None:
    """The other order does the same, and still makes the task lazily."""

    @once(key="{a}")
    @app.task(base=ReliableTask, name="t")
    def t(a: int) -> int:
        return 2 * a

    assert "t" not in app._tasks
    assert names(t, 7) == "t:7"
    assert t(4) == 8


def test_above_a_task_that_was_made(app: Celery) -> None:
    """A finalized app makes its tasks at once."""
    app.finalize()

    @once(key="{a}")
    @app.task(base=ReliableTask, name="t")
    def t(a: int) -> None:
        pass

    assert names(t, 7) == "t:7"


@pytest.mark.parametrize("first", ["self", "task"])
def test_a_bound_task_keys_on_its_other_parameters(app: Celery, first: str) -> None:
    """With bind=True the first parameter is the task, whatever it is called."""

    def by_self(self: Any, a: int) -> None:
        pass

    def by_task(task: Any, a: int) -> None:
        pass

    body = by_self if first == "self" else by_task
    t = app.task(once(key="{a}")(body), base=ReliableTask, bind=True, name="t")
    assert names(t, 7) == "t:7"


def test_self_is_no_parameter(app: Celery) -> None:
    """A template cannot name the task."""
    with pytest.raises(ConfigError, match="'self' is no parameter of the task; known are a"):

        @once(key="{self.name}")
        def t(self: Any, a: int) -> None:
            pass


def test_a_bound_task_cannot_key_on_itself_by_another_name(app: Celery) -> None:
    """What only the registration can know raises at the registration."""

    def body(task: Any, a: int) -> None:
        pass

    t = app.task(once(key="{task}")(body), base=ReliableTask, bind=True)
    with pytest.raises(ConfigError, match="'task' is no parameter of the task; known are a"):
        t.name  # noqa: B018 - makes the task


def test_without_parentheses(app: Celery) -> None:
    """Bare, it keys on all arguments."""

    @app.task(base=ReliableTask, name="t")
    @once
    def t(a: int, b: int = 2) -> None:
        pass

    name = t.reliable_once.claim_name
    assert name(t, (1,), {}) == name(t, (), {"b": 2, "a": 1}) != name(t, (2,), {})


def test_below_shared_task(app: Celery) -> None:
    """A task of every app carries it into each."""

    @shared_task(base=ReliableTask, name="tests.unit.shared_once")
    @once(key="{a}")
    def t(a: int) -> None:
        pass

    app.set_current()
    assert names(app.tasks["tests.unit.shared_once"], 7) == "tests.unit.shared_once:7"


def test_above_shared_task_is_refused() -> None:
    """It would have to make the task at import, before any app is there."""
    with pytest.raises(ConfigError, match="write it below"):

        @once(key="{a}")
        @shared_task(base=ReliableTask, name="tests.unit.never")
        def t(a: int) -> None:
            pass


def test_a_pydantic_task(app: Celery) -> None:
    """Celery's own wrapper around the body hides nothing."""

    class Model(pydantic.BaseModel):
        n: int

    @app.task(base=ReliableTask, pydantic=True, name="t")
    @once(key="{a[n]}")
    def t(a: Model) -> None:
        pass

    assert names(t, {"n": 7}) == "t:7"


def test_on_a_class(app: Celery) -> None:
    """Classes take it, and hand it down."""

    @once(key="{a}")
    class Base(ReliableTask):
        name = "base"

        def run(self, a: int) -> None:
            pass

    class Sub(Base):
        name = "sub"

    assert names(app.register_task(Base()), 7) == "base:7"
    assert names(app.register_task(Sub()), 7) == "sub:7"


def test_on_the_run_method(app: Celery) -> None:
    """Inside the class it stands where the parameters stand."""

    class T(ReliableTask):
        name = "t"

        @once(key="{a}")
        def run(self, a: int) -> None:
            pass

    assert names(app.register_task(T()), 7) == "t:7"


def test_on_the_run_method_of_a_plain_task_a_worker_refuses_it(app: Celery) -> None:
    """Nothing of ours is near when such a class is made, so the worker looks at its start."""

    class Plain(Task):  # type: ignore[type-arg]
        name = "plain"

        @once(key="{number}")
        def run(self, number: int) -> None:
            """Do nothing."""

    task = app.register_task(Plain())
    with pytest.raises(ConfigError, match="@once on plain has no effect, for its base is Task"):
        refuse_plain_base(task)


def test_on_a_static_run_method(app: Celery) -> None:
    """A static body has no self to leave out."""

    class T(ReliableTask):
        name = "t"

        @staticmethod
        @once(key="{a}")
        def run(a: int) -> int:
            return a

    task = app.register_task(T())
    assert names(task, 7) == "t:7"
    assert task(7) == 7


def test_a_subclass_with_another_body_keeps_the_option(app: Celery) -> None:
    """The key is then read from the parameters of the new body."""

    @once(key="{a}")
    class Base(ReliableTask):
        def run(self, a: int) -> None:
            pass

    class Sub(Base):
        name = "sub"

        def run(self, b: int, a: int) -> None:  # type: ignore[override]
            pass

    assert names(app.register_task(Sub()), 1, 7) == "sub:7"
    with pytest.raises(ConfigError, match="'a' is no parameter"):

        class Wrong(Base):
            def run(self, c: int) -> None:
                pass


def test_on_a_task_object(app: Celery) -> None:
    """A task that exists already can be given it."""

    @app.task(base=ReliableTask, name="t")
    def t(a: int) -> None:
        pass

    app.finalize()
    assert once(key="{a}")(app.tasks["t"]) is app.tasks["t"]
    assert names(app.tasks["t"], 7) == "t:7"


def test_with_the_library_as_the_apps_task_class() -> None:
    """``Celery(task_cls=...)`` makes every base a good one."""
    with Celery("cls", broker="memory://", task_cls=ReliableTask, set_as_current=False) as app:

        @app.task(name="t")
        @once(key="{a}")
        def t(a: int) -> None:
            pass

        assert names(t, 7) == "t:7"


def test_a_decorator_in_between_changes_nothing(app: Celery) -> None:
    """Whatever uses functools.wraps is seen through."""

    def logged(function: Any) -> Any:
        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return inner

    @app.task(base=ReliableTask, name="t")
    @logged
    @once(key="{a}")
    def t(a: int) -> None:
        pass

    assert names(t, 7) == "t:7"


def below(app: Celery, **options: Any) -> Any:
    """A plain task with ``@once`` below."""

    @app.task(name="t", **options)
    @once
    def t(self: Any, a: int) -> None:
        pass

    return t


def above(app: Celery, **options: Any) -> Any:
    """A plain task with ``@once`` above."""

    @once
    @app.task(name="t", **options)
    def t(self: Any, a: int) -> None:
        pass

    return t


class Plain(Task):  # type: ignore[type-arg]
    """A base that knows nothing of this library."""

    abstract = True


@pytest.mark.parametrize("order", [below, above])
@pytest.mark.parametrize("options", [{}, {"bind": True}, {"base": Plain}])
def test_a_base_that_would_ignore_it_is_refused(
    app: Celery, order: Any, options: dict[str, Any]
) -> None:
    """It raises when the task is registered, and says what to write."""
    t = order(app, **options)
    base = "Plain" if "base" in options else "Task"
    with pytest.raises(
        ConfigError, match=rf"@once on t has no effect, for its base is {base}: write @app\.task"
    ):
        t.delay(1)


@pytest.mark.parametrize("order", [below, above])
def test_a_finalized_app_refuses_at_once(app: Celery, order: Any) -> None:
    """Where the task is made at once, the error is there at once."""
    app.finalize()
    with pytest.raises(ConfigError, match="has no effect"):
        order(app)


def test_a_shared_task_with_such_a_base_is_refused(app: Celery) -> None:
    """Also where the task is made for each app."""

    @shared_task(name="tests.unit.shared_plain")
    @once
    def t(a: int) -> None:
        pass

    with pytest.raises(ConfigError, match="has no effect"):
        app.finalize()


def test_a_class_with_such_a_base_is_refused(app: Celery) -> None:
    """On a class the error is there at once."""
    with pytest.raises(ConfigError, match="its base is Plain"):

        @once
        class T(Plain):
            def run(self, a: int) -> None:
                pass


@pytest.mark.parametrize("target", [7, functools.partial(print), print])
def test_what_is_no_task_is_refused(target: Any) -> None:
    """Only functions and tasks can be once."""
    with pytest.raises(ConfigError, match="decorate a function or a task"):
        once(key=None)(target)


def test_a_wrong_template_raises_where_it_stands() -> None:
    """Before any app knows the function."""
    with pytest.raises(ConfigError, match=r"'nmae' is no parameter of the task; known are name"):

        @once(key="{nmae}")
        def t(name: str) -> None:
            pass


def test_twice_with_other_options(app: Celery) -> None:
    """Whichever would win, the other one would be a surprise."""
    with pytest.raises(ConfigError, match=r"twice on .*send"):

        @once(key="{n}")
        @once(key="{n}", ttl=5)
        def send(n: int) -> None:
            pass


def test_twice_above_and_below(app: Celery) -> None:
    """It is said when the task is made."""

    @once(key="{n}", ttl=5)
    @app.task(base=ReliableTask, name="send")
    @once(key="{n}")
    def send(n: int) -> None:
        pass

    with pytest.raises(ConfigError, match="twice on send"):
        send.delay(1)


def test_twice_the_same(app: Celery) -> None:
    """There is nothing to choose from."""

    @once(key="{n}")
    @app.task(base=ReliableTask)
    @once(key="{n}")
    def send(n: int) -> None:
        pass

    assert send.reliable_once is not None
