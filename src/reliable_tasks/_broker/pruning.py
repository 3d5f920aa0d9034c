"""Dropping dead letters that are too old, or too many."""

from __future__ import annotations

import logging
import time
from functools import partial

import redis

from reliable_tasks._broker.saying import say, tell
from reliable_tasks._store.dead import DeadStore
from reliable_tasks.instrumentation.signals import dead_letters_dropped

__all__ = ["prune"]

#: How often it is said that dead letters get old (s).
_WARN_AGAIN = 3600.0
_warned_at = -_WARN_AGAIN


def prune(store: DeadStore, server: redis.Redis) -> None:
    """Drop some of them, the oldest first, and warn of those that will be."""
    pruned = store.prune(server)
    for count, reason in ((pruned.aged, "age"), (pruned.many, "count")):
        if count:
            said = "%d dead letters were dropped for their %s (reliable_dead_letter_max_%s)"
            say(logging.ERROR, said, count, reason, reason)
            tell(partial(dead_letters_dropped.send, sender=None, count=count, reason=reason))
    if pruned.soon:
        _warn(pruned.soon)


def _warn(count: int) -> None:
    global _warned_at
    if time.monotonic() - _warned_at < _WARN_AGAIN:
        return
    _warned_at = time.monotonic()
    say(
        logging.WARNING,
        "%d dead letters are in the last tenth of the time that they are kept "
        "(reliable_dead_letter_max_age): replay or discard them, or they are dropped",
        count,
    )
