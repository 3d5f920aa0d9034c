"""A duplicate that somebody waits for: it follows the task that owns its key, and ends as it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from celery import Task, states
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend

from reliable_tasks._celery.headers import TIMES_SET_ASIDE
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import Claim
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._store.claims import Follow, Following
from reliable_tasks.errors import FollowedTaskFailed, FollowTimeout, StoreError

__all__ = ["Outcome", "begin_to_follow", "is_follower", "keeps_results", "outcome_of", "pause_of"]

logger = logging.getLogger("reliable_tasks")

#: Pauses of a task that follows another one, the first and the longest (s), ...
_WHILE_FOLLOWING = (0.2, 5.0)
#: ... and of one that cannot learn what became of that.
_WHILE_UNAVAILABLE = (1.0, 5.0)
#: Entry of a task's request: it follows, or it ends for the one that it followed.
_FOLLOWS = "reliable_follows"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the task ended that a duplicate followed."""

    value: Any = None
    error: BaseException | None = None

    def take(self) -> Any:
        """Return what that task returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.value


def is_follower(task: Task[..., Any]) -> bool:
    """Say whether a task that runs, or has run, did so in another one's stead alone."""
    return bool(task.request.get(_FOLLOWS))


def keeps_results(task: Task[..., Any], *, is_ignored: bool) -> bool:
    """Say whether one task can read the result of another."""
    return not is_ignored and not isinstance(task.backend, (DisabledBackend, RPCBackend))


def outcome_of(task: Task[..., Any], once: Once, locks: Locks, claim: Claim) -> Outcome | None:
    """Return how the task ended that this one follows; ``None`` if it has to run itself.

    Raises:
        SetAside: That task has not ended.
        FollowTimeout: It has not, and the time is over.
        DuplicateTaskError: The conflict setting of this one is ``"raise"``.
        StoreError: The lock Redis does not answer, or refuses.
    """
    follows = claim.follows
    if follows is not None and follows.then == "fail":
        task.request.update({_FOLLOWS: True})
        raise once.refusal(claim.name, follows.owner, follows.expires_in)
    if follows is None and not _may_follow(task, once):
        return None
    answer = _ask(once, locks, claim)
    if answer.code is Follow.OURS:
        return None
    task.request.update({_FOLLOWS: True})
    if answer.code is Follow.WAITS:
        raise _until_ended(claim, answer)
    if follows is None or follows.then == "join":
        outcome = _read(task, answer)
        if outcome is not None:
            logger.info("Task %s[%s] ends as %s", task.name, claim.owner, answer.followed)
            return outcome
    task.request.update({_FOLLOWS: False})
    return None


def begin_to_follow(task: Task[..., Any], once: Once, locks: Locks, claim: Claim) -> Exception:
    """Have a task follow the one that owns its key; return what its copy is to raise."""
    answer = locks.claims.follow(
        claim.name,
        task_id=claim.owner,
        followed=claim.owner,
        until=claim.follows.until if claim.follows else None,
        ttl=once.ttl(locks.config),
    )
    task.request.update({_FOLLOWS: True})
    return _until_ended(claim, answer)


def pause_of(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> SetAside | None:
    """Return why a message must not take a slot yet, in a worker's main process."""
    global _unavailable_until
    claim = Claim.from_headers(headers, headers.get("id"))
    if claim is None or claim.follows is None or claim.follows.then == "fail":
        return None
    if time.monotonic() < _unavailable_until:
        return SetAside("the lock Redis did not answer", *_WHILE_UNAVAILABLE)
    # An error here would end the worker.
    try:
        answer = _ask(once, once.locks(task), claim)
    except StoreError as error:
        # The main process cannot wait for each of them, for it has heartbeats to send.
        _unavailable_until = time.monotonic() + _WHILE_UNAVAILABLE[1]
        return SetAside(str(error), *_WHILE_UNAVAILABLE)
    except Exception:
        logger.exception("Whom task %s[%s] follows is not known", task.name, claim.owner)
        return None
    is_due = answer.code is not Follow.WAITS or answer.seconds <= 0
    return None if is_due else _pause(answer)


_unavailable_until = 0.0


def _may_follow(task: Task[..., Any], once: Once) -> bool:
    """Say whether a copy may have been found to be a duplicate when it came before."""
    if not once.options.is_claimed_by_calls or once.options.at_publish != "existing":
        return False
    request = task.request
    is_redelivered = (request.delivery_info or {}).get("redelivered")
    return bool(is_redelivered or request.get(TIMES_SET_ASIDE))


def _ask(once: Once, locks: Locks, claim: Claim) -> Following:
    follows = claim.follows
    return locks.claims.follow(
        claim.name,
        task_id=claim.owner,
        followed=follows.owner if follows else "",
        until=follows.until if follows else None,
        ttl=once.ttl(locks.config),
    )


def _until_ended(claim: Claim, answer: Following) -> Exception:
    if answer.seconds <= 0:
        return FollowTimeout(claim.name, answer.followed)
    return _pause(answer)


def _pause(answer: Following) -> SetAside:
    first, longest = _WHILE_FOLLOWING
    longest = min(longest, max(answer.seconds, first) + 0.01)
    return SetAside(f"it follows task {answer.followed}", first, longest, answer.followed)


def _read(task: Task[..., Any], answer: Following) -> Outcome | None:
    """Return how a task ended that owns its key no more, or ``None`` if nobody knows."""
    if answer.followed == task.request.id:
        return None
    if not keeps_results(task, is_ignored=bool(task.request.ignore_result)):
        if answer.state == states.SUCCESS:
            return Outcome()
        if answer.state == states.FAILURE:
            return Outcome(error=FollowedTaskFailed(answer.followed))
        return None
    try:
        meta = task.backend.get_task_meta(answer.followed)
    except Exception as error:
        reason = f"the result of task {answer.followed} cannot be read: {error}"
        raise SetAside(reason, *_WHILE_UNAVAILABLE) from error
    if meta["status"] == states.SUCCESS:
        return Outcome(meta["result"])
    if meta["status"] == states.FAILURE:
        raised = meta["result"]
        is_error = isinstance(raised, BaseException)
        return Outcome(error=raised if is_error else FollowedTaskFailed(answer.followed))
    return None
