"""The ``@once`` decorator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, overload

from celery import Task
from celery.local import PromiseProxy, Proxy, maybe_evaluate

from reliable_tasks._once.keys import KeySpec
from reliable_tasks._once.once import Once
from reliable_tasks._once.options import Lifetime, OnceOptions, OnConflict
from reliable_tasks.errors import ConfigError

__all__ = ["BAD_BASE", "OPTIONS", "once", "once_options", "refuse_plain_base"]

#: The attribute under which a function, a task or a class carries its options.
OPTIONS = "__reliable_once__"
#: What is said where ``@once`` meets a task that would ignore it.
BAD_BASE = (
    "@once on {task} has no effect, for its base is {base}: "
    "write @app.task(base=ReliableTask), or Celery(task_cls=ReliableTask)"
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@overload
def once(decorated: Decorated, /) -> Decorated: ...
@overload
def once(
    *,
    key: KeySpec = None,
    lock: Lifetime = "until_executed",
    on_conflict: OnConflict | None = None,
    ttl: float | timedelta | None = None,
) -> Callable[[Decorated], Decorated]: ...
def once(
    decorated: Any = None,
    /,
    *,
    key: KeySpec = None,
    lock: Lifetime = "until_executed",
    on_conflict: OnConflict | None = None,
    ttl: float | timedelta | None = None,
) -> Any:
    """Let at most one task with a key be queued or running.

    Works above and below ``@app.task``, on a task class, and on its ``run`` method; the task's
    base must be `ReliableTask`.

    Args:
        decorated: The function or task, when written without parentheses: ``@once``.
        key: What makes two calls the same. A template over the task's parameters
            (``"invoice:{invoice_id}"``, ``"{order.id}"``, ``"{items[0]}"``), a function that is
            called with the task's arguments and returns any value, or nothing: all arguments.
            Values keep their types: ``1`` and ``"1"`` are two keys. Keys of different tasks
            never meet.
        lock: How long the key stays taken. ``"until_executed"``: from the call to the task's
            final state, across retries. ``"until_executing"``: from the call to the start.
            ``"until_expired"``: for the ``ttl``, whatever happens. ``"while_executing"``: from the
            start to the end, so that any number is queued and one runs.
            ``"until_and_while_executing"``: one is queued and one runs.
        on_conflict: What a call does whose key is taken. ``"existing"``, the default: returns the
            result of the task that has it, with ``.duplicate`` true. ``"raise"``: raises
            `DuplicateTaskError`. ``"replace"``: takes the place of that task, which ends in state
            ``REVOKED``. And what a task does that starts while another one runs, with the locks
            that have a *while*: ``"reschedule"``, the default: waits for its turn. ``"drop"``:
            ends in state ``REVOKED``. ``"raise"``: fails with `DuplicateTaskError`. Where both
            can be meant: ``{"publish": ..., "start": ...}``.
        ttl: How long the message may wait in the queue, in seconds or as a timedelta, on top of
            its countdown or ETA; then the key is free again. Default: ``reliable_once_ttl``.

    Raises:
        ConfigError: An option is unknown or makes no sense with another one, a template names
            what is no parameter, or the task is no `ReliableTask`.

    Example:
        ::

            @app.task(base=ReliableTask)
            @once(key="invoice:{invoice_id}")
            def send_invoice(invoice_id: int, *, copy_to: str | None = None) -> str: ...
    """
    options = OnceOptions(key=key, lock=lock, on_conflict=on_conflict, ttl=ttl)
    if decorated is not None:
        return _attach(decorated, options)
    return lambda target: _attach(target, options)


def once_options(target: Any) -> OnceOptions | None:
    """Return the options that ``@once`` left on a function or a class."""
    found = getattr(target, OPTIONS, None)
    return found if isinstance(found, OnceOptions) else None


def _attach(target: Any, options: OnceOptions) -> Any:
    if type(target) is PromiseProxy:
        # @app.task is lazy: the task is made when somebody first asks for it.
        target.__then__(lambda: _adopt(maybe_evaluate(target), options))
        return target
    if type(target) is Proxy:
        raise ConfigError(
            "@once above @shared_task would have to make the task at import: write it below"
        )
    if isinstance(target, Task) or (inspect.isclass(target) and issubclass(target, Task)):
        _adopt(target, options)
        return target
    if not inspect.isfunction(target):
        raise ConfigError(f"@once on {target!r}: decorate a function or a task")
    parameters = list(inspect.signature(target).parameters)
    # Whether the first parameter is the task shows when the task is made; the rest can be
    # checked where the mistake stands.
    takes_self = parameters[:1] == ["self"]
    _refuse_another(once_options(target), options, target.__qualname__)
    Once(options, target, takes_self=takes_self, task=target.__qualname__)
    setattr(target, OPTIONS, options)
    target.__doc__ = _Doc(target.__doc__ or "")
    return target


def _adopt(task: Any, options: OnceOptions) -> None:
    cls = task if inspect.isclass(task) else type(task)
    adopt = getattr(cls, "adopt_once", None)
    if adopt is None:
        base = cls.__mro__[1].__name__
        raise ConfigError(BAD_BASE.format(task=getattr(task, "name", None) or cls, base=base))
    # One that a class has from its base is overridden.
    _refuse_another(cls.__dict__.get(OPTIONS), options, getattr(task, "name", None) or cls)
    adopt(options)


def _refuse_another(before: OnceOptions | None, options: OnceOptions, task: Any) -> None:
    if before is not None and before != options:
        raise ConfigError(f"@once is there twice on {task}, with other options: keep one of them")


def refuse_plain_base(task: Any) -> None:
    """Refuse a task whose ``run`` method has an ``@once`` that its base knows nothing of.

    Raises:
        ConfigError: With the base to use.
    """
    cls = type(task)
    if once_options(task.run) is not None and not hasattr(cls, "adopt_once"):
        raise ConfigError(BAD_BASE.format(task=task.name, base=cls.__mro__[1].__name__))


class _Doc(str):
    """A docstring that notices which class it becomes part of.

    Naughty, but nothing else of ours is near when Celery makes a task of a function: Celery
    copies the function's ``__doc__`` into the new class, and Python calls ``__set_name__`` of
    what it finds there. A plain `Task` would ignore ``@once`` without a word.
    """

    __slots__ = ()

    def __set_name__(self, owner: type, name: str) -> None:
        if not issubclass(owner, Task) or hasattr(owner, "adopt_once"):
            return
        base = owner.__mro__[1].__name__

        def refuse(cls: type, app: Any) -> None:
            raise ConfigError(BAD_BASE.format(task=getattr(cls, "name", cls), base=base))

        # An error raised here would reach the user wrapped in a RuntimeError (before 3.12).
        setattr(owner, "on_bound", classmethod(refuse))  # noqa: B010 - a class made at run time
