"""`ReliableTask` in every form that Celery knows, and whose word counts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pydantic
import pytest
import tenacity
import time_machine
from celery import Celery, Task, chain, group, shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded, WorkerShutdown

from reliable_tasks import (
    ConfigError,
    DuplicateTaskError,
    PoisonPill,
    ReliableResult,
    ReliableTask,
    RequeuesExhausted,
    RetriesExhausted,
    TaskExited,
    UnsupportedCelery,
    _body,
    once,
    presets,
)
from reliable_tasks._broker.fence import Fenced
from reliable_tasks._celery import versions
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._retrying import RETRYING
from tests.unit.harness import claims, run, run_all, take

DEFAULTS = {
    "acks_late": True,
    "reject_on_worker_lost": True,
    "track_started": True,
    "retry_on_worker_lost": False,
}


class Order(pydantic.BaseModel):
    """What a pydantic task takes."""

    n: int


def nothing() -> int:
    """A body."""
    return 7


def values(task: Any) -> dict[str, Any]:
    """What the task goes by."""
    return {name: getattr(task, name) for name in DEFAULTS}


# -- forms -----------------------------------------------------------------------------------


def as_base(app: Celery) -> Any:
    """The form of the issue."""

    @app.task(base=ReliableTask, name="t")
    def t(a: int, b: int = 2) -> int:
        return a + b

    return t


def bound(app: Celery) -> Any:
    """The body gets the task."""

    @app.task(base=ReliableTask, name="t", bind=True)
    def t(self: Any, a: int, b: int = 2) -> int:
        assert self.name == "t"
        return a + b

    return t


def shared(app: Celery) -> Any:
    """A task of every app."""

    @shared_task(base=ReliableTask, name="t")
    def t(a: int, b: int = 2) -> int:
        return a + b

    return t


def class_based(app: Celery) -> Any:
    """A class, registered by hand."""

    class T(ReliableTask):
        name = "t"

        def run(self, a: int, b: int = 2) -> int:
            return a + b

    return app.register_task(T())


def inherited(app: Celery) -> Any:
    """A class below a class, with super()."""

    class Base(ReliableTask):
        def run(self, a: int, b: int = 2) -> int:
            return a + b

    class T(Base):
        name = "t"

        def run(self, a: int, b: int = 2) -> int:
            return super().run(a, b)

    return app.register_task(T())


def with_self(app: Celery) -> Any:
    """A function that is not bound and has a parameter called self."""

    @app.task(base=ReliableTask, name="t")
    def t(self: int, b: int = 2) -> int:
        return self + b

    return t


def with_pydantic(app: Celery) -> Any:
    """Celery checks and converts the arguments."""

    @app.task(base=ReliableTask, name="t", pydantic=True)
    def t(a: int, b: int = 2) -> int:
        return a + b

    return t


# Celery itself checks neither classes nor the arguments of pydantic tasks at the call.
CHECKED = [as_base, bound, shared, with_self]
FORMS = [as_base, bound, shared, class_based, inherited, with_self, with_pydantic]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs(app: Celery, form: Any) -> None:
    """Called, applied and queued, with the defaults of a reliable task."""
    form(app)
    app.finalize()
    task = app.tasks["t"]
    assert isinstance(task, ReliableTask)
    assert values(task) == DEFAULTS
    assert task(1) == 3
    assert task.run(1, 5) == 6
    assert task.apply((1,)).get() == 3
    result = task.delay(1, b=4)
    assert isinstance(result, ReliableResult)
    assert not result.duplicate
    assert run(app, take(app)).value == 5


@pytest.mark.parametrize("form", CHECKED)
def test_wrong_arguments_are_refused_at_the_call(app: Celery, form: Any) -> None:
    """Celery checks them against the body, which it still sees."""
    form(app)
    app.finalize()
    with pytest.raises(TypeError):
        app.tasks["t"].delay()
    assert take(app) is None


def test_a_pydantic_model_arrives_as_one(app: Celery) -> None:
    """Also where the task is a once-task."""

    @app.task(base=ReliableTask, name="t", pydantic=True)
    @once(key="{order[n]}")
    def t(order: Order) -> Order:
        return Order(n=order.n + 1)

    t.delay({"n": 7})
    assert run(app, take(app)).value == {"n": 8}


def test_it_can_be_the_class_of_all_tasks() -> None:
    """``Celery(task_cls=...)``, as a class and by name."""
    for task_cls in (ReliableTask, "reliable_tasks:ReliableTask"):
        with Celery("t", broker="memory://", task_cls=task_cls, set_as_current=False) as app:

            @app.task(name="t", shared=False)
            def t() -> None:
                pass

            assert isinstance(app.tasks["t"], ReliableTask)
            assert values(app.tasks["t"]) == DEFAULTS


# -- whose word counts -----------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_option_of_the_task_wins(app: Celery, name: str) -> None:
    """What stands at the task is the most specific."""
    value = not DEFAULTS[name]
    app.conf[f"task_{name}"] = DEFAULTS[name]
    t = app.task(nothing, base=ReliableTask, name="t", **{name: value})
    assert values(t) == DEFAULTS | {name: value}


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_attribute_of_a_subclass_wins(app: Celery, name: str) -> None:
    """A base of one's own says it for all tasks below."""
    value = not DEFAULTS[name]
    base = type("Base", (ReliableTask,), {"abstract": True, name: value})
    t = app.task(nothing, base=base, name="t")
    assert values(t) == DEFAULTS | {name: value}


