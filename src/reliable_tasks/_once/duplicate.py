"""A call whose key is taken, and that somebody waits for: what its message is to do instead."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from celery import Task, states
from celery.backends.rpc import RPCBackend

from reliable_tasks._once.claim import Claim, Follows, Then
from reliable_tasks._once.following import keeps_results
from reliable_tasks._once.lineage import lineage_of_call
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._store.claims import Follow, Publish, Ticket

__all__ = ["follows", "is_refused", "needs_value"]

logger = logging.getLogger("reliable_tasks")

#: What Celery publishes the body of a chord from, where the backend does not count the header.
_CHORD_UNLOCK = "celery.chord_unlock"


def is_refused(task: Task[..., Any], task_id: str | None, options: Mapping[str, Any]) -> bool:
    """Say whether it is the caller that hears of a duplicate that may not be queued.

    Nobody does where Celery publishes it: as the next of a chain, for a callback, as the body of
    a chord. And a group is not to be refused half-way.
    """
    # The last of a chain has what a group or a chord gives to the whole.
    chain = _listed(options.get("chain"))
    last = (chain[0].get("options") or {}) if chain and isinstance(chain[0], Mapping) else {}
    if any(options.get(n) or last.get(n) for n in ("group_id", "chord")) or options.get(
        "parent_id"
    ):
        return False
    running: Any = task.app.current_worker_task
    if running is None:
        return True
    is_body = task_id in _ids(running.request.chord)
    return not is_body and running.name != _CHORD_UNLOCK


def needs_value(task: Task[..., Any], link: Any, options: Mapping[str, Any]) -> bool:
    """Say whether something that follows takes the task's result."""
    is_ignored = options.get("ignore_result", task.ignore_result)
    if options.get("chord") or (isinstance(task.backend, RPCBackend) and not is_ignored):
        # That backend hands a result to its caller, and nobody else has it.
        return True
    following = [*_listed(options.get("chain"))[-1:], *_listed(link)]
    return any(not _is_immutable(signature) for signature in following)


def follows(
    task: Task[..., Any],
    once: Once,
    locks: Locks,
    claim: Claim,
    ticket: Ticket[Publish],
    *,
    ttl: float,
    may_follow: bool,
) -> Follows | None:
    """Return whom a duplicate is to follow, and to what end; ``None`` if the key is its own.

    What the owner's own run has led to does not share its end, but runs after it; unless the key
    is taken for a window of time.

    Raises:
        StoreError: The lock Redis does not answer, or refuses.
    """
    is_for_a_window = once.options.is_for_a_window
    lineage = [] if is_for_a_window else lineage_of_call(task.app, claim.owner)
    if not may_follow and ticket.owner not in lineage:
        return Follows(ticket.owner, 0, "fail", ticket.seconds)
    if ticket.owner == claim.owner:
        return None
    answer = locks.claims.follow(
        claim.name, task_id=claim.owner, followed=ticket.owner, until=None, ttl=ttl
    )
    if answer.code is Follow.OURS:
        return None
    then: Then = "join"
    is_over = answer.code is Follow.FREE or (
        not is_for_a_window and _has_ended(task, answer.followed)
    )
    if is_over or answer.followed in lineage:
        # What is called after the owner's end, as the body of its chord is, is to run; its claim
        # is about to be released, or was a moment ago.
        then = "run"
    return Follows(answer.followed, answer.until, then, ticket.seconds)


def _has_ended(task: Task[..., Any], task_id: str) -> bool:
    if not keeps_results(task, is_ignored=bool(task.ignore_result)):
        return False
    try:
        return task.backend.get_state(task_id) in states.READY_STATES
    except Exception:
        # Whoever runs it will see.
        logger.warning("The state of task %s cannot be read", task_id, exc_info=True)
        return False


def _listed(signatures: Any) -> list[Any]:
    if not signatures:
        return []
    is_one = isinstance(signatures, Mapping) or not isinstance(signatures, Iterable)
    return [signatures] if is_one else list(signatures)


def _is_immutable(signature: Any) -> bool:
    return isinstance(signature, Mapping) and bool(signature.get("immutable"))


def _ids(signature: Any) -> set[str]:
    """Return the ids of the tasks of a canvas."""
    if not isinstance(signature, Mapping):
        return set()
    kwargs = signature.get("kwargs") or {}
    parts = [*_listed(kwargs.get("tasks")), *_listed(kwargs.get("header"))]
    found = {str((signature.get("options") or {}).get("task_id"))}
    return found.union(*(_ids(part) for part in parts))
