"""Claims and messages: queued in one step, or one after the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

from celery import Task
from kombu.exceptions import OperationalError

from reliable_tasks._celery.producing import producer_for
from reliable_tasks._once.call import Asked
from reliable_tasks._once.locks import BrokerUnavailable, Locks
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Publish, Ticket
from reliable_tasks._store.publication import ClaimTaken, Publication, Published, publishing
from reliable_tasks.errors import StoreError, StoreUnavailable
from reliable_tasks.instrumentation.signals import claim_acquired

__all__ = [
    "accepted",
    "check_proceeds",
    "confirm",
    "forget_result",
    "is_one_step",
    "queue_with_claim",
    "replaced",
    "take_back",
    "taken",
    "unavailable",
]

logger = logging.getLogger("reliable_tasks")


def queue_with_claim(asked: Asked) -> ReliableResult | Ticket[Publish]:
    """Take a call's claim and queue its message, or return who has the key.

    Raises:
        StoreUnavailable: The lock Redis does not answer and ``reliable_on_store_error`` is
            ``"raise"``; a kombu ``OperationalError`` where the lock Redis is the broker.
    """
    return _one_step(asked) if is_one_step(asked) else _two_steps(asked)


def is_one_step(asked: Asked) -> bool:
    """Say whether the broker makes the claim in the script that queues the message."""
    if not asked.locks.are_made_by_broker:
        return False
    app: Any = asked.task.app
    own = app.pool.connection
    # A connection of the caller's own may lead anywhere; a group hands on the app's.
    producer, options = asked.call.producer, asked.call.options
    if not own.transport_options.get("reliable") or options.get("connection"):
        return False
    return producer is None or _uri(producer.connection) == _uri(own)


def _uri(connection: Any) -> str:
    return str(connection.as_uri(include_password=True))


def _one_step(asked: Asked) -> ReliableResult | Ticket[Publish]:
    """Have the broker make the claim in the script that queues the message."""
    task, wish = asked.task, asked.wish
    # What cannot be looked at is found when the message is queued, or its error is.
    with suppress(StoreError):
        known = asked.locks.claims.look(wish)
        if known is not None:
            return known
    try:
        with producer_for(task.app, asked.call.producer) as producer:
            try:
                with publishing(wish, wish.owner) as answers:
                    result = asked.queued(producer)
            except ClaimTaken as refused:
                # Not through the producer, whose connection is as good as before.
                forget_result(task, wish.owner)
                asked.locks.claims.expect_duplicates(wish)
                return taken(refused.published)
    except OperationalError as error:
        # Claim and message are queued together or not at all: nothing is to be taken back.
        raise unavailable(asked.locks, error) from error
    return accepted(asked, result, replaced(answers))


def taken(published: Published) -> Ticket[Publish]:
    """Return what the broker's script said of a key that is taken."""
    return Ticket(Publish.DUPLICATE, published.owner, published.seconds, published.fence)


def replaced(answers: list[Published]) -> str | None:
    """Return whose place a message has, by what was said of each queue that it went to."""
    return next((answer.owner for answer in answers if answer.owner), None)


def unavailable(locks: Locks, error: OperationalError) -> BrokerUnavailable:
    """Return the error of callers whose lock Redis is the broker."""
    return BrokerUnavailable(locks.claims.client.shown_url, str(error))


def _two_steps(asked: Asked) -> ReliableResult | Ticket[Publish]:
    """Claim, then queue the message; take the claim back if that failed."""
    locks, wish, token = asked.locks, asked.wish, uuid4().hex
    in_doubt = False
    try:
        ticket = locks.claims.take(wish, token)
        if ticket.code is Publish.DUPLICATE:
            return ticket
        with producer_for(asked.task.app, asked.call.producer) as producer:
            # For a connection of the caller's own Celery makes a producer that nobody sees.
            producer.has_begun = bool(asked.call.options.get("connection"))
            try:
                result = asked.queued(producer)
            except BaseException as error:
                in_doubt = producer.may_have_queued(error)
                raise
    except StoreError as error:
        # Perhaps only the reply was lost, and the claim of a task that is not queued stands.
        take_back(locks, [(wish, token)], in_doubt=False)
        check_proceeds(asked, error)
        return asked.queued()
    except BaseException:
        take_back(locks, [(wish, token)], in_doubt=in_doubt)
        raise
    if ticket.code is not Publish.TAKEN_OVER:
        return accepted(asked, result, None)
    confirm(locks, [wish])
    return accepted(asked, result, ticket.owner)


def check_proceeds(asked: Asked, error: StoreError) -> None:
    """Make sure that a message is to be queued though the lock Redis does not answer.

    Raises:
        StoreError: It is not.
    """
    if asked.locks.config.on_store_error == "proceed":
        logger.warning(
            "Task %s[%s] is queued without a claim: %s", asked.task.name, asked.claim.owner, error
        )
    elif isinstance(error, StoreUnavailable):
        raise asked.locks.unavailable(error) from error
    else:
        raise error


def confirm(locks: Locks, wishes: Sequence[Publication]) -> None:
    """Note that the messages are queued of calls that took claims over."""
    try:
        locks.claims.confirm_each(wishes)
    except StoreError as error:
        for wish in wishes:
            logger.warning(
                "Task %s[%s] is queued, but the one whose place it has may run all the same: %s",
                wish.task,
                wish.owner,
                error,
            )


def take_back(locks: Locks, wishes: Sequence[tuple[Publication, str]], *, in_doubt: bool) -> None:
    """Take back claims whose messages are not queued, or whose messages may be."""
    try:
        locks.claims.abandon_each(wishes, in_doubt=in_doubt)
    except StoreError as error:
        for wish, _ in wishes:
            logger.warning("A claim on %s may stay until it lapses: %s", wish.claim, error)


def accepted(asked: Asked, result: ReliableResult, before: str | None) -> ReliableResult:
    """Tell of a message that is queued, in the place of another one's perhaps."""
    wish = asked.wish
    result.replaced_id = before
    if before is not None:
        logger.info(
            "Task %s[%s] takes the place of %s (%s)", wish.task, wish.owner, before, wish.claim
        )
    if wish.how != "continue":
        claim_acquired.send(
            sender=asked.task, key=wish.claim, task_id=wish.owner, replaced_id=before
        )
    return result


def forget_result(task: Task[..., Any], task_id: str) -> None:
    """Let go of the result of a message that was not queued: Celery subscribed to it before."""
    consumer = getattr(task.backend, "result_consumer", None)
    if consumer is None:
        return
    try:
        consumer.cancel_for(task_id)
    except Exception:
        logger.debug("The subscription to %s stays", task_id, exc_info=True)
