"""The worker's side: let a copy in or set it aside, and release its claim when it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import uuid4

from celery import Task, states
from celery.exceptions import Ignore
from celery.signals import task_postrun

from reliable_tasks._celery.headers import DELIVERY, TIMES_SET_ASIDE
from reliable_tasks._celery.registry import hard_limit
from reliable_tasks._celery.revoking import end_as_revoked
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import HOLDER, Claim, Run
from reliable_tasks._once.locks import Locks, locks_of
from reliable_tasks._once.once import Once
from reliable_tasks._store.claims import Entry, Publish, Release, Ticket
from reliable_tasks._store.delivery import is_beside
from reliable_tasks.config import UNLIMITED
from reliable_tasks.errors import DuplicateTaskError, StoreError
from reliable_tasks.instrumentation.signals import (
    claim_acquired,
    claim_conflict,
    claim_lost,
    claim_released,
)

__all__ = ["end_unrun", "enter", "mark_copy"]

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
#: The lease outlives the hard limit by what the kill may take (s).
_KILL_GRACE = 5.0
#: After the lock Redis did not answer, a worker's main process lets claims lapse for so long (s):
#: it cannot wait for each of them, for it has heartbeats to send.
_MAIN_PROCESS_PAUSE = 30.0

#: Trace states that end a run for good. Without one (SystemExit) the child is about to die, and
#: the main process decides, for it knows whether the message goes back.
_ENDED = frozenset({states.SUCCESS, states.FAILURE, states.IGNORED, states.REJECTED, states.RETRY})
_FINAL = frozenset({states.SUCCESS, states.FAILURE})


def mark_copy(headers: dict[str, Any]) -> None:
    """Give a received message the token that the child and the main process know it by."""
    headers[HOLDER] = uuid4().hex


def enter(task: Task[..., Any], once: Once) -> None:
    """Take the claim for this run.

    Raises:
        Ignore: A later attempt exists, the call was replaced, or it is dropped for another task
            that runs; this copy is acknowledged unrun.
        SetAside: Another copy or another task runs, or the lock Redis does not answer; this copy
            tries again.
        DuplicateTaskError: Another task owns the key.
    """
    locks = locks_of(task.app)
    copy = _Copy(task, once, locks, _claim_of(task, once, vars(task.request)))
    try:
        run = copy.let_in()
    except StoreError as error:
        _unavailable(task, locks, error)
        return
    run.begin(task)


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
            return Run(self.once, self.claim, held, self.holder, fence)
        if options.is_freed_at_start:
            return Run(self.once, self.claim, None, self.holder, self._start())
        fence = self._enter(self.claim, self._end_late)
        return Run(self.once, self.claim, self.claim, self.holder, fence)

    def _see_the_window(self) -> None:
        """Have a task that was called by name take the key that its call did not."""
        claim = self.claim
        if Claim.from_headers(vars(self.task.request), claim.owner) is not None:
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
        if ticket.code is Publish.DUPLICATE:
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
        lease = _lease(self.task, self.locks)
        ticket = self.locks.claims.enter(
            claim.name,
            owner=claim.owner,
            attempt=claim.attempt,
            holder=self.holder,
            lease=lease,
            ttl=_redelivery(self.task, lease),
            task=self.task.name,
            delivery=_delivery(self.task, self.locks),
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
            remember=_redelivery(self.task, _lease(self.task, self.locks)),
        )
        if ticket.code is Entry.DUPLICATE:
            # One that was started before gave its key up then.
            if not _may_have_started(self.task):
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
        self._tell_conflict(self.claim, ticket, "late")
        if self.once.options.at_publish == "replace":
            self._revoke(f"task {ticket.owner} has taken its place")
        raise DuplicateTaskError(self.claim.name, ticket.owner, ticket.seconds)

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
        if action != "reschedule" or not self.task.request.get(TIMES_SET_ASIDE):
            self._tell_conflict(self.claim.turn, ticket, action)
        if action == "reschedule":
            if self.once.options.is_freed_at_start:
                # It waits for longer than it might in the queue.
                ttl = self.once.ttl(self.locks.config)
                self.locks.claims.keep(self.claim.name, owner=self.claim.owner, ttl=ttl)
            reason = f"task {ticket.owner} runs with its key"
            raise _until_free(reason, _WHILE_OTHER_RUNS, ticket, waits_for=ticket.owner)
        # Its call is over.
        if self.once.options.is_claimed_by_calls:
            self._release(self.claim)
        if action == "drop":
            self._revoke(f"task {ticket.owner} runs with its key")
        raise DuplicateTaskError(self.claim.name, ticket.owner, ticket.seconds)

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


def _may_have_started(task: Task[..., Any]) -> bool:
    """Say whether a message was in a worker's hands before."""
    request = task.request
    return bool(
        request.retries
        or (request.delivery_info or {}).get("redelivered")
        or request.get(TIMES_SET_ASIDE)
    )


