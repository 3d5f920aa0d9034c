"""What a worker knows of a copy of a once-task that it received."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

from celery import Task

from reliable_tasks._celery.headers import DELIVERY, TIMES_SET_ASIDE
from reliable_tasks._celery.registry import hard_limit
from reliable_tasks._once.claim import HOLDER, Claim
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._store.delivery import is_beside
from reliable_tasks.config import UNLIMITED

__all__ = [
    "KILL_GRACE",
    "adopt",
    "claim_of",
    "delivery_of",
    "is_by_name",
    "lease_of",
    "mark_copy",
    "may_have_started",
    "redelivery_of",
    "was_delivered_before",
]

#: The lease outlives the hard limit by what the kill may take (s).
KILL_GRACE = 5.0


def mark_copy(headers: dict[str, Any]) -> None:
    """Give a received message the token that the child and the main process know it by."""
    headers[HOLDER] = uuid4().hex


def claim_of(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> Claim:
    """Return the claim that a message carries, or that of its arguments if it came by name."""
    claim = Claim.from_headers(headers, headers.get("id"))
    if claim is not None and claim.name:
        return claim
    name = once.claim_name(task, headers.get("args"), headers.get("kwargs"))
    if claim is not None:
        return replace(claim, name=name)
    return Claim(name, str(headers["id"]), int(headers.get("retries") or 0))


def is_by_name(claim: Claim, headers: dict[str, Any]) -> bool:
    """Say whether a message carries no claim, but a call by name."""
    return Claim.from_headers(headers, claim.owner) is None


def adopt(task: Task[..., Any], once: Once, locks: Locks, claim: Claim) -> None:
    """Let a message that carries no claim have what was taken for it."""
    once.adopt(task, locks, claim.name, owner=claim.owner, attempt=claim.attempt)


def delivery_of(task: Task[..., Any], locks: Locks) -> str:
    """Return the tag of the message's delivery, where the lock Redis knows its lease."""
    # An early ack ends the delivery when the run begins.
    tag = str(task.request.get(DELIVERY) or "") if task.acks_late else ""
    return tag if locks.are_at_broker or is_beside(tag) else ""


def lease_of(task: Task[..., Any], locks: Locks) -> float:
    """Return for how long a run is covered where nobody renews its lease (s)."""
    limit = hard_limit(task, task.request.timelimit)
    return (limit or locks.config.longest_task or UNLIMITED) + KILL_GRACE


def redelivery_of(task: Task[..., Any], lease: float) -> float:
    """Return within how many seconds a copy of a message comes back if it comes back at all."""
    options = task.app.conf.broker_transport_options or {}
    return max(lease, float(options.get("visibility_timeout") or 0)) + KILL_GRACE


def may_have_started(task: Task[..., Any]) -> bool:
    """Say whether a task may have been started before."""
    return bool(task.request.retries or was_delivered_before(vars(task.request)))


def was_delivered_before(headers: dict[str, Any]) -> bool:
    """Say whether a message was in a worker's hands before."""
    delivery = headers.get("delivery_info") or {}
    return bool(delivery.get("redelivered") or headers.get(TIMES_SET_ASIDE))
