"""How the message of a call was written, for one that is sent again."""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request
from kombu import serialization

__all__ = ["serializer_of", "written_as"]

_registry: Any = serialization.registry  # type: ignore[attr-defined]

#: What Celery leaves out when it makes a signature of a request; `ignore_result` until 5.7.
_LEFT_OUT = ("compression", "argsrepr", "kwargsrepr", "ignore_result")


def serializer_of(content_type: str) -> str | None:
    """Return the name of the serializer that writes such content, ``None`` if nobody has one."""
    found = _registry.type_to_name.get(content_type)
    return None if found is None else str(found)


def written_as(request: Request) -> dict[str, Any]:
    """Return the options of a call that Celery's ``signature_from_request`` leaves out.

    By another serializer its arguments would be others, or could not be sent; by another
    ``argsrepr`` those show that were to be hidden.
    """
    headers = request.request_dict
    options = {
        "serializer": serializer_of(request.message.content_type),
        **{name: headers.get(name) for name in _LEFT_OUT},
    }
    return {name: value for name, value in options.items() if value is not None}
