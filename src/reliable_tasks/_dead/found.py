"""A message in the queue of dead letters, read as one, whoever has put it there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from math import isfinite
from typing import Any, get_type_hints

from reliable_tasks._celery.headers import without_brokers_own
from reliable_tasks._dead.letters import raw_of
from reliable_tasks._store.letters import Cause, DeadLetter, as_cause
from reliable_tasks.errors import ReplayRefused

__all__ = ["LETTER", "Found", "read"]

#: Header: the message is a dead letter of ours, and has this id.
LETTER = "reliable-dead-letter"
#: Why RabbitMQ dropped a message.
_REASONS = {
    "delivery_limit": Cause.POISON,
    "rejected": Cause.REJECTED,
    "expired": Cause.EXPIRED,
}
_KNOWN = frozenset(one.name for one in fields(DeadLetter))
#: What a field may be; a whole number is as good as another one.
_KINDS = {
    name: float | int if kind is float else kind
    for name, kind in get_type_hints(DeadLetter).items()
}
#: So much is told of what is wrong with a message (characters).
_LONGEST_ERROR = 1_000


@dataclass(frozen=True, slots=True)
class Found:
    """A message in the queue.

    Attributes:
        letter: The dead letter that it is, or what is known of it.
        raw: The task's message, as kombu's Redis transport would write it.
        is_readable: Whether it could be read.
    """

    letter: DeadLetter
    raw: bytes
    is_readable: bool = True

    def check(self) -> None:
        """Check that it could be read.

        Raises:
            ReplayRefused: It could not.
        """
        if not self.is_readable:
            raise ReplayRefused(self.letter.id, self.letter.error)


def read(message: Any) -> Found:
    """Read a message; of one that cannot be read, for others are behind it, what is known."""
    try:
        if message.errors:
            # kombu could not unpack it.
            raise message.errors[0][1]
        return _kept(message) if LETTER in message.headers else _dropped(message)
    except Exception as error:  # noqa: BLE001 - whoever put it there can have put anything there
        why = f"its message cannot be read: {type(error).__name__}: {error}"[:_LONGEST_ERROR]
        return Found(_letter(message, b"", Cause.UNDECODABLE, why), b"", is_readable=False)


def _kept(message: Any) -> Found:
    """Read a letter that a worker has kept."""
    body = json.loads(message.body)
    raw = str(body["message"]).encode("utf-8", "surrogateescape")
    known = {k: v for k, v in body["about"].items() if k in _KNOWN}
    known |= {"cause": as_cause(known["cause"]), "size": len(raw)}
    letter = DeadLetter(**known)
    for name, kind in _KINDS.items():
        value = getattr(letter, name)
        if not isinstance(value, kind) or (isinstance(value, float) and not isfinite(value)):
            raise TypeError(f"{name} is {value!r}")
    return Found(letter, raw)


def _dropped(message: Any) -> Found:
    """Read a task's message, or whatever it is, that RabbitMQ has dropped."""
    death = _death(message)
    # Where it was sent first, and not by whom it came here.
    keys = death.get("routing-keys")
    sent_to = {
        "exchange": _text(death.get("exchange")),
        "routing_key": _text(keys[0]) if isinstance(keys, list) and keys else "",
    }
    raw = raw_of(message, sent_to)
    reason = _text(death.get("reason"))
    cause = _REASONS.get(reason, Cause.REJECTED)
    why = f"dropped by RabbitMQ: {reason or None}"
    return Found(_letter(message, raw, cause, why), raw)


def _letter(message: Any, raw: bytes, cause: Cause, error: str) -> DeadLetter:
    """Return what is known of a message that is no letter of ours."""
    headers, death = message.headers, _death(message)
    task_id = _text(headers.get("id"))
    return DeadLetter(
        id=task_id or _id_of(message),
        task=_text(headers.get("task")),
        task_id=task_id,
        cause=cause,
        error=error,
        queue=_text(death.get("queue")),
        retries=_number(headers.get("retries")),
        deliveries=_number(headers.get("x-delivery-count")),
        at=_seconds(death.get("time")),
        argsrepr=_text(headers.get("argsrepr")),
        kwargsrepr=_text(headers.get("kwargsrepr")),
        root_id=_text(headers.get("root_id")),
        size=len(raw),
    )


def _id_of(message: Any) -> str:
    """Return the id of a message that has none: each time the same, however often it is read."""
    body = message.body
    content = body if isinstance(body, str) else bytes(body or b"")
    headers = sorted(without_brokers_own(message.headers).items())
    try:
        said = repr((headers, content))
    except RecursionError:
        said = repr(content)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, said))


def _death(message: Any) -> Mapping[str, Any]:
    """Return what RabbitMQ says of how it dropped a message."""
    deaths = message.headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else None
    return first if isinstance(first, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _seconds(moment: Any) -> float:
    if not isinstance(moment, datetime):
        return 0.0
    # py-amqp has it in UTC, and does not say so.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
