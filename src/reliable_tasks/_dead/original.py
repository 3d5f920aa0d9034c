"""The message of a dead letter, read again: what is called, and how."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery, signature
from celery.canvas import Signature
from kombu.exceptions import KombuError
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads

from reliable_tasks._celery.headers import without_brokers_own
from reliable_tasks._celery.written import serializer_of
from reliable_tasks.errors import ReplayRefused

__all__ = ["UNREADABLE", "Original", "text_of"]

#: What reading a message raises that is none; `RecursionError` where it is nested too deeply.
UNREADABLE = (KombuError, ValueError, TypeError, LookupError, AttributeError, RecursionError)

#: Headers that are made anew for each message, or are of one delivery.
_OF_ONE_MESSAGE = frozenset(
    (
        *("lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries"),
        *("timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin"),
        *("ignore_result", "replaced_task_nesting", "stamped_headers", "stamps"),
        *("redelivered", "crashes", "compression"),
    )
)
#: What other headers of that kind begin with.
_OURS = ("reliable_", "reliable-")


@dataclass(frozen=True, slots=True)
class Original:
    """A task's message.

    Attributes:
        id: Id of its dead letter.
        headers: Its headers.
        args: The task's positional arguments.
        kwargs: Its keyword arguments.
        embed: Callbacks, errbacks, the rest of its chain, and its chord.
        serializer: How it was written.
        priority: Its priority, or ``None``.
        exchange: The exchange that it was sent to.
        routing_key: Its routing key, or ``""`` if that is not known.
    """

    id: str
    headers: Mapping[str, Any]
    args: list[Any]
    kwargs: dict[str, Any]
    embed: Mapping[str, Any]
    serializer: str
    priority: int | None
    exchange: str = ""
    routing_key: str = ""

    @classmethod
    def read(cls, app: Celery, id_: str, raw: bytes) -> Original:
        """Read a message as it is kept.

        Raises:
            ReplayRefused: It cannot be read, or is not a task's.
        """
        if not raw:
            reason = "its message was too large to be kept (reliable_dead_letter_max_body)"
            raise ReplayRefused(id_, reason)
        try:
            found = loads(raw.decode())
            body = _body_of(found)
            properties = dict(found["properties"])
            headers = dict(found["headers"])
            message: Any = Message(
                body=body,
                content_type=found["content-type"],
                content_encoding=found["content-encoding"],
                headers=headers,
                properties=properties,
                accept=prepare_accept_content(app.conf.accept_content),
            )
            args, kwargs, embed = message.decode()
            sent_by = properties.get("delivery_info") or {}
            if not isinstance(headers["task"], str) or not isinstance(embed or {}, Mapping):
                raise TypeError(f"it names the task {headers['task']!r}")
            original = cls(
                id=id_,
                headers=headers,
                args=list(args),
                kwargs=dict(kwargs),
                embed=embed or {},
                serializer=serializer_of(found["content-type"]) or "json",
                priority=properties.get("priority"),
                exchange=str(sent_by.get("exchange") or ""),
                routing_key=str(sent_by.get("routing_key") or ""),
            )
            # Whoever wrote it may have put anything there.
            original.options(), original.place(), original.chord, original.index
        except UNREADABLE as error:
            raise ReplayRefused(id_, f"its message cannot be read: {error!r}") from error
        return original

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.headers["task"])

    @property
    def group_id(self) -> str | None:
        """The group that it is a part of."""
        found = self.headers.get("group")
        return None if found is None else str(found)

    @property
    def chord(self) -> dict[str, Any] | None:
        """The chord that waits for it, or for the last step of its chain."""
        found = self._in_chord.get("chord")
        return dict(found) if found else None

    @property
    def index(self) -> int:
        """Its place among the parts of that chord, or that of its chain."""
        return int(self._in_chord.get("group_index") or 0)

    @property
    def _in_chord(self) -> Mapping[str, Any]:
        """The options of what the chord waits for."""
        if self.embed.get("chord"):
            index = self.headers.get("group_index")
            return {"chord": self.embed["chord"], "group_index": index}
        steps = (step.get("options") or {} for step in self.embed.get("chain") or ())
        return next((options for options in steps if options.get("chord")), {})

    def options(self) -> dict[str, Any]:
        """Return how it was called: the options of ``apply_async``, but for what is reset."""
        hard, soft = (*(self.headers.get("timelimit") or ()), None, None)[:2]
        stamped = list(self.headers.get("stamped_headers") or ())
        stamps = self.headers.get("stamps") or {}
        options: dict[str, Any] = {
            "link": self._signatures("callbacks"),
            "link_error": self._signatures("errbacks"),
            "headers": {
                name: value
                for name, value in without_brokers_own(
                    self.headers, *_OF_ONE_MESSAGE, *stamped
                ).items()
                if not name.startswith(_OURS)
            },
            "serializer": self.serializer,
            "priority": self.priority,
            "compression": self.headers.get("compression"),
            "shadow": self.headers.get("shadow"),
            "argsrepr": self.headers.get("argsrepr"),
            "kwargsrepr": self.headers.get("kwargsrepr"),
            "time_limit": hard,
            "soft_time_limit": soft,
            "ignore_result": self.headers.get("ignore_result"),
            **({"stamped_headers": stamped} if stamped else {}),
            **{name: stamps.get(name) for name in stamped},
        }
        return {name: value for name, value in options.items() if value not in (None, [], {})}

    def place(self) -> dict[str, Any]:
        """Return where in a canvas it was called."""
        options: dict[str, Any] = {
            "root_id": self.headers.get("root_id"),
            "parent_id": self.headers.get("parent_id"),
            "group_id": self.headers.get("group"),
            "group_index": self.headers.get("group_index"),
            "chain": self.embed.get("chain"),
            "chord": self.embed.get("chord"),
        }
        return {name: value for name, value in options.items() if value is not None}

    def destination(self, app: Celery, came_by: str, asked_for: str | None) -> dict[str, Any]:
        """Return which way it is sent again: the queue, or the exchange and the routing key.

        Args:
            app: The app.
            came_by: The queue that it came by, or ``""`` if that is not known.
            asked_for: The queue that it is to go to instead.
        """
        if asked_for:
            return {"queue": asked_for}
        queues = app.amqp.queues
        if came_by and came_by in queues:
            return {"queue": came_by}
        if self.exchange:
            return {"exchange": self.exchange, "routing_key": self.routing_key}
        # Without an exchange it is the queue's name.
        makes_any = bool(app.conf.task_create_missing_queues)
        if self.routing_key and (makes_any or self.routing_key in queues):
            return {"queue": self.routing_key}
        return {}

    def signature(self, app: Celery) -> Signature[Any]:
        """Return what was called, to be called anew in a canvas."""
        made: Signature[Any] = app.signature(self.task, self.args, self.kwargs)
        made.set(immutable=True, **self.options())
        return made

    def _signatures(self, kind: str) -> list[Any]:
        return [signature(one) for one in self.embed.get(kind) or ()]


def _body_of(found: Mapping[str, Any]) -> Any:
    """Return a message's body as kombu reads it: who is not kombu may have written it as it is."""
    is_encoded = found["properties"].get("body_encoding") == "base64"
    return base64.b64decode(found["body"]) if is_encoded else found["body"]


def text_of(raw: bytes) -> str:
    """Return a message as people can read it, its body too where that is text."""
    try:
        found = json.loads(raw)
        body = _body_of(found)
        found["body"] = json.loads(body) if found["content-type"] == "application/json" else body
        return json.dumps(found, indent=2, default=repr)
    except UNREADABLE:
        return raw.decode("utf-8", "backslashreplace")
