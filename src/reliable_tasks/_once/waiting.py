"""The claims of messages that wait in a worker: kept for as long as they wait.

A claim lives for as long as its message may wait in the queue. One that has come to a worker, and
waits there behind others, for its rate limit or for its turn, has not been forgotten.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from celery import Celery

from reliable_tasks._celery.delivery import DeliveredRequest, waiting_requests
from reliable_tasks._once.claim import Claim
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import claim_of
from reliable_tasks._once.silence import Silence
from reliable_tasks._store.claims import Claims
from reliable_tasks.errors import StoreError, StoreUnavailable

__all__ = ["keep_claims"]

logger = logging.getLogger("reliable_tasks")

#: A claim is kept each time that a third of its ``ttl`` is over, ...
_PART = 1 / 3
#: ... and for the first time when its message has waited for so long (s): nobody knows how much of
#: it was left when that came.
_FIRST = 5.0
_silence = Silence(30.0)


def keep_claims(app: Celery) -> None:
    """Keep the claims of an app's messages that wait in this worker, where it is time to."""
    if _silence:
        return
    # An error here would end the worker.
    try:
        for claims, due in _due(waiting_requests(app)).items():
            _keep(claims, due)
    except Exception:
        logger.exception("The claims of messages that wait here may lapse")
        _silence.begin()


@dataclass(frozen=True, slots=True)
class _Due:
    """A claim that is to be kept, for so long (s)."""

    request: DeliveredRequest
    claim: Claim
    ttl: float


def _due(requests: Iterable[DeliveredRequest]) -> dict[Claims, list[_Due]]:
    now = time.monotonic()
    due: dict[Claims, list[_Due]] = defaultdict(list)
    for request in requests:
        task: Any = request.task
        once: Once | None = getattr(task, "reliable_once", None)
        if once is None or not once.options.is_claimed_by_calls:
            continue
        claim = Claim.from_headers(request.request_dict, request.id)
        # Who follows another task has no claim; who came by name takes it when it starts.
        if claim is None or claim.follows is not None:
            continue
        locks = once.locks(task)
        ttl = once.ttl(locks.config)
        waited = now - (request.kept_at or request.received_at)
        if waited < (ttl * _PART if request.kept_at else min(ttl * _PART, _FIRST)):
            continue
        # A window is seen to have been called, and is not kept.
        ttl = 0.0 if once.options.is_for_a_window else ttl
        due[locks.claims].append(_Due(request, claim_of(task, once, request.request_dict), ttl))
    return due


def _keep(claims: Claims, due: list[_Due]) -> None:
    try:
        claims.keep_each([(one.claim.name, one.claim.owner, one.ttl) for one in due])
    except StoreUnavailable as error:
        logger.warning("The claims of %d messages that wait here may lapse: %s", len(due), error)
        _silence.begin()
        return
    except StoreError:
        # One that cannot be read must not keep the others from being kept.
        for one in due:
            with suppress(StoreError):
                claims.keep(one.claim.name, owner=one.claim.owner, ttl=one.ttl)
    now = time.monotonic()
    for one in due:
        one.request.kept_at = now
