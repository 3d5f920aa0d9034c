"""The claims of messages that wait in a worker: kept for as long as they wait.

A claim lives for as long as its message may wait in the queue. One that has come to a worker, and
waits there behind others, for its rate limit or for its turn, has not been forgotten.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from celery import Celery

from reliable_tasks._celery.delivery import DeliveredRequest, waiting_requests
from reliable_tasks._once.claim import Claim
from reliable_tasks._once.once import Once
from reliable_tasks._once.received import claim_of
from reliable_tasks._once.silence import Silence
from reliable_tasks._store.claims import Claims
from reliable_tasks.errors import StoreError

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
        _keep(waiting_requests(app))
    except StoreError as error:
        logger.warning("The claims of messages that wait here may lapse: %s", error)
        _silence.begin()
    except Exception:
        logger.exception("The claims of messages that wait here may lapse")
        _silence.begin()


def _keep(requests: Iterable[DeliveredRequest]) -> None:
    now = time.monotonic()
    due: dict[Claims, list[tuple[str, str, float]]] = defaultdict(list)
    for request in requests:
        task: Any = request.task
        once: Once | None = getattr(task, "reliable_once", None)
        if once is None or not once.options.is_claimed_by_calls or once.options.is_for_a_window:
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
        request.kept_at = now
        name = claim_of(task, once, request.request_dict).name
        due[locks.claims].append((name, claim.owner, ttl))
    for claims, kept in due.items():
        claims.keep_each(kept)
