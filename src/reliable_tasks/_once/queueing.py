"""Claims and messages: queued in one step, or one after the other."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from celery import Task
from kombu.exceptions import OperationalError

from reliable_tasks._celery.producing import Producer, producer_for
from reliable_tasks._once.call import Asked
from reliable_tasks._once.locks import BrokerUnavailable, Locks
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Publish, Ticket
from reliable_tasks._store.publication import (
    ClaimTaken,
    Publication,
    Published,
    PutOff,
    Queued,
    batching,
    publication_of,
    publishing,
    publishing_each,
)
from reliable_tasks._store.scripts import AT_ONCE
from reliable_tasks.errors import StoreError, StoreUnavailable
from reliable_tasks.instrumentation.signals import claim_acquired

__all__ = [
    "Way",
    "in_one_step",
    "in_two_steps",
    "is_one_step",
    "many_in_one_step",
    "portions",
    "putting_off",
    "send",
]

logger = logging.getLogger("reliable_tasks")

#: About so many bytes of messages are under way at once.
_BYTES_AT_ONCE = 1_000_000


@dataclass(slots=True)
class Way:
    """A call on its way, and how far it has come.

    Attributes:
        asked: What it asks for.
        token: Of its claim, where that is a step of its own.
        ticket: What was said of its claim, if anything was.
        result: That of its message, when it is made.
        is_queued: Whether its message is known to be queued.
        is_in_doubt: Whether it may be, although its publish failed.
    """

    asked: Asked
    token: str = ""
    ticket: Ticket[Publish] | None = None
    result: ReliableResult | None = None
    is_queued: bool = False
    is_in_doubt: bool = False

    @property
    def is_duplicate(self) -> bool:
        """Whether its key is taken."""
        return self.ticket is not None and self.ticket.code is Publish.DUPLICATE

    @property
    def takes_a_place(self) -> bool:
        """Whether another task had its claim."""
        return self.ticket is not None and self.ticket.code is Publish.TAKEN_OVER

    def heard(self, published: Published) -> None:
        """Note what was said of its message, and of the claim that was made with it."""
        wish = self.asked.wish
        if published.code is Queued.CLAIM_TAKEN:
            self.ticket = Ticket(
                Publish.DUPLICATE, published.owner, published.seconds, published.fence
            )
            _forget_result(self.asked.task, wish.owner)
            self.asked.locks.claims.expect_duplicates(wish)
            return
        self.is_queued = True
        # One message can go to several queues. What has a token had its answer before.
        if wish.claim and not self.token and not self.takes_a_place:
            code = Publish.TAKEN_OVER if published.owner else Publish.CLAIMED
            self.ticket = Ticket(code, published.owner, wish.ttl, 0)

    def outcome(self) -> ReliableResult | Ticket[Publish]:
        """Return who has the key, or the result of a call that is queued, and tell of that."""
        wish, ticket, result = self.asked.wish, self.ticket, self.result
        if ticket is not None and self.is_duplicate:
            return ticket
        assert result is not None
        if ticket is None:
            return result
        if self.takes_a_place:
            result.replaced_id = ticket.owner
            logger.info(
                "Task %s[%s] takes the place of %s (%s)",
                *(wish.task, wish.owner, ticket.owner, wish.claim),
            )
        if wish.how != "continue":
            claim_acquired.send(
                sender=self.asked.task,
                key=wish.claim,
                task_id=wish.owner,
                replaced_id=result.replaced_id,
            )
        return result


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


def in_one_step(way: Way) -> None:
    """Have the broker make the claim in the script that queues the message."""
    asked = way.asked
    # What cannot be looked at is found when the message is queued, or its error is.
    with suppress(StoreError):
        way.ticket = asked.locks.claims.look(asked.wish)
    if way.is_duplicate:
        return
    try:
        with _producer_for(asked) as producer:
            try:
                with publishing(asked.wish, asked.claim.owner) as answers:
                    way.result = asked.queued(producer)
            except ClaimTaken as refused:
                # Not through the producer, whose connection is as good as before.
                answers = [refused.published]
    except OperationalError as error:
        raise _unavailable(asked.locks, error) from error
    for answer in answers:
        way.heard(answer)


def many_in_one_step(ways: Sequence[Way]) -> None:
    """Have the broker make the claims in the scripts that queue the messages."""
    asked = ways[0].asked
    try:
        with _producer_for(asked) as producer:
            _queue(ways, producer, with_claims=True)
    except OperationalError as error:
        raise _unavailable(asked.locks, error) from error


def _unavailable(locks: Locks, error: OperationalError) -> BrokerUnavailable:
    # Claim and message are queued together or not at all: nothing is to be taken back.
    return BrokerUnavailable(locks.claims.client.shown_url, str(error))


def in_two_steps(ways: Sequence[Way]) -> None:
    """Claim, then queue the messages of those that may; take claims back where that failed.

    Raises:
        StoreUnavailable: The lock Redis does not answer and ``reliable_on_store_error`` is
            ``"raise"``; a kombu ``OperationalError`` where the lock Redis is the broker.
    """
    locks = ways[0].asked.locks
    claiming = [way for way in ways if way.asked.wish.claim]
    try:
        _claim(locks, claiming)
        if all(way.is_duplicate for way in ways):
            return
        with _producer_for(ways[0].asked) as producer:
            _queue([way for way in ways if not way.is_duplicate], producer, with_claims=False)
    except BaseException:
        _take_back(locks, [way for way in claiming if not (way.is_duplicate or way.is_queued)])
        raise
    finally:
        _confirm(locks, [way for way in claiming if way.is_queued and way.takes_a_place])


def _claim(locks: Locks, ways: Sequence[Way]) -> None:
    for way in ways:
        owner = way.asked.claim.owner
        # Of a call that has its own id by its caller there may be another one.
        way.token = owner if way.asked.call.task_id is None else uuid4().hex
        wished = publication_of({"id": owner})
        if wished is not None and wished.token:
            # Whoever makes the same call again, for the first caller may be dead, has its claim.
            way.token = f"{wished.token} {way.token}"
    try:
        tickets = locks.claims.take_each([(way.asked.wish, way.token) for way in ways])
    except StoreError as error:
        if locks.config.on_store_error == "raise":
            if isinstance(error, StoreUnavailable):
                raise locks.unavailable(error) from error
            raise
        # Perhaps only the reply was lost, and the claim of a task that is queued without stands.
        _take_back(locks, ways)
        logger.warning("%s: queued without a claim: %s", _named(ways), error)
        return
    for way, ticket in zip(ways, tickets, strict=True):
        way.ticket = ticket


def _take_back(locks: Locks, ways: Sequence[Way]) -> None:
    if not ways:
        return
    try:
        locks.claims.abandon_each((way.asked.wish, way.token, way.is_in_doubt) for way in ways)
    except StoreError as error:
        logger.warning("%s: the claim may stay until it lapses: %s", _named(ways), error)


def _confirm(locks: Locks, ways: Sequence[Way]) -> None:
    if not ways:
        return
    try:
        locks.claims.confirm_each([way.asked.wish for way in ways])
    except StoreError as error:
        logger.warning(
            "%s: queued in the place of another one, which may run all the same: %s",
            *(_named(ways), error),
        )


def _named(ways: Sequence[Way]) -> str:
    """Say of which tasks something is to be said, in one line however many they are."""
    wish = ways[0].asked.wish
    first = f"Task {wish.task}[{wish.owner}] ({wish.claim})"
    return f"{first} and {len(ways) - 1} more" if len(ways) > 1 else first


def _queue(ways: Sequence[Way], producer: Producer, *, with_claims: bool) -> None:
    """Queue the messages, together where there are many and the transport can."""
    by_id = {way.asked.claim.owner: way for way in ways}
    wishes: dict[str | None, Publication] = {way.asked.claim.owner: way.asked.wish for way in ways}
    # What is wished for by others, as for a retry, stands otherwise.
    wishing = publishing_each(wishes) if with_claims else nullcontext()
    under_way: Sequence[Way] = ()
    try:
        with putting_off(producer, by_id) as messages, wishing:
            for way in ways:
                under_way = [way]
                producer.forget()
                way.result = way.asked.queued(producer)
                is_put_off = messages and messages[-1].task_id == way.asked.claim.owner
                way.is_queued = not is_put_off
        asked = ways[0].asked
        for some in portions(messages):
            under_way = [by_id[message.task_id] for message in some]
            said = send(asked.task, some, producer, asked.call.options)
            for way, answer in zip(under_way, said, strict=True):
                way.heard(answer)
    except BaseException as error:
        if producer.may_have_queued(error):
            for way in under_way:
                way.is_in_doubt = True
        raise


@contextmanager
def putting_off(producer: Producer, ids: Collection[str]) -> Iterator[list[PutOff]]:
    """Put the messages of some tasks off that are published meanwhile, where that is possible.

    One alone is published as it is.

    Yields:
        Those that were.
    """
    if len(ids) < 2:
        yield []
        return
    with producer.putting_off() as is_possible, batching(ids if is_possible else ()) as messages:
        yield messages


def send(
    task: Task[..., Any],
    messages: list[PutOff],
    producer: Producer,
    options: Mapping[str, Any],
) -> list[Published]:
    """Queue messages that were put off, and say what became of each."""
    conf: Any = task.app.conf
    is_retried = options.get("retry", conf.task_publish_retry)
    policy = {**conf.task_publish_retry_policy, **(options.get("retry_policy") or {})}
    return producer.publish_put_off(messages, policy if is_retried else None)


def portions(messages: Sequence[PutOff]) -> Iterator[list[PutOff]]:
    """Divide messages into as many as are queued at once."""
    portion: list[PutOff] = []
    size = 0
    for message in messages:
        portion.append(message)
        size += message.size
        if len(portion) == AT_ONCE or size >= _BYTES_AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _producer_for(asked: Asked) -> AbstractContextManager[Producer]:
    call = asked.call
    return producer_for(asked.task.app, call.producer, call.options.get("connection"))


def _forget_result(task: Task[..., Any], task_id: str) -> None:
    """Let go of the result of a message that was not queued: Celery subscribed to it before."""
    consumer = getattr(task.backend, "result_consumer", None)
    if consumer is None:
        return
    try:
        consumer.cancel_for(task_id)
    except Exception:
        logger.debug("The subscription to %s stays", task_id, exc_info=True)
