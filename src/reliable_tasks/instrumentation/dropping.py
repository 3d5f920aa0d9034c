"""What is said of dead letters that were dropped, or will be."""

from __future__ import annotations

import logging
import time
from typing import Any

from reliable_tasks.instrumentation.signals import dead_letters_dropped

__all__ = ["tell_pruned"]

logger = logging.getLogger("reliable_tasks")

#: How often it is said that dead letters get old (s).
_WARN_AGAIN = 3600.0
_warned_at = -_WARN_AGAIN


def tell_pruned(pruned: Any) -> None:
    """Tell what a `Pruned` of the store says."""
    global _warned_at
    for count, reason in ((pruned.aged, "age"), (pruned.many, "count")):
        if count:
            said = "%d dead letters were dropped for their %s (reliable_dead_letter_max_%s)"
            logger.error(said, count, reason, reason)
            dead_letters_dropped.send(sender=None, count=count, reason=reason)
    if pruned.soon and time.monotonic() - _warned_at > _WARN_AGAIN:
        _warned_at = time.monotonic()
        logger.warning(
            "%d dead letters are in the last tenth of the time that they are kept "
            "(reliable_dead_letter_max_age): replay or discard them, or they are dropped",
            pruned.soon,
        )
