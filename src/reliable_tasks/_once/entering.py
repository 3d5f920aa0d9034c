"""The start of a once-task: a copy is let in, follows another task, is set aside, or ends unrun."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import uuid4

from celery import Task
from celery.exceptions import Ignore

from reliable_tasks._celery.headers import TIMES_SET_ASIDE
from reliable_tasks._celery.revoking import end_as_revoked
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import HOLDER, Claim, Run
from reliable_tasks._once.following import Outcome, begin_to_follow, outcome_of
from reliable_tasks._once.lineage import comes_after
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import (
    adopt,
    claim_of,
    delivery_of,
    is_by_name,
    lease_of,
    may_have_started,
    redelivery_of,
)
from reliable_tasks._store.claims import Entry, Publish, Ticket
from reliable_tasks.errors import StoreError
from reliable_tasks.instrumentation.signals import (
    claim_acquired,
    claim_conflict,
    claim_released,
)

__all__ = ["enter"]

logger = logging.getLogger("reliable_tasks")

#: Pauses of a copy that may not start yet, the first and the longest (s): while another copy of
#: its attempt runs, ...
_WHILE_RUNNING = (1.0, 5.0)
#: ... while another task runs with its key, ...
_WHILE_OTHER_RUNS = (0.2, 5.0)
#: ... while the attempt before it, which published it, is about to end, ...
_WHILE_ENDING = (0.1, 5.0)
#: ... while the lock Redis does not answer.
_WHILE_UNAVAILABLE = (1.0, 5.0)


def enter(task: Task[..., Any], once: Once) -> Outcome | None:
    """Take the claim for this run.

    Returns:
        The outcome of the task that this one followed, if it is to end as that and not run.

    Raises:
        Ignore: A later attempt exists, the call was replaced, or it is dropped for another task
            that runs; this copy is acknowledged unrun.
        SetAside: Another copy or another task runs, or the lock Redis does not answer; this copy
            tries again.
        DuplicateTaskError: Another task owns the key, and the conflict setting is ``"raise"``.
        FollowTimeout: It follows another task, which has not ended in time.
    """
    locks = once.locks(task)
    copy = _Copy(task, once, locks, claim_of(task, once, vars(task.request)))
    try:
        outcome = outcome_of(task, once, locks, copy.claim)
        if outcome is not None:
            return outcome
        run = copy.let_in()
    except _EndsAs as ends:
        return ends.outcome
    except StoreError as error:
        _unavailable(task, locks, error)
        return None
    run.begin(task)
    return None


class _EndsAs(Exception):
    """A copy that would like to start is to end as another task has."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy of a task that would like to start."""

    task: Task[..., Any]
    once: Once
    locks: Locks
    claim: Claim

    @property
    def holder(self) -> str:
        """The token of this copy."""
        request = self.task.request
        if not request.get(HOLDER):
            request.update({HOLDER: uuid4().hex})
        return str(request.get(HOLDER))

    def let_in(self) -> Run:
        """Take what the copy needs to run.

        Raises:
            StoreError: The lock Redis does not answer, or refuses.
        """
        options = self.once.options
        if is_by_name(self.claim, vars(self.task.request)):
            adopt(self.task, self.once, self.locks, self.claim)
        if options.is_for_a_window:
            self._see_the_window()
        if options.takes_turns:
            held = self.claim.turn
            fence = self._enter(held, self._wait_its_turn)
            claim_acquired.send(
                sender=self.task, key=held.name, task_id=held.owner, replaced_id=None
            )
            if options.is_freed_at_start:
                try:
                    self._start()
                except BaseException:
                    self._release(held)
                    raise
            return self._run(held, fence)
        if options.is_freed_at_start:
            return self._run(None, self._start())
        fence = self._enter(self.claim, self._end_late)
        return self._run(self.claim.as_owner, fence)

    def _run(self, held: Claim | None, fence: int) -> Run:
        return Run(self.once, self.claim.as_owner, held, self.holder, fence)

    def _see_the_window(self) -> None:
        """Have a task take the key that its call did not: by name, or while another one had it."""
        claim = self.claim
        by_name = is_by_name(claim, vars(self.task.request))
        if claim.follows is None and (not by_name or may_have_started(self.task)):
            if not by_name:
                # Another call may have the place of this one, whose publish had failed.
                self._keep()
            return
        ticket = self.locks.claims.acquire(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            # The same for each copy.
            token=claim.owner,
            ttl=self.once.ttl(self.locks.config),
            task=self.task.name,
            how="window",
        )
        # One that followed the owner of the window, and has no end of it to share, runs in it: as
        # a part of what that has become, perhaps.
        known = (claim.owner, claim.follows.owner if claim.follows else None)
        if ticket.code is Publish.DUPLICATE and ticket.owner not in known:
            self._end_late(Ticket(Entry.DUPLICATE, ticket.owner, ticket.seconds, ticket.fence))

    def _release(self, claim: Claim) -> None:
        """Free what this copy has taken, or its call: it does not run."""
        with suppress(StoreError):
            self.locks.claims.release(
                claim.name,
                owner=claim.owner,
                attempt=claim.attempt,
                holder=self.holder,
                may_be_unentered=True,
            )

    def _enter(self, claim: Claim, meet: Callable[[Ticket[Entry]], None]) -> int:
        lease = lease_of(self.task, self.locks)
        ticket = self.locks.claims.enter(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            holder=self.holder,
            lease=lease,
            ttl=redelivery_of(self.task, lease),
            task=self.task.name,
            delivery=delivery_of(self.task, self.locks),
            takes=claim is not self.claim,
        )
        if ticket.code is Entry.DUPLICATE:
            meet(ticket)
        elif ticket.code in (Entry.RUNNING, Entry.PREDECESSOR_RUNNING):
            pauses = _WHILE_RUNNING if ticket.code is Entry.RUNNING else _WHILE_ENDING
            raise _until_free("another copy of it runs", pauses, ticket)
        else:
            self._check(ticket)
        return ticket.fence

    def _start(self) -> int:
        """Free the key of the call: the next one can be queued."""
        claim = self.claim
        ticket = self.locks.claims.start(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            remember=redelivery_of(self.task, lease_of(self.task, self.locks)),
        )
        if ticket.code is Entry.DUPLICATE:
            # One that was started before gave its key up then.
            if not may_have_started(self.task):
                self._end_late(ticket)
        elif ticket.code is Entry.PREDECESSOR_RUNNING:
            raise _until_free("another call is taking its place", _WHILE_ENDING, ticket)
        else:
            self._check(ticket)
            claim_released.send(sender=self.task, key=claim.name, task_id=claim.owner)
        return ticket.fence

    def _check(self, ticket: Ticket[Entry]) -> None:
        if ticket.code is Entry.CONTINUED:
            logger.warning(
                "Task %s[%s] is not run again: attempt %d was continued already",
                self.task.name,
                self.claim.owner,
                self.claim.attempt,
            )
            raise Ignore
        if ticket.code is Entry.REPLACED:
            self._revoke(f"task {ticket.owner} has taken its place")

    def _end_late(self, ticket: Ticket[Entry]) -> None:
        """End a copy that starts when another task has the key that its call had taken."""
        if self.once.waits_if_late:
            reason = f"task {ticket.owner} has its key"
            raise _until_free(reason, _WHILE_OTHER_RUNS, ticket, waits_for=ticket.owner)
        if self.claim.follows is not None or self.once.options.at_publish == "existing":
            self._tell_conflict(self.claim, ticket, "follow")
            outcome = begin_to_follow(self.task, self.once, self.locks, self.claim)
            if outcome is not None:
                raise _EndsAs(outcome)
            raise _until_free("its key was free a moment later", _WHILE_OTHER_RUNS, ticket)
        self._tell_conflict(self.claim, ticket, "late")
        if self.once.options.at_publish == "replace":
            self._revoke(f"task {ticket.owner} has taken its place")
        raise self.once.refusal(self.claim.name, ticket.owner, ticket.seconds)

    def _tell_conflict(self, claim: Claim, ticket: Ticket[Entry], action: str) -> None:
        claim_conflict.send(
            sender=self.task,
            key=claim.name,
            task_id=claim.owner,
            owner=ticket.owner,
            action=action,
        )

    def _wait_its_turn(self, ticket: Ticket[Entry]) -> None:
        """Answer a copy that starts while another task runs with its key."""
        action = self.once.options.at_start
        if comes_after(self.task, ticket.owner):
            # That one is about to end.
            action = "reschedule"
        if action != "reschedule" or not self.task.request.get(TIMES_SET_ASIDE):
            self._tell_conflict(self.claim.turn, ticket, action)
        if action == "reschedule":
            if self.once.options.is_freed_at_start:
                # It waits for longer than it might in the queue.
                self._keep(self.once.ttl(self.locks.config))
            reason = f"task {ticket.owner} runs with its key"
            raise _until_free(reason, _WHILE_OTHER_RUNS, ticket, waits_for=ticket.owner)
        # Its call is over.
        if self.once.options.is_claimed_by_calls:
            self._release(self.claim)
        if action == "drop":
            self._revoke(f"task {ticket.owner} runs with its key")
        raise self.once.refusal(self.claim.name, ticket.owner, ticket.seconds)

    def _keep(self, ttl: float = 0) -> None:
        """Keep the key of a call for a while (s), or end where another call has its place."""
        claim = self.claim
        ticket = self.locks.claims.keep(claim.name, owner=claim.owner, ttl=ttl)
        if ticket.code is Entry.PREDECESSOR_RUNNING:
            raise _until_free("another call is taking its place", _WHILE_ENDING, ticket)
        self._check(ticket)

    def _revoke(self, reason: str) -> NoReturn:
        logger.warning("Task %s[%s] is not run: %s", self.task.name, self.claim.owner, reason)
        try:
            end_as_revoked(self.task, reason)
        except Exception as error:
            raise SetAside(f"its end cannot be stored: {error}", *_WHILE_UNAVAILABLE) from error
        raise Ignore


def _until_free(
    reason: str, pauses: tuple[float, float], ticket: Ticket[Entry], waits_for: str = ""
) -> SetAside:
    first, longest = pauses
    return SetAside(reason, first, min(longest, ticket.seconds + 0.01), waits_for)


def _unavailable(task: Task[..., Any], locks: Locks, error: StoreError) -> None:
    if locks.config.on_store_error == "raise":
        raise SetAside(str(error), *_WHILE_UNAVAILABLE) from None
    logger.error("Task %s[%s] runs without a claim: %s", task.name, task.request.id, error)