@pytest.mark.parametrize("name", [n for n in DEFAULTS if n != "retry_on_worker_lost"])
def test_a_setting_of_the_app_wins(app: Celery, name: str) -> None:
    """An app that says no means it, also where no is Celery's default."""
    app.conf[f"task_{name}"] = False
    t = app.task(nothing, base=ReliableTask, name="t")
    assert values(t) == DEFAULTS | {name: False}


def test_a_bad_setting_is_found_when_the_task_is_made(app: Celery) -> None:
    """Before anything was queued."""
    app.conf.reliable_once_tll = 5
    t = app.task(nothing, base=ReliableTask, name="t")
    with pytest.raises(ConfigError, match="did you mean 'reliable_once_ttl'"):
        t.delay()


def test_an_unsupported_celery_is_refused_with_the_first_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task class on an unknown Celery might silently do nothing."""
    monkeypatch.setattr(versions, "_TOO_NEW", versions.CELERY)
    with pytest.raises(UnsupportedCelery):
        type("T", (ReliableTask,), {})


# -- retries ---------------------------------------------------------------------------------

FAST = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_fixed(0.25))


def test_a_policy_is_carried_out_by_celery(app: Celery) -> None:
    """A retry is a message with a delay below a second, and carries the state in a header."""

    @app.task(base=ReliableTask, name="t", retrying=FAST)
    def t() -> None:
        raise OSError("no")

    t.delay()
    first = take(app)
    assert run(app, first).state == "RETRY"
    second = take(app)
    assert second.headers["retries"] == 1
    assert second.headers["id"] == first.headers["id"]
    assert second.headers[RETRYING]["idle_for"] == 0.25
    assert second.headers["eta"] is not None
    assert run(app, second).state == "RETRY"
    third = take(app)
    assert third.headers[RETRYING]["idle_for"] == 0.5
    ended = run(app, third)
    assert ended.state == "FAILURE"
    assert isinstance(ended.value, OSError)
    assert take(app) is None


def test_celerys_own_bound_does_not_cut_a_policy_short(app: Celery) -> None:
    """``max_retries`` is three by default; the policy says when to stop."""

    @app.task(base=ReliableTask, name="t", bind=True, retrying=tenacity.stop_after_attempt(8))
    def t(self: Any) -> int:
        if self.request.retries < 7:
            raise OSError("no")
        retries: int = self.request.retries
        return retries

    result = t.delay()
    assert len(run_all(app)) == 8
    assert result.get(timeout=1) == 7


def test_a_result_can_be_retried(app: Celery) -> None:
    """Until it is accepted, or the policy gives up."""

    @app.task(
        base=ReliableTask,
        name="t",
        bind=True,
        retrying=[tenacity.retry_if_result(lambda n: n < 2), tenacity.stop_after_attempt(3)],
    )
    def t(self: Any, cheat: int) -> int:
        retries: int = self.request.retries
        return retries - cheat

    result = t.delay(0)
    assert [ended.state for ended in run_all(app)] == ["RETRY", "RETRY", "SUCCESS"]
    assert result.get(timeout=1) == 2
    t.delay(9)
    ended = run_all(app)[-1]
    assert isinstance(ended.value, RetriesExhausted)
    assert str(ended.value) == "no acceptable result after 3 attempts; the last was -7"


def test_a_fallback_is_a_success(app: Celery) -> None:
    """``retry_error_callback`` turns the last error into a result."""

    @app.task(
        base=ReliableTask,
        name="t",
        retrying={
            "stop": tenacity.stop_after_attempt(1),
            "retry_error_callback": lambda state: "fallback",
        },
    )
    def t() -> None:
        raise OSError("no")

    t.delay()
    assert run(app, take(app)).value == "fallback"


def test_a_policy_can_be_switched_off(app: Celery) -> None:
    """``enabled=False`` leaves the task as it is."""

    @app.task(base=ReliableTask, name="t", retrying={"enabled": False})
    def t() -> None:
        raise OSError("no")

    t.delay()
    assert run(app, take(app)).state == "FAILURE"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Ignore(), "IGNORED"),
        (Reject("no", requeue=False), "REJECTED"),
        (SoftTimeLimitExceeded(), "RETRY"),
        (OSError(), "RETRY"),
    ],
)
def test_what_is_said_to_celery_is_no_error(app: Celery, error: Exception, state: str) -> None:
    """A policy sees the task's errors, not what the task asks of the worker."""

    @app.task(base=ReliableTask, name="t", retrying=FAST)
    def t() -> None:
        raise error

    t.delay()
    assert run(app, take(app)).state == state


