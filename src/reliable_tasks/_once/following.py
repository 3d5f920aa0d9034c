"""A duplicate that somebody waits for: it follows the task that owns its key, and ends as it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Task, states
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.exceptions import Ignore, Reject, Retry

from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._once.claim import Claim
from reliable_tasks._once.locks import Locks
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import claim_of, was_delivered_before
from reliable_tasks._once.silence import Silence
from reliable_tasks._store.claims import Follow, Following
from reliable_tasks.errors import FollowedTaskFailed, FollowTimeout, StoreError

__all__ = ["Outcome", "begin_to_follow", "is_follower", "keeps_results", "outcome_of", "pause_of"]

logger = logging.getLogger("reliable_tasks")

#: Pauses of a task that follows another one, the first and the longest (s), ...
_WHILE_FOLLOWING = (0.2, 5.0)
#: ... and of one that cannot learn what became of that.
_WHILE_UNAVAILABLE = (1.0, 5.0)
_silence = Silence(5.0)
#: Errors that say what became of a run, and not what went wrong in it: another run that raised them
#: would be handled as that one was.
_OF_A_RUN = (Ignore, Reject, Retry, TimeLimitExceeded, WorkerLostError)
#: Entry of a task's request: it follows another one, or ends for it.
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
    if answer.code is Follow.WAITS:
        return _wait(task, claim, answer)
    if follows is None or follows.then == "join":
        return _read(task, claim, answer)
    return None


def begin_to_follow(task: Task[..., Any], once: Once, locks: Locks, claim: Claim) -> Outcome | None:
    """Have a task follow the one that has its key.

    Returns:
        How that one has ended, if that is known; ``None`` if its key is free by now.

    Raises:
        SetAside: That task has not ended.
        FollowTimeout: It has not, and the time is over.
        StoreError: The lock Redis does not answer, or refuses.
    """
    answer = locks.claims.follow(
        claim.name,
        task_id=claim.owner,
        followed=claim.owner,
        until=claim.follows.until if claim.follows else None,
        ttl=once.ttl(locks.config),
    )
    if answer.code is Follow.WAITS:
        return _wait(task, claim, answer)
    return _read(task, claim, answer) if answer.code is Follow.ENDED else None


def pause_of(task: Task[..., Any], once: Once, headers: dict[str, Any]) -> SetAside | None:
    """Return why a message must not take a slot yet, in a worker's main process."""
    claim = Claim.from_headers(headers, headers.get("id"))
    if claim is None or claim.follows is None or claim.follows.then == "fail":
        return None
    # An error here would end the worker.
    try:
        claim = claim_of(task, once, headers)
        locks = once.locks(task)
        answer = None if _silence else _ask(once, locks, claim)
    except StoreError:
        _silence.begin()
        answer = None
    except Exception:
        logger.exception("Whom task %s[%s] follows is not known", task.name, claim.owner)
        return None
    if answer is None:
        is_due = locks.config.on_store_error == "proceed"
        return None if is_due else SetAside("the lock Redis does not answer", *_WHILE_UNAVAILABLE)
    is_due = answer.code is not Follow.WAITS or answer.seconds <= 0
    return None if is_due else _pause(answer)


def _may_follow(task: Task[..., Any], once: Once) -> bool:
    """Say whether a copy may have been found to be a duplicate when it came before."""
    if not once.options.is_claimed_by_calls or once.options.at_publish != "existing":
        return False
    return was_delivered_before(vars(task.request))


def _ask(once: Once, locks: Locks, claim: Claim) -> Following:
    follows = claim.follows
    return locks.claims.follow(
        claim.name,
        task_id=claim.owner,
        followed=follows.owner if follows else "",
        until=follows.until if follows else None,
        ttl=once.ttl(locks.config),
    )


def _wait(task: Task[..., Any], claim: Claim, answer: Following) -> Outcome:
    """Wait on; at the end of its time a task looks whether only the word of an end is missing."""
    outcome = _read(task, claim, answer) if answer.seconds <= 0 else None
    if outcome is not None:
        return outcome
    task.request.update({_FOLLOWS: True})
    if answer.seconds <= 0:
        raise FollowTimeout(claim.name, answer.followed)
    raise _pause(answer)


def _pause(answer: Following) -> SetAside:
    first, longest = _WHILE_FOLLOWING
    longest = min(longest, max(answer.seconds, first) + 0.01)
    return SetAside(f"it follows task {answer.followed}", first, longest, answer.followed)


def _read(task: Task[..., Any], claim: Claim, answer: Following) -> Outcome | None:
    """Return how a followed task has ended, or ``None`` if nobody knows."""
    if answer.followed in ("", claim.owner):
        return None
    if not keeps_results(task, is_ignored=bool(task.request.ignore_result)):
        outcome = _without_backend(answer)
    else:
        try:
            meta = task.backend.get_task_meta(answer.followed)
        except Exception as error:
            task.request.update({_FOLLOWS: True})
            if answer.seconds <= 0:
                return Outcome(error=FollowTimeout(claim.name, answer.followed))
            reason = f"the result of task {answer.followed} cannot be read: {error}"
            raise SetAside(reason, *_WHILE_UNAVAILABLE) from error
        outcome = _in_backend(meta, answer.followed)
    if outcome is not None:
        task.request.update({_FOLLOWS: True})
        logger.info("Task %s[%s] ends as %s", task.name, claim.owner, answer.followed)
    return outcome


def _without_backend(answer: Following) -> Outcome | None:
    if answer.state == states.SUCCESS:
        return Outcome()
    if answer.state == states.FAILURE:
        return Outcome(error=FollowedTaskFailed(answer.followed))
    return None


def _in_backend(meta: Any, task_id: str) -> Outcome | None:
    if meta["status"] == states.SUCCESS:
        return Outcome(meta["result"])
    if meta["status"] != states.FAILURE:
        return None
    raised = meta["result"]
    if isinstance(raised, Exception) and not isinstance(raised, _OF_A_RUN):
        return Outcome(error=raised)
    return Outcome(error=FollowedTaskFailed(task_id, repr(raised)))
