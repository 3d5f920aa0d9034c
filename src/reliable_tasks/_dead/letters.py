"""What is kept of a task that has failed, made of its request and its error."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import Reject
from kombu.utils.json import dumps

from reliable_tasks._celery.channels import queue_of
from reliable_tasks._celery.headers import FIRST_FAILED
from reliable_tasks._dead.options import Options
from reliable_tasks._store.letters import Cause, DeadLetter, Letter
from reliable_tasks.errors import DuplicateTaskError, PoisonPill, RequeuesExhausted

__all__ = [
    "bare_letter",
    "cause_of",
    "letter_of_message",
    "letter_of_request",
    "raw_of",
    "raw_of_request",
]

logger = logging.getLogger("reliable_tasks")

#: So much of an error, and of its traceback, is kept (characters).
_LONGEST_ERROR, _LONGEST_TRACEBACK = 1_000, 20_000
#: What can hold what must not be read, and nothing is found by.
_READABLE = ("argsrepr", "kwargsrepr", "error", "traceback", "claim")
_OF_ERRORS: tuple[tuple[type[BaseException], Cause], ...] = (
    (PoisonPill, Cause.POISON),
    (RequeuesExhausted, Cause.REQUEUES),
    (TimeLimitExceeded, Cause.TIME_LIMIT),
    (WorkerLostError, Cause.LOST),
    (Reject, Cause.REJECTED),
)


def cause_of(error: BaseException, retries: int) -> Cause:
    """Say why a task will not run again that failed with an error."""
    for kind, cause in _OF_ERRORS:
        if isinstance(error, kind):
            return cause
    return Cause.RETRIES if retries else Cause.FAILED


def letter_of_request(
    request: Any, error: BaseException, traceback: str, options: Options, cause: Cause | None = None
) -> Letter | None:
    """Return the dead letter that a failed task becomes, or ``None`` if it becomes none.

    What the task calls expected (``throws``) is no failure, and who ends as a duplicate has another
    one that runs for it.
    """
    is_verdict = isinstance(error, (PoisonPill, RequeuesExhausted))
    if not is_verdict and isinstance(error, (DuplicateTaskError, *request.task.throws)):
        return None
    headers = request.request_dict
    retries = _number(headers.get("retries"))
    cause = cause or cause_of(error, retries)
    if cause not in options.causes:
        return None
    message = request.message
    crashes = _number(headers.get("crashes"))
    history = error.history if isinstance(error, PoisonPill) else ()
    first = headers.get(FIRST_FAILED) or (history[0]["at"] if history else None)
    if not isinstance(first, (int, float)):
        first = time.time()
    about = DeadLetter(
        id=str(request.id),
        task=request.name,
        task_id=str(request.id),
        cause=cause,
        error=_said(error),
        traceback=traceback,
        worker=request.hostname,
        queue=queue_of(request.app, message),
        priority=message.properties.get("priority"),
        retries=retries,
        crashes=max(crashes, getattr(error, "crashes", 0)),
        deliveries=_number(headers.get("x-delivery-count")),
        first_at=float(first),
        argsrepr=str(headers.get("argsrepr") or ""),
        kwargsrepr=str(headers.get("kwargsrepr") or ""),
        claim=_claim_of(headers),
        root_id=str(headers.get("root_id") or request.id),
        parent_id=_text(headers.get("parent_id")),
        group_id=_text(headers.get("group")),
        chord_id=_chord_of(request),
    )
    return Letter(_shown(about, options), raw_of_request(request), options.bounds)


def bare_letter(request: Any, error: BaseException, options: Options) -> Letter | None:
    """Return the dead letter of a failed task of which little more can be told than its message."""
    cause = cause_of(error, 0)
    if cause not in options.causes:
        return None
    about = DeadLetter(
        id=str(request.id),
        task=request.name,
        task_id=str(request.id),
        cause=cause,
        error=f"{type(error).__name__} (more could not be told: see the worker's log)",
        worker=request.hostname,
        queue=queue_of(request.app, request.message),
        first_at=time.time(),
        root_id=str(request.id),
        group_id=_text(request.request_dict.get("group")),
        chord_id=_chord_of(request),
    )
    return Letter(about, raw_of_request(request), options.bounds)


def letter_of_message(
    message: Any,
    error: BaseException | None,
    cause: Cause,
    options: Options,
    *,
    queue: str,
    worker: str,
    event: str,
    raw: bytes,
) -> Letter | None:
    """Return the dead letter of a message that is not a task's of this worker.

    Args:
        message: The message.
        error: What is wrong with it, if that was raised.
        cause: What is wrong with it.
        options: The app's.
        queue: The queue that it came by.
        worker: The worker's name.
        event: What tells it from others like it: its delivery.
        raw: The whole message, as kombu's Redis transport would write it.
    """
    if cause not in options.causes:
        return None
    headers = message.headers if isinstance(message.headers, Mapping) else {}
    task_id = str(headers.get("id") or "")
    about = DeadLetter(
        id=task_id or event,
        task=str(headers.get("task") or ""),
        task_id=task_id,
        cause=cause,
        error=_said(error) if error else "no task's message",
        worker=worker,
        queue=queue,
        priority=message.properties.get("priority"),
        retries=_number(headers.get("retries")),
        deliveries=_number(headers.get("x-delivery-count")),
        first_at=time.time(),
        argsrepr=str(headers.get("argsrepr") or ""),
        kwargsrepr=str(headers.get("kwargsrepr") or ""),
        claim=_claim_of(headers),
        root_id=str(headers.get("root_id") or task_id),
        parent_id=_text(headers.get("parent_id")),
        group_id=_text(headers.get("group")),
    )
    return Letter(_shown(about, options), raw, options.bounds)


def raw_of(
    message: Any,
    sent_to: Mapping[str, Any] | None = None,
    headers: Mapping[str, Any] | None = None,
) -> bytes:
    """Return a message of any broker as kombu's Redis transport would write it.

    Args:
        message: The message.
        sent_to: The exchange and the routing key, if not those that it came by.
        headers: Its headers, if not all of them.
    """
    info = message.delivery_info if sent_to is None else sent_to
    body = message.body
    if not isinstance(body, (str, bytes, bytearray, memoryview)):
        # Not of kombu's making, with a body that JSON has unpacked.
        body = "" if body is None else dumps(body)
    encoded = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body)
    properties = {
        name: value
        for name, value in message.properties.items()
        if name not in ("delivery_tag", "application_headers", "delivery_info")
    }
    properties["body_encoding"] = "base64"
    properties["delivery_info"] = {name: info.get(name) for name in ("exchange", "routing_key")}
    shown = _jsonable(message.headers if headers is None else headers)
    # Its body was unpacked when it came.
    shown.pop("compression", None)
    return dumps(
        {
            "body": base64.b64encode(encoded).decode(),
            "content-type": message.content_type,
            "content-encoding": message.content_encoding,
            "headers": shown,
            "properties": _jsonable(properties),
        }
    ).encode()


def raw_of_request(request: Any) -> bytes:
    """Return the message of a request, as it was fetched where that is known."""
    delivery = request._delivery  # noqa: SLF001 - of our own request
    return (delivery.raw if delivery is not None else b"") or raw_of(request.message)


def _jsonable(values: Any) -> dict[str, Any]:
    """Return what can be written as JSON of headers; producers of all kinds write them."""
    found = {}
    for name, value in (values if isinstance(values, Mapping) else {}).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            value = str(value)
        found[str(name)] = value
    return found


def _shown(about: DeadLetter, options: Options) -> DeadLetter:
    """Return what is known of a task as it may be read, and no longer than it may be."""
    # A secret that was cut in two before would not be found.
    redacted = _redacted(about, options)
    return replace(
        redacted,
        error=redacted.error[:_LONGEST_ERROR],
        traceback=redacted.traceback[-_LONGEST_TRACEBACK:],
    )


def _redacted(about: DeadLetter, options: Options) -> DeadLetter:
    if options.redact is None:
        return about
    try:
        redacted = options.redact(about)
        texts: dict[str, Any] = {name: getattr(redacted, name) for name in _READABLE}
        if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
            raise TypeError(f"{wrong[0]} is no text: {texts[wrong[0]]!r}")
        return replace(about, **texts)
    except Exception:
        # Rather nothing to read than what must not be read.
        logger.exception("reliable_dead_letter_redact failed for task %s", about.task_id)
        hidden: dict[str, Any] = dict.fromkeys(_READABLE, "(not redacted)")
        return replace(about, **{**hidden, "claim": ""})


def _claim_of(headers: Mapping[str, Any]) -> str:
    claim = headers.get("reliable_claim")
    return str(claim.get("key") or "") if isinstance(claim, Mapping) else ""


def _chord_of(request: Any) -> str | None:
    """Return the group of the chord that has counted a task's failure, if it is a part of one."""
    if request.chord:
        return _text(request.request_dict.get("group"))
    for step in request._context.chain or ():  # noqa: SLF001 - its public parts do not have it
        options = step.get("options") if isinstance(step, Mapping) else None
        if isinstance(options, Mapping) and options.get("chord"):
            return _text(options.get("group_id"))
    return None


def _said(error: BaseException) -> str:
    try:
        said = str(error)
    except Exception as another:  # noqa: BLE001 - of the user's own class
        said = f"(it cannot be shown: {type(another).__name__})"
    return f"{type(error).__name__}: {said}"


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