def test_a_retry_of_ones_own_passes_through(app: Celery) -> None:
    """``self.retry`` beside a policy is carried out as it stands."""

    @app.task(base=ReliableTask, name="t", bind=True, retrying=tenacity.retry_never)
    def t(self: Any) -> int:
        retries: int = self.request.retries
        if not retries:
            raise self.retry(countdown=0)
        return retries

    result = t.delay()
    assert [ended.state for ended in run_all(app)] == ["RETRY", "SUCCESS"]
    assert result.get(timeout=1) == 1


def test_autoretry_still_works(app: Celery) -> None:
    """Celery's own way is not touched."""

    @app.task(
        base=ReliableTask,
        name="t",
        bind=True,
        autoretry_for=(OSError,),
        default_retry_delay=0,
        max_retries=2,
    )
    @once
    def t(self: Any) -> None:
        raise OSError("no")

    t.delay()
    assert [ended.state for ended in run_all(app)] == ["RETRY", "RETRY", "FAILURE"]
    assert claims(app) == []


def both_options(app: Celery) -> Any:
    """Both at the task."""
    return app.task(nothing, base=ReliableTask, name="t", retrying=FAST, autoretry_for=(OSError,))


def autoretry_above_retrying(app: Celery) -> Any:
    """One at the base, the other at the task."""
    base = type("Base", (ReliableTask,), {"abstract": True, "retrying": FAST})
    return app.task(nothing, base=base, name="t", autoretry_for=(OSError,))


def mixed_in(app: Celery) -> Any:
    """One at each of two bases."""
    one = type("One", (ReliableTask,), {"abstract": True, "retrying": FAST})
    two = type("Two", (), {"autoretry_for": (OSError,)})
    return app.register_task(type("T", (two, one), {"name": "t", "run": lambda self: None})())


@pytest.mark.parametrize("how", [both_options, autoretry_above_retrying, mixed_in])
def test_two_ways_to_retry_are_one_too_many(app: Celery, how: Any) -> None:
    """Both would retry the same error, each on its own count."""
    with pytest.raises(ConfigError, match="t has retrying= and autoretry_for="):
        how(app).delay()


def test_a_task_can_drop_the_policy_of_its_base(app: Celery) -> None:
    """``retrying=None`` goes back to none."""
    base = type("Base", (ReliableTask,), {"abstract": True, "retrying": FAST})

    @app.task(base=base, name="t", retrying=None)
    def t() -> None:
        raise OSError("no")

    t.delay()
    assert run(app, take(app)).state == "FAILURE"


def test_a_bad_policy_is_refused_when_the_task_is_made(app: Celery) -> None:
    """The message names the task."""
    t = app.task(nothing, base=ReliableTask, name="shop.t", retrying=7)
    with pytest.raises(ConfigError, match=r"retrying=7 on shop\.t"):
        t.delay()


