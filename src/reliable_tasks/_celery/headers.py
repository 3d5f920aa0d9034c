"""The headers that this library's worker puts on a message that it received."""

from __future__ import annotations

__all__ = ["DELIVERY", "IN_DOUBT", "IS_COPY", "OF_ONE_COPY", "TIMES_SET_ASIDE", "WAITS_FOR"]

#: Header, of one delivery: its tag.
DELIVERY = "reliable_delivery"
#: Header, of one start: the broker may have taken its message back.
IN_DOUBT = "reliable_in_doubt"
#: Headers of a copy that waits in the broker: its message was delivered before, ...
IS_COPY = "reliable_copy"
#: ... so many times it was set aside, ...
TIMES_SET_ASIDE = "reliable_set_aside"
#: ... and it waits for this.
WAITS_FOR = "reliable_waits_for"
OF_ONE_COPY = (IS_COPY, TIMES_SET_ASIDE, WAITS_FOR)
