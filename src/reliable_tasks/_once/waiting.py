"""The claims of messages that wait in a worker: kept for as long as they wait.

A claim lives for as long as its message may wait in the queue. One that has come to a worker, and
waits there behind others, for its rate limit or for its turn, has not been forgotten.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery

from reliable_tasks._celery.delivery import DeliveredRequest, waiting_requests
from reliable_tasks._once.claim import Claim
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import claim_of
from reliable_tasks._store.claims import Claims
from reliable_tasks.errors import StoreUnavailable

__all__ = ["keep_claims"]

logger = logging.getLogger("reliable_tasks")

#: A claim is kept each time that a third of its ``ttl`` is over, ...
_PART = 1 / 3
#: ... and for the first time when its message has waited for so long (s): nobody knows how much of
#: it was left when that came.
_FIRST = 5.0
#: When the lock Redis does not answer it is left alone for such a part of the shortest ``ttl``, ...
_PAUSE_PART = 1 / 6
#: ... but not for longer (s).
_LONGEST_PAUSE = 30.0

#: Until when nothing is kept there (monotonic s), for it did not answer.
_paused: WeakKeyDictionary[Claims, float] = WeakKeyDictionary()


def keep_claims(app: Celery) -> None:
    """Keep the claims of an app's messages that wait in this worker, where it is time to."""
    # An error here would end the worker.
    try:
        for claims, due in _due(waiting_requests(app)).items():
            if _paused.get(claims, 0.0) < time.monotonic():
                _keep(claims, due)
    except Exception:
        logger.exception("The claims of messages that wait here may lapse")


@dataclass(frozen=True, slots=True)
class _Due:
    """A claim that is to be kept, for so long (s)."""

    request: DeliveredRequest
    claim: Claim
    ttl: float


def _due(requests: Iterable[DeliveredRequest]) -> dict[Claims, list[_Due]]:
    found: dict[Claims, list[_Due]] = defaultdict(list)
    for request in requests:
        if math.isinf(request.kept_at):
            continue
        try:
            claim = _claim_due(request)
        except Exception:
            logger.exception("The claim of task %s may lapse while it waits here", request.id)
            request.kept_at = math.inf
            continue
        if claim is not None:
            found[claim[0]].append(claim[1])
    return found


def _claim_due(request: DeliveredRequest) -> tuple[Claims, _Due] | None:
    """Return the claim of a message, and where it is kept, if it is time to."""
    task: Any = request.task
    once: Once | None = getattr(task, "reliable_once", None)
    if once is None or not once.options.is_claimed_by_calls:
        return None
    claim = Claim.from_headers(request.request_dict, request.id)
    # Who follows another task has no claim; who came by name takes it when it starts.
    if claim is None or claim.follows is not None:
        return None
    locks = once.locks(task)
    ttl = once.ttl(locks.config)
    waited = time.monotonic() - (request.kept_at or request.received_at)
    if waited < (ttl * _PART if request.kept_at else min(ttl * _PART, _FIRST)):
        return None
    # A window is seen to have been called, and is not kept.
    kept_for = 0.0 if once.options.is_for_a_window else ttl
    claim = claim_of(task, once, request.request_dict)
    return locks.claims, _Due(request, claim, kept_for)


def _keep(claims: Claims, due: list[_Due]) -> None:
    try:
        claims.keep_each([(one.claim.name, one.claim.owner, one.ttl) for one in due])
    except StoreUnavailable as error:
        logger.warning("The claims of %d messages that wait here may lapse: %s", len(due), error)
        shortest = min((one.ttl for one in due if one.ttl), default=_LONGEST_PAUSE)
        pause = min(shortest * _PAUSE_PART, _LONGEST_PAUSE)
        _paused[claims] = time.monotonic() + pause
        return
    now = time.monotonic()
    for one in due:
        one.request.kept_at = now