def test_a_policy_can_come_from_annotations(app: Celery) -> None:
    """``task_annotations`` sets options of tasks that one cannot edit."""
    app.conf.task_annotations = {"t": {"retrying": tenacity.stop_after_attempt(2)}}

    @app.task(base=ReliableTask, name="t")
    def t() -> None:
        raise OSError("no")

    t.delay()
    assert [ended.state for ended in run_all(app)] == ["RETRY", "FAILURE"]


def test_a_preset_is_a_set_of_options(app: Celery) -> None:
    """As in the issue."""

    @app.task(base=ReliableTask, name="t", **presets.STANDARD)
    @once(key="invoice:{invoice_id}")
    def t(invoice_id: int, *, copy_to: str | None = None) -> str:
        raise OSError("no")

    task = app.tasks["t"]
    assert (task.time_limit, task.soft_time_limit) == (300, 240)
    assert task._policy.retrying.stop.max_attempt_number == 5
    t.delay(7)
    assert run(app, take(app)).state == "RETRY"
    assert len(claims(app)) == 1


def test_another_reason_to_reject_a_retry_is_left_alone(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no matter of the broker or the claim stays Celery's."""

    @app.task(base=ReliableTask, name="t", bind=True)
    def t(self: Any) -> None:
        raise self.retry(countdown=0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("cannot be encoded")

    t.delay()
    message = take(app)
    monkeypatch.setattr(app.amqp, "send_task_message", fail)
    ended = run(app, message)
    assert isinstance(ended.value, Reject)
    assert not isinstance(ended.value, SetAside)


# -- users' own methods ----------------------------------------------------------------------


class Overrider(ReliableTask):
    """A base that overrides every hook and calls no super()."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what a user's own does."""
        return self.run(*args, **kwargs)

    def before_start(self, *args: Any) -> None:
        """Do nothing."""

    def after_return(self, *args: Any) -> None:
        """Do nothing."""

    def on_success(self, *args: Any) -> None:
        """Do nothing."""

    def on_failure(self, *args: Any) -> None:
        """Do nothing."""

    def on_retry(self, *args: Any) -> None:
        """Do nothing."""


def test_hooks_without_super_still_claim_and_release(app: Celery) -> None:
    """The guard does not depend on what users override."""

    @app.task(base=Overrider, name="t", bind=True, retrying=FAST)
    @once
    def t(self: Any) -> int:
        (claim,) = claims(app)
        assert claim["holder"]
        if not self.request.retries:
            raise OSError("no")
        return 7

    result = t.delay()
    assert [ended.state for ended in run_all(app)] == ["RETRY", "SUCCESS"]
    assert result.get(timeout=1) == 7
    assert claims(app) == []


def test_a_body_that_calls_itself_is_guarded_once(app: Celery) -> None:
    """A recursion is a function call, not another run."""

    @app.task(base=ReliableTask, name="t", bind=True, retrying=FAST)
    @once
    def t(self: Any, n: int) -> int:
        if n == 0:
            return 0
        run: int = self.run(n - 1)
        called: int = self(n - 1)
        return 1 + run + called

    t.delay(2)
    assert run(app, take(app)).value == 3


def test_a_duplicate_breaks_no_canvas(app: Celery) -> None:
    """A step is queued all the same, unless it is to raise: then the call does."""

    @app.task(base=ReliableTask, name="t")
    @once
    def t() -> str:
        return "done"

    @app.task(base=ReliableTask, name="strict")
    @once(on_conflict="raise")
    def strict() -> None:
        pass

    t.delay()
    results = [
        canvas.apply_async()
        for canvas in (group(t.si(), t.si()), chain(t.si(), t.si()), t.s().set(link=t.si()))
    ]
    run_all(app)
    for result in results:
        assert result.get(timeout=1) in ("done", ["done", "done"])
    strict.delay()
    with pytest.raises(DuplicateTaskError):
        chain(strict.si(), t.si()).apply_async()
    with pytest.raises(DuplicateTaskError):
        strict.apply_async(link=t.si())
    refused, other = group(strict.si(), t.si()).apply_async()
    run_all(app)
    assert isinstance(refused.result, DuplicateTaskError)
    assert other.get(timeout=1) == "done"


def test_a_result_is_found_by_its_id(app: Celery) -> None:
    """``AsyncResult`` of a reliable task is a reliable result."""
    t = app.task(nothing, base=ReliableTask, name="t")
    queued = t.delay()
    run_all(app)
    found = t.AsyncResult(queued.id)
    assert isinstance(found, ReliableResult)
    assert found.get(timeout=1) == 7
    assert not found.duplicate


def test_a_plain_task_beside_it_is_left_alone(app: Celery) -> None:
    """The library changes no task but its own."""
    app.task(nothing, name="plain")
    app.finalize()
    plain = app.tasks["plain"]
    assert isinstance(plain, Task)
    assert not isinstance(plain, ReliableTask)
    assert not plain.acks_late


# -- crashes, requeues and their end ---------------------------------------------------------


def bounds(task: Any) -> tuple[int | None, int | None]:
    """How often a task may crash, and go back to its queue."""
    crashes, requeues = task._reliable_budgets()
    return crashes, requeues


def test_a_task_has_the_budgets_of_its_app(app: Celery) -> None:
    """Unless it says something else itself."""
    app.conf.reliable_max_crashes = 5
    app.conf.reliable_max_requeues = None
    t = app.task(nothing, base=ReliableTask, name="t", max_requeues=7)
    assert bounds(t) == (5, 7)


def test_budgets_can_come_from_a_base_or_from_annotations(app: Celery) -> None:
    """As all other options; what is nearest to the task wins."""
    app.conf.task_annotations = {"t": {"max_crashes": 1}}
    base = type("Base", (ReliableTask,), {"abstract": True, "max_crashes": 9, "max_requeues": 8})
    t = app.task(nothing, base=base, name="t")
    other = app.task(nothing, base=base, name="other", max_crashes=None)
    assert bounds(t) == (1, 8)
    assert bounds(other) == (None, 8)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("max_crashes", 0, r"max_crashes of t = 0: give a number of crashes, 1 or more"),
        ("max_requeues", "x", r"max_requeues of t = 'x': give a number of requeues, 0 or more"),
        ("dead_letter", "posion", r"dead_letter of t = 'posion'; did you mean 'poison'"),
    ],
)
def test_a_bad_budget_is_found_when_the_task_is_made(
    app: Celery, option: str, value: Any, text: str
) -> None:
    """Before anything was queued."""
    t = app.task(nothing, base=ReliableTask, name="t", **{option: value})
    with pytest.raises(ConfigError, match=text):
        t.delay()