def _claim_of(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> Claim:
    """Return the claim that a message carries, or that of its arguments if it came by name."""
    claim = Claim.from_headers(headers, headers.get("id"))
    if claim is None:
        name = once.claim_name(task, headers.get("args"), headers.get("kwargs"))
        claim = Claim(name, str(headers["id"]), int(headers.get("retries") or 0))
    return claim


def _delivery(task: Task[..., Any], locks: Locks) -> str:
    """Return the tag of the message's delivery, where the lock Redis knows its lease."""
    # An early ack ends the delivery when the run begins.
    tag = str(task.request.get(DELIVERY) or "") if task.acks_late else ""
    return tag if locks.are_at_broker or is_beside(tag) else ""


def _unavailable(task: Task[..., Any], locks: Locks, error: StoreError) -> None:
    if locks.config.on_store_error == "raise":
        raise SetAside(str(error), *_WHILE_UNAVAILABLE) from None
    logger.error("Task %s[%s] runs without a claim: %s", task.name, task.request.id, error)


def _lease(task: Task[..., Any], locks: Locks) -> float:
    limit = hard_limit(task, task.request.timelimit)
    return (limit or locks.config.longest_task or UNLIMITED) + _KILL_GRACE


def _redelivery(task: Task[..., Any], lease: float) -> float:
    """Return within how many seconds a copy of a message comes back if it comes back at all."""
    options = task.app.conf.broker_transport_options or {}
    return max(lease, float(options.get("visibility_timeout") or 0)) + _KILL_GRACE


@task_postrun.connect(weak=False)
def _leave(task: Any = None, state: str | None = None, retval: Any = None, **_: Any) -> None:
    run = Run.of(task)
    if run is not None and state in _ENDED:
        goes_back = state == states.REJECTED and bool(getattr(retval, "requeue", False))
        if run.held is not None:
            _release(task, run.once, run.held, run.holder, goes_back=goes_back)
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
    elif run is None and state in _FINAL and not task.request.is_eager:
        once = getattr(task, "reliable_once", None)
        if once is not None and not isinstance(retval, DuplicateTaskError):
            # It failed before its body began, or ran without the lock Redis.
            _end_unrun(task, once, vars(task.request), requeued=False)


def end_unrun(
    task: Task[..., Any],
    once: Once,
    headers: dict[str, Any],
    *,
    requeued: bool,
    is_routine: bool = False,
) -> None:
    """End a copy whose child did not: it was killed, timed out, revoked or never started.

    With ``is_routine`` nothing is said if the claim turns out to be released already.
    """
    global _unavailable_until
    if time.monotonic() < _unavailable_until and not requeued:
        logger.warning("The claim of task %s[%s] stays until it lapses", task.name, headers["id"])
        return
    # An error here would end the worker.
    try:
        answered = _end_unrun(task, once, headers, requeued=requeued, is_routine=is_routine)
        if not answered and not is_routine:
            _unavailable_until = time.monotonic() + _MAIN_PROCESS_PAUSE
    except Exception:
        logger.exception("The claim of task %s[%s] is not released", task.name, headers.get("id"))


_unavailable_until = 0.0


def _end_unrun(
    task: Task[..., Any],
    once: Once,
    headers: dict[str, Any],
    *,
    requeued: bool,
    is_routine: bool = False,
) -> bool:
    try:
        claim = _claim_of(task, once, headers)
    except (TypeError, LookupError, AttributeError):
        # Arguments that do not fit the task: no copy of it ever had a claim.
        return True
    holder = str(headers.get(HOLDER) or "")
    options = once.options
    answered = True
    if options.takes_turns:
        # It may not have had its turn yet.
        answered = _release(task, once, claim.turn, holder, goes_back=requeued, is_routine=True)
    if options.is_claimed_by_calls and not options.is_for_a_window:
        answered &= _release(
            task,
            once,
            claim,
            holder,
            goes_back=requeued,
            may_be_unentered=True,
            is_routine=is_routine or options.is_freed_at_start,
        )
    return answered


def _release(
    task: Task[..., Any],
    once: Once,
    claim: Claim,
    holder: str,
    *,
    goes_back: bool,
    may_be_unentered: bool = False,
    is_routine: bool = False,
) -> bool:
    """Release a claim; return whether the lock Redis answered."""
    locks = locks_of(task.app)
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
            remember=0.0 if is_turn else _redelivery(task, _lease(task, locks)),
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
