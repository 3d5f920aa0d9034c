"""The worker's side: let a copy in or set it aside, and release its claim when it ends."""

from __future__ import annotations

import logging
import time
from typing import Any
from uuid import uuid4

from celery import Task, states
from celery.exceptions import Ignore
from celery.signals import task_postrun

from reliable_tasks._celery.headers import DELIVERY
from reliable_tasks._celery.registry import hard_limit
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import HOLDER, Claim, Run
from reliable_tasks._once.locks import Locks, locks_of
from reliable_tasks._once.once import Once
from reliable_tasks._store.claims import Entry, Release
from reliable_tasks.config import UNLIMITED
from reliable_tasks.errors import DuplicateTaskError, StoreError

__all__ = ["end_unrun", "enter", "mark_copy"]

logger = logging.getLogger("reliable_tasks")

#: Pauses of a copy that may not start yet, the first and the longest (s): while another copy of
#: its attempt runs, ...
_WHILE_RUNNING = (1.0, 5.0)
#: ... while the attempt before it, which published it, is about to end, ...
_WHILE_ENDING = (0.1, 5.0)
#: ... while the lock Redis does not answer.
_WHILE_UNAVAILABLE = (1.0, 5.0)
#: The lease outlives the hard limit by what the kill may take (s).
_KILL_GRACE = 5.0
#: After the lock Redis did not answer, a worker's main process lets claims lapse for so long (s):
#: it cannot wait for each of them, for it has heartbeats to send.
_MAIN_PROCESS_PAUSE = 30.0

#: Trace states that end a run for good. Without one (SystemExit) the child is about to die, and
#: the main process decides, for it knows whether the message goes back.
_ENDED = frozenset({states.SUCCESS, states.FAILURE, states.IGNORED, states.REJECTED, states.RETRY})
_FINAL = frozenset({states.SUCCESS, states.FAILURE})


def mark_copy(headers: dict[str, Any]) -> None:
    """Give a received message the token that the child and the main process know it by."""
    headers[HOLDER] = uuid4().hex


def enter(task: Task[..., Any], once: Once) -> None:
    """Take the claim for this run.

    Raises:
        Ignore: A later attempt exists; this copy is acknowledged unrun.
        SetAside: Another copy runs, or the lock Redis does not answer; this copy tries again.
        DuplicateTaskError: Another task owns the key.
    """
    request = task.request
    locks = locks_of(task.app)
    claim = _claim_of(task, once, vars(request))
    holder = str(request.get(HOLDER) or uuid4().hex)
    lease = _lease(task, locks)
    try:
        ticket = locks.claims.enter(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            holder=holder,
            lease=lease,
            ttl=_redelivery(task, lease),
            task=task.name,
            delivery=_delivery(task, locks),
        )
    except StoreError as error:
        _unavailable(task, locks, error)
        return
    if ticket.code is Entry.ENTERED:
        Run(once, claim, holder, ticket.fence).begin(task)
    elif ticket.code is Entry.CONTINUED:
        logger.warning(
            "Task %s[%s] is not run again: attempt %d was continued already",
            task.name,
            claim.owner,
            claim.attempt,
        )
        raise Ignore
    elif ticket.code is Entry.DUPLICATE:
        raise DuplicateTaskError(claim.name, ticket.owner, ticket.seconds)
    else:
        first, longest = _WHILE_RUNNING if ticket.code is Entry.RUNNING else _WHILE_ENDING
        raise SetAside("another copy of it runs", first, min(longest, ticket.seconds + 0.01))