PILL = PoisonPill("one", 3, 3, [{"host": "w@h", "pid": 7, "how": "exitcode 3", "at": 5.0}])


@pytest.mark.parametrize(
    "verdict", [PILL, RequeuesExhausted("one", 101, 100)], ids=["poison", "requeues"]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"autoretry_for": (Exception,)},
        {"retrying": tenacity.stop_after_attempt(9)},
        {"exclusive": True},
    ],
    ids=["plain", "autoretry_for", "retrying", "exclusive"],
)
def test_a_task_that_is_not_to_run_again_ends(
    app: Celery, options: dict[str, Any], verdict: Exception
) -> None:
    """With its handlers, and without its body; no policy takes the verdict for an error of its."""
    called: list[Any] = []

    class Handling(ReliableTask):
        abstract = True

        def on_failure(self, exc: Any, *args: Any) -> None:
            called.append(exc)

    @app.task(base=Handling, name="t", **options)
    def t() -> None:
        called.append("body")

    result = t.delay()
    message = take(app)
    message.headers["reliable_condemned"] = (type(verdict).__name__, verdict.args)
    ended = run(app, message)
    assert ended.state == "FAILURE"
    assert type(ended.value) is type(verdict)
    assert ended.value.args == verdict.args
    assert [type(one) for one in called] == [type(verdict)]
    assert take(app) is None
    assert result.state == "FAILURE"


class Failing:
    """What a task of no class of ours may inherit from."""

    called: ClassVar[list[str]] = []

    def before_start(self, *args: Any) -> None:
        """Fail."""
        self._fail("before_start")

    def on_failure(self, *args: Any) -> None:
        """Fail."""
        self._fail("on_failure")

    def after_return(self, *args: Any) -> None:
        """Fail."""
        self._fail("after_return")

    def _fail(self, where: str) -> None:
        self.called.append(where)
        raise RuntimeError(f"no {where}")


