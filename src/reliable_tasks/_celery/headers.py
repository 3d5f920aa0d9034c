"""The headers that this library's worker puts on a message that it received."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "CONDEMNED",
    "COUNTED",
    "DELIVERY",
    "FIRST_FAILED",
    "IN_DOUBT",
    "IS_COPY",
    "OF_ONE_COPY",
    "REPLAY_OF",
    "REQUEUES",
    "TIMES_SET_ASIDE",
    "WAITS_FOR",
    "without_brokers_own",
]

#: Header, of one delivery: its tag.
DELIVERY = "reliable_delivery"
#: Header, of one start: the broker may have taken its message back.
IN_DOUBT = "reliable_in_doubt"
#: Header, of one start: the task is over, and its child only says so, by an error's name and
#: arguments.
CONDEMNED = "reliable_condemned"
#: Header of a retry: when the task failed first (s since the epoch).
FIRST_FAILED = "reliable_first_failed"
#: Header of a replay: the dead letter that it is one of.
REPLAY_OF = "reliable-replay-of"
#: Headers of a copy that waits in the broker: its message was delivered before, ...
IS_COPY = "reliable_copy"
#: ... so many times it was set aside, ...
TIMES_SET_ASIDE = "reliable_set_aside"
#: ... and it waits for this.
WAITS_FOR = "reliable_waits_for"
#: Header of a copy that put itself back into its queue: how often it did.
REQUEUES = "reliable_requeues"
#: Header of what is sent again, or of a retry, where RabbitMQ alone counts: its count until then.
COUNTED = "reliable_counted"
OF_ONE_COPY = (IS_COPY, TIMES_SET_ASIDE, WAITS_FOR, REQUEUES, COUNTED, CONDEMNED)

#: Headers in which RabbitMQ counts how often, and says from where, a message came back.
_BROKERS_OWN = frozenset(
    (
        *("x-delivery-count", "x-acquired-count", "x-death"),
        *("x-first-death-exchange", "x-first-death-queue", "x-first-death-reason"),
        *("x-last-death-exchange", "x-last-death-queue", "x-last-death-reason"),
    )
)


def without_brokers_own(headers: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return the headers of a message that is sent again, without the broker's and some others."""
    left_out = _BROKERS_OWN.union(others)
    return {name: value for name, value in headers.items() if name not in left_out}