def _claim_of(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> Claim:
    """Return the claim that a message carries, or that of its arguments if it came by name."""
    claim = Claim.from_headers(headers, headers.get("id"))
    if claim is None:
        name = once.claim_name(task, headers.get("args"), headers.get("kwargs"))
        claim = Claim(name, str(headers["id"]), int(headers.get("retries") or 0))
    return claim


def _delivery(task: Task[..., Any], locks: Locks) -> str:
    """Return the tag of the message's delivery, where the lock Redis knows its lease."""
    # An early ack ends the delivery when the run begins.
    return str(task.request.get(DELIVERY) or "") if locks.are_at_broker and task.acks_late else ""


def _unavailable(task: Task[..., Any], locks: Locks, error: StoreError) -> None:
    if locks.config.on_store_error == "raise":
        raise SetAside(str(error), *_WHILE_UNAVAILABLE) from None
    logger.error("Task %s[%s] runs without a claim: %s", task.name, task.request.id, error)


def _lease(task: Task[..., Any], locks: Locks) -> float:
    limit = hard_limit(task, task.request.timelimit)
    return (limit or locks.config.longest_task or UNLIMITED) + _KILL_GRACE


def _redelivery(task: Task[..., Any], lease: float) -> float:
    """Return within how many seconds a copy of a message comes back if it comes back at all."""
    options = task.app.conf.broker_transport_options or {}
    return max(lease, float(options.get("visibility_timeout") or 0)) + _KILL_GRACE


@task_postrun.connect(weak=False)
def _leave(task: Any = None, state: str | None = None, retval: Any = None, **_: Any) -> None:
    run = Run.of(task)
    if run is not None and state in _ENDED:
        goes_back = state == states.REJECTED and bool(getattr(retval, "requeue", False))
        _release(task, run.once, run.claim, run.holder, goes_back=goes_back)
    elif run is None and state in _FINAL and not task.request.is_eager:
        once = getattr(task, "reliable_once", None)
        if once is not None and not isinstance(retval, DuplicateTaskError):
            # It failed before its body began, or ran without the lock Redis.
            _end_unrun(task, once, vars(task.request), requeued=False)


def end_unrun(
    task: Task[..., Any],
    once: Once,
    headers: dict[str, Any],
    *,
    requeued: bool,
    is_routine: bool = False,
) -> None:
    """End a copy whose child did not: it was killed, timed out, revoked or never started.

    With ``is_routine`` nothing is said if the claim turns out to be released already.
    """
    global _unavailable_until
    if time.monotonic() < _unavailable_until and not requeued:
        logger.warning("The claim of task %s[%s] stays until it lapses", task.name, headers["id"])
        return
    # An error here would end the worker.
    try:
        answered = _end_unrun(task, once, headers, requeued=requeued, is_routine=is_routine)
        if not answered and not is_routine:
            _unavailable_until = time.monotonic() + _MAIN_PROCESS_PAUSE
    except Exception:
        logger.exception("The claim of task %s[%s] is not released", task.name, headers.get("id"))


_unavailable_until = 0.0


def _end_unrun(
    task: Task[..., Any],
    once: Once,
    headers: dict[str, Any],
    *,
    requeued: bool,
    is_routine: bool = False,
) -> bool:
    try:
        claim = _claim_of(task, once, headers)
    except (TypeError, LookupError, AttributeError):
        # Arguments that do not fit the task: no copy of it ever had a claim.
        return True
    holder = str(headers.get(HOLDER) or "")
    return _release(
        task,
        once,
        claim,
        holder,
        goes_back=requeued,
        may_be_unentered=True,
        is_routine=is_routine,
    )


def _release(
    task: Task[..., Any],
    once: Once,
    claim: Claim,
    holder: str,
    *,
    goes_back: bool,
    may_be_unentered: bool = False,
    is_routine: bool = False,
) -> bool:
    """Release a claim; return whether the lock Redis answered."""
    locks = locks_of(task.app)
    try:
        outcome, owner = locks.claims.release(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            holder=holder,
            keep_for=once.ttl(locks.config) if goes_back else 0.0,
            may_be_unentered=may_be_unentered,
            remember=_redelivery(task, _lease(task, locks)),
        )
    except StoreError as error:
        logger.warning("A claim on %s may stay until it lapses: %s", claim.name, error)
        return False
    if is_routine:
        return True
    if outcome is Release.LAPSED:
        logger.warning(
            "Task %s[%s] ended after its claim on %s had lapsed", task.name, claim.owner, claim.name
        )
    elif outcome is Release.NOT_OURS:
        logger.warning(
            "Task %s[%s] ended when %s owned %s already",
            task.name,
            claim.owner,
            owner if owner != claim.owner else "a later run of it",
            claim.name,
        )
    return True
