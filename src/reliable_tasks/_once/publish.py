"""The publisher's side: claim, then queue, and take the claim back if that failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol
from uuid import uuid4

from celery import Task
from kombu.exceptions import OperationalError

from reliable_tasks._celery.delays import delay_of
from reliable_tasks._once.claim import CLAIM, OF_ONE_DELIVERY, Claim, Run
from reliable_tasks._once.locks import BrokerUnavailable, Locks, locks_of
from reliable_tasks._once.once import Once
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Publish, Ticket
from reliable_tasks._store.publication import (
    ClaimTaken,
    Publication,
    publication_of,
    publishing,
)
from reliable_tasks.errors import DuplicateTaskError, LockLost, StoreError, StoreUnavailable

__all__ = ["publish"]

logger = logging.getLogger("reliable_tasks")


class Queue(Protocol):
    """Queues the task under an id with the given headers, and returns its result."""

    def __call__(
        self, identity: str, headers: Mapping[str, Any], producer: Any = None
    ) -> ReliableResult:
        """Queue it, by a producer of the caller's if there is one."""


def publish(
    task: Task[..., Any],
    once: Once,
    queue: Queue,
    *,
    args: Any,
    kwargs: Any,
    task_id: str | None,
    producer: Any,
    options: Mapping[str, Any],
    waited_for: bool,
) -> ReliableResult:
    """Claim a call's key and queue it, or return the owner's result.

    Raises:
        DuplicateTaskError: The key is taken, and the conflict setting is ``"raise"`` or
            something is ``waited_for`` that would never come: the rest of a chain, a callback.
        LockLost: A retry or a replacement found that another task owns the key by now.
        StoreUnavailable: The lock Redis does not answer and ``reliable_on_store_error`` is
            ``"raise"``; a kombu ``OperationalError`` where the lock Redis is the broker.
    """
    locks = locks_of(task.app)
    given = options.get("headers") or {}
    headers = {k: v for k, v in given.items() if k not in (CLAIM, *OF_ONE_DELIVERY)}
    carried = Claim.from_headers(options.get("headers"), task_id)
    owner = task_id or str(uuid4())
    retries = int(options.get("retries") or 0)
    is_retry = carried is not None and retries > 0
    # A retry keeps its claim whatever became of its arguments on the way; anything else that
    # comes with a claim (a replacement) goes on with it only if it is about the same key.
    name = carried.name if carried and is_retry else once.claim_name(task, args, kwargs)
    continued = carried if carried and carried.name == name else None
    claim = Claim(name, owner, continued.attempt + 1 if continued else retries)
    headers[CLAIM] = claim.as_header()
    token = uuid4().hex
    ttl = once.ttl(locks.config) + delay_of(task.app, options)
    is_own = continued is not None or retries > 0
    if _is_one_script(task, locks, options, producer):
        try:
            # Ours to give back: kombu closes the connection of one that an exception leaves.
            with task.app.producer_or_acquire(producer) as acquired:
                try:
                    with publishing(_wish(task, claim, ttl, continued), owner):
                        return queue(owner, headers, acquired)
                except ClaimTaken as taken:
                    _forget_result(task, owner)
                    answer = taken.published
                    ticket = Ticket(Publish.DUPLICATE, answer.owner, answer.seconds, answer.fence)
        except OperationalError as error:
            # Claim and message are queued together or not at all: nothing is to be taken back.
            raise BrokerUnavailable(locks.claims.client.shown_url, str(error)) from error
        return _refused(task, once, claim, ticket, task_id, is_own=is_own, waited_for=waited_for)
    try:
        ticket = _take(task, locks, claim, token, ttl, continued)
        if ticket.code is Publish.CLAIMED:
            return queue(owner, headers)
    except StoreError as error:
        # Perhaps only the reply was lost, and the claim of a task that is not queued stands.
        _take_back(locks, claim, token)
        if locks.config.on_store_error == "proceed":
            logger.warning("Task %s[%s] is queued without a claim: %s", task.name, owner, error)
            return queue(owner, headers)
        if isinstance(error, StoreUnavailable):
            raise locks.unavailable(error) from error
        raise
    except BaseException:
        _take_back(locks, claim, token)
        raise
    return _refused(task, once, claim, ticket, task_id, is_own=is_own, waited_for=waited_for)


def _refused(
    task: Task[..., Any],
    once: Once,
    claim: Claim,
    ticket: Ticket[Publish],
    task_id: str | None,
    *,
    is_own: bool,
    waited_for: bool,
) -> ReliableResult:
    """Answer a call whose key another task owns."""
    # A retry must not end without a word as somebody's duplicate, whatever its headers say.
    if is_own:
        raise LockLost(claim.name, claim.owner, ticket.owner)
    if waited_for or once.options.on_conflict == "raise":
        raise DuplicateTaskError(claim.name, ticket.owner, ticket.seconds)
    return _existing(task, claim, ticket, task_id)


def _forget_result(task: Task[..., Any], task_id: str) -> None:
    """Let go of the result of a message that was not queued: Celery subscribed to it before."""
    consumer = getattr(task.backend, "result_consumer", None)
    if consumer is None:
        return
    try:
        consumer.cancel_for(task_id)
    except Exception:
        logger.debug("The subscription to %s stays", task_id, exc_info=True)


def _is_one_script(
    task: Task[..., Any], locks: Locks, options: Mapping[str, Any], producer: Any
) -> bool:
    """Say whether the broker makes the claim in the script that queues the message."""
    app: Any = task.app
    if not locks.are_at_broker or not (app.conf.broker_transport_options or {}).get("reliable"):
        return False
    # A connection of the caller's own may lead anywhere; a group hands on the app's.
    if options.get("connection"):
        return False
    return producer is None or _uri(producer.connection) == _uri(app.pool.connection)


def _uri(connection: Any) -> str:
    return str(connection.as_uri(include_password=True))


def _wish(task: Task[..., Any], claim: Claim, ttl: float, continued: Claim | None) -> Publication:
    run = Run.of(task) if continued is not None else None
    return replace(
        publication_of({"id": claim.owner}) or Publication(),
        claim=claim.name,
        keeps=continued is not None,
        owner=claim.owner,
        claim_attempt=claim.attempt,
        ttl=ttl,
        task=task.name,
        holder=run.holder if run else "",
    )


def _take(
    task: Task[..., Any],
    locks: Locks,
    claim: Claim,
    token: str,
    ttl: float,
    continued: Claim | None,
) -> Ticket[Publish]:
    asked: dict[str, Any] = {
        "owner": claim.owner,
        "attempt": claim.attempt,
        "token": token,
        "ttl": ttl,
        "task": task.name,
    }
    if continued is None:
        return locks.claims.acquire(claim.name, **asked)
    run = Run.of(task)
    return locks.claims.continue_(claim.name, holder=run.holder if run else "", **asked)


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


def _take_back(locks: Locks, claim: Claim, token: str) -> None:
    try:
        locks.claims.abandon(claim.name, owner=claim.owner, token=token)
    except StoreError as error:
        logger.warning("A claim on %s may stay until it lapses: %s", claim.name, error)
