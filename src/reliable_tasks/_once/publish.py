"""The publisher's side: claim, then queue, and take the claim back if that failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol
from uuid import uuid4

from celery import Task
from kombu.exceptions import OperationalError

from reliable_tasks._celery.delays import delay_of
from reliable_tasks._once.claim import CLAIM, OF_ONE_DELIVERY, Claim, Follows, Run
from reliable_tasks._once.duplicate import follows, is_refused, needs_value
from reliable_tasks._once.following import keeps_results
from reliable_tasks._once.locks import BrokerUnavailable, Locks
from reliable_tasks._once.once import Once
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Publish, Ticket
from reliable_tasks._store.publication import (
    ClaimTaken,
    How,
    Publication,
    publication_of,
    publishing,
)
from reliable_tasks.errors import LockLost, StoreError, StoreUnavailable
from reliable_tasks.instrumentation.signals import claim_acquired, claim_conflict

__all__ = ["Call", "publish"]

logger = logging.getLogger("reliable_tasks")


class Queue(Protocol):
    """Queues the task under an id with the given headers, and returns its result."""

    def __call__(
        self, identity: str, headers: Mapping[str, Any], producer: Any = None
    ) -> ReliableResult:
        """Queue it, by a producer of the caller's if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a once-task.

    Attributes:
        args: The task's positional arguments.
        kwargs: Its keyword arguments.
        task_id: The id that the caller asks for, if any.
        producer: A producer of the caller's, if any.
        link: What is called with the result.
        options: All else that ``apply_async`` was given.
        is_waited_for: Whether something waits for the end: the rest of a chain, a callback.
    """

    args: Any
    kwargs: Any
    task_id: str | None
    producer: Any
    link: Any
    options: Mapping[str, Any]
    is_waited_for: bool


def publish(task: Task[..., Any], once: Once, queue: Queue, call: Call) -> ReliableResult:
    """Claim a call's key and queue it, or answer as the conflict setting says.

    A duplicate that is waited for is queued all the same, and follows the task that has the key.

    Raises:
        DuplicateTaskError: The key is taken, and the conflict setting is ``"raise"``, or what
            waits needs a value that no backend keeps.
        LockLost: A retry or a replacement found that another task owns the key by now.
        StoreUnavailable: The lock Redis does not answer and ``reliable_on_store_error`` is
            ``"raise"``; a kombu ``OperationalError`` where the lock Redis is the broker.
    """
    locks = once.locks(task)
    options, producer = call.options, call.producer
    given = options.get("headers") or {}
    headers = {k: v for k, v in given.items() if k not in (CLAIM, *OF_ONE_DELIVERY)}
    owner = call.task_id or str(uuid4())
    if not once.options.is_claimed_by_calls:
        return queue(owner, headers, producer)
    carried = Claim.from_headers(given, call.task_id)
    retries = int(options.get("retries") or 0)
    is_retry = carried is not None and retries > 0
    # A retry keeps its claim whatever became of its arguments on the way; anything else that
    # comes with a claim (a replacement) goes on with it only if it is about the same key.
    is_known = carried is not None and is_retry and carried.name
    name = carried.name if carried and is_known else once.claim_name(task, call.args, call.kwargs)
    continued = carried if carried and carried.name == name else None
    claim = Claim(name, owner, continued.attempt + 1 if continued else retries)
    headers[CLAIM] = claim.as_sent()
    is_own = continued is not None or retries > 0
    if is_own and once.options.is_for_a_window:
        # It was called in its window, which may be over.
        return queue(owner, headers, producer)
    wish = replace(
        publication_of({"id": owner}) or Publication(),
        claim=name,
        keeps=continued is not None,
        how="acquire" if retries else _how(once),
        owner=owner,
        claim_attempt=claim.attempt,
        ttl=once.ttl(locks.config) + delay_of(task.app, options),
        task=task.name,
        holder=_holder(task, once, claim, continued, call),
    )
    send = _one_step if _is_one_script(task, locks, options, producer) else _two_steps
    answer = send(task, locks, wish, queue, headers, producer)
    if not isinstance(answer, Ticket):
        return answer
    if not is_own:
        return _as_duplicate(task, once, queue, call, claim, answer, headers, ttl=wish.ttl)
    # A retry must not end without a word as somebody's duplicate, whatever its headers say.
    if not once.options.is_freed_at_start and not once.waits_if_late:
        raise LockLost(claim.name, claim.owner, answer.owner)
    # It gave its key up when it started, or waits for it, and must run all the same.
    if not once.waits_if_late:
        del headers[CLAIM]
    return queue(owner, headers, producer)


def _as_duplicate(
    task: Task[..., Any],
    once: Once,
    queue: Queue,
    call: Call,
    claim: Claim,
    answer: Ticket[Publish],
    headers: dict[str, Any],
    *,
    ttl: float,
) -> ReliableResult:
    """Answer a call whose key is taken, or queue its message to follow the task that has it."""
    locks, options, action = once.locks(task), call.options, once.options.at_publish
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
        _tell_conflict(task, claim, call.task_id, answer, action)
        if action == "raise":
            raise once.refusal(claim.name, answer.owner, answer.seconds)
        return _existing(task, claim, answer, call.task_id)
    try:
        whom = follows(task, once, locks, claim, answer, ttl=ttl, may_follow=may_follow)
        if whom is None:
            headers[CLAIM] = _next_attempt(locks, claim).as_sent()
    except StoreError as error:
        if locks.config.on_store_error == "proceed":
            logger.warning("Task %s[%s] is queued as it is: %s", task.name, claim.owner, error)
            whom = None
        elif isinstance(error, StoreUnavailable):
            raise locks.unavailable(error) from error
        else:
            raise
    if whom is None:
        return queue(claim.owner, headers, call.producer)
    headers[CLAIM] = replace(claim, follows=whom).as_sent()
    _tell_conflict(task, claim, claim.owner, answer, "follow" if may_follow else "raise")
    return _following(task, claim, whom, queue(claim.owner, headers, call.producer))


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


def _how(once: Once) -> How:
    if once.options.is_for_a_window:
        return "window"
    return "replace" if once.options.at_publish == "replace" else "acquire"


def _holder(
    task: Task[..., Any], once: Once, claim: Claim, continued: Claim | None, call: Call
) -> str:
    """Return the token of the run that continues its claim, or hands it on, or ``""``."""
    if continued is not None:
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


def _one_step(
    task: Task[..., Any],
    locks: Locks,
    wish: Publication,
    queue: Queue,
    headers: Mapping[str, Any],
    producer: Any,
) -> ReliableResult | Ticket[Publish]:
    """Have the broker make the claim in the script that queues the message."""
    try:
        # Ours to give back: kombu closes the connection of one that an exception leaves.
        with task.app.producer_or_acquire(producer) as acquired:
            try:
                with publishing(wish, wish.owner) as answers:
                    result = queue(wish.owner, headers, acquired)
            except ClaimTaken as taken:
                _forget_result(task, wish.owner)
                found = taken.published
                return Ticket(Publish.DUPLICATE, found.owner, found.seconds, found.fence)
    except OperationalError as error:
        # Claim and message are queued together or not at all: nothing is to be taken back.
        raise BrokerUnavailable(locks.claims.client.shown_url, str(error)) from error
    before = next((answer.owner for answer in answers if answer.owner), None)
    return _queued(task, wish, result, before)


def _two_steps(
    task: Task[..., Any],
    locks: Locks,
    wish: Publication,
    queue: Queue,
    headers: Mapping[str, Any],
    producer: Any,
) -> ReliableResult | Ticket[Publish]:
    """Claim, then queue the message; take the claim back if that failed."""
    token = uuid4().hex
    try:
        ticket = _take(locks, wish, token)
        if ticket.code is Publish.DUPLICATE:
            return ticket
        result = queue(wish.owner, headers, producer)
    except StoreError as error:
        # Perhaps only the reply was lost, and the claim of a task that is not queued stands.
        _take_back(locks, wish, token)
        if locks.config.on_store_error == "proceed":
            logger.warning(
                "Task %s[%s] is queued without a claim: %s", task.name, wish.owner, error
            )
            return queue(wish.owner, headers, producer)
        if isinstance(error, StoreUnavailable):
            raise locks.unavailable(error) from error
        raise
    except BaseException:
        _take_back(locks, wish, token)
        raise
    if ticket.code is not Publish.TAKEN_OVER:
        return _queued(task, wish, result, None)
    try:
        locks.claims.confirm(wish.claim, owner=wish.owner, attempt=wish.claim_attempt)
    except StoreError as error:
        logger.warning(
            "Task %s[%s] is queued in the place of %s, which may run all the same: %s",
            task.name,
            wish.owner,
            ticket.owner,
            error,
        )
    return _queued(task, wish, result, ticket.owner)


def _take(locks: Locks, wish: Publication, token: str) -> Ticket[Publish]:
    asked: dict[str, Any] = {
        "owner": wish.owner,
        "attempt": wish.claim_attempt,
        "token": token,
        "ttl": wish.ttl,
        "task": wish.task,
        "holder": wish.holder,
    }
    if wish.keeps:
        return locks.claims.continue_(wish.claim, **asked)
    return locks.claims.acquire(wish.claim, how=wish.how, **asked)


def _take_back(locks: Locks, wish: Publication, token: str) -> None:
    try:
        locks.claims.abandon(wish.claim, owner=wish.owner, token=token)
    except StoreError as error:
        logger.warning("A claim on %s may stay until it lapses: %s", wish.claim, error)


def _queued(
    task: Task[..., Any], wish: Publication, result: ReliableResult, before: str | None
) -> ReliableResult:
    """Tell of a message that is queued, in the place of another one's perhaps."""
    result.replaced_id = before
    if before is not None:
        logger.info(
            "Task %s[%s] takes the place of %s (%s)", task.name, wish.owner, before, wish.claim
        )
    if not wish.keeps:
        claim_acquired.send(sender=task, key=wish.claim, task_id=wish.owner, replaced_id=before)
    return result


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
    if not locks.are_made_by_broker or not (app.conf.broker_transport_options or {}).get(
        "reliable"
    ):
        return False
    # A connection of the caller's own may lead anywhere; a group hands on the app's.
    if options.get("connection"):
        return False
    return producer is None or _uri(producer.connection) == _uri(app.pool.connection)


def _uri(connection: Any) -> str:
    return str(connection.as_uri(include_password=True))


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
