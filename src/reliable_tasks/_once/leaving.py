"""The end of a once-task: its claim is released, by its child or for it."""

from __future__ import annotations

import logging
from typing import Any

from celery import Task, states
from celery.signals import task_postrun

from reliable_tasks._once.claim import HOLDER, Claim, Run
from reliable_tasks._once.following import is_follower
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import (
    KILL_GRACE,
    adopt,
    claim_of,
    is_by_name,
    lease_of,
    redelivery_of,
    was_delivered_before,
)
from reliable_tasks._once.silence import Silence
from reliable_tasks._store.claims import End, Release
from reliable_tasks.errors import DuplicateTaskError, StoreError
from reliable_tasks.instrumentation.signals import claim_lost, claim_released

__all__ = ["end_late", "end_unrun", "uncover"]

logger = logging.getLogger("reliable_tasks")

_silence = Silence(30.0)

#: Trace states that end a run for good. Without one (SystemExit) the child is about to die, and
#: the main process decides, for it knows whether the message goes back.
_ENDED = frozenset({states.SUCCESS, states.FAILURE, states.IGNORED, states.REJECTED, states.RETRY})
_FINAL = frozenset({states.SUCCESS, states.FAILURE})
#: What those that follow a task are told whose state nobody reports: they look for it themselves.
_SOMEHOW = "ENDED"


@task_postrun.connect(weak=False)
def _leave(task: Any = None, state: str | None = None, retval: Any = None, **_: Any) -> None:
    run = Run.of(task)
    if run is not None and state in _ENDED:
        goes_back = state == states.REJECTED and bool(getattr(retval, "requeue", False))
        is_over = not goes_back and state != states.RETRY
        told = state if state in _FINAL else _SOMEHOW
        end = _end(task, run.once, run.claim, told) if is_over else None
        if run.held is not None:
            _release(task, run.once, run.held, run.holder, goes_back=goes_back, end=end)
        elif end is not None:
            _note_end(task, run, end)
        if state == states.RETRY and run.once.options.is_freed_at_start:
            # The retry has taken the key again; where that is a step of its own, it counts now.
            _release(
                task,
                run.once,
                run.claim,
                run.holder,
                goes_back=False,
                may_be_unentered=True,
                is_routine=True,
            )
    elif run is None and state in _FINAL and not task.request.is_eager and not is_follower(task):
        once = getattr(task, "reliable_once", None)
        if once is not None and not isinstance(retval, DuplicateTaskError):
            # It failed before its body began, or ran without the lock Redis.
            _end_unrun(task, once, vars(task.request), requeued=False, is_unstarted=True)


def _end(task: Task[..., Any], once: Once, claim: Claim, state: str) -> End | None:
    """Return what those that follow a task are told of its end."""
    if not once.options.is_claimed_by_calls:
        return None
    # Where the key stays taken, somebody can begin to follow when it has ended.
    is_kept = once.options.is_for_a_window
    ttl = once.ttl(once.locks(task).config) if is_kept else None
    return End(claim.name, state, ttl)


def _note_end(task: Task[..., Any], run: Run, end: End) -> None:
    try:
        run.once.locks(task).claims.note_end(end, owner=run.claim.owner)
    except StoreError as error:
        logger.warning("Who follows task %s[%s] may wait: %s", task.name, run.claim.owner, error)


def end_unrun(
    task: Task[..., Any],
    once: Once,
    headers: dict[str, Any],
    *,
    requeued: bool,
    has_started: bool = False,
    is_routine: bool = False,
) -> None:
    """End a copy whose child did not: it was killed, timed out, revoked or never started.

    With ``is_routine`` nothing is said if the claim turns out to be released already.
    """
    is_unstarted = not (requeued or has_started or is_routine)
    if _silence and not requeued:
        logger.warning("The claim of task %s[%s] stays until it lapses", task.name, headers["id"])
        return
    # An error here would end the worker.
    try:
        answered = _end_unrun(
            task,
            once,
            headers,
            requeued=requeued,
            is_unstarted=is_unstarted,
            is_routine=is_routine,
        )
        if not answered and not is_routine:
            _silence.begin()
    except Exception:
        logger.exception("The claim of task %s[%s] is not released", task.name, headers.get("id"))