def test_handlers_that_fail_do_not_keep_a_task_from_its_end(
    app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever they come from, it says what it ends with, and they are all called, once."""
    called: list[str] = []
    monkeypatch.setattr(Failing, "called", called)

    class Both(Failing, ReliableTask):
        abstract = True

    app.task(nothing, base=Both, name="t")
    app.finalize()
    app.tasks["t"].delay()
    message = take(app)
    message.headers["reliable_condemned"] = ("PoisonPill", PILL.args)
    ended = run(app, message)
    assert (ended.state, type(ended.value)) == ("FAILURE", PoisonPill)
    assert called == ["before_start", "on_failure", "after_return"]
    for where in called:
        assert f"{where} of task t[{message.headers['id']}] has failed" in caplog.text


def test_a_handler_of_another_task_may_fail(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises is the task's error, as in Celery; one can be no function."""
    monkeypatch.setattr(Failing, "called", [])

    class Both(Failing, ReliableTask):
        abstract = True
        on_failure = after_return = staticmethod(lambda *_: None)

    app.task(nothing, base=Both, name="t")
    app.finalize()
    app.tasks["t"].delay()
    ended = run(app, take(app))
    assert (ended.state, str(ended.value)) == ("FAILURE", "no before_start")


@pytest.mark.parametrize("kind", [staticmethod, classmethod, functools.partialmethod])
def test_handlers_of_any_kind_may_fail(
    app: Celery, caplog: pytest.LogCaptureFixture, kind: Callable[..., Any]
) -> None:
    """They need not be functions, and have failed all the same."""

    def fail(*args: Any) -> None:
        raise RuntimeError(f"no {len(args)}")

    class Failing(ReliableTask):
        abstract = True
        on_failure = kind(fail)

    app.task(nothing, base=Failing, name="t")
    app.finalize()
    app.tasks["t"].delay()
    message = take(app)
    message.headers["reliable_condemned"] = ("PoisonPill", PILL.args)
    assert type(run(app, message).value) is PoisonPill
    assert f"no {5 if kind is staticmethod else 6}" in caplog.text


def test_a_call_of_users_is_not_made_for_a_task_that_is_over(app: Celery) -> None:
    """It is for any other, wherever the base has it from."""
    called: list[str] = []

    class Calling:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            called.append("call")
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    class Both(Calling, ReliableTask):
        abstract = True

    app.task(nothing, base=Both, name="t")
    app.finalize()
    for _ in range(2):
        app.tasks["t"].delay()
    message = take(app)
    message.headers["reliable_condemned"] = ("PoisonPill", PILL.args)
    assert type(run(app, message).value) is PoisonPill
    assert called == []
    assert run(app, take(app)).state == "SUCCESS"
    assert called == ["call"]


def test_an_errback_of_a_task_that_crashed_is_called(app: Celery) -> None:
    """It has failed, as others do."""
    app.task(nothing, base=ReliableTask, name="t")
    app.task(nothing, base=ReliableTask, name="clean_up")
    app.finalize()
    app.tasks["t"].apply_async(link_error=app.tasks["clean_up"].si())
    message = take(app)
    message.headers["reliable_condemned"] = ("PoisonPill", PILL.args)
    run(app, message)
    assert take(app).headers["task"] == "clean_up"


def test_a_run_by_hand_has_not_crashed(app: Celery) -> None:
    """It is counted nowhere, and the task can ask for it."""

    @app.task(base=ReliableTask, name="t", bind=True)
    def t(self: Any) -> Any:
        return self.request.get("crashes")

    assert t.apply().get() == 0
    assert t() is None


def test_a_copy_whose_lease_may_have_ended_does_not_run(app: Celery) -> None:
    """It is asked about again after a pause."""
    app.task(nothing, base=ReliableTask, name="t")
    app.finalize()
    app.tasks["t"].delay()
    message = take(app)
    message.headers["reliable_in_doubt"] = True
    ended = run(app, message)
    assert isinstance(ended.value, SetAside)
    assert run(app, message, redeliver_to=[]).state == ended.state != "SUCCESS"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_body_that_would_end_its_child_fails_alone(app: Celery, error: BaseException) -> None:
    """In Celery that is the end of the child, which would count as a crash."""

    @app.task(base=ReliableTask, name="t")
    def t() -> None:
        raise error

    t.delay()
    ended = run(app, take(app))
    assert ended.state == "FAILURE"
    assert isinstance(ended.value, TaskExited)
    assert ended.value.raised == repr(error)


def test_an_exclusive_task_without_its_lease_waits(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker could not renew it, so another one may run it."""

    @contextlib.contextmanager
    def fenced() -> Iterator[None]:
        raise Fenced
        yield

    monkeypatch.setattr(_body, "exclusively", fenced)
    t = app.task(nothing, base=ReliableTask, name="t", exclusive=True)
    t.delay()
    ended = run(app, take(app))
    assert isinstance(ended.value, SetAside)
    assert str(ended.value) == "set aside: its worker could not renew its lease"


def test_an_exclusive_task_with_its_lease_runs(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other one."""
    monkeypatch.setattr(_body, "exclusively", contextlib.nullcontext)
    t = app.task(nothing, base=ReliableTask, name="t", exclusive=True)
    t.delay()
    assert run(app, take(app)).value == 7


def test_what_ends_the_worker_is_not_the_tasks(app: Celery) -> None:
    """In solo its signal handlers run in the midst of a task."""

    @app.task(base=ReliableTask, name="t")
    def t() -> None:
        raise WorkerShutdown(0)

    t.delay()
    with pytest.raises(WorkerShutdown):
        run(app, take(app))


# -- what a retry carries on -----------------------------------------------------------------


def failing(app: Celery, error: Exception | None, **options: Any) -> Any:
    """A task that retries for an error, if for any."""

    @app.task(base=ReliableTask, name="t", bind=True)
    def t(self: Any) -> None:
        raise self.retry(countdown=0, exc=error, **options)

    return app.tasks["t"]


def test_a_retry_says_when_the_task_failed_first(app: Celery) -> None:
    """The dead letter that it may become says so; later retries do not change it."""
    task = failing(app, OSError("no"))
    with time_machine.travel(1_772_366_400, tick=False) as clock:
        task.delay()
        message = take(app)
        assert "reliable_first_failed" not in message.headers
        for _ in range(3):
            assert run(app, message).state == "RETRY"
            message = take(app)
            assert message.headers["reliable_first_failed"] == 1_772_366_400
            clock.shift(60)


def test_a_policy_says_so_too(app: Celery) -> None:
    """Its retries are retries."""

    @app.task(base=ReliableTask, name="t", retrying=FAST)
    def t() -> None:
        raise OSError("no")

    with time_machine.travel(1_772_366_400, tick=False):
        t.delay()
        run(app, take(app))
        headers = take(app).headers
    assert headers["reliable_first_failed"] == 1_772_366_400
    assert headers[RETRYING]


def test_a_retry_without_an_error_is_no_failure(app: Celery) -> None:
    """A task may just wait for something."""
    failing(app, None).delay()
    run(app, take(app))
    again = take(app)
    assert again.headers["retries"] == 1
    assert "reliable_first_failed" not in again.headers


def test_headers_of_the_callers_own_are_kept_by_a_retry(app: Celery) -> None:
    """Those that the retry is given take their place, and still it says when it failed."""
    failing(app, OSError("no")).apply_async(headers={"tenant": "t7"})
    run(app, take(app))
    again = take(app)
    assert again.headers["tenant"] == "t7"
    assert again.headers["reliable_first_failed"]


def test_a_retry_with_headers_of_its_own(app: Celery) -> None:
    """They are sent, with what this library has to say."""
    failing(app, OSError("no"), headers={"tenant": "t8"}).delay()
    run(app, take(app))
    again = take(app)
    assert again.headers["tenant"] == "t8"
    assert again.headers["reliable_first_failed"]


def test_a_retry_begins_with_a_new_requeue_budget(app: Celery) -> None:
    """What one message has counted is none of the next one's, but for the task's crashes."""
    failing(app, OSError("no")).delay()
    message = take(app)
    of_one_message = {"reliable_requeues": 5, "reliable_set_aside": 3}
    message.headers.update(of_one_message, reliable_counted=2)
    run(app, message)
    again = take(app)
    assert not set(of_one_message) & set(again.headers)
    assert again.headers["reliable_counted"] == 2
