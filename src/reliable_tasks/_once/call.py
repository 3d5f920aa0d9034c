"""A call of a once-task: what it asks of the lock Redis, and what its message is to carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from celery import Task

from reliable_tasks._celery.delays import delay_of
from reliable_tasks._celery.headers import without_brokers_own
from reliable_tasks._once.claim import CLAIM, OF_ONE_DELIVERY, Claim, Run
from reliable_tasks._once.duplicate import is_refused
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.publication import How, Publication, publication_of

__all__ = ["Asked", "Call", "Queue", "ask"]


class Queue(Protocol):
    """Queues the task of a call under an id with the given headers, and returns its result."""

    def __call__(
        self, call: Call, identity: str | None, headers: Mapping[str, Any] | None, producer: Any
    ) -> ReliableResult:
        """Queue it, by this producer if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a once-task.

    Attributes:
        args: The task's positional arguments.
        kwargs: Its keyword arguments.
        task_id: The id that the caller asks for, if any.
        producer: A producer of the caller's, if any.
        link: What is called with the result.
        link_error: What is called with an error.
        shadow: The name that the message shows.
        options: All else that ``apply_async`` was given.
        is_waited_for: Whether something waits for the end: the rest of a chain, a callback.
        queued_by: Queues it.
    """

    args: Any
    kwargs: Any
    task_id: str | None
    producer: Any
    link: Any
    link_error: Any
    shadow: str | None
    options: Mapping[str, Any]
    is_waited_for: bool
    queued_by: Queue

    def queue(
        self, identity: str | None, headers: Mapping[str, Any] | None, producer: Any = None
    ) -> ReliableResult:
        """Queue the task, by this producer or by the caller's if there is one."""
        return self.queued_by(self, identity, headers, producer or self.producer)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks for.

    Attributes:
        task: The task.
        once: Its ``@once``.
        locks: The claims that its own is one of.
        call: The call.
        claim: What its message owns, or would like to.
        headers: Of its message.
        wish: What is to be done when it is queued; without a claim's name where none is asked for.
        is_own: Whether it is the owner's own retry or replacement, or a step of either.
    """

    task: Task[..., Any]
    once: Once
    locks: Locks
    call: Call
    claim: Claim
    headers: dict[str, Any]
    wish: Publication
    is_own: bool

    def queued(self, producer: Any = None) -> ReliableResult:
        """Queue the message as it stands."""
        return self.call.queue(self.claim.owner, self.headers, producer)


def ask(task: Task[..., Any], once: Once, call: Call) -> Asked:
    """Say what a call asks for."""
    locks = once.locks(task)
    given = call.options.get("headers") or {}
    headers = without_brokers_own(given, CLAIM, *OF_ONE_DELIVERY)
    owner = call.task_id or str(uuid4())
    retries = int(call.options.get("retries") or 0)
    if not once.options.is_claimed_by_calls:
        nothing = Claim("", owner, retries), headers, Publication()
        return Asked(task, once, locks, call, *nothing, is_own=False)
    carried = Claim.from_headers(given, call.task_id)
    # A retry keeps its claim whatever became of its arguments on the way; anything else that
    # comes with a claim (a replacement) goes on with it only if it is about the same key.
    is_known = carried is not None and retries > 0 and carried.name
    name = carried.name if carried and is_known else once.claim_name(task, call.args, call.kwargs)
    continued = carried if carried and carried.name == name else None
    claim = Claim(name, owner, continued.attempt + 1 if continued else retries)
    headers[CLAIM] = claim.as_sent()
    # The last part of a canvas that the owner has become is called by another one's run, when the
    # owner's is over: it takes the key anew.
    is_own = retries > 0 or (continued is not None and _is_of_run(task, owner))
    if is_own and once.options.is_for_a_window:
        # It was called in its window, which may be over.
        return Asked(task, once, locks, call, claim, headers, Publication(), is_own)
    kept = continued if is_own else None
    before = publication_of({"id": claim.owner})
    wish = Publication(
        continues=before.continues if before else "",
        task_id=before.task_id if before else "",
        is_only=bool(before and before.is_only),
        token=before.token if before else "",
        claim=claim.name,
        how=_how(once, kept, before, is_own=is_own),
        owner=claim.owner,
        claim_attempt=claim.attempt,
        ttl=once.ttl(locks.config) + delay_of(task.app, call.options),
        task=task.name,
        holder=_holder(task, once, claim, kept, call),
    )
    return Asked(task, once, locks, call, claim, headers, wish, is_own)


def _is_of_run(task: Task[..., Any], owner: str) -> bool:
    """Say whether it is the run of a task itself that calls, or nobody's."""
    caller: Any = task.app.current_worker_task
    return caller is None or caller.request.id == owner


def _how(once: Once, kept: Claim | None, before: Publication | None, *, is_own: bool) -> How:
    if kept is not None:
        return "continue"
    if is_own:
        return "acquire"
    if once.options.is_for_a_window:
        return "window"
    replaces = before is None or before.replaces
    return "replace" if replaces and once.options.at_publish == "replace" else "acquire"


def _holder(task: Task[..., Any], once: Once, claim: Claim, kept: Claim | None, call: Call) -> str:
    """Return the token of the run that continues its claim, or hands it on, or ``""``."""
    if kept is not None:
        run = Run.of(task)
        return run.holder if run is not None else ""
    if not once.hands_on and is_refused(task, call.task_id, call.options):
        # From its own body, not by what comes after it in a canvas.
        return ""
    caller: Any = task.app.current_task
    run = None if caller is None else Run.of(caller)
    if run is None or run.held is None or once.options.is_for_a_window:
        return ""
    # In a task that calls itself with its own key.
    return run.holder if run.held.name == claim.name else ""
