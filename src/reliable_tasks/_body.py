"""The body of a reliable task: let in by its claim, fenced, and retried by its policy."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from celery.exceptions import Ignore, Reject, Retry
from celery.utils.serialization import get_pickleable_exception

from reliable_tasks._broker.fence import Fenced, exclusively
from reliable_tasks._celery.budgets import condemned
from reliable_tasks._celery.exits import ends_more_than_the_task, is_told_to_end
from reliable_tasks._celery.headers import IN_DOUBT
from reliable_tasks._celery.registry import hard_limit
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.entering import enter
from reliable_tasks._once.lineage import note_end
from reliable_tasks._retrying import RETRYING, GiveUp, Policy, RetryIn
from reliable_tasks.errors import TaskExited

__all__ = ["WRAPPED", "guarded"]

logger = logging.getLogger("reliable_tasks")

#: A copy that waited in a pool, and whose lease may have ended, is asked about after a pause (s).
_IN_DOUBT = (0.05, 1.0)
#: An exclusive task whose lease may have ended tries again after a pause (s).
_AFTER_FENCE = (0.5, 5.0)


def guarded(function: Callable[..., Any], *, takes_self: bool) -> Callable[..., Any]:
    """Wrap a task's body: let it in by its claim, and carry out its retry policy.

    The body is wrapped and not ``__call__`` or a handler like ``before_start``, for users
    override those without calling ``super()``.
    """

    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        body = functools.partial(function, self) if takes_self else function
        # Called as a function, or by a subclass' run through super(): nothing of ours to do.
        if self.request.called_directly or self.request.get("reliable_body"):
            return body(*args, **kwargs)
        if (verdict := condemned(self.request)) is not None:
            raise verdict
        if self.request.get(IN_DOUBT):
            raise SetAside("its lease may have ended", *_IN_DOUBT)
        self.request.update(reliable_body=True)
        try:
            if not self.exclusive or self.request.is_eager:
                return _start(self, self._policy, body, args, kwargs)
            with _fenced():
                return _start(self, self._policy, body, args, kwargs)
        finally:
            # What is called from now on comes after it.
            note_end(self)

    run.__takes_self__ = takes_self  # type: ignore[attr-defined]
    signature = inspect.signature(function)
    if not takes_self:
        # run is a method now, while a plain function had no self: Celery asks for the signature.
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        own = [
            p.replace(name="self_") if p.name == "self" else p
            for p in signature.parameters.values()
        ]
        signature = signature.replace(parameters=[first, *own])
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _unfailing(name: str, handler: Any) -> Callable[..., Any]:
    """Wrap a handler: what it raises does not keep a task from its end that must not run again.

    Args:
        name: Its name.
        handler: As it stands in the class: a function, or what makes one.
    """

    @functools.wraps(handler)
    def handle(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return _bound(handler, self)(*args, **kwargs)
        except Exception as error:
            verdict = condemned(self.request)
            if verdict is None:
                raise
            if repr(error) != repr(verdict):
                logger.exception(
                    "%s of task %s[%s] has failed, and the task ends all the same: %r",
                    *(name, self.name, self.request.id, verdict),
                )
            return None

    return handle


def _spared(call: Any) -> Callable[..., Any]:
    """Wrap a ``__call__`` of users: it is not called for a task that must not run again.

    It would see that the body raises what the task ends with, and could make it something else.
    """

    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (verdict := condemned(self.request)) is not None:
            raise verdict
        return _bound(call, self)(*args, **kwargs)

    return run


#: What users write that is called where a child only says that a task is over.
WRAPPED: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "__call__": _spared,
    **{
        name: functools.partial(_unfailing, name)
        for name in ("before_start", "on_failure", "after_return")
    },
}


def _bound(attribute: Any, task: Any) -> Callable[..., Any]:
    """Return what an attribute of a class is for one of its tasks."""
    get = getattr(attribute, "__get__", None)
    bound: Callable[..., Any] = attribute if get is None else get(task, type(task))
    return bound


def _start(
    task: Any, policy: Policy | None, body: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if task.request.is_eager:
        task.request.update(crashes=0)
    else:
        body = _ending_alone(task, body)
        if task.reliable_once is not None:
            followed = enter(task, task.reliable_once)
            if followed is not None:
                return followed.take()
    if policy is None:
        return body(*args, **kwargs)
    return _run_with(policy, task, body, args, kwargs)


@contextlib.contextmanager
def _fenced() -> Iterator[None]:
    try:
        with exclusively():
            yield
    except Fenced:
        reason = "its worker could not renew its lease"
        raise SetAside(reason, *_AFTER_FENCE) from None


def _ending_alone(task: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a body: what ends more than a task in Celery is the failure of this one alone."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return body(*args, **kwargs)
        except Reject as rejected:
            # Celery hands its reason on as it is, and a pool waits for what it cannot unpickle.
            reason = rejected.reason  # type: ignore[attr-defined]
            shown = get_pickleable_exception(reason) if isinstance(reason, Exception) else reason
            if shown is reason:
                raise
            raise Reject(shown, rejected.requeue) from rejected  # type: ignore[attr-defined]
        except Exception:
            raise
        except BaseException as error:
            is_limited = bool(hard_limit(task, task.request.timelimit))
            is_told = is_told_to_end(str(task.request.id))
            if ends_more_than_the_task(error, is_limited=is_limited, is_told_to_end=is_told):
                raise
            raise TaskExited(repr(error)) from error

    return run


def _run_with(policy: Policy, task: Any, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if not policy.retrying.enabled:
        return body(*args, **kwargs)
    request = task.request
    headers = request.headers or {}
    state = policy.start(body, args, kwargs, request.retries, headers.get(RETRYING))
    try:
        result = body(*args, **kwargs)
    except (Ignore, Reject, Retry):
        raise
    except Exception as error:  # noqa: BLE001 - which errors are retried is the policy's choice
        decision = policy.after_error(state, error)
        raised: Exception | None = error
    else:
        decision = policy.after_result(state, result)
        raised = None
    if isinstance(decision, RetryIn):
        raise task.retry(
            exc=raised,
            countdown=decision.seconds,
            max_retries=request.retries + 1,
            headers={**headers, RETRYING: decision.header},
        )
    if isinstance(decision, GiveUp):
        raise decision.error
    return decision.value
