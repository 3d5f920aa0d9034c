"""The publisher's side: claim and queue, or answer as the conflict setting says."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from celery import Task

from reliable_tasks._celery.beat import is_called_by_beat
from reliable_tasks._once.call import Asked, Call, ask
from reliable_tasks._once.claim import CLAIM, Claim, Follows
from reliable_tasks._once.duplicate import follows, is_refused, needs_value
from reliable_tasks._once.following import keeps_results
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._once.queueing import Way, in_one_step, in_two_steps, is_one_step
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Publish, Ticket
from reliable_tasks.errors import LockLost, StoreError, StoreUnavailable
from reliable_tasks.instrumentation.signals import claim_conflict

__all__ = ["publish", "refused"]

logger = logging.getLogger("reliable_tasks")


def publish(task: Task[..., Any], once: Once, call: Call) -> ReliableResult:
    """Claim a call's key and queue it, or answer as the conflict setting says.

    A duplicate that is waited for is queued all the same, and follows the task that has the key.

    Raises:
        DuplicateTaskError: The key is taken, and the conflict setting is ``"raise"``, or what
            waits needs a value that no backend keeps.
        LockLost: A retry or a replacement found that another task owns the key by now.
        StoreUnavailable: The lock Redis does not answer and ``reliable_on_store_error`` is
            ``"raise"``; a kombu ``OperationalError`` where the lock Redis is the broker.
    """
    asked = ask(task, once, call)
    if not asked.wish.claim:
        return asked.queued()
    way = Way(asked)
    if is_one_step(asked):
        in_one_step(way)
    else:
        in_two_steps([way])
    outcome = way.outcome()
    if not isinstance(outcome, Ticket):
        return outcome
    # Beat would log a traceback each time that it finds the last run still going.
    return refused(asked, outcome, may_raise=not is_called_by_beat())


def refused(asked: Asked, answer: Ticket[Publish], *, may_raise: bool = True) -> ReliableResult:
    """Answer a call whose key is taken.

    With ``may_raise`` false the call does not raise for it is a duplicate, but says so.
    """
    once, claim = asked.once, asked.claim
    if not asked.is_own:
        return _as_duplicate(asked, answer, may_raise=may_raise)
    # A retry must not end without a word as somebody's duplicate, whatever its headers say.
    if not once.options.is_freed_at_start and not once.waits_if_late:
        raise LockLost(claim.name, claim.owner, answer.owner)
    # It gave its key up when it started, or waits for it, and must run all the same.
    if not once.waits_if_late:
        del asked.headers[CLAIM]
    return asked.queued()


def _as_duplicate(asked: Asked, answer: Ticket[Publish], *, may_raise: bool) -> ReliableResult:
    """Answer a call whose key is taken, or queue its message to follow the task that has it."""
    task, once, locks, call, claim = asked.task, asked.once, asked.locks, asked.call, asked.claim
    options, action = call.options, once.options.at_publish
    is_ignored = bool(options.get("ignore_result", task.ignore_result))
    may_follow = action != "raise" and (
        not needs_value(task, call.link, options) or keeps_results(task, is_ignored=is_ignored)
    )
    # A second call with the owner's own id cannot wait for it; what Celery calls so, as the last
    # of a canvas that the owner has become, is the owner.
    is_itself = answer.owner == call.task_id
    is_raised = (
        call.is_waited_for
        and is_refused(task, call.task_id, options)
        and (not may_follow or is_itself)
    )
    if not call.is_waited_for or is_raised:
        action = "raise" if is_raised else action
        action = action if may_raise else "existing"
        _tell_conflict(task, claim, call.task_id, answer, action)
        if action == "raise":
            raise once.refusal(claim.name, answer.owner, answer.seconds)
        return _existing(task, claim, answer, call.task_id)
    try:
        whom = follows(task, once, locks, claim, answer, ttl=asked.wish.ttl, may_follow=may_follow)
        if whom is None:
            asked.headers[CLAIM] = _next_attempt(locks, claim).as_sent()
    except StoreError as error:
        if locks.config.on_store_error == "proceed":
            logger.warning("Task %s[%s] is queued as it is: %s", task.name, claim.owner, error)
            whom = None
        elif isinstance(error, StoreUnavailable):
            raise locks.unavailable(error) from error
        else:
            raise
    if whom is None:
        return asked.queued()
    asked.headers[CLAIM] = replace(claim, follows=whom).as_sent()
    _tell_conflict(task, claim, claim.owner, answer, "follow" if may_follow else "raise")
    return _following(task, claim, whom, asked.queued())


def _next_attempt(locks: Locks, claim: Claim) -> Claim:
    """Return the claim of what comes after all that is known of its owner."""
    record = locks.claims.read(claim.name)
    known = [int(record.get(field) or 0) for field in ("attempt", "next_attempt")]
    return replace(claim, attempt=max(claim.attempt, *(number + 1 for number in known)))


def _tell_conflict(
    task: Task[..., Any],
    claim: Claim,
    task_id: str | None,
    answer: Ticket[Publish],
    action: str,
) -> None:
    claim_conflict.send(
        sender=task, key=claim.name, task_id=task_id, owner=answer.owner, action=action
    )


def _following(
    task: Task[..., Any], claim: Claim, whom: Follows, result: ReliableResult
) -> ReliableResult:
    logger.info(
        "Task %s[%s] is queued as a duplicate of %s (%s)",
        task.name,
        claim.owner,
        whom.owner,
        claim.name,
    )
    result.duplicate = True
    result.followed_id = whom.owner
    return result


def _existing(
    task: Task[..., Any], claim: Claim, ticket: Ticket[Publish], asked_id: str | None
) -> ReliableResult:
    logger.info(
        "Task %s is a duplicate of %s (%s)%s",
        task.name,
        ticket.owner,
        claim.name,
        f": its own id {asked_id} is not used" if asked_id else "",
    )
    result = ReliableResult(ticket.owner, backend=task.backend, task_name=task.name, app=task.app)
    result.duplicate = True
    result.ignored_id = asked_id
    return result
