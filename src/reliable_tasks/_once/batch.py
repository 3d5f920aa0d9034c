"""Many calls at once: their claims and their messages, in a handful of round trips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from celery import Task
from kombu.exceptions import OperationalError

from reliable_tasks._celery.producing import Producer, producer_for
from reliable_tasks._once.call import Asked, Call, ask
from reliable_tasks._once.once import Once
from reliable_tasks._once.publish import refused
from reliable_tasks._once.queueing import (
    accepted,
    check_proceeds,
    confirm,
    forget_result,
    is_one_step,
    replaced,
    take_back,
    taken,
    unavailable,
)
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._store.claims import Publish, Ticket
from reliable_tasks._store.publication import Published, PutOff, Queued, publishing
from reliable_tasks.errors import StoreError

__all__ = ["publish_many", "queue_many"]

#: So many messages are under way at once, and about so many bytes of them.
_AT_ONCE, _BYTES_AT_ONCE = 250, 1_000_000


@dataclass(slots=True)
class _Sent:
    """One call of a batch, and how far it has come.

    Attributes:
        asked: What it asks for.
        ticket: What was said of its claim, if anything was.
        result: That of its message, when it is made.
        published: What was said of its message.
    """

    asked: Asked
    ticket: Ticket[Publish] | None = None
    result: ReliableResult | None = None
    published: list[Published] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether its key is taken."""
        return self.ticket is not None and self.ticket.code is Publish.DUPLICATE

    def answer(self) -> ReliableResult:
        """Return what the caller gets."""
        if self.ticket is not None and self.is_refused:
            return refused(self.asked, self.ticket, may_raise=False)
        assert self.result is not None
        if not self.asked.wish.claim or (self.ticket is None and not self.published):
            return self.result
        before = replaced(self.published)
        if self.ticket is not None and self.ticket.code is Publish.TAKEN_OVER:
            before = self.ticket.owner
        return accepted(self.asked, self.result, before)


def queue_many(task: Task[..., Any], calls: Sequence[Call]) -> list[ReliableResult]:
    """Queue some calls of a task that has no ``@once``."""
    with producer_for(task.app) as producer:
        with producer.batch() as messages:
            results = [call.queue(call.task_id, None, producer) for call in calls]
        for _ in _send(task, messages, producer):
            pass
    return results


def publish_many(task: Task[..., Any], once: Once, calls: Sequence[Call]) -> list[ReliableResult]:
    """Claim the keys of some calls of one task and queue them, and answer each.

    None raises for its key is taken: its result says that it is a duplicate.

    Raises:
        StoreUnavailable: As one call does; some of them may be queued by then.
    """
    sent = [_Sent(ask(task, once, call)) for call in calls]
    if not sent:
        return []
    if is_one_step(sent[0].asked):
        _in_one_step(sent)
    else:
        _in_two_steps(sent)
    return [one.answer() for one in sent]


def _in_one_step(sent: list[_Sent]) -> None:
    """Have the broker make the claims in the script that queues the messages."""
    try:
        with _producer_for(sent) as producer:
            with producer.batch() as messages:
                for one in sent:
                    with publishing(one.asked.wish, one.asked.claim.owner):
                        one.result = one.asked.queued(producer)
            _send_all(sent, messages, producer)
    except OperationalError as error:
        raise unavailable(sent[0].asked.locks, error) from error
    for one in sent:
        refusal = next((said for said in one.published if said.code is Queued.CLAIM_TAKEN), None)
        if refusal is not None:
            forget_result(one.asked.task, one.asked.claim.owner)
            one.ticket = taken(refusal)


def _in_two_steps(sent: list[_Sent]) -> None:
    """Make all claims, and then queue the messages of those that were made."""
    locks = sent[0].asked.locks
    claiming = [one for one in sent if one.asked.wish.claim]
    # Each has a task of its own, whose id is known to nobody else.
    wishes = [(one.asked.wish, one.asked.claim.owner) for one in claiming]
    try:
        tickets = locks.claims.take_each(wishes)
    except StoreError as error:
        take_back(locks, wishes, in_doubt=False)
        for one in claiming:
            check_proceeds(one.asked, error)
    else:
        for one, ticket in zip(claiming, tickets, strict=True):
            one.ticket = ticket
    messages: list[PutOff] = []
    in_doubt = False
    try:
        with _producer_for(sent) as producer:
            try:
                with producer.batch() as messages:
                    for one in sent:
                        if not one.is_refused:
                            one.result = one.asked.queued(producer)
                _send_all(sent, messages, producer)
            except BaseException as error:
                in_doubt = producer.may_have_queued(error)
                raise
    except BaseException:
        put_off = {message.task_id for message in messages}
        lost = [
            (one.asked.wish, one.asked.claim.owner)
            for one in claiming
            if one.ticket is not None
            and not one.is_refused
            and not one.published
            and (one.result is None or one.asked.claim.owner in put_off)
        ]
        take_back(locks, lost, in_doubt=in_doubt)
        raise
    over = [
        one.asked.wish
        for one in claiming
        if one.ticket is not None and one.ticket.code is Publish.TAKEN_OVER
    ]
    if over:
        confirm(locks, over)


def _producer_for(sent: list[_Sent]) -> AbstractContextManager[Producer]:
    asked = sent[0].asked
    return producer_for(asked.task.app, asked.call.producer)


def _send_all(sent: list[_Sent], messages: list[PutOff], producer: Producer) -> None:
    by_id = {one.asked.claim.owner: one for one in sent}
    for message, said in _send(sent[0].asked.task, messages, producer):
        by_id[message.task_id].published.append(said)


def _send(
    task: Task[..., Any], messages: list[PutOff], producer: Producer
) -> Iterator[tuple[PutOff, Published]]:
    for some in _portions(messages):
        yield from zip(some, producer.publish_put_off(some, task.app.conf), strict=True)


def _portions(messages: list[PutOff]) -> Iterator[list[PutOff]]:
    portion: list[PutOff] = []
    size = 0
    for message in messages:
        portion.append(message)
        size += message.size
        if len(portion) == _AT_ONCE or size >= _BYTES_AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
