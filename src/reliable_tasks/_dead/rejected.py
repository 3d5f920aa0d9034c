"""Messages that are no task's of this worker: Celery drops them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import uuid4

from celery import Celery

from reliable_tasks._celery.channels import held_by, queue_of
from reliable_tasks._celery.headers import without_brokers_own
from reliable_tasks._dead.keeping import bury, tell_buried
from reliable_tasks._dead.letters import letter_of_message, raw_of
from reliable_tasks._dead.options import read_options
from reliable_tasks._store.letters import BY_CONTENT, Cause

__all__ = ["Rejected"]

logger = logging.getLogger("reliable_tasks")


class Rejected:
    """What a worker does with messages that it can make nothing of.

    Args:
        app: The app.
        worker: The worker's name.
    """

    def __init__(self, app: Celery, worker: str) -> None:
        self._app = app
        self._worker = worker

    def keep(self, message: Any, error: BaseException | None, *, is_unknown: bool) -> bool:
        """Have a message kept, at the latest when it is acknowledged.

        Args:
            message: The message; it is not ended here.
            error: What is wrong with it, if that was raised.
            is_unknown: Whether it is a task's that this worker does not know.

        Returns:
            Whether it is; if not, it is to be rejected.
        """
        # What is wrong with it can be wrong here, too, and an error would end worker after worker.
        try:
            return self._keep(message, error, is_unknown=is_unknown)
        except Exception:
            logger.critical("A message cannot be kept: %r", message, exc_info=True)
            return False

    def _keep(self, message: Any, error: BaseException | None, *, is_unknown: bool) -> bool:
        held = held_by(message.channel)
        delivery = held.get(message.delivery_tag) if held is not None else None
        raw = raw_of(message) if delivery is None else delivery.raw
        event = _event_of(message)
        letter = letter_of_message(
            message,
            error,
            Cause.UNKNOWN_TASK if is_unknown else Cause.UNDECODABLE,
            read_options(self._app),
            queue=queue_of(self._app, message),
            worker=self._worker,
            event=event,
            raw=raw,
        )
        if letter is None:
            return False
        if delivery is None:
            return bury(self._app, None, letter, event)
        delivery.letter = letter
        delivery.when_buried = partial(tell_buried, self._app, None, letter)
        return True


def _event_of(message: Any) -> str:
    """Return what is the same when the same message comes again, for nobody acknowledged it."""
    tag = message.delivery_tag
    if isinstance(tag, str):
        return hashlib.sha256(tag.encode()).hexdigest()[:32]
    # RabbitMQ counts its tags anew on each connection: only what the message says tells it from
    # others. Without an id two can say the same; rather the same one twice than one of two lost.
    headers = message.headers if isinstance(message.headers, Mapping) else {}
    if not headers.get("id"):
        return uuid4().hex
    raw = raw_of(message, headers=without_brokers_own(headers, "redelivered"))
    return BY_CONTENT + hashlib.sha256(raw).hexdigest()[:32]