def end_late(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> None:
    """Release what a copy has left because nobody answered when it ended: now somebody does."""
    _silence.end()
    end_unrun(task, once, headers, requeued=False, has_started=True, is_routine=True)


def _end_unrun(
    task: Task[..., Any],
    once: Once,
    headers: dict[str, Any],
    *,
    requeued: bool,
    is_unstarted: bool,
    is_routine: bool = False,
) -> bool:
    try:
        claim = claim_of(task, once, headers)
    except (TypeError, LookupError, AttributeError):
        # Arguments that do not fit the task: no copy of it ever had a claim.
        return True
    holder = str(headers.get(HOLDER) or "")
    options = once.options
    answered = True
    is_over = not requeued and not is_routine
    end = _end(task, once, claim, _SOMEHOW) if is_over else None
    # Who follows another task may not have got the key yet.
    is_routine = is_routine or claim.follows is not None
    if options.takes_turns:
        # It may not have had its turn yet.
        answered = _release(
            task, once, claim.turn, holder, goes_back=requeued, is_routine=True, end=end
        )
    if options.is_claimed_by_calls and not options.is_for_a_window:
        # One that was started before gave its key up then.
        may_be_freed = options.is_freed_at_start and was_delivered_before(headers)
        if is_unstarted and not may_be_freed and is_by_name(claim, headers):
            adopt(task, once, once.locks(task), claim)
        answered &= _release(
            task,
            once,
            claim,
            holder,
            goes_back=requeued,
            may_be_unentered=True,
            is_routine=is_routine or options.is_freed_at_start,
            end=end,
        )
    return answered


def uncover(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> None:
    """Cover a run whose message is about to be acknowledged, though its child may be alive."""
    options = once.options
    if options.is_freed_at_start and not options.takes_turns:
        return
    try:
        claim = claim_of(task, once, headers)
        held = claim.turn if options.takes_turns else claim
        holder = str(headers.get(HOLDER) or "")
        once.locks(task).claims.uncover(held.name, holder=holder, grace=KILL_GRACE)
    except Exception:
        # An error here would end the worker.
        logger.exception("The claim of task %s[%s] may be free early", task.name, headers["id"])


def _release(
    task: Task[..., Any],
    once: Once,
    claim: Claim,
    holder: str,
    *,
    goes_back: bool,
    may_be_unentered: bool = False,
    is_routine: bool = False,
    end: End | None = None,
) -> bool:
    """Release a claim; return whether the lock Redis answered."""
    locks = once.locks(task)
    is_turn = once.options.takes_turns and not may_be_unentered
    try:
        outcome, owner = locks.claims.release(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            holder=holder,
            # A task that goes back leaves its turn to others, and takes another one later.
            keep_for=once.ttl(locks.config) if goes_back and not is_turn else 0.0,
            may_be_unentered=may_be_unentered,
            remember=0.0 if is_turn else redelivery_of(task, lease_of(task, locks)),
            end=end,
        )
    except StoreError as error:
        logger.warning("A claim on %s may stay until it lapses: %s", claim.name, error)
        return False
    if outcome is Release.FREED:
        claim_released.send(sender=task, key=claim.name, task_id=claim.owner)
    if is_routine or outcome in (Release.FREED, Release.KEPT):
        return True
    claim_lost.send(
        sender=task,
        key=claim.name,
        task_id=claim.owner,
        owner=owner if outcome is Release.NOT_OURS else None,
    )
    if outcome is Release.LAPSED:
        logger.warning(
            "Task %s[%s] ended after its claim on %s had lapsed", task.name, claim.owner, claim.name
        )
    else:
        logger.warning(
            "Task %s[%s] ended when %s owned %s already",
            task.name,
            claim.owner,
            owner if owner != claim.owner else "a later run of it",
            claim.name,
        )
    return True
